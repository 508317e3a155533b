"""The commands about sessions on disk: /save, /load, /sessions."""

from __future__ import annotations

import time
from collections.abc import Iterable

from rich.filesize import decimal

from glm4run.cli.chat.state import Chat
from glm4run.cli.chat.view import inert
from glm4run.cli.console import note, talk
from glm4run.errors import UsageError


def save(chat: Chat, argument: str) -> None:
    """`/save [NAME]`: a name for the session; where nothing was kept until now, from here on it is."""
    from glm4run.cli.chat.opening import keep, rename
    from glm4run.session_files import new_name

    if not chat.session.conversation.turns:
        raise UsageError("there is nothing to save yet", hint="write a message first")
    if chat.files is None:
        keep(chat, argument or new_name())
    elif argument:
        rename(chat, argument)
    assert chat.files is not None
    note(f"saved as {chat.files.name}; `glm4run chat --resume {chat.files.name}` goes on with it")


def load(chat: Chat, argument: str) -> None:
    """`/load NAME`: leaves this session as it is and goes on with another."""
    from glm4run.cli.chat.opening import resume

    if not argument:
        raise UsageError("/load takes the name of a session", hint="/sessions lists them")
    resume(chat, argument)


def sessions(chat: Chat, argument: str) -> None:
    """`/sessions`."""
    from glm4run.session import shorten
    from glm4run.session_files import list_sessions, sessions_folder

    found = list_sessions()
    here = "" if chat.files is None else chat.files.name
    for summary in found:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(summary.changed))
        mark = "*" if summary.name == here else " "
        cache = f", cache {decimal(summary.cache_bytes)}" if summary.cache_bytes else ""
        talk(f"{mark} {summary.name}  {when}, {summary.model}, {summary.turns} messages{cache}")
        note(f"    {inert(shorten(summary.first_words, 60))}")
    if not found:
        note("no session is saved yet")
    note(f"in {sessions_folder()}; delete a folder to delete its session")


def session_names(chat: Chat) -> Iterable[str]:
    """What Tab offers behind /load."""
    from glm4run.session_files import list_sessions

    return [summary.name for summary in list_sessions()]
