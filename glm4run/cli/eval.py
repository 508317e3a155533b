"""`glm4run eval`: how well does this model predict a text, and how far is it from the model it was made of?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glm4run.cli import options
from glm4run.cli.console import note, token_progress, write_json, write_text
from glm4run.cli.groups import with_groups
from glm4run.errors import UsageError
from glm4run.text_windows import DEFAULT_CONTEXT, Cut, read_text

if TYPE_CHECKING:
    from glm4run.evaluation import Evaluation
    from glm4run.fidelity import Divergence, Measured
    from glm4run.generate import LoadedModel
    from glm4run.reference_logits import SavedReference


@with_groups
def eval(
    *,
    model: Annotated[
        str | None, typer.Argument(help="Folder or name; default: the newest packed model, else the demo")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="The text, a file in UTF-8; with --needle the haystack, built in by default")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="The model to compare with: a folder or a name")] = None,
    reference_logits: Annotated[
        Path | None, typer.Option(help="Compare with logits that --save-logits wrote, without loading that model")
    ] = None,
    save_logits: Annotated[
        Path | None, typer.Option(help="Write this model's distributions, 2 bytes for each token of the vocabulary")
    ] = None,
    ctx: Annotated[
        str | None,
        typer.Option(
            help=f"Tokens of a window, prefix included; default: {DEFAULT_CONTEXT}. With --needle the context"
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1, help="Advance windows by so many tokens and score the new ones; default: side by side, second halves"
        ),
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="At most so many windows, from the start")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="At most so many tokens of the text")] = None,
    needle: Annotated[
        bool, typer.Option("--needle", help="Find a needle in a haystack instead: a grid of lengths and depths")
    ] = False,
    lengths: Annotated[
        str | None, typer.Option(help="With --needle: tokens, such as 1k,4k,16k; default: what fits the context")
    ] = None,
    depths: Annotated[
        str | None, typer.Option(help="With --needle: percent of the haystack before it; default: 0,25,50,75,100")
    ] = None,
    needles: Annotated[int | None, typer.Option(min=1, help="With --needle: so many for each cell; default: 3")] = None,
    seed: Annotated[int | None, typer.Option(help="With --needle: of the codes; default: 0")] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="With --needle: answer (the default; has it the code?) or logprob (are its tokens likeliest?)"
        ),
    ] = None,
    loading: options.Loading,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document")] = False,
) -> None:
    """Perplexity over a text; with a reference also KL divergence and how often the likeliest token is the same."""
    if needle:
        _refuse("--needle", reference, reference_logits, save_logits, stride, windows, max_tokens)
        _search(model, text, ctx, lengths, depths, needles, seed, score, as_json=as_json, loading=loading)
        return
    _refuse("an evaluation without --needle", lengths, depths, needles, seed, score)
    if text is None:
        raise UsageError("no --text to evaluate on", hint="--text FILE, or --needle")
    ctx = ctx or str(DEFAULT_CONTEXT)
    context = options.parse_context(ctx)
    assert context is not None
    if reference is not None and reference_logits is not None:
        raise UsageError("--reference and --reference-logits are two references", hint="give one of them")
    cut = Cut(context, stride, windows, max_tokens)
    content = read_text(text)
    saved = _open_saved(reference_logits)
    _, loaded = options.load(model, loading, ctx=ctx)
    against: LoadedModel | SavedReference | None = saved
    if reference is not None:
        # Its weights and its cache are taken as they are, so that a model can be its own reference.
        plain = dataclasses.replace(loading, backend="auto", activations="auto", quantize_on_load=None, kv_bits="16")
        _, against = options.load(reference, plain, ctx=ctx)
    from glm4run import evaluation

    with token_progress("evaluating", "windows") as progress:
        result = evaluation.evaluate(
            loaded, content, cut, reference=against, save_logits=save_logits, progress=progress
        )
    if save_logits is not None:
        note(f"logits saved: {save_logits}")
    facts = {
        "model": loaded.name,
        "backend": loaded.backend_detail,
        "bits_per_weight": round(evaluation.bits_per_weight(loaded), 4),
        "reference": _reference_name(against),
        "kv_bits": str(loaded.memory_run.kv_format),
    }
    if as_json:
        write_json(_as_json(result, facts))
    else:
        _print(result, facts)


def _refuse(what: str, *given: Any) -> None:
    if any(value is not None for value in given):
        raise UsageError(f"an option was given that {what} does not have", hint="`glm4run eval --help` lists them")


def _search(
    model: str | None,
    text: Path | None,
    ctx: str | None,
    lengths: str | None,
    depths: str | None,
    count: int | None,
    seed: int | None,
    score: str | None,
    *,
    as_json: bool,
    loading: options.Loading,
) -> None:
    from glm4run.cli.needle import haystack, run
    from glm4run.needle import DEFAULT_DEPTHS, DEFAULT_NEEDLES, needles, require_score

    # What is wrong is said before a model is loaded.
    sizes = (
        tuple(options.parse_context(word.strip(), "--lengths") or 0 for word in lengths.split(",")) if lengths else ()
    )
    try:
        percent = tuple(int(word) for word in depths.split(",")) if depths else DEFAULT_DEPTHS
    except ValueError:
        raise UsageError(f"--depths {depths!r} are no numbers", hint="percent, such as 0,50,100") from None
    chosen, content = require_score(score or "answer"), haystack(text)
    needles(count or DEFAULT_NEEDLES, 0)
    _, loaded = options.load(model, loading, ctx=ctx or (str(max(sizes)) if sizes else None))
    run(
        loaded,
        content,
        lengths=sizes,
        depths=percent,
        count=count or DEFAULT_NEEDLES,
        seed=seed or 0,
        score=chosen,
        as_json=as_json,
    )


def _open_saved(path: Path | None) -> SavedReference | None:
    if path is None:
        return None
    from glm4run.reference_logits import SavedReference

    return SavedReference(path)


def _reference_name(reference: LoadedModel | SavedReference | None) -> str | None:
    if reference is None:
        return None
    from glm4run.reference_logits import SavedReference

    return reference.provenance.model if isinstance(reference, SavedReference) else reference.name


def _as_json(result: Evaluation, facts: dict[str, Any]) -> dict[str, Any]:
    """The contract's keys first."""
    divergence = result.summary.divergence
    return {
        "tokens": result.summary.tokens,
        "perplexity": result.summary.perplexity.value,
        "reference_perplexity": None if divergence is None else divergence.reference_perplexity.value,
        "kld_mean": None if divergence is None else divergence.kl_mean.value,
        "kld_p99": None if divergence is None else divergence.kl_p99,
        "same_top1": None if divergence is None else divergence.same_top1.value,
        "context": result.cut.context,
        "stride": result.cut.stride or result.cut.context - result.prefix_tokens,
        "scored": "second half" if result.cut.stride is None else "new tokens",
        "windows": result.windows,
        "prefix_tokens": result.prefix_tokens,
        "text": {"name": result.text.name, "sha256": result.text.sha256},
        "perplexity_error": result.summary.perplexity.error,
        "divergence": None if divergence is None else _divergence_json(divergence),
        **facts,
    }


def _divergence_json(divergence: Divergence) -> dict[str, Any]:
    """What the contract's keys leave out."""
    return {
        "kld_mean_error": divergence.kl_mean.error,
        "kld_median": divergence.kl_median,
        "kld_max": divergence.kl_max,
        "same_top1_error": divergence.same_top1.error,
        "reference_perplexity_error": divergence.reference_perplexity.error,
        "perplexity_ratio": divergence.perplexity_ratio.value,
        "perplexity_ratio_error": divergence.perplexity_ratio.error,
        "by_position": [
            {"first": bucket.first, "last": bucket.last, "tokens": bucket.tokens, "kld_mean": bucket.kl_mean}
            for bucket in divergence.by_position
        ],
    }


def _print(result: Evaluation, facts: dict[str, Any]) -> None:
    divergence = result.summary.divergence
    scored = "second halves" if result.cut.stride is None else f"stride {result.cut.stride}"
    lines = {
        "text": f"{result.text.name}, {result.summary.tokens:,} tokens scored: {result.windows} windows of "
        f"{result.cut.context}, {scored}",
        "model": f"{facts['model']}, {facts['bits_per_weight']:.2f} bits per weight, backend {facts['backend']}, "
        f"cache of {facts['kv_bits']} bits",
        "perplexity": _plain(result.summary.perplexity),
    }
    if divergence is not None:
        ratio, same = divergence.perplexity_ratio, divergence.same_top1
        lines |= {
            "reference": facts["reference"],
            "reference perplexity": _plain(divergence.reference_perplexity),
            "change of perplexity": f"{ratio.value - 1:+.3%} ± {ratio.error:.3%}",
            "KL divergence": f"{_plain(divergence.kl_mean)} mean, {divergence.kl_median:.4g} median, "
            f"{divergence.kl_p99:.4g} p99, {divergence.kl_max:.4g} max",
            "same top-1": f"{same.value:.2%} ± {same.error:.2%}",
            "KL by position": ", ".join(
                f"{bucket.first}-{bucket.last - 1}: {bucket.kl_mean:.4g}" for bucket in divergence.by_position
            ),
        }
    for name, value in lines.items():
        write_text(f"{name:<22} {value}\n")


def _plain(measured: Measured) -> str:
    return f"{measured.value:.5g} ± {measured.error:.2g}"
