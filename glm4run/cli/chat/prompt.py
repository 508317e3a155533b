"""Where messages come from: a terminal with editing, a dumb one, or a pipe.

Editing (several lines, paste, history, completion, wide characters) is prompt_toolkit's, which is imported only once
a terminal is there. The prompt is talk, not text: it goes to stderr, so that stdout can be piped.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from glm4run.cli.console import read_stdin_line, talk
from glm4run.errors import UsageError
from glm4run.user_files import user_path

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

PROMPT, CONTINUED = "> ", ". "
Complete = Callable[[str], Iterable[tuple[str, int]]]
"""The text before the cursor -> (what may stand there, from how many characters back)."""


class Reader(Protocol):
    """Reads messages and answers to questions."""

    is_interactive: bool

    def message(self) -> str:
        """One message. Raises EOFError at the end of the input, KeyboardInterrupt for Ctrl-C."""
        ...

    def ask(self, question: str) -> str:
        """One line in answer to a question; "" where nobody can be asked."""
        ...


def choose_reader(complete: Complete, history: Path | None) -> Reader:
    """The reader for this process's stdin. `history`: a file; None keeps it in memory."""
    if not sys.stdin.isatty():
        return PipeReader()
    if not sys.stderr.isatty() or os.environ.get("TERM", "dumb") in ("dumb", ""):
        return PlainReader()
    return TerminalReader(complete, history)


class PipeReader:
    """A message a line; a line that ends in a backslash goes on in the next."""

    is_interactive = False

    def message(self) -> str:
        return _join_lines(self._line)

    def ask(self, question: str) -> str:
        return ""

    def _line(self, is_first: bool) -> str:
        return read_stdin_line()


class PlainReader(PipeReader):
    """A terminal without cursor movement: the system's own line editing."""

    is_interactive = True

    def __init__(self) -> None:
        _edit_whole_characters()

    def message(self) -> str:
        while True:
            try:
                return _join_lines(self._line)
            except UsageError as error:  # half a character: a terminal that does not know UTF-8
                talk(f"error: {error.message}; please type it again", style="bold red", only="error:")

    def ask(self, question: str) -> str:
        sys.stderr.write(question)
        sys.stderr.flush()
        return read_stdin_line().strip()

    def _line(self, is_first: bool) -> str:
        sys.stderr.write(PROMPT if is_first else CONTINUED)
        sys.stderr.flush()
        return read_stdin_line()


def _join_lines(read: Callable[[bool], str]) -> str:
    lines: list[str] = []
    while True:
        line = read(not lines)
        if not line and not lines:
            raise EOFError
        text = line.rstrip("\r\n")
        if line and text.endswith("\\"):
            lines.append(text[:-1])
            continue
        return "\n".join([*lines, text])


def _edit_whole_characters() -> None:
    """Tells the terminal that its line is UTF-8, so that Backspace takes a whole character."""
    import termios

    try:
        flag = getattr(termios, "IUTF8", 0x4000)  # Linux's value; Python names it from 3.13 on
        settings = termios.tcgetattr(sys.stdin)
        settings[0] |= flag
        termios.tcsetattr(sys.stdin, termios.TCSANOW, settings)
    except (OSError, termios.error):
        return


class TerminalReader:
    """prompt_toolkit's editor."""

    is_interactive = True

    def __init__(self, complete: Complete, history: Path | None) -> None:
        self._session = _prompt_session(complete, history)

    def message(self) -> str:
        return str(self._session.prompt(PROMPT))

    def ask(self, question: str) -> str:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output

        asking: PromptSession[str] = PromptSession(output=create_output(stdout=sys.stderr))
        return asking.prompt(question).strip()


def _prompt_session(complete: Complete, history: Path | None) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.output import create_output
    from prompt_toolkit.shortcuts import CompleteStyle

    class Words(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            for text, back in complete(document.text_before_cursor):
                yield Completion(text, start_position=-back)

    return PromptSession(
        multiline=True,
        prompt_continuation=lambda width, line, wrapped: CONTINUED,
        key_bindings=_keys(),
        completer=Words(),
        complete_while_typing=False,
        # Like a shell's: completions are listed, not drawn over the screen, which has room in ten rows too.
        complete_style=CompleteStyle.READLINE_LIKE,
        reserve_space_for_menu=0,
        history=InMemoryHistory() if history is None else FileHistory(_private_file(history)),
        enable_open_in_editor=True,
        tempfile_suffix=".md",
        output=create_output(stdout=sys.stderr),
    )


def _keys() -> Any:
    """Enter sends, unless the line ends in a backslash; Alt-Enter is a new line; a paste is text, whatever it holds."""
    from prompt_toolkit.application.current import get_app
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()
    is_editing = Condition(
        lambda: get_app().layout.current_buffer is get_app().layout.get_buffer_by_name(DEFAULT_BUFFER)
    )

    @keys.add("enter", filter=is_editing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end_of_line:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=is_editing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-x", "c-e", filter=is_editing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()

    return keys


def _private_file(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)
    return str(path)


def history_file() -> Path:
    """Where the prompt's history is kept (XDG)."""
    return user_path("state", "history")


def editor_command() -> list[str] | None:
    """The user's editor: $VISUAL, $EDITOR, else one that is installed."""
    named = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if named:
        return shlex.split(named)
    found = next((path for name in ("nano", "vim", "vi") if (path := shutil.which(name))), None)
    return None if found is None else [found]


def edit_text(text: str) -> str:
    """`text` as the user left it in the editor.

    Raises:
        UsageError: there is no editor, or it failed.
    """
    command = editor_command()
    if command is None:
        raise UsageError("no editor was found", hint="set EDITOR, or give the new text: /edit TEXT")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "message.md"
        path.write_text(text, encoding="utf-8")
        try:
            code = subprocess.run([*command, str(path)], check=False).returncode
        except OSError as error:
            raise UsageError(f"the editor cannot be started: {error}", hint="set EDITOR") from error
        if code:
            raise UsageError(f"the editor {command[0]} ended with code {code}; the message stays as it was")
        return path.read_text(encoding="utf-8", errors="replace").rstrip("\n")
