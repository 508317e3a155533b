"""A conversation whose cache is kept between turns, so that only what is new is ever prefilled.

Plain for now: say, clear. What a stopped answer had produced stays part of the conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from glm4run.chat_format import Message, encode_chat
from glm4run.errors import DoesNotFitError
from glm4run.generate import LoadedModel
from glm4run.sampling import SamplingParams
from glm4run.steps import Context, GenerationStep, Timings


@dataclass
class Session:
    """One conversation with one model."""

    model: LoadedModel
    params: SamplingParams
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    _context: Context = field(init=False)
    most_context_used: int = 0  # over all conversations so far
    _ids: list[int] = field(init=False)  # every token so far, exactly as the model saw and produced them

    def __post_init__(self) -> None:
        self._context = self.model.new_context()
        self.clear()

    def clear(self) -> None:
        """Forgets every turn; the system message stays."""
        self.messages = [] if self.system is None else [Message("system", self.system)]
        self._ids = []

    @property
    def context_used(self) -> int:
        """Tokens of the conversation so far."""
        return len(self._ids)

    def say(
        self,
        text: str,
        *,
        timings: Timings | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[GenerationStep]:
        """Adds a user message and streams the answer.

        However the iteration ends (to the end, closed, Ctrl-C), the conversation holds the message and what was
        answered so far. A message that does not fit is refused before anything changes.
        """
        prompt = self._prompt_with(Message("user", text))
        if len(prompt) >= self.model.plan.context_len:
            raise DoesNotFitError(
                f"the conversation would have {len(prompt)} tokens, the context holds {self.model.plan.context_len}",
                hint="/clear starts a new one; --ctx sets a larger context",
            )
        steps = self.model.stream(
            prompt,
            self.params,
            chat=True,
            context=self._context,
            timings=timings,
            on_prefill=on_prefill,
        )
        return self._record(Message("user", text), prompt, steps)

    @property
    def _rerenders(self) -> bool:
        """Whether the dialect prints history other than it was generated (it drops thoughts)."""
        return self.model.require_dialect().drops_thoughts

    def _prompt_with(self, message: Message) -> list[int]:
        dialect = self.model.require_dialect()
        whole = [*self.messages, message]
        if not self._ids or self._rerenders:
            return encode_chat(self.model.tokenizer, dialect, whole)
        # The published templates print turns one after the other with nothing between them, so the new turn is
        # appended to the very tokens the model produced: encoding its text again might cut it differently.
        turn = encode_chat(self.model.tokenizer, dialect, [message])
        return [*self._ids, *turn[len(self.model.tokenizer.prefix_ids) :]]

    def _record(
        self, question: Message, prompt: list[int], steps: Iterator[GenerationStep]
    ) -> Iterator[GenerationStep]:
        answer: list[str] = []
        produced: list[int] = []
        try:
            for step in steps:
                answer.append(step.text)
                if step.token_id is not None:
                    produced.append(step.token_id)
                yield step
        finally:
            self._ids = [*prompt, *produced]
            self.most_context_used = max(self.most_context_used, len(self._ids))
            self.messages += [question, Message("assistant", "".join(answer))]
