"""What a stream of generation is made of: steps, timings, the tokens behind a cache, and text that may be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from glm4run.chat_format import AnswerCleaner
from glm4run.kv_cache import KVCache
from glm4run.sampling import TokenLogprobs
from glm4run.stopping import StopStrings
from glm4run.tokenizer import Tokenizer
from glm4run.tool_calls import ToolCall, parse_tool_calls

FinishReason = Literal["stop", "max_tokens", "context_full", "repetition", "tool_calls", "interrupted", "error"]


@dataclass(frozen=True)
class Rollback:
    """Tokens of an answer that were taken back because it had degenerated, and what is left of it."""

    tokens: int
    text: str
    thought: str
    why: str


@dataclass(frozen=True)
class GenerationStep:
    """What one token added. The last step of a stream has a `finish_reason` and may have text that was held back."""

    text: str  # new text of the answer, whole characters only
    thought: str = ""  # new text of the thought (reasoning models)
    token_id: int | None = None  # None in the last step
    finish_reason: FinishReason | None = None
    stopped_by: str | None = None  # the stop token or stop string
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: TokenLogprobs | None = None  # where `SamplingParams.logprobs` is set
    rollback: Rollback | None = None  # comes before what `text` adds; only where `SamplingParams.recover` is set


@dataclass
class Timings:
    """Seconds and tokens of one generation."""

    prefill_s: float = 0.0
    prefill_tokens: int = 0
    recalled_tokens: int = 0  # from kept prompts, beside `prefill_tokens`
    shared_tokens: int = 0  # of other requests of a batch, likewise
    decode_s: float = 0.0
    decode_tokens: int = 0
    drafted_tokens: int = 0  # by speculation
    accepted_tokens: int = 0  # of those; part of `decode_tokens`

    def as_json(self, load_s: float) -> dict[str, float]:
        """The keys of the contract."""
        return {
            "load_s": round(load_s, 3),
            "prefill_s": round(self.prefill_s, 3),
            "prefill_tok_per_s": round(self.prefill_tokens / self.prefill_s, 2) if self.prefill_s else 0.0,
            "decode_s": round(self.decode_s, 3),
            "decode_tok_per_s": round(self.decode_tokens / self.decode_s, 2) if self.decode_s else 0.0,
        }


@dataclass
class Context:
    """The tokens that a cache holds, so that a later prompt prefills only what is new."""

    cache: KVCache
    ids: list[int] = field(default_factory=list)

    def shares(self, prompt: Sequence[int], unit: int = 1, rest: int = 1) -> int:
        """How many tokens of `prompt` the cache holds at its beginning, a multiple of `unit`; never the last `rest`."""
        held = self.ids[: max(0, min(self.cache.position, len(prompt) - rest))]
        return common_prefix(held, prompt) // unit * unit

    def begin_with(self, other: Context, count: int) -> None:
        """Holds the first `count` tokens of `other`, and nothing else: a fork of it, or itself cut short."""
        self.cache.copy_from(other.cache, count)
        self.ids = other.ids[:count]

    def reuse(self, prompt: Sequence[int]) -> list[int]:
        """Keeps the longest common prefix and returns what must still be prefilled; at least the last token."""
        common = self.shares(prompt)
        self.cache.truncate(common)
        self.ids = list(prompt[:common])
        return list(prompt[common:])


def common_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many ids two sequences share from their beginning."""
    for count, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if mine != other:
            return count
    return min(len(ours), len(theirs))


class TextStream:
    """Tokens to text that may be shown: whole characters, no framing, stop strings held back."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], cleaner: AnswerCleaner | None) -> None:
        self.decoder = tokenizer.stream_decoder()
        self.stops = StopStrings(stop)
        self.cleaner = cleaner
        self.whole: list[str] = []
        self.thoughts: list[str] = []

    @property
    def shown(self) -> str:
        """The answer so far."""
        return "".join(self.whole)

    @property
    def thought(self) -> str:
        """The thought so far."""
        return "".join(self.thoughts)

    def push(self, token: int) -> GenerationStep:
        return self._step(self.decoder.push(token), token)

    def finish(self, reason: FinishReason, declared: frozenset[str], stopped_by: str | None = None) -> GenerationStep:
        step = self._step(self.decoder.flush(), None)
        rest = self.cleaner.flush() if self.cleaner is not None else None
        answer = step.text + (self.stops.push(rest.answer)[0] if rest else "") + self.stops.flush()
        self.whole.append(answer[len(step.text) :])
        calls = tuple(parse_tool_calls("".join(self.whole), declared)) if declared else ()
        return GenerationStep(
            answer,
            step.thought + (rest.thought if rest else ""),
            finish_reason="tool_calls" if calls else reason,
            stopped_by=stopped_by,
            tool_calls=calls,
        )

    def _step(self, text: str, token: int | None) -> GenerationStep:
        thought = ""
        if self.cleaner is not None:
            part = self.cleaner.push(text)
            text, thought = part.answer, part.thought
        shown, stopped_by = self.stops.push(text)
        self.whole.append(shown)
        self.thoughts.append(thought)
        return GenerationStep(shown, thought, token_id=token, stopped_by=stopped_by)
