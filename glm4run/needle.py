"""A needle in a haystack: does the model find one sentence, wherever it stands in a text of any length?

A grid of lengths and depths, several needles a cell. Two scores: whether the greedy answer has the needle's code, and
how likely the code's own tokens are where they belong, which also small models can show. Prompts are read in the order
in which each begins with what the one before it has read, so that a haystack is computed once and not once a depth.
"""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from glm4run.chat_format import Message
from glm4run.errors import DoesNotFitError, UsageError
from glm4run.generate import LoadedModel
from glm4run.sampling import SamplingParams
from glm4run.steps import Context, Timings
from glm4run.text_windows import Text
from glm4run.tokenizer import Tokenizer

Score = Literal["answer", "logprob"]
SCORES: tuple[Score, ...] = ("answer", "logprob")
DEFAULT_DEPTHS = (0, 25, 50, 75, 100)  # percent of the haystack before the needle
DEFAULT_NEEDLES = 3
MOST_LENGTHS, SHORTEST = 5, 256  # of the lengths taken where none are given
ANSWER_ROOM = 40  # tokens of a length that are left for the answer
ANSWER_TOKENS = 24  # that a greedy answer may have
RETRIEVES = 0.5  # the share without a haystack below which a grid says nothing
SUBJECTS = ("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Riga", "Quito", "Bern", "Accra", "Hanoi", "Turin", "Perth")
INTRODUCTION = "Read the text. A question about it follows.\n\n"
Progress = Callable[[int, int], None]  # prompts done, prompts in all


@dataclass(frozen=True)
class Needle:
    """One fact that nobody can know, and how it is asked for."""

    subject: str
    code: str

    @property
    def lead(self) -> str:
        """What stands before the code, in the needle and in an answer."""
        return f"The secret code of {self.subject} is"

    @property
    def sentence(self) -> str:
        """What is hidden."""
        return f"{self.lead} {self.code}."

    @property
    def question(self) -> str:
        """What is asked of a chat model."""
        return f"What is the secret code of {self.subject}? Answer with the code alone."


@dataclass(frozen=True)
class Found:
    """What one prompt gave."""

    prompt_tokens: int
    is_found: bool  # the greedy answer has the code
    ranks: tuple[int, ...]  # of the code's tokens among all tokens, 0 the likeliest, each after the right ones before
    logprob: float  # mean of the code's tokens

    @property
    def top1(self) -> float:
        """The share of the code's tokens that are the likeliest."""
        return sum(rank == 0 for rank in self.ranks) / len(self.ranks)


@dataclass(frozen=True)
class Cell:
    """All needles of one length and depth."""

    length: int
    depth: int
    found: tuple[Found, ...]

    def share(self, score: Score) -> float:
        """From 0 to 1: of answers with the code, or of the codes' tokens that are the likeliest."""
        return share(self.found, score)

    def as_json(self) -> dict[str, Any]:
        """The keys of `eval --needle --json`."""
        return {"length": self.length, "depth": self.depth, **summarize(self.found)}


@dataclass(frozen=True)
class Grid:
    """What was asked and what came of it."""

    lengths: tuple[int, ...]
    depths: tuple[int, ...]
    cells: tuple[Cell, ...]
    bare: tuple[Found, ...]  # the needle and the question, no haystack
    absent: tuple[Found, ...]  # the shortest haystack without the needle: what a guess is worth
    prompt_tokens: int
    computed_tokens: int
    haystack_tokens: int  # of the text once
    repeats: bool  # the text is shorter than the longest length

    def retrieves(self, score: Score) -> bool:
        """Whether the model can do the task at all."""
        return share(self.bare, score) >= RETRIEVES


def share(found: Sequence[Found], score: Score) -> float:
    """See `Cell.share`."""
    return statistics.fmean(item.is_found if score == "answer" else item.top1 for item in found)


def summarize(found: Sequence[Found]) -> dict[str, Any]:
    """Counts and means of several needles."""
    return {
        "prompt_tokens": max(item.prompt_tokens for item in found),
        "needles": len(found),
        "found": sum(item.is_found for item in found),
        "top1": round(share(found, "logprob"), 4),
        "logprob": round(statistics.fmean(item.logprob for item in found), 4),
        "worst_rank": max(max(item.ranks) for item in found),
    }


def default_lengths(context_len: int) -> tuple[int, ...]:
    """Powers of two that fit, the largest ones; what fits itself where it is smaller than the smallest."""
    lengths = [1 << n for n in range(8, 21) if SHORTEST <= 1 << n <= context_len]
    return tuple(lengths[-MOST_LENGTHS:]) or (context_len,)


def needles(count: int, seed: int) -> tuple[Needle, ...]:
    """`count` facts, the same for the same seed. Raises UsageError for more than there are subjects."""
    if not 0 < count <= len(SUBJECTS):
        raise UsageError(f"{count} needles were asked for", hint=f"1 to {len(SUBJECTS)}")
    chance = random.Random(seed)
    return tuple(Needle(name, str(chance.randrange(10000, 100000))) for name in chance.sample(SUBJECTS, count))


@dataclass(frozen=True)
class _Task:
    length: int
    depth: int
    needle: Needle
    before: int  # tokens of haystack before the needle
    ids: list[int]


@torch.inference_mode()
def search(
    model: LoadedModel,
    text: Text,
    *,
    lengths: Sequence[int] = (),
    depths: Sequence[int] = DEFAULT_DEPTHS,
    count: int = DEFAULT_NEEDLES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Grid:
    """Hides and asks for needles in `text`, which is repeated where it is too short.

    `lengths` are tokens of prompt and answer together; none means what fits the model's context. A chat model is asked
    in its dialect; a base model continues the needle's beginning.

    Raises:
        UsageError: sizes that make no sense. DoesNotFitError: a length beyond the context. Before any computation.
    """
    limit = model.plan.context_len
    lengths = tuple(sorted(set(lengths))) or default_lengths(limit)
    depths = tuple(sorted(set(depths)))
    if not depths or depths[0] < 0 or depths[-1] > 100:
        raise UsageError(f"depths are {list(depths)}", hint="percent of the haystack, such as 0,50,100")
    if lengths[-1] > limit:
        raise DoesNotFitError(
            f"a length of {lengths[-1]} tokens does not fit the context of {limit}", hint="use shorter --lengths"
        )
    hidden = needles(count, seed)
    hay = _Haystack(model.tokenizer, text, lengths[-1])
    prompts = _Prompts(model, hay)
    tasks = [prompts.task(length, depth, needle) for length in lengths for depth in depths for needle in hidden]
    # Each begins with all of the haystack that the next one begins with.
    tasks.sort(key=lambda task: (-task.before, -task.length, task.needle.subject))
    asker = _Asker(model)
    total, done = len(tasks) + 2 * count, 0

    def ask(ids: list[int], needle: Needle) -> Found:
        nonlocal done
        found = asker.ask(ids, needle)
        done += 1
        if progress is not None:
            progress(done, total)
        return found

    absent = [ask(prompts.absent(lengths[0], needle), needle) for needle in hidden]
    results: dict[tuple[int, int], list[Found]] = {}
    for task in tasks:
        results.setdefault((task.length, task.depth), []).append(ask(task.ids, task.needle))
    bare = [ask(prompts.encode(needle.sentence, needle), needle) for needle in hidden]
    return Grid(
        lengths,
        depths,
        tuple(Cell(*place, tuple(found)) for place, found in sorted(results.items())),
        tuple(bare),
        tuple(absent),
        asker.prompt_tokens,
        asker.timings.prefill_tokens,
        hay.tokens,
        hay.repeats,
    )


class _Haystack:
    """A text in sentences, with the tokens of each; repeated as often as it takes."""

    def __init__(self, tokenizer: Tokenizer, text: Text, longest: int) -> None:
        once = [part for part in re.findall(r".+?(?:[.!?。！？]+\s+|\n+|\Z)", text.content, re.DOTALL) if part.strip()]
        counts = [len(tokenizer.encode(part)) for part in once]
        self.tokens = sum(counts)
        if self.tokens < 16:
            raise UsageError(f"{text.name} has {self.tokens} tokens, too few for a haystack", hint="give a longer text")
        self.repeats = self.tokens < longest
        rounds = longest // self.tokens + 1
        self.parts, self.counts = once * rounds, counts * rounds

    def upto(self, tokens: int) -> int:
        """How many sentences have at most so many tokens."""
        taken = number = 0
        while number < len(self.parts) and taken + self.counts[number] <= tokens:
            taken += self.counts[number]
            number += 1
        return number


class _Prompts:
    """Builds prompts of a length in tokens."""

    def __init__(self, model: LoadedModel, hay: _Haystack) -> None:
        self.model, self.hay = model, hay

    def encode(self, text: str, needle: Needle) -> list[int]:
        """The question behind a text: in the model's dialect, or as the beginning of a sentence to complete."""
        if self.model.dialect is None:
            return self.model.encode_prompt(f"{text.rstrip()}\n\n{needle.lead}")
        return self.model.encode_prompt([Message("user", f"{INTRODUCTION}{text.rstrip()}\n\n{needle.question}")])

    def task(self, length: int, depth: int, needle: Needle) -> _Task:
        parts, counts = self.hay.parts, self.hay.counts

        def built(end: int) -> tuple[int, str]:
            before = self.hay.upto(sum(counts[:end]) * depth // 100)
            return before, "".join((*parts[:before], needle.sentence + " ", *parts[before:end]))

        ids, end = self._fitting(length, needle, lambda end: built(end)[1])
        return _Task(length, depth, needle, sum(counts[: built(end)[0]]), ids)

    def absent(self, length: int, needle: Needle) -> list[int]:
        """A haystack without the needle."""
        return self._fitting(length, needle, lambda end: "".join(self.hay.parts[:end]))[0]

    def _fitting(self, length: int, needle: Needle, build: Callable[[int], str]) -> tuple[list[int], int]:
        """The longest haystack whose prompt leaves room for an answer, and its sentences."""
        room = length - ANSWER_ROOM
        frame = len(self.encode(needle.sentence, needle))
        end = self.hay.upto(room - frame)
        while end > 0:
            ids = self.encode(build(end), needle)
            if len(ids) <= room:
                return ids, end
            end -= 1
        raise UsageError(
            f"a length of {length} tokens has no room for a haystack", hint=f"give at least {4 * (frame + ANSWER_ROOM)}"
        )


class _Asker:
    """Asks one model, whose cache keeps what prompts share."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.context: Context = model.new_context()
        self.timings = Timings()
        self.prompt_tokens = 0
        dead = model.dead_ids.to(model.device)
        self._never = torch.zeros(len(dead), dtype=torch.float64, device=model.device).masked_fill(dead, float("-inf"))

    def ask(self, ids: list[int], needle: Needle) -> Found:
        self.prompt_tokens += len(ids)
        ranks, logprob = self._likelihood(ids, needle)
        params = SamplingParams(temperature=0.0, max_new_tokens=ANSWER_TOKENS)
        chat = self.model.dialect is not None
        # What is likely is asked first: the answer then stands behind a prompt that is in the cache.
        steps = self.model.stream(ids, params, chat=chat, context=self.context, timings=self.timings)
        answer = ""
        for step in steps:
            answer += step.text
            if needle.code in answer:
                break
        return Found(len(ids), needle.code in answer, ranks, logprob)

    def _likelihood(self, ids: list[int], needle: Needle) -> tuple[tuple[int, ...], float]:
        """Rank and mean log-probability of the code's tokens, each behind the right ones before it."""
        encode = self.model.tokenizer.encode
        # A chat model writes a line end first; then the needle's own words lead to the code.
        lead = "" if self.model.dialect is None else "\n" + needle.lead
        stem = ids + encode(lead)
        code = encode(f"{lead or needle.lead} {needle.code}")[len(encode(lead or needle.lead)) :]
        self.model.prefill(stem[:-1], self.context, timings=self.timings)
        fed = torch.tensor([stem[-1], *code[:-1]], dtype=torch.long, device=self.model.device)
        logits = self.model.model(fed, self.context.cache, logits="all").double() + self._never
        self.context.ids += fed.tolist()
        wanted = torch.tensor(code, device=self.model.device)[:, None]
        ranks = (logits > logits.gather(1, wanted)).sum(1)
        return tuple(int(rank) for rank in ranks), float(logits.log_softmax(-1).gather(1, wanted).mean())


def require_score(text: str) -> Score:
    """Raises UsageError for a score that does not exist."""
    for name in SCORES:
        if text == name:
            return name
    raise UsageError(f"score is {text!r}", hint=f"one of: {', '.join(SCORES)}")
