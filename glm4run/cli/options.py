"""Options that several commands share, spelled once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from glm4run.cli.console import byte_progress, note, talk
from glm4run.config import read_config
from glm4run.dialects import Dialect
from glm4run.errors import UsageError
from glm4run.kv_format import parse_kv_bits
from glm4run.memory import parse_bytes, parse_size
from glm4run.model_folders import (
    FoundModel,
    chat_dialect,
    describe_report,
    find_model,
    no_chat_template,
    read_provenance,
)
from glm4run.prompt_store import DEFAULT_BYTES
from glm4run.speculative import parse_speculate

if TYPE_CHECKING:
    from glm4run import kernels
    from glm4run.constraints import Constraint
    from glm4run.generate import LoadedModel
    from glm4run.steps import Timings

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Backend = Annotated[
    str,
    typer.Option(help="Kernels of packed linears: auto, native, triton, torch, reference, bitsandbytes or quanto"),
]
QuantizeOnLoad = Annotated[
    str | None,
    typer.Option(
        help="Pack an unpacked model while it is loaded: nf4, fp4 or int8 (bitsandbytes), qint8 or qint4 (quanto)"
    ),
]
Activations = Annotated[
    str, typer.Option(help="How activations meet packed weights: auto, int8 (fastest), int16 or bf16 (as they are)")
]
KVBits = Annotated[
    str, typer.Option(help="Bits of keys and values in the cache: 16, 8 or 4; keys and values apart as 8:4")
]
Mmap = Annotated[
    bool,
    typer.Option("--mmap", help="Leave packed weights in their files for good: less memory, decodes somewhat slower"),
]
Dtype = Annotated[str, typer.Option(help="What to compute in: auto, bf16, fp16 or fp32")]
Ctx = Annotated[str | None, typer.Option(help="Context in tokens, such as 8k; default: the largest that fits")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one per core")]
RopeTheta = Annotated[float | None, typer.Option(help="Override the RoPE base of the config")]
CheckPlan = Annotated[
    bool, typer.Option("--check-plan", help="At the end, compare the memory plan with the measured peak")
]
Yarn = Annotated[str, typer.Option(help="YaRN for the 0414 series beyond 32k: auto, on or off")]
MaxTokens = Annotated[int | None, typer.Option(help="Stop after this many tokens; default: when the context is full")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; default: what the model asks for")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability")]
TopK = Annotated[int | None, typer.Option(help="Keep this many tokens; 0 keeps all")]
MinP = Annotated[float | None, typer.Option(help="Keep tokens at least this likely relative to the likeliest")]
Penalty = Annotated[float | None, typer.Option("--repetition-penalty", help="Above 1 discourages tokens seen before")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text")]
Speculate = Annotated[
    str | None,
    typer.Option(
        help="Drafts from the context's own words, verified several at once, with the same text: auto (where they "
        "pay), off, or how many tokens to draft (1 to 7)"
    ),
]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End at this text; may be given several times")]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is loaded: what every command asks that loads one."""

    device: Device = "auto"
    backend: Backend = "auto"
    activations: Activations = "auto"
    quantize_on_load: QuantizeOnLoad = None
    dtype: Dtype = "auto"
    kv_bits: KVBits = "16"
    threads: Threads = None
    mmap: Mmap = False
    rope_theta: RopeTheta = None
    yarn: Yarn = "auto"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen and when to stop."""

    max_tokens: MaxTokens = None
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    min_p: MinP = None
    penalty: Penalty = None
    seed: Seed = None
    stop: Stop = None
    speculate: Speculate = None

    def given(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that the user set, by name."""
        fields = {
            "max_new_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.penalty,
            "seed": self.seed,
            "stop": tuple(self.stop) if self.stop else None,
            "speculate": None if self.speculate is None else parse_speculate(self.speculate),
        }
        return {key: value for key, value in fields.items() if value is not None}


JsonSchema = Annotated[
    str | None, typer.Option("--json-schema", help="Answer with JSON that fits this schema: a file, or JSON itself")
]
Regex = Annotated[str | None, typer.Option("--regex", help="Answer with text that this matches as a whole")]


PromptCache = Annotated[
    str | None,
    typer.Option(
        help="Keep long prompts on disk, so that nothing is read twice: off, or the most they may take "
        "(default: 8GiB, and a fifth of the free disk at most)"
    ),
]
PROMPT_CACHE_VARIABLE = "GLM4RUN_PROMPT_CACHE"  # the default of --prompt-cache


def prompt_cache_bytes(text: str | None) -> int | None:
    """What `--prompt-cache` (else `$GLM4RUN_PROMPT_CACHE`) allows; None where it is off."""
    option = "--prompt-cache" if text is not None else f"${PROMPT_CACHE_VARIABLE}"
    asked = text if text is not None else os.environ.get(PROMPT_CACHE_VARIABLE) or None
    if asked is None:
        return DEFAULT_BYTES
    if asked == "off":
        return None
    try:
        return parse_bytes(asked)
    except ValueError:
        raise UsageError(f"{option} {asked!r} is not a size", hint="off, or a size such as 8GiB") from None


def with_kept_prompts(loaded: LoadedModel, most_bytes: int | None) -> LoadedModel:
    """The model with its kept prompts; what is taken from them is said on stderr."""
    if most_bytes is None:
        return loaded
    import dataclasses

    from glm4run.prompt_cache import PromptCache as KeptPrompts

    kept = KeptPrompts(
        loaded,
        most_bytes=most_bytes,
        on_recall=lambda tokens, of: note(f"{tokens} of {of} prompt tokens came from the prompt cache"),
        on_problem=lambda line: talk(f"notice: {line}", style="yellow", only="notice:"),
    )
    return dataclasses.replace(loaded, kept_prompts=kept)


def parse_context(text: str | None, option: str = "--ctx") -> int | None:
    """The value of `--ctx`, or of another option that takes a number of tokens."""
    if text is None:
        return None
    try:
        return parse_size(text)
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a size", hint="a number of tokens: 8192, 8k or 128k") from None


def load(
    model: str | None, loading: Loading, *, ctx: str | None, needs_chat: bool = False
) -> tuple[FoundModel, LoadedModel]:
    """Finds and loads the model, and says on stderr what was taken.

    With `needs_chat` a model that cannot hold a conversation is refused before anything is loaded.
    """
    context_len = parse_context(ctx)
    kv_format = parse_kv_bits(loading.kv_bits)
    found = find_model(model)
    if needs_chat:
        require_chat(found)
    if found.why:
        note(f"model: {found.name} ({found.why}; {found.folder})")
    from glm4run import load_model

    with byte_progress(f"loading {found.name}") as progress:
        loaded = load_model(
            found.folder,
            device=loading.device,
            backend=loading.backend,
            activations=cast("kernels.Activations", loading.activations),
            quantize_on_load=loading.quantize_on_load,
            threads=loading.threads,
            mmap=loading.mmap,
            dtype=loading.dtype,
            context_len=context_len,
            rope_theta=loading.rope_theta,
            yarn=loading.yarn,
            kv_bits=kv_format,
            progress=progress,
        )
    _announce(found, loaded)
    return found, loaded


def require_chat(found: FoundModel) -> Dialect:
    """The chat dialect of a model folder. Raises CheckpointError for a base model, naming the chat variants."""
    dialect, _ = chat_dialect(found.folder, read_config(found.folder))
    if dialect is None:
        raise no_chat_template(found.name)
    return dialect


def _announce(found: FoundModel, loaded: LoadedModel) -> None:
    from rich.filesize import decimal

    dtype = str(loaded.model.dtype).removeprefix("torch.")
    kept = loaded.memory_run.kv_format
    cache = f" in a cache of {kept} bits" if kept.is_quantized else ""
    note(
        f"{found.name}: {decimal(loaded.plan.weight_bytes)} of weights, "
        f"backend {loaded.backend_detail} ({loaded.backend_reason}), "
        f"{dtype} on {loaded.device}, context {loaded.plan.context_len} tokens{cache}, loaded in {loaded.load_s:.1f} s"
    )
    quality = describe_report(read_provenance(found.folder))
    if quality is not None:
        note(f"{found.name}: {quality}")
    for notice in loaded.notices:
        talk(f"notice: {notice}", style="yellow", only="notice:")
    if found.is_demo:
        count = loaded.config.num_parameters / 1e6
        talk(
            f"This is the embedded demo model ({count:.1f} million parameters), not GLM-4-9B: it knows glm4run and "
            "little else.",
            style="yellow",
        )


def say_plan_check(loaded: LoadedModel, tokens_held: int) -> None:
    """`--check-plan`: the plan, the measured peak, and the error between them."""
    from glm4run.plan_check import check_plan

    loaded.settle()  # what it holds at its fullest
    note(check_plan(loaded.run_now, loaded.plan, loaded.device, tokens_held).describe())


def given_constraint(json_schema: str | None, regex: str | None) -> Constraint | None:
    """What answers must be. Raises UsageError for what cannot be honoured, before any model is loaded."""
    if json_schema is not None and regex is not None:
        raise UsageError("--json-schema and --regex were given", hint="use one of the two")
    from glm4run.constraints import Constraint, read_schema

    if regex is not None:
        return Constraint.from_regex(regex)
    return None if json_schema is None else Constraint.from_schema(read_schema(json_schema))


def require_speculation(loaded: LoadedModel, asked: str | None) -> None:
    """Says why there are no drafts where the user asked for a number of them. Raises UsageError for that."""
    why = loaded.why_no_speculation
    if asked is not None and asked not in ("off", "auto") and why is not None:
        raise UsageError(f"--speculate {asked} is not possible with this model: {why}", hint="leave it out")
    if asked == "auto" and why is not None:
        note(f"no drafts: {why}")


def describe_drafts(timings: Timings) -> str:
    """What speculation did, for a status line; nothing where it did nothing."""
    if not timings.drafted_tokens:
        return ""
    return f", {timings.accepted_tokens} of {timings.drafted_tokens} drafted tokens came"
