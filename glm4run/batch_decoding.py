"""Several sequences decoded together: each weight is read once for all, and whoever ends makes room for the next.

Every sequence has its own cache, sampler and end. What it becomes does not depend on the others: the native library
gives a row the same bits whatever else is in the product. Prompts are read one at a time, chunk by chunk, between two
steps of the others; what a prompt has in common with one that was read before is copied from its cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from glm4run.answer import Answer
from glm4run.constraints import Constraint
from glm4run.errors import DoesNotFitError, GenerationError, UsageError
from glm4run.generate import LoadedModel
from glm4run.generation import OpenAnswer
from glm4run.loading import available_bytes
from glm4run.memory import GIB, MemoryPlan, Run, Term, plan_run
from glm4run.sampling import SamplingParams
from glm4run.steps import Context

MOST_TOGETHER = 32
# What `auto` takes at most: beyond it a step takes as much longer as it has more sequences (docs/performance.md).
ENOUGH_TOGETHER = 16
SHARED_BLOCK = 64  # tokens: requests that begin alike for so long are answered one after the other


@dataclass(frozen=True)
class Job:
    """What is to be answered: token ids, and how."""

    ids: list[int]
    params: SamplingParams
    chat: bool
    constraint: Constraint | None = None

    def most_tokens(self, context_len: int) -> int:
        """What its cache must hold at most."""
        if self.params.max_new_tokens is None:
            return context_len
        return min(context_len, len(self.ids) + self.params.max_new_tokens)


@dataclass(frozen=True)
class BatchPlan:
    """How many sequences are decoded together, what each cache holds, and the bytes of that."""

    sequences: int
    capacity: int
    run: Run
    plan: MemoryPlan


@dataclass
class _Lane:
    number: int  # of its job
    open: OpenAnswer
    answer: Answer
    cache: HeldContext


def choose_batch(model: LoadedModel, jobs: Sequence[Job], wanted: int | None) -> BatchPlan:
    """As many sequences as asked for, or as are worth it and fit the free memory (`wanted` None).

    Raises:
        UsageError: several were asked for of a model whose kernels do not promise equal results. DoesNotFitError: so
            many caches do not fit.
    """
    capacity = max((job.most_tokens(model.plan.context_len) for job in jobs), default=1)
    why = model.why_no_speculation  # the same promise: a row's bits do not depend on the other rows
    if wanted is not None and wanted > 1 and why is not None:
        raise UsageError(f"--batch {wanted} is not possible with this model: {why}", hint="leave it out")
    if wanted is not None and wanted > MOST_TOGETHER:
        raise UsageError(f"--batch is {wanted}", hint=f"auto, or 1 to {MOST_TOGETHER}")
    most = 1 if why is not None else ENOUGH_TOGETHER if wanted is None else wanted
    free = available_bytes(model.device)
    for sequences in range(max(1, min(most, len(jobs))), 0, -1):
        run, plan = _plan(model, sequences, capacity)
        needed = plan.bytes_of("kv_cache", "kv_of_others", "prefill_activations", "attention", "logits")
        if sequences == 1 or free is None or needed <= free:
            return BatchPlan(sequences, capacity, run, plan)
        if wanted is not None:
            raise DoesNotFitError(
                f"{sequences} sequences of {capacity} tokens need {needed / GIB:.2f} GiB beside the weights, "
                f"{free / GIB:.2f} GiB are free",
                hint="a smaller --batch, --max-tokens or --ctx",
            )
    raise AssertionError("one sequence is what the model was loaded for")


def _plan(model: LoadedModel, sequences: int, capacity: int) -> tuple[Run, MemoryPlan]:
    """The model's own plan with the caches of the other sequences, and a row of logits for each."""
    run = model.memory_run
    rows = max(run.logits_rows, sequences)

    def others(context_len: int) -> tuple[Term, ...]:
        one = plan_run(run, context_len).bytes_of("kv_cache")
        formula = f"keys and values of {sequences - 1} more sequences of {context_len} tokens"
        return (*run.extra_terms(context_len), Term("kv_of_others", (sequences - 1) * one, "exact", formula))

    together = dataclasses.replace(run, logits_rows=rows, extra_terms=others, chunk=model.plan.chunk)
    return together, plan_run(together, capacity)


def sharing_order(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The numbers of the prompts, those that begin alike side by side; nothing else leaves its place.

    Walks the tree of their beginnings, branches in the order in which they first come. Each prompt then shares most
    with the one before it, so that what it shares has never been given away.
    """
    first: dict[bytes, int] = {}
    keys = []
    for number, prompt in enumerate(prompts):
        begins, path = hashlib.sha256(), []
        for start in range(0, len(prompt) - SHARED_BLOCK + 1, SHARED_BLOCK):
            begins.update(array("I", prompt[start : start + SHARED_BLOCK]).tobytes())
            path.append(first.setdefault(begins.digest(), number))
        keys.append((*path, number))
    return sorted(range(len(prompts)), key=keys.__getitem__)


@dataclass(eq=False)
class HeldContext:
    """A context, and how many of its tokens are of a prompt that others may begin with."""

    context: Context
    prompt_tokens: int = 0


class SharedContexts:
    """The caches of a batch. Each keeps the prompt that it last held, so that the next one begins with what it shares.

    Only what was read as a prompt is shared, where chunks show in the last bits only whole chunks (`cut_unit` of the
    model), and of a long prompt not the last tokens (`read_together`): so an answer is the same to the bit as alone.
    """

    def __init__(self, model: LoadedModel, capacity: int | None = None) -> None:
        """`capacity` of each cache in tokens; None takes the model's context."""
        self.model, self.capacity = model, capacity
        self._idle: list[HeldContext] = []  # the last used at the end
        self._busy: list[HeldContext] = []

    def take(self, ids: Sequence[int]) -> tuple[HeldContext, int]:
        """A context for a prompt, and how many of its tokens are in there already."""
        unit, rest = self.model.cut_unit, self.model.read_together(len(ids))
        best, shared = None, 0
        for held in (*self._idle, *self._busy):
            count = min(held.context.shares(ids, unit, rest), held.prompt_tokens // unit * unit)
            if count > shared:
                best, shared = held, count
        if best is not None and best in self._idle:
            self._idle.remove(best)
            chosen = best
        else:
            chosen = self._idle.pop(0) if self._idle else HeldContext(self.model.new_context(self.capacity))
        chosen.context.begin_with(chosen.context if best is None else best.context, shared)
        chosen.prompt_tokens = len(ids)
        self._busy.append(chosen)
        return chosen, shared

    def give_back(self, held: HeldContext, *, is_sound: bool = True) -> None:
        """Its answer has ended; where not `is_sound`, nobody begins with it."""
        self._busy.remove(held)
        self._idle.append(held)
        if not is_sound:
            held.prompt_tokens = 0


def answer_together(model: LoadedModel, jobs: Sequence[Job], batch: BatchPlan) -> Iterator[tuple[int, Answer]]:
    """Yields (number of the job, its answer) as they end. A job that cannot be answered ends with `error`.

    Ctrl-C ends the iteration with KeyboardInterrupt; what was being answered is lost.
    """
    waiting = deque(enumerate(jobs))
    contexts = SharedContexts(model, batch.capacity)
    lanes: list[_Lane] = []
    while waiting or lanes:
        while waiting and len(lanes) < batch.sequences:
            number, job = waiting.popleft()
            lane = _open(model, number, job, contexts)
            if _proceed(lane, None):  # reads the prompt and chooses the first token
                lanes.append(lane)
            else:
                contexts.give_back(lane.cache, is_sound=lane.answer.error is None)
                yield number, lane.answer
        if not lanes:
            continue
        going = list[_Lane]()
        ended = list[_Lane]()
        for lane, logits in zip(lanes, model.decode_together([lane.open for lane in lanes]), strict=True):
            (going if _proceed(lane, logits) else ended).append(lane)
        lanes = going
        for lane in ended:
            contexts.give_back(lane.cache, is_sound=lane.answer.error is None)
        for lane in ended:
            yield lane.number, lane.answer


def _open(model: LoadedModel, number: int, job: Job, contexts: SharedContexts) -> _Lane:
    """An answer that begins."""
    held, shared = contexts.take(job.ids)
    answer = Answer(model.name, model.backend, model.load_s, prompt_tokens=len(job.ids), constraint=job.constraint)
    opened = model.open_answer(
        job.ids, job.params, chat=job.chat, context=held.context, timings=answer.timings, constraint=job.constraint
    )
    answer.timings.shared_tokens = shared
    return _Lane(number, opened, answer, held)


def _proceed(lane: _Lane, logits: Tensor | None) -> bool:
    """Gives an answer its logits; whether it goes on."""
    try:
        steps, goes_on = lane.open.proceed(logits)
    except GenerationError as error:
        lane.answer.fail(error)
        steps, goes_on = [], False
    for step in steps:
        lane.answer.add(step)
    if not goes_on and lane.answer.constraint is not None:
        lane.answer.problem = lane.answer.constraint.problem(lane.answer.text)
    return goes_on
