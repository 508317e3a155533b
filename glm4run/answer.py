"""A whole answer: what a stream of steps adds up to, and its JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from glm4run.chat_format import Message, ToolCall
from glm4run.constraints import Constraint
from glm4run.errors import GenerationError
from glm4run.generate import LoadedModel, is_conversation
from glm4run.sampling import SamplingParams
from glm4run.steps import Timings


@dataclass
class Answer:
    """One finished (or interrupted) answer."""

    model: str
    backend: str
    load_s: float
    prompt_tokens: int
    text: str = ""
    thought: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "interrupted"
    stopped_by: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    timings: Timings = field(default_factory=Timings)
    error: GenerationError | None = None
    recovered: str = ""  # why tokens were taken back and written anew
    constraint: Constraint | None = None
    problem: str | None = None  # what the answer has against the constraint

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)

    def as_json(self) -> dict[str, Any]:
        """The stable keys of `generate --json`."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "finish_reason": self.finish_reason,
            "stopped_by": self.stopped_by,
            "tool_calls": [{"name": call.name, "arguments": call.arguments} for call in self.tool_calls],
            "timings": self.timings.as_json(self.load_s),
            "model": self.model,
            "backend": self.backend,
            "cached_tokens": self.timings.recalled_tokens,
            **({} if self.constraint is None else {"valid": self.problem is None}),
            **({} if self.problem is None else {"problem": self.problem}),
            **({"thought": self.thought} if self.thought else {}),
            **({"recovered": self.recovered} if self.recovered else {}),
            **({"error": self.error.message} if self.error is not None else {}),
        }


def collect(
    model: LoadedModel,
    prompt: str | Sequence[Message] | Sequence[int],
    params: SamplingParams,
    *,
    on_text: Callable[[str, str], None] | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
    constraint: Constraint | None = None,
) -> Answer:
    """Runs a stream to its end. `on_text` gets (new text, new thought) as they come.

    Ctrl-C ends it with `interrupted`, output that is not finite with `error`; what was generated until then is kept.
    """
    ids = model.encode_prompt(prompt)
    answer = Answer(model.name, model.backend, model.load_s, prompt_tokens=len(ids), constraint=constraint)
    chat = is_conversation(prompt)
    steps = model.stream(ids, params, chat=chat, timings=answer.timings, on_prefill=on_prefill, constraint=constraint)
    try:
        for step in steps:
            if step.rollback is not None:
                del answer.token_ids[len(answer.token_ids) - step.rollback.tokens :]
                answer.text, answer.thought = step.rollback.text, step.rollback.thought
                answer.recovered = step.rollback.why
            answer.text += step.text
            answer.thought += step.thought
            if step.token_id is not None:
                answer.token_ids.append(step.token_id)
            if on_text is not None:
                on_text(step.text, step.thought)
            if step.finish_reason is not None:
                answer.finish_reason, answer.stopped_by = step.finish_reason, step.stopped_by
                answer.tool_calls = step.tool_calls
    except KeyboardInterrupt:
        answer.finish_reason = "interrupted"
    except GenerationError as error:
        answer.finish_reason, answer.error = "error", error
    if constraint is not None:
        answer.problem = constraint.problem(answer.text)
    return answer
