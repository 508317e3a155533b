"""One answer to the end: reading what is long, streaming, tool calls and what follows them, the line below."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.filesize import decimal

from glm4run.cli import options
from glm4run.cli.chat.state import Chat, warn
from glm4run.cli.chat.tool_calls import CallHold, run_calls
from glm4run.cli.chat.view import AnswerView, ThoughtView
from glm4run.cli.console import note, say_error, token_progress
from glm4run.errors import GenerationError, Glm4RunError

if TYPE_CHECKING:
    from glm4run.steps import GenerationStep, Timings
    from glm4run.tool_calls import ToolCall

MOST_TOOL_ROUNDS = 8  # answers in a row that are calls
LONG_READ_S = 20.0  # a prompt that takes longer is worth a hint that it can be stopped

Start = Callable[["Timings", Callable[[int, int], None] | None], "Iterator[GenerationStep]"]


@dataclass
class _Outcome:
    timings: Timings
    reason: str = "interrupted"
    calls: tuple[ToolCall, ...] = ()


def ask(chat: Chat, text: str) -> None:
    """Sends a message with the attached files and shows the answer. Whatever ends it, the chat goes on."""
    session, files = chat.session, list(chat.attached)

    def start(timings: Timings, on_prefill: Callable[[int, int], None] | None) -> Iterator[GenerationStep]:
        steps = session.say(text, files, timings=timings, on_prefill=on_prefill)
        chat.attached.clear()  # only now: a message that does not fit keeps its files
        return steps

    try:
        announce_reading(chat, text, files)
    except KeyboardInterrupt:
        note(f"stopped; {session.cached_tokens} tokens that were read are kept, nothing was sent")
        return
    except Glm4RunError as error:
        say_error(error.message, error.hint)
        return
    show_answer(chat, start)


def announce_reading(chat: Chat, text: str, files: list[tuple[str, str]]) -> None:
    """Before a long prompt is read: its tokens, the seconds that will take, and the memory."""
    session = chat.session
    reading = session.read_first(text, files)
    chunk = session.model.plan.chunk
    limit = session.model.plan.context_len
    if reading.new_tokens <= chunk or len(reading.prompt) >= limit:
        return
    reading = session.recall(reading)
    if reading.new_tokens <= chunk:
        return
    measured = session.probe(reading)
    seconds = measured.seconds or 0.0
    hint = "; Ctrl-C stops it and keeps what was read" if seconds > LONG_READ_S else ""
    note(
        f"reading {reading.new_tokens} tokens: about {duration(seconds)}, {decimal(reading.kv_bytes)} of cache "
        f"(context then {len(reading.prompt)}/{limit}){hint}"
    )


def show_answer(chat: Chat, start: Start) -> None:
    """Streams an answer, runs the tools that it calls, and goes on until it is one."""
    for _ in range(MOST_TOOL_ROUNDS):
        outcome = _stream(chat, start)
        if outcome is None:
            return
        if outcome.reason != "tool_calls":
            _status(chat, outcome)
            return
        results = run_calls(chat, outcome.calls)
        if results is None:
            return

        def after_calls(
            timings: Timings, on_prefill: Callable[[int, int], None] | None, results: list[str] = results
        ) -> Iterator[GenerationStep]:
            return chat.session.observe(results, timings=timings, on_prefill=on_prefill)

        start = after_calls
    warn(f"{MOST_TOOL_ROUNDS} answers in a row were tool calls; stopped here")


def _stream(chat: Chat, start: Start) -> _Outcome | None:
    """One generation; None where there is nothing to go on from."""
    from glm4run.steps import Timings

    outcome = _Outcome(Timings())
    view, thoughts = AnswerView(is_raw=chat.is_raw), ThoughtView(is_hidden=not chat.shows_thoughts)
    hold = CallHold(chat.tools)
    error: Glm4RunError | None = None
    try:
        with token_progress("reading") as on_prefill, closing(start(outcome.timings, on_prefill)) as steps:  # type: ignore[type-var]  # a generator, which its type does not promise
            for step in steps:
                if step.rollback is not None:
                    _say_rollback(view, thoughts, hold, step.rollback.why, step.rollback.tokens)
                    view, hold = AnswerView(is_raw=chat.is_raw), CallHold({})
                thoughts.show(step.thought)
                shown = hold.push(step.text)
                if shown:
                    thoughts.end()
                view.show(shown)
                if step.finish_reason is not None:
                    outcome.reason, outcome.calls = step.finish_reason, step.tool_calls
    except KeyboardInterrupt:
        outcome.reason = "interrupted"
    except GenerationError as caught:
        outcome.reason, error = "error", caught
    except Glm4RunError as caught:
        say_error(caught.message, caught.hint)
        return None
    thoughts.end()
    if not outcome.calls:
        view.show(hold.rest())
    if view.has_shown or not outcome.calls:  # a call alone is no text
        view.end()
    if error is not None:
        say_error(error.message, error.hint)
    if chat.session.conversation.is_unanswered:
        kept = f"{chat.session.cached_tokens} tokens are in the cache"
        note(f"no answer yet; {kept}: /retry goes on, another message takes its place")
        return None
    return outcome


def _say_rollback(view: AnswerView, thoughts: ThoughtView, hold: CallHold, why: str, tokens: int) -> None:
    thoughts.end()
    view.show(hold.rest())
    view.end()
    what = f"its last {tokens} tokens are taken back, and it goes on from before them" if tokens else "computed again"
    warn(f"the answer degenerated: {why}; {what}")


def _status(chat: Chat, outcome: _Outcome) -> None:
    """The dim line below an answer."""
    session, timings = chat.session, outcome.timings
    speed = timings.decode_tokens / timings.decode_s if timings.decode_s else 0.0
    ending = "" if outcome.reason == "stop" else f", ended by {outcome.reason}"
    used, limit = session.context_used, session.model.plan.context_len
    drafts = options.describe_drafts(timings)
    forwards = speed * (1.0 - timings.accepted_tokens / max(1, timings.decode_tokens))  # a second
    note(
        f"{timings.decode_tokens} tokens, {speed:.1f} tok/s{_share(chat, forwards)}{drafts}, "
        f"context {used}/{limit}{ending}"
    )
    if session.constraint is not None and not session.tools:
        problem = session.constraint.problem(session.conversation.path()[-1].message.content)
        if problem is not None:
            warn(f"the answer has not the format that was set: {problem}")


def _share(chat: Chat, tok_per_s: float) -> str:
    if chat.bandwidth_gb_per_s is None or not tok_per_s:
        return ""
    from glm4run.benchmark import bytes_per_token

    nbytes = bytes_per_token(chat.session.model, chat.session.cached_tokens)
    return f", {tok_per_s * nbytes / 1e9 / chat.bandwidth_gb_per_s:.0%} of bandwidth"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 1:
        return "a second"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
