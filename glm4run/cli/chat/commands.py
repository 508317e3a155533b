"""The table of a chat's commands: name, arguments, help, what Tab offers, and what runs. `/help` prints this table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from glm4run.cli.chat import on_context, on_conversation, on_sessions, on_settings
from glm4run.cli.chat.answering import ask
from glm4run.cli.chat.completion import Words
from glm4run.cli.chat.completion import complete as complete_words
from glm4run.cli.chat.state import Chat, ChatEnded
from glm4run.cli.console import note, say_error, stderr_console, talk
from glm4run.errors import Glm4RunError

ESCAPE = "//"
WIDE_ENOUGH = 70  # columns, for a table
KEYS_HELP = (
    "Alt-Enter or a backslash at the end starts a new line; a paste stays one message; Tab completes; "
    "Ctrl-X Ctrl-E opens the editor. Ctrl-C stops an answer and keeps the conversation, Ctrl-D leaves. "
    "A message that starts with a slash is sent with two: //like this."
)


@dataclass(frozen=True)
class Command:
    """One command. `words`: what may follow it, for Tab; None stands for names of files."""

    name: str
    arguments: str
    help: str
    run: Callable[[Chat, str], None]
    words: Callable[[Chat], Iterable[str]] | None = lambda _: ()


def _help(chat: Chat, argument: str) -> None:
    from rich.table import Table
    from rich.text import Text

    rows = [(f"{command.name} {command.arguments}".rstrip(), command.help) for command in COMMANDS.values()]
    console = stderr_console()
    if console.is_terminal and console.width >= WIDE_ENOUGH:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for usage, text in rows:
            table.add_row(Text(usage, style="bold"), text)
        console.print(table)
    else:  # a narrow window or a file: a line each
        for usage, text in rows:
            talk(f"{usage}  {text}")
    talk(KEYS_HELP)


def _leave(chat: Chat, argument: str) -> None:
    raise ChatEnded


_ALL = (
    Command("/help", "", "show this", _help),
    Command("/system", "[TEXT|off]", "show or set the system message", on_settings.system),
    Command(
        "/set",
        "NAME VALUE",
        "a sampling parameter, overflow, or the format of answers",
        on_settings.set_value,
        on_settings.set_words,
    ),
    Command("/show", "", "every setting", on_settings.show),
    Command("/undo", "", "take the last question and its answer back", on_conversation.undo),
    Command("/redo", "", "bring back what /undo took; else answer the last question anew", on_conversation.redo),
    Command("/retry", "[NAME=VALUE]", "answer the last question anew, with other settings once", on_conversation.retry),
    Command("/edit", "[TEXT]", "change the last question, in your editor, and ask again", on_conversation.edit),
    Command("/fork", "[NAME]", "go on in a new branch; the old one stays", on_conversation.fork),
    Command(
        "/branches", "[NAME]", "list the branches, or go to one", on_conversation.branches, on_conversation.branch_names
    ),
    Command("/clear", "", "start anew; what was said stays as a branch", on_conversation.clear),
    Command("/pin", "[N]", "keep a turn when the oldest are dropped (again: no longer)", on_conversation.pin),
    Command("/file", "[PATH|off]", "attach a text file to the next message", on_context.file, None),
    Command("/ctx", "", "what the context is spent on", on_context.ctx),
    Command("/prompt", "", "the exact tokens of the conversation, control tokens marked", on_context.prompt),
    Command("/tokens", "TEXT", "how a text is cut into tokens", on_context.tokens),
    Command("/copy", "", "the last answer to the clipboard", on_conversation.copy),
    Command("/save", "[NAME]", "keep this session, under a name", on_sessions.save),
    Command("/load", "NAME", "go on with a saved session", on_sessions.load, on_sessions.session_names),
    Command("/sessions", "", "list the saved sessions", on_sessions.sessions),
    Command("/think", "[show|hide]", "show or hide the thoughts of a reasoning model", on_settings.think),
    Command("/tools", "[FILE|examples|off]", "list the tools, or take them from a file", on_settings.tools, None),
    Command("/exit", "", "leave", _leave),
)
COMMANDS = {command.name: command for command in _ALL}
"""Every command by its name, in the order of `/help`."""


def complete(chat: Chat, text: str) -> list[tuple[str, int]]:
    """What Tab offers for the text before the cursor."""

    def words(command: Command) -> Words | None:
        offered = command.words
        return None if offered is None else lambda: offered(chat)

    return complete_words(text, {name: words(command) for name, command in COMMANDS.items()})


def handle(chat: Chat, text: str) -> None:
    """Runs a command, or sends a message. Expected failures are said, and the chat goes on.

    Raises:
        ChatEnded: the user wants to go.
    """
    text = text.rstrip()
    if not text.strip():
        if chat.attached:
            note("write what to do with the attached file")
        return
    if text.startswith(ESCAPE):
        ask(chat, text[1:])
        return
    if not text.startswith("/"):
        ask(chat, text)
        return
    name, _, argument = text.partition(" ")
    name, newline, more = name.partition("\n")
    command = COMMANDS.get(name)
    if command is None:
        hint = f"//{name[1:]} ... sends it as a message"
        talk(f"unknown command {name}: /help lists them; {hint}")
        return
    try:
        command.run(chat, f"{more} {argument}".strip() if newline else argument.strip())
    except Glm4RunError as error:
        say_error(error.message, error.hint)
