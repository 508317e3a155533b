"""A conversation with a model whose cache is kept between turns, so that only what is new is ever prefilled.

Turns are kept as the very tokens that the model saw and produced. Undo, edit and other branches shorten the cache to
what they share; dialects that drop thoughts are rendered anew, and the cache keeps the common prefix. What a stopped
answer had produced stays part of the conversation. Raises and never prints: `on_notice` gets what a user must know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from glm4run.chat_format import Message, ToolCall, encode_chat
from glm4run.constraints import Constraint
from glm4run.conversation import Attachment, Conversation, Turn
from glm4run.errors import CheckpointError, DoesNotFitError, UsageError
from glm4run.generate import LoadedModel
from glm4run.interrupts import interrupts_held
from glm4run.reading_speed import ReadingSpeed
from glm4run.sampling import SamplingParams
from glm4run.steps import Context, GenerationStep, Timings, common_prefix

Overflow = Literal["error", "drop-oldest-turns"]
OVERFLOWS: tuple[Overflow, ...] = ("error", "drop-oldest-turns")
ROOM_SHARE = 4  # dropping leaves at least this part of the context free, or every turn would drop and prefill anew
PROBE_TOKENS = 128  # of a long prompt, read first to know how long the rest will take
FILE_FENCE = "```"


class CacheFiles(Protocol):
    """Where keys and values are kept beyond the process."""

    def extend(self, context: Context, prompt: Sequence[int]) -> int:
        """Loads what is kept of `prompt` behind what the cache shares with it; returns how many tokens."""
        ...

    def save(self, context: Context) -> None:
        """Keeps what the cache holds."""
        ...


@dataclass(frozen=True)
class Reading:
    """What a message will cost before its answer begins."""

    prompt: list[int]
    new_tokens: int  # not in the cache yet
    kv_bytes: int  # that they add
    seconds: float | None  # predicted; None before anything has been measured


@dataclass
class Session:
    """One conversation with one model."""

    model: LoadedModel
    params: SamplingParams
    system: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    overflow: Overflow = "error"
    constraint: Constraint | None = None  # what every answer must be, while there are no tools
    conversation: Conversation = field(default_factory=Conversation)
    cache_files: CacheFiles | None = None
    on_notice: Callable[[str], None] = lambda _: None
    most_context_used: int = 0  # over all conversations so far
    speed: ReadingSpeed | None = None  # of the same model, as measured so far; None knows nothing yet
    context: Context | None = None  # of the same model, to go on with; None allocates one
    _context: Context = field(init=False)
    _speed: ReadingSpeed = field(init=False)

    def __post_init__(self) -> None:
        self._context = self.model.new_context() if self.context is None else self.context
        self._speed = ReadingSpeed(self.model.config) if self.speed is None else self.speed

    # --- what there is

    @property
    def messages(self) -> list[Message]:
        """What the model is shown, the system message first."""
        head = [] if self.system is None else [Message("system", self.system)]
        return [*head, *(turn.message for turn in self.shown_turns())]

    def shown_turns(self) -> list[Turn]:
        """The turns of this branch that go to the model."""
        return [turn for turn in self.conversation.path() if turn.number not in self.conversation.dropped]

    @property
    def context_used(self) -> int:
        """Tokens of the conversation so far; 0 where nothing has been said."""
        return len(self.tokens()) if self.shown_turns() else 0

    @property
    def kv_bytes_per_token(self) -> int:
        """What a token takes in the cache."""
        return self._context.cache.bytes_per_token

    @property
    def cached_tokens(self) -> int:
        """Tokens that the cache holds now."""
        return self._context.cache.position

    def tokens(self) -> list[int]:
        """The ids of the conversation so far, without the mark that an answer follows."""
        turns = self.shown_turns()
        if self._rerenders:
            return self._encode(self.messages, answer_follows=False)
        return [*self.head_tokens(), *(i for turn in turns for i in turn.ids)]

    def head_tokens(self, *, with_system: bool = True) -> list[int]:
        """The prefix, the tools and the system message."""
        system = [Message("system", self.system)] if self.system is not None and with_system else []
        return self._encode(system, answer_follows=False)

    def turn_tokens(self, turn: Turn) -> int:
        """How many tokens a turn has in the prompt."""
        return len(self._encode_turn(turn.message)) if self._rerenders else len(turn.ids)

    # --- changing it

    def clear(self) -> None:
        """Forgets every turn; the system message stays, and what was said stays as a branch."""
        self.conversation.clear()

    def set_system(self, text: str | None) -> None:
        """Another system message, from the next answer on. All that stands behind it is prefilled anew."""
        self.system = text
        self.conversation.on_record({"system": text})

    def set_params(self, **changes: Any) -> None:
        """Other sampling parameters. Raises UsageError for values out of range."""
        self.params = replace(self.params, **changes)

    def reencode(self) -> None:
        """Makes the texts of all turns this model's tokens, where another model had said them."""
        turns = self.conversation.turns
        self.conversation.replace_ids({n: tuple(self._encode_turn(turn.message)) for n, turn in turns.items()})

    def restore_cache(self) -> int:
        """Loads what is on disk of the conversation's keys and values; returns how many of its tokens are there."""
        if self.cache_files is not None:
            self.cache_files.extend(self._context, self.tokens())
        return common_prefix(self._context.ids[: self.cached_tokens], self.tokens())

    def save_cache(self) -> None:
        """Writes the keys and values that are not on disk yet."""
        if self.cache_files is not None:
            self.cache_files.save(self._context)

    # --- asking

    def read_first(self, text: str, files: Sequence[tuple[str, str]] = ()) -> Reading:
        """What `say` with the same words would have to prefill. Changes nothing."""
        self._require_dialect()
        message, _ = with_files(text, files)
        return self._reading(self._prompt_with(message))

    def recall(self, reading: Reading) -> Reading:
        """Takes what is kept of a long prompt from other runs, and says what is left to read."""
        kept = self.model.kept_prompts
        return (
            reading if kept is None or not kept.recall(self._context, reading.prompt) else self._reading(reading.prompt)
        )

    def probe(self, reading: Reading) -> Reading:
        """Prefills the beginning of what is new, and predicts the rest from it. Nothing of it is done twice."""
        common = len(reading.prompt) - reading.new_tokens
        part = reading.prompt[: common + PROBE_TOKENS]
        if reading.seconds is not None or len(part) >= min(len(reading.prompt), self.model.plan.context_len):
            return reading
        timings = Timings()
        self.model.prefill(part, self._context, timings=timings)
        self._note_speed(timings, len(part))
        return self._reading(reading.prompt)

    def say(
        self,
        text: str,
        files: Sequence[tuple[str, str]] = (),
        *,
        timings: Timings | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[GenerationStep]:
        """Adds a user message, with the (name, text) of files before it, and streams the answer.

        However the iteration ends (to the end, closed, Ctrl-C), the conversation holds the message and what was
        answered so far. A message that does not fit is refused before anything changes.
        """
        self._require_dialect()
        message, parts = with_files(text, files)
        attachments = tuple(Attachment(name, len(self.model.tokenizer.encode(part))) for name, part in parts)
        self._make_room(message)
        self.conversation.withdraw_question()
        self.conversation.add(message, self._encode_turn(message), attachments=attachments)
        return self._answer(timings, on_prefill)

    def observe(
        self,
        results: Sequence[str],
        *,
        timings: Timings | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[GenerationStep]:
        """Gives the results of the last answer's tool calls, in their order, and streams what the model says to them.

        Raises:
            DoesNotFitError: they leave no room; then they are not part of the conversation.
        """
        messages = [Message("observation", text) for text in results]
        self._make_room(*messages)
        for message in messages:
            self.conversation.add(message, self._encode_turn(message))
        return self._answer(timings, on_prefill)

    def regenerate(
        self,
        params: SamplingParams | None = None,
        *,
        timings: Timings | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[GenerationStep]:
        """Answers the last question again, once with other `params` if given. The answer before stays as a branch."""
        self.conversation.back_to_question()
        self.conversation.undrop(self.conversation.exchanges()[-1])
        self._make_room()
        return self._answer(timings, on_prefill, params)

    def edit(
        self,
        text: str,
        *,
        timings: Timings | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[GenerationStep]:
        """Asks `text` in the place of the last question. What was said there before stays as a branch.

        `text` is the whole message, with the files that stand in it.
        """
        message = Message("user", text)
        question = self.conversation.undo()
        attachments = tuple(file for file in question.attachments if f"{file.name}:\n{FILE_FENCE}" in text)
        try:
            self._make_room(message)
        except DoesNotFitError:
            self.conversation.redo()
            raise
        self.conversation.add(message, self._encode_turn(message), attachments=attachments)
        return self._answer(timings, on_prefill)

    # --- the prompt

    @property
    def _rerenders(self) -> bool:
        """Whether the dialect prints history other than it was generated (it drops thoughts)."""
        return self.model.dialect is not None and self.model.dialect.drops_thoughts

    def _require_dialect(self) -> None:
        self.model.require_dialect()

    def _encode(self, messages: Sequence[Message], *, answer_follows: bool) -> list[int]:
        dialect = self.model.require_dialect()
        return encode_chat(self.model.tokenizer, dialect, messages, self.tools or None, answer_follows)

    def _encode_turn(self, message: Message) -> list[int]:
        """A turn alone. The published templates print turns one after the other with nothing between them, so turns
        are appended to the very tokens the model produced: encoding its text again might cut it differently."""
        ids = encode_chat(self.model.tokenizer, self.model.require_dialect(), [message], add_generation_prompt=False)
        return ids[len(self.model.tokenizer.prefix_ids) :]

    @property
    def _answer_mark(self) -> int:
        mark = self.model.tokenizer.special_id("<|assistant|>")
        if mark is None:
            raise CheckpointError("the tokenizer has no control token <|assistant|>")
        return mark

    def _prompt_with(self, *more: Message) -> list[int]:
        """The prompt that these messages would make behind the conversation (a question without answer set aside)."""
        if self._rerenders:
            turns = self.shown_turns()
            unanswered = bool(more) and more[0].role == "user" and self.conversation.is_unanswered
            kept = turns[:-1] if unanswered and turns else turns
            head = [] if self.system is None else [Message("system", self.system)]
            return self._encode([*head, *(turn.message for turn in kept), *more], answer_follows=True)
        ids = self.tokens()
        if more and more[0].role == "user" and self.conversation.is_unanswered:
            ids = ids[: len(ids) - len(self.shown_turns()[-1].ids)]
        return [*ids, *(i for message in more for i in self._encode_turn(message)), self._answer_mark]

    def _reading(self, prompt: list[int]) -> Reading:
        new = len(prompt) - common_prefix(self._context.ids[: self._context.cache.position], prompt)
        seconds = self._speed.seconds(new, len(prompt) - new)
        return Reading(prompt, new, new * self.kv_bytes_per_token, seconds)

    def _make_room(self, *messages: Message) -> None:
        """Refuses what does not fit, or drops the oldest turns for it, as `overflow` says."""
        limit = self.model.plan.context_len
        needed = len(self._prompt_with(*messages))
        room = min(limit // 2, max(self.params.max_new_tokens or 0, limit // ROOM_SHARE))
        gone: list[list[Turn]] = []
        if self.overflow == "drop-oldest-turns" and needed + room > limit:
            gone, needed = self._oldest(needed, limit - room, stays=None if messages else self.conversation.tip)
        if needed >= limit:
            hint = "/clear starts a new one; --ctx sets a larger context"
            more = "; `/set overflow drop-oldest-turns` lets the oldest turns go" if self.overflow == "error" else ""
            raise DoesNotFitError(
                f"the conversation would have {needed} tokens, the context holds {limit}", hint=hint + more
            )
        if gone:
            names = [
                f"{shorten(turns[0].message.content)!r} ({sum(map(self.turn_tokens, turns))} tokens)" for turns in gone
            ]
            self.conversation.drop([turn for turns in gone for turn in turns])
            count = f"{len(gone)} turn{'s' if len(gone) > 1 else ''}"
            self.on_notice(f"the context is full: the oldest {count} no longer go to the model: {', '.join(names)}")

    def _oldest(self, needed: int, target: int, stays: int | None) -> tuple[list[list[Turn]], int]:
        """The exchanges to drop, oldest first, until `target` tokens are left, and how many are left then.

        Pinned ones stay, and so does the one that ends at turn `stays`.
        """
        gone = []
        for turns in self.droppable():
            if needed <= target:
                break
            if turns[-1].number != stays:
                gone.append(turns)
                needed -= sum(map(self.turn_tokens, turns))
        return gone, needed

    def droppable(self) -> list[list[Turn]]:
        """The exchanges that may be dropped, in the order in which they would be."""
        conversation = self.conversation
        exchanges = conversation.exchanges()
        if conversation.is_unanswered and exchanges and len(exchanges[-1]) == 1:
            exchanges = exchanges[:-1]
        return [
            turns
            for turns in exchanges
            if turns[0].number not in conversation.pinned and turns[0].number not in conversation.dropped
        ]

    def _note_speed(self, timings: Timings, prompt: int) -> None:
        """What reading up to the end of a prompt of so many tokens took; a few tokens tell nothing."""
        if timings.prefill_tokens >= PROBE_TOKENS:
            self._speed.note(timings.prefill_tokens, prompt - timings.prefill_tokens, timings.prefill_s)

    # --- the answer

    def _answer(
        self,
        timings: Timings | None,
        on_prefill: Callable[[int, int], None] | None,
        params: SamplingParams | None = None,
    ) -> Iterator[GenerationStep]:
        prompt = self._prompt_with()
        timings = timings or Timings()
        if self.cache_files is not None:
            self.cache_files.extend(self._context, prompt)
        steps = self.model.stream(
            prompt,
            params or self.params,
            chat=True,
            tools=self.tools or None,
            context=self._context,
            timings=timings,
            on_prefill=on_prefill,
            constraint=None if self.tools else self.constraint,
        )
        return self._record(steps, timings, len(prompt))

    def _record(self, steps: Iterator[GenerationStep], timings: Timings, prompt: int) -> Iterator[GenerationStep]:
        heard = _Heard()
        try:
            for step in steps:
                heard.add(step)
                yield step
        finally:
            with interrupts_held():
                self._note_speed(timings, prompt)
                if heard.ids or heard.finish_reason is not None:
                    self._add_answer(heard)
                self.most_context_used = max(self.most_context_used, len(self._context.ids))
                self.save_cache()
                if self.model.kept_prompts is not None:
                    self.model.kept_prompts.keep()

    def _add_answer(self, heard: _Heard) -> None:
        message = Message("assistant", "" if heard.calls else heard.text, tool_calls=heard.calls)
        ids = () if self._rerenders else (self._answer_mark, *heard.ids)
        reason = heard.finish_reason or "interrupted"
        self.conversation.add(message, ids, thought=heard.thought, finish_reason=reason)


class _Heard:
    """An answer as far as it has come."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.text = self.thought = ""
        self.finish_reason: str | None = None
        self.calls: tuple[ToolCall, ...] = ()

    def add(self, step: GenerationStep) -> None:
        if step.rollback is not None:
            del self.ids[len(self.ids) - step.rollback.tokens :]
            self.text, self.thought = step.rollback.text, step.rollback.thought
        self.text += step.text
        self.thought += step.thought
        if step.token_id is not None:
            self.ids.append(step.token_id)
        if step.finish_reason is not None:
            self.finish_reason, self.calls = step.finish_reason, step.tool_calls


def with_files(text: str, files: Sequence[tuple[str, str]]) -> tuple[Message, list[tuple[str, str]]]:
    """A user message with the texts of files before it, each in a fence of its own; and (name, that text) of each."""
    parts = []
    for name, content in files:
        fence = FILE_FENCE
        while fence in content:
            fence += "`"
        body = content if content.endswith("\n") or not content else content + "\n"
        parts.append((name, f"{name}:\n{fence}\n{body}{fence}\n\n"))
    return Message("user", "".join(part for _, part in parts) + text), parts


def shorten(text: str, width: int = 40) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def require_overflow(text: str) -> Overflow:
    """Raises UsageError for a policy that does not exist."""
    for name in OVERFLOWS:
        if text == name:
            return name
    raise UsageError(f"overflow is {text!r}", hint=f"one of: {', '.join(OVERFLOWS)}")
