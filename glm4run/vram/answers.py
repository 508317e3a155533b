"""The answers about one model on one device: the grid, the longest contexts, the remedies, the cards that would do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

from glm4run.memory import GIB, HEADROOM_BYTES, MemoryPlan, Reserve, Run, largest_context, plan_run, tokenizer_bytes
from glm4run.vram.choices import Choice, Subject, make_run
from glm4run.vram.gpus import Gpu, load_gpus
from glm4run.vram.speed import Speed, cpu_speed, estimate_speed, span_of
from glm4run.vram.targets import Target, of_gpu

TIGHT_SHARE = 0.03  # of the device: with less to spare a plan that fits is called tight
CARDS_PER_VENDOR = 3
USEFUL_CONTEXT = 32768  # the widest weights with at least this context are recommended, else the longest context
KINDS_TO_BUY = ("desktop", "workstation", "datacenter", "unified", "apu")


@dataclass(frozen=True)
class Question:
    """A model, a device, contexts in tokens, the choices to compare. `context_bytes` overrides the CUDA context's.

    `reserve` is left free of the device; `free_bytes` is what a run may then take, below zero where that is more than
    there is.
    """

    subject: Subject
    target: Target
    contexts: tuple[int, ...]
    choices: tuple[Choice, ...]
    context_bytes: int | None = None
    draft: Subject | None = None
    reserve: Reserve = field(default_factory=Reserve)
    _runs: dict[object, Run] = field(default_factory=dict, init=False, compare=False, repr=False)
    _plans: dict[tuple[Choice, int], MemoryPlan] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def free_bytes(self) -> int:
        """What a run may take of the device."""
        return self.target.free_bytes - self.reserve.of(self.target.total_bytes)

    def run(self, choice: Choice, target: Target | None = None) -> Run:
        """What a choice means on the device, or on another one."""
        device = target or self.target
        config = self.subject.config
        packed = choice.bits not in ("16", "nf4")
        dtype = device.dtype(packed=packed, dense_bytes=4 * config.num_parameters + HEADROOM_BYTES)
        tokenizer = tokenizer_bytes(self.subject.folder, config.vocab_size)
        overhead = device.overhead(tokenizer, self.context_bytes)
        key = (choice, device.device, dtype, overhead)
        if key not in self._runs:
            self._runs[key] = make_run(
                self.subject,
                choice,
                overhead,
                device=device.device,
                dtype=dtype,
                backend=device.backend(),
                draft=self.draft,
            )
        return self._runs[key]

    def plan(self, choice: Choice, context_len: int) -> MemoryPlan:
        """The plan of a choice at a context."""
        key = (choice, context_len)
        if key not in self._plans:
            self._plans[key] = plan_run(self.run(choice), context_len)
        return self._plans[key]


@dataclass(frozen=True)
class Row:
    """One choice at one context. `headroom_bytes` is negative by what is short."""

    choice: Choice
    plan: MemoryPlan
    headroom_bytes: int
    is_tight: bool
    speed: Speed | None

    @property
    def fits(self) -> bool:
        return self.headroom_bytes >= 0


@dataclass(frozen=True)
class Longest:
    """The longest context of a choice; `reason` says what bounds it: the model or the memory."""

    choice: Choice
    tokens: int
    reason: str


@dataclass(frozen=True)
class Remedy:
    """A step of the ladder, on top of those before it. `runs_now`: this version of glm4run does it."""

    what: str
    plan_bytes: int
    saved_bytes: int
    fits: bool
    runs_now: bool
    option: str


@dataclass(frozen=True)
class Card:
    """A card of the catalogue that runs a choice at a context."""

    choice: Choice
    gpu: Gpu
    peak_bytes: int
    longest_tokens: int
    speed: Speed | None

    @property
    def used_share(self) -> float:
        return self.peak_bytes / self.gpu.usable_bytes


def make_rows(question: Question) -> list[Row]:
    """Every choice at every context."""
    return [make_row(question, choice, context_len) for choice in question.choices for context_len in question.contexts]


def make_row(question: Question, choice: Choice, context_len: int) -> Row:
    """One choice at one context."""
    plan = question.plan(choice, context_len)
    headroom = question.free_bytes - plan.peak_bytes
    is_tight = 0 <= headroom < TIGHT_SHARE * question.target.total_bytes
    target = question.target
    speed = _speed(question, choice, plan, target.gpu)
    if speed is None and target.similar:
        speed = span_of([_speed(question, choice, plan, gpu) for gpu in target.similar])
    bandwidth = None if target.calibration is None else target.calibration.read_gb_per_s
    if bandwidth is not None and choice.bits not in ("16", "nf4") and target.backend() == "native":
        speed = cpu_speed(bandwidth, _read_bytes(plan), batch=choice.batch)
    return Row(choice, plan, headroom, is_tight, speed)


def longest_contexts(question: Question) -> list[Longest]:
    """The longest context of every choice, up to the model's own."""
    return [longest_context(question, choice) for choice in question.choices]


def longest_context(question: Question, choice: Choice, *, reserve_bytes: int = 0) -> Longest:
    """The longest context of one choice that leaves `reserve_bytes` free."""
    limit = question.subject.context_limit
    tokens = largest_context(question.run(choice), question.free_bytes - reserve_bytes, limit)
    return Longest(choice, tokens, "model" if tokens == limit else "memory")


def recommend(question: Question) -> Longest | None:
    """What to run on the device: of what this version executes, the widest weights with a useful context.

    A little is left free, and the context is rounded down to a whole k.
    """
    total = question.target.total_bytes
    reserve = max(0, int(TIGHT_SHARE * total) - question.reserve.of(total))  # beyond what is kept free already
    able = []
    for choice in question.choices:
        if not choice.estimated:
            found = longest_context(question, choice, reserve_bytes=reserve)
            tokens = found.tokens // 1024 * 1024 or found.tokens
            able.append(dataclasses.replace(found, tokens=tokens))
    able = [item for item in able if item.tokens]
    wide = [item for item in able if item.tokens >= min(USEFUL_CONTEXT, question.subject.context_limit)]
    return wide[0] if wide else max(able, key=lambda item: item.tokens, default=None)


def ladder(question: Question, choice: Choice, context_len: int) -> list[Remedy]:
    """What would make a choice fit, in the order of the least loss, each step on top of those before."""
    steps = []
    current, before = choice, question.plan(choice, context_len).peak_bytes
    for what, option, step in _steps(choice, question):
        after = question.plan(step, context_len).peak_bytes
        if after < before:
            runs_now = set(step.estimated) <= set(current.estimated)
            fits = after <= question.free_bytes
            steps.append(Remedy(what, after, before - after, fits, runs_now, option))
            before = after
        current = step
    return steps


def _steps(choice: Choice, question: Question) -> Iterator[tuple[str, str, Choice]]:
    """Speed goes first, then precision where it hurts least: cache, head, weights."""
    current = choice
    changes: list[tuple[str, str, dict[str, object]]] = [
        ("chunks of 128 tokens", "--chunk 128", {"chunk": min(128, choice.chunk)})
    ]
    if question.target.device == "cuda":
        changes.append(("the embedding in RAM", "--embed host", {"embed_on_host": True}))
    changes.append(("a cache of 8 bits", "--kv-bits 8", {"kv_bits": min(8, choice.kv_bits)}))
    if choice.bits in ("8", "4"):
        changes.append(("a head of 8 bits", "--head-bits 8", {"head_bits": 8}))
    changes.append(("a cache of 4 bits", "--kv-bits 4", {"kv_bits": 4}))
    for bits in {"16": ("8", "4"), "8": ("4",)}.get(choice.bits, ()):
        changes.append((f"weights of {bits} bits", f"--bits {bits}", {"bits": bits}))
    for what, option, change in changes:
        current = dataclasses.replace(current, **change)  # type: ignore[arg-type]  # fields of Choice, by name
        yield what, option, current


def layers_to_offload(question: Question, choice: Choice, context_len: int) -> int | None:
    """How many layers must go to RAM for a choice to fit; None where even all but one are not enough."""
    for layers in range(1, question.subject.config.num_hidden_layers):
        moved = dataclasses.replace(choice, offloaded_layers=layers)
        if question.plan(moved, context_len).peak_bytes <= question.free_bytes:
            return layers
    return None


def gpus_to_split_over(question: Question, choice: Choice, context_len: int) -> int | None:
    """How many devices like this one hold a choice as a pipeline; None beyond eight."""
    for count in (2, 4, 8):
        split = dataclasses.replace(choice, gpus=count, split="pp")
        if question.plan(split, context_len).peak_bytes <= question.free_bytes:
            return count
    return None


def cards_that_fit(question: Question, choice: Choice, context_len: int, *, per_vendor: int) -> list[Card]:
    """The smallest cards of every vendor that run a choice with more than a tight headroom, smallest first."""
    cards: list[Card] = []
    for vendor in dict.fromkeys(gpu.vendor for gpu in load_gpus()):
        fitting = []
        for gpu in load_gpus():
            if gpu.vendor == vendor and gpu.kind in KINDS_TO_BUY:
                target = of_gpu(gpu)
                peak = plan_run(question.run(choice, target), context_len).peak_bytes
                spare = max(TIGHT_SHARE * gpu.total_bytes, question.reserve.of(gpu.total_bytes))
                if peak <= gpu.usable_bytes - spare:
                    fitting.append((gpu, peak))
        fitting.sort(key=lambda item: (item[0].total_bytes, -item[0].bandwidth_gb_per_s))
        cards += [_card(question, choice, context_len, gpu, peak) for gpu, peak in _by_size(fitting)[:per_vendor]]
    return cards


def _by_size(fitting: list[tuple[Gpu, int]]) -> list[tuple[Gpu, int]]:
    """One card of each size, the fastest, so that a list of three shows three sizes."""
    sizes: dict[int, tuple[Gpu, int]] = {}
    for gpu, peak in fitting:
        sizes.setdefault(round(gpu.total_bytes / GIB), (gpu, peak))
    return list(sizes.values())


def _card(question: Question, choice: Choice, context_len: int, gpu: Gpu, peak: int) -> Card:
    run = question.run(choice, of_gpu(gpu))
    free = gpu.usable_bytes - question.reserve.of(gpu.total_bytes)
    longest = largest_context(run, free, question.subject.context_limit)
    return Card(choice, gpu, peak, longest, _speed(question, choice, plan_run(run, context_len), gpu))


def _read_bytes(plan: MemoryPlan) -> int:
    """What a token reads at the end of the context."""
    return plan.bytes_of("linears", "scales", "head", "norms_and_biases", "kv_cache")


def _speed(question: Question, choice: Choice, plan: MemoryPlan, gpu: Gpu | None) -> Speed | None:
    bits = {"16": 16, "8": 8, "4": 4, "nf4": 4}.get(choice.bits)
    if bits is None:  # a packed folder: as its linears are
        bits = min((scheme.bits for scheme in question.subject.schemes.values()), default=16)
    config = question.subject.config
    return estimate_speed(gpu, bits, _read_bytes(plan), config, plan.context_len, batch=choice.batch)
