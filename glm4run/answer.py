"""A whole answer: what a stream of steps adds up to, and its JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from glm4run.chat_format import Message, ToolCall
from glm4run.constraints import Constraint
from glm4run.errors import GenerationError, Glm4RunError
from glm4run.generate import LoadedModel, is_conversation
from glm4run.sampling import SamplingParams, TokenLogprobs
from glm4run.steps import Context, GenerationStep, Timings


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
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of each token, where they were asked for
    finish_reason: str = "interrupted"
    stopped_by: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    timings: Timings = field(default_factory=Timings)
    error: Glm4RunError | None = None
    recovered: str = ""  # why tokens were taken back and written anew
    constraint: Constraint | None = None
    problem: str | None = None  # what the answer has against the constraint

    def add(self, step: GenerationStep) -> None:
        """One more step of its stream."""
        if step.rollback is not None:
            kept = len(self.token_ids) - step.rollback.tokens
            del self.token_ids[kept:], self.logprobs[kept:]
            self.text, self.thought = step.rollback.text, step.rollback.thought
            self.recovered = step.rollback.why
        self.text += step.text
        self.thought += step.thought
        if step.token_id is not None:
            self.token_ids.append(step.token_id)
        if step.logprobs is not None:
            self.logprobs.append(step.logprobs)
        if step.finish_reason is not None:
            self.finish_reason, self.stopped_by = step.finish_reason, step.stopped_by
            self.tool_calls = step.tool_calls

    def fail(self, error: Glm4RunError) -> None:
        """It ended by an error; what there is of it stays."""
        self.finish_reason, self.error = "error", error

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
            "speculation": {"drafted": self.timings.drafted_tokens, "accepted": self.timings.accepted_tokens},
            "model": self.model,
            "backend": self.backend,
            "cached_tokens": self.timings.recalled_tokens + self.timings.shared_tokens,
            **({} if self.constraint is None else {"valid": self.problem is None}),
            **({} if self.problem is None else {"problem": self.problem}),
            **({"logprobs": [_as_json(token) for token in self.logprobs]} if self.logprobs else {}),
            **({"thought": self.thought} if self.thought else {}),
            **({"recovered": self.recovered} if self.recovered else {}),
            **({"error": self.error.message} if self.error is not None else {}),
        }


def _as_json(token: TokenLogprobs) -> dict[str, Any]:
    top = [{"token_id": i, "logprob": round(value, 6)} for i, value in token.likeliest]
    return {"token_id": token.token_id, "logprob": round(token.logprob, 6), "top": top}


def collect(
    model: LoadedModel,
    prompt: str | Sequence[Message] | Sequence[int],
    params: SamplingParams,
    *,
    on_text: Callable[[str, str], None] | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
    constraint: Constraint | None = None,
    chat: bool | None = None,
    context: Context | None = None,
) -> Answer:
    """Runs a stream to its end. `on_text` gets (new text, new thought) as they come; `context` as `stream` takes it.

    Ctrl-C ends it with `interrupted`, output that is not finite with `error`; what was generated until then is kept.
    """
    ids = model.encode_prompt(prompt)
    answer = Answer(model.name, model.backend, model.load_s, prompt_tokens=len(ids), constraint=constraint)
    chat = is_conversation(prompt) if chat is None else chat
    steps = model.stream(
        ids,
        params,
        chat=chat,
        context=context,
        timings=answer.timings,
        on_prefill=on_prefill,
        constraint=constraint,
    )
    try:
        for step in steps:
            answer.add(step)
            if on_text is not None:
                on_text(step.text, step.thought)
    except KeyboardInterrupt:
        answer.finish_reason = "interrupted"
    except GenerationError as error:
        answer.fail(error)
    if constraint is not None:
        answer.problem = constraint.problem(answer.text)
    return answer
