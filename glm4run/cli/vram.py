"""`glm4run vram`: what fits, how far, how fast, and what to run. Starts without torch and reads headers only."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from glm4run.cli import vram_files, vram_plot, vram_text
from glm4run.cli.console import note, write_json, write_text
from glm4run.errors import DoesNotFitError, UsageError
from glm4run.memory import (
    GIB,
    MIB,
    PREFILL_CHUNK,
    Reserve,
    calibrated_cpu,
    gib_text,
    parse_reserve,
    parse_size,
)
from glm4run.memory.calibration import calibration_file
from glm4run.qformat import GROUP_SIZES
from glm4run.vram.answers import Question, cards_that_fit, longest_contexts, make_rows
from glm4run.vram.choices import BITS, Choice, Subject, default_bits, find_subject
from glm4run.vram.runtimes import RUNTIMES, Theirs, estimate
from glm4run.vram.targets import Target, resolve_target

DEFAULT_CONTEXTS = (1024, 63 * 1024, 131072)
DEFAULT_WIDTH = (80, 24)
T = TypeVar("T")
LARGEST_CARD = "192GB"  # what `--gpu all` plans on: every row is then about the cards, not about one device


def vram(
    model: Annotated[
        str | None, typer.Argument(help="A member of the family or a folder (its exact bytes); default: GLM-4-9B-Chat")
    ] = None,
    ctx: Annotated[str | None, typer.Option(help="Contexts in tokens, such as 1k,63k,128k")] = None,
    bits: Annotated[str | None, typer.Option(help="Bits of the weights, of 16,8,4,nf4")] = None,
    kv_bits: Annotated[str, typer.Option(help="Bits of the cache, of 16,8,4")] = "16",
    head_bits: Annotated[str, typer.Option(help="Bits of lm_head, of 16,8")] = "8",
    group_size: Annotated[int | None, typer.Option(help="32, 64 or 128; default: quantize's recipe")] = None,
    embed: Annotated[str, typer.Option(help="Where the embedding lies: gpu, or host (an estimate)")] = "gpu",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once; above 1 is an estimate")] = 1,
    chunk: Annotated[str, typer.Option(help="Tokens of a prompt fed at once")] = str(PREFILL_CHUNK),
    draft: Annotated[str | None, typer.Option(help="Speculation (an estimate): ngram, or a draft model")] = None,
    draft_tokens: Annotated[int, typer.Option(min=1, help="Tokens drafted at once, with --draft")] = 4,
    every_logits: Annotated[
        bool, typer.Option("--every-logits", help="Keep the logits of all positions, as LoadedModel.logits does")
    ] = False,
    gpu: Annotated[str, typer.Option(help="auto, cpu, all, a GPU's name, or a size such as 12GB")] = "auto",
    gpus: Annotated[int, typer.Option(min=1, help="Split over this many such GPUs (an estimate)")] = 1,
    split: Annotated[str, typer.Option(help="pp: whole layers to each GPU; tp: every layer cut")] = "pp",
    offload: Annotated[int, typer.Option(min=0, help="Layers kept in RAM (an estimate)")] = 0,
    context_mib: Annotated[int | None, typer.Option(min=0, help="CUDA context of the device in MiB, if known")] = None,
    reserve: Annotated[
        str, typer.Option(help="Memory to leave free: 3% of the device, or a size such as 500MiB")
    ] = "0",
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="First measure this machine's overheads, and keep them for later plans")
    ] = False,
    runtime: Annotated[str, typer.Option(help=f"Compare with: {', '.join(RUNTIMES[1:])}")] = RUNTIMES[0],
    max_ctx: Annotated[bool, typer.Option("--max-ctx", help="Only the longest context of each choice")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Every term of one plan, with its formula")] = False,
    plot: Annotated[bool, typer.Option("--plot", help="A chart of memory against context")] = False,
    svg: Annotated[Path | None, typer.Option(help="Write the chart as SVG (extra: plot)")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the chart as PNG (extra: plot)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values, a column for each term")] = False,
    as_md: Annotated[bool, typer.Option("--md", help="Print a Markdown table")] = False,
) -> int:
    """Say what fits in memory, the longest context, the speed to expect and what to run.

    With no options: GLM-4-9B-Chat on this machine's GPU (else its RAM). `--gpu 12GB` asks about a card you may buy.
    Exit code 2 says that nothing fits. What is marked * is estimated: this version does not run it yet.
    """
    _require_one_form(as_json, as_csv, as_md, max_ctx, explain, plot)
    subject = find_subject(model)
    template = Choice(
        "16",
        group_size=_one_of("--group-size", group_size, (None, *GROUP_SIZES)),
        embed_on_host=_one_of("--embed", embed, ("gpu", "host")) == "host",
        batch=batch,
        chunk=_tokens("--chunk", chunk),
        drafted_tokens=0 if draft is None else draft_tokens,
        every_logits=every_logits,
        gpus=gpus,
        split=_one_of("--split", split, ("pp", "tp")),
        offloaded_layers=offload,
    )
    if calibrate:
        _calibrate(gpu)
    question = Question(
        subject,
        resolve_target(LARGEST_CARD if gpu == "all" else gpu),
        _contexts(ctx, subject),
        _choices(template, subject, bits, kv_bits, head_bits),
        None if context_mib is None else context_mib * MIB,
        None if draft in (None, "ngram") else find_subject(draft),
        _reserve(reserve),
    )
    _require_gpu_options(question.target, template)
    for path, kind in ((svg, "svg"), (png, "png")):
        if path is not None:
            vram_plot.write_image(question, path, kind)
    theirs = _theirs(question, _one_of("--runtime", runtime, RUNTIMES))
    if as_json:
        write_json(vram_files.as_json(question, theirs=theirs, with_cards=gpu == "all"))
    elif as_csv or as_md:
        write_text(vram_files.as_csv(question) if as_csv else vram_files.as_markdown(question))
    else:
        _print(_lines(question, theirs, max_ctx=max_ctx, explain=explain, plot=plot, all_cards=gpu == "all"))
    return _verdict(question, theirs=theirs, max_ctx=max_ctx, all_cards=gpu == "all")


def _lines(
    question: Question, theirs: list[Theirs], *, max_ctx: bool, explain: bool, plot: bool, all_cards: bool
) -> Iterable[str]:
    width = shutil.get_terminal_size(DEFAULT_WIDTH).columns
    if theirs:
        return vram_text.theirs_table(question, theirs, width)
    if plot:
        return vram_plot.chart(question, width)
    if max_ctx:
        return vram_text.max_context_table(question, width)
    if all_cards:
        return vram_text.cards_table(question, width)
    if explain:
        rows = make_rows(question)
        fitting = [row for row in rows if row.fits]
        # The narrowest question is the clearest: one row where one was asked, else the largest that fits.
        row = max(fitting, key=lambda item: item.plan.context_len) if fitting else rows[-1]
        return vram_text.explain(question, row, width)
    return vram_text.screen(question, width)


def _print(lines: Iterable[str]) -> None:
    write_text("".join(f"{line.rstrip()}\n" for line in lines))


def _verdict(question: Question, *, theirs: list[Theirs], max_ctx: bool, all_cards: bool) -> int:
    """0, or an error where nothing of what was asked fits."""
    if theirs:
        return 0
    if all_cards:
        context_len = max(question.contexts)
        if any(cards_that_fit(question, choice, context_len, per_vendor=1) for choice in question.choices):
            return 0
        raise DoesNotFitError("no card of the catalogue holds this", hint="fewer bits, a shorter context, more GPUs")
    if max_ctx:
        if any(item.tokens for item in longest_contexts(question)):
            return 0
        raise DoesNotFitError(f"no context fits on {question.target.name}", hint="`glm4run vram` lists what helps")
    rows = make_rows(question)
    if any(row.fits for row in rows):
        return 0
    least = min(rows, key=lambda row: row.plan.peak_bytes)
    needed, free = least.plan.peak_bytes / GIB, question.free_bytes / GIB
    raise DoesNotFitError(
        f"needs {needed:.2f} GiB, {free:.2f} free on {question.target.name}: short {gib_text(-least.headroom_bytes)}",
        hint="what helps is listed above; `--gpu all` names cards that do",
    )


# --- options


def _contexts(text: str | None, subject: Subject) -> tuple[int, ...]:
    """`--ctx`, or the usual ones as far as the model goes."""
    limit = subject.context_limit
    if text is None:
        return tuple(dict.fromkeys(min(tokens, limit) for tokens in DEFAULT_CONTEXTS))
    contexts = tuple(dict.fromkeys(_tokens("--ctx", word) for word in text.split(",")))
    longest = max(contexts)
    if longest > limit:
        raise DoesNotFitError(
            f"a context of {longest} tokens was asked for, {subject.name} has {limit}", hint=f"use --ctx {limit}"
        )
    return contexts


def _choices(template: Choice, subject: Subject, bits: str | None, kv_bits: str, head_bits: str) -> tuple[Choice, ...]:
    """Every combination of the lists."""
    widths = default_bits(subject) if bits is None else _words("--bits", bits, BITS)
    caches = [int(word) for word in _words("--kv-bits", kv_bits, ("16", "8", "4"))]
    heads = [int(word) for word in _words("--head-bits", head_bits, ("16", "8"))]
    choices = []
    for width, cache, head in product(widths, caches, heads):
        kept = head if width in ("8", "4") else 8  # elsewhere the head is as it is
        choices.append(replace(template, bits=width, kv_bits=cache, head_bits=kept))
    return tuple(dict.fromkeys(choices))


def _theirs(question: Question, runtime: str) -> list[Theirs]:
    if runtime == RUNTIMES[0]:
        return []
    rows = []
    for choice, context_len in product(question.choices, question.contexts):
        if choice.bits not in ("16", "8", "4") or (runtime == "hf-remote" and choice.bits == "8"):
            continue
        rows.append(
            estimate(
                runtime,
                question.subject.config,
                context_len,
                bits=int(choice.bits),
                kv_bits=choice.kv_bits,
                device_bytes=question.target.total_bytes if question.target.device == "cuda" else None,
            )
        )
    if not rows:
        raise UsageError(f"nothing of this is modelled for {runtime}", hint="a member of the family at 16 or 4 bits")
    return rows


def _words(option: str, text: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    words = tuple(dict.fromkeys(word.strip().lower() for word in text.split(",")))
    for word in words:
        if word not in allowed:
            raise UsageError(f"{option} {word!r}", hint=f"one or more of {','.join(allowed)}")
    return words


def _one_of(option: str, value: T, allowed: tuple[T, ...]) -> T:
    if value not in allowed:
        raise UsageError(f"{option} {value!r}", hint=f"one of: {', '.join(str(item) for item in allowed if item)}")
    return value


def _tokens(option: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a size", hint="a number of tokens: 8192, 8k or 128k") from None


def _reserve(text: str) -> Reserve:
    try:
        return parse_reserve(text)
    except ValueError:
        raise UsageError(f"--reserve {text!r} is no amount of memory", hint="3%, 500MiB or 1GB") from None


def _calibrate(gpu: str) -> None:
    """Measures the device that `--gpu` means, and says where that is kept."""
    from glm4run.calibrate import calibrate

    if gpu not in ("auto", "cpu"):
        raise UsageError("--calibrate measures this machine, and --gpu names another device", hint="leave out --gpu")
    target = resolve_target(gpu)
    if not target.is_supported:
        raise UsageError(f"glm4run does not run on {target.name} yet", hint="--gpu cpu")
    on_cpu = target.device == "cpu"
    found = calibrate(calibrated_cpu() if on_cpu else target.name, target.device, note)
    what = (
        f"process {found.context_bytes / MIB:.0f} MiB and {found.later_bytes / MIB:.0f} later"
        if on_cpu
        else (f"device context {found.context_bytes / MIB:.0f} MiB, slack {(found.slack_bytes or 0) / MIB:.0f} MiB")
    )
    note(f"measured: {what}; kept in {calibration_file()}")


def _require_one_form(*forms: bool) -> None:
    if sum(forms) > 1:
        raise UsageError(
            "more than one of --json, --csv, --md, --max-ctx, --explain and --plot was asked for", hint="use one"
        )


def _require_gpu_options(target: Target, choice: Choice) -> None:
    if target.device == "cpu" and (choice.embed_on_host or choice.gpus > 1 or choice.offloaded_layers):
        raise UsageError(
            "--embed host, --gpus and --offload are about a GPU, and the plan is for this machine's RAM",
            hint="name one: --gpu 12GB",
        )
    if choice.gpus > 1 and choice.offloaded_layers:
        raise UsageError("--gpus and --offload together are not modelled", hint="use one of the two")
