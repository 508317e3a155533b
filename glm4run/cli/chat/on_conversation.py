"""The commands about what was said: /undo, /redo, /retry, /edit, /fork, /branches, /clear, /pin, /copy."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from glm4run.cli.chat.answering import show_answer
from glm4run.cli.chat.on_settings import parse_setting
from glm4run.cli.chat.prompt import edit_text
from glm4run.cli.chat.state import Chat
from glm4run.cli.chat.view import inert
from glm4run.cli.console import note, talk
from glm4run.errors import UsageError

if TYPE_CHECKING:
    from glm4run.sampling import SamplingParams
    from glm4run.steps import GenerationStep, Timings

CLIPBOARD_LIMIT_BYTES = 74_994  # of text: what terminals take in one OSC 52, 100,000 bytes of base64


def undo(chat: Chat, argument: str) -> None:
    """`/undo`."""
    question = chat.session.conversation.undo()
    note(f"taken back: {_first(question.message.content)}; /redo brings it back")


def redo(chat: Chat, argument: str) -> None:
    """`/redo`: what was undone, else another answer."""
    if chat.session.conversation.redo():
        last = chat.session.conversation.exchanges()[-1][0]
        note(f"back again: {_first(last.message.content)}")
    else:
        _answer_again(chat, None)


def retry(chat: Chat, argument: str) -> None:
    """`/retry [NAME=VALUE ...]`."""
    params = chat.session.params
    for word in argument.split():
        name, equals, text = word.partition("=")
        if not equals:
            raise UsageError(f"/retry cannot take {word!r}", hint="/retry temperature=1 top_p=0.9")
        key, value = parse_setting(name, text)
        params = replace(params, **{key: value})
    _answer_again(chat, params)


def _answer_again(chat: Chat, params: SamplingParams | None) -> None:
    conversation = chat.session.conversation
    had_answer = not conversation.is_unanswered
    if not conversation.exchanges():
        raise UsageError("there is no message yet", hint="write one")
    if had_answer and (params or chat.session.params).temperature == 0:
        note("temperature is 0, so the answer will be the same; /retry temperature=0.8 gives another")

    def start(timings: Timings, on_prefill: Callable[[int, int], None] | None) -> Iterator[GenerationStep]:
        return chat.session.regenerate(params, timings=timings, on_prefill=on_prefill)

    show_answer(chat, start)


def edit(chat: Chat, argument: str) -> None:
    """`/edit [TEXT]`: TEXT, or what the user makes of the last question in the editor, takes its place."""
    exchanges = chat.session.conversation.exchanges()
    if not exchanges:
        raise UsageError("there is no message to edit yet", hint="write one")
    before = exchanges[-1][0].message.content
    text = argument
    if not argument:
        if not chat.reader.is_interactive:
            raise UsageError("/edit opens an editor, and this is no terminal", hint="give the new text: /edit TEXT")
        text = edit_text(before)
    if not text.strip() or text.rstrip() == before.rstrip():
        note("the message is as it was")
        return

    def start(timings: Timings, on_prefill: Callable[[int, int], None] | None) -> Iterator[GenerationStep]:
        return chat.session.edit(text, timings=timings, on_prefill=on_prefill)

    show_answer(chat, start)


def fork(chat: Chat, argument: str) -> None:
    """`/fork [NAME]`."""
    conversation = chat.session.conversation
    before = conversation.branch
    name = conversation.fork(argument or None)
    note(f"now on branch {name}; {before} stays as it is")


def branches(chat: Chat, argument: str) -> None:
    """`/branches [NAME]`."""
    conversation = chat.session.conversation
    if argument:
        conversation.switch(argument)
        note(f"now on branch {argument}")
        show_last(chat)
        return
    for name in conversation.branches:
        turns = [turn for turn in conversation.path(name) if turn.message.role == "user"]
        words = _first(turns[-1].message.content) if turns else "(empty)"
        mark = "*" if name == conversation.branch else " "
        talk(f"{mark} {name}  {len(turns)} question{'s' if len(turns) != 1 else ''}, the last: {words}")


def branch_names(chat: Chat) -> Iterable[str]:
    """What Tab offers behind /branches."""
    return chat.session.conversation.branches


def clear(chat: Chat, argument: str) -> None:
    """`/clear`."""
    chat.session.clear()
    chat.attached.clear()
    note("the conversation is forgotten; /branches still has it")


def pin(chat: Chat, argument: str) -> None:
    """`/pin [N]`: the exchange N of /ctx, or the last."""
    conversation = chat.session.conversation
    exchanges = conversation.exchanges()
    try:
        number = int(argument) if argument else len(exchanges)
    except ValueError:
        number = 0
    if not 1 <= number <= len(exchanges):
        raise UsageError(f"there is no turn {argument or number}", hint="/ctx numbers them")
    question = exchanges[number - 1][0]
    is_pinned = question.number not in conversation.pinned
    conversation.pin(question.number, pinned=is_pinned)
    note(f"turn {number} {'stays when the oldest are dropped' if is_pinned else 'may be dropped again'}")


def copy(chat: Chat, argument: str) -> None:
    """`/copy`: through the terminal (OSC 52), so that it works over ssh."""
    answers = [turn for turn in chat.session.conversation.path() if turn.message.role == "assistant"]
    if not answers or not answers[-1].message.content:
        raise UsageError("there is no answer to copy yet")
    text = answers[-1].message.content
    data = text.encode()
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        raise UsageError("this terminal has no clipboard", hint="pipe the chat into a file, or select with the mouse")
    if len(data) > CLIPBOARD_LIMIT_BYTES:
        raise UsageError(f"the answer has {len(data)} bytes, terminals take {CLIPBOARD_LIMIT_BYTES} at most")
    sys.stderr.write(f"\x1b]52;c;{base64.b64encode(data).decode()}\x07")
    sys.stderr.flush()
    note(f"{len(text)} characters were given to the terminal's clipboard")


def show_last(chat: Chat) -> None:
    """The last exchange in brief, so that the user knows where the conversation stands."""
    exchanges = chat.session.conversation.exchanges()
    if not exchanges:
        return
    for turn in exchanges[-1]:
        mark = "> " if turn.message.role == "user" else "  "
        if turn.message.content:
            note(f"{mark}{_first(turn.message.content, 200)}")
    if chat.session.conversation.is_unanswered:
        note("the last message has no answer yet: /retry asks again")


def _first(text: str, width: int = 60) -> str:
    from glm4run.session import shorten

    return inert(shorten(text, width))
