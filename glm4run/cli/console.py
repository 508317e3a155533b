"""stdout for text and JSON, stderr for everything that is said about them.

rich is imported when there is something for stderr: many runs of the light commands say nothing there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from glm4run.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console


def stderr_console() -> Console:
    """A console on stderr. Made anew each time: tests and redirections replace the stream.

    A terminal wraps at words; a pipe or a log gets each message as one line.
    """
    from rich.console import Console

    return Console(stderr=True, soft_wrap=not sys.stderr.isatty(), highlight=False)


def talk(message: str, *, style: str = "", only: str = "") -> None:
    """One line to the user on stderr; `style` applies to the leading `only`, or to all of it."""
    from rich.markup import escape

    if style and only and message.startswith(only):
        text = f"[{style}]{escape(only)}[/]{escape(message.removeprefix(only))}"
    else:
        text = f"[{style}]{escape(message)}[/]" if style else escape(message)
    stderr_console().print(text)


def say_error(message: str, hint: str | None) -> None:
    """What went wrong, and what to do about it."""
    talk(f"error: {message}", style="bold red", only="error:")
    if hint:
        talk(f"hint: {hint}", style="cyan", only="hint:")


def note(message: str) -> None:
    """Something worth knowing that needs no action."""
    talk(message, style="dim")


def write_json(data: Any) -> None:
    """Machine-readable output: one JSON document on stdout."""
    sys.stdout.write(json.dumps(data, ensure_ascii=False, indent=2) + "\n")
    sys.stdout.flush()


def write_text(text: str) -> None:
    """Generated text to stdout, at once."""
    _write_at_once(sys.stdout, text)


def write_error_text(text: str) -> None:
    """Generated text to stderr, at once: a thought."""
    _write_at_once(sys.stderr, text)


def _write_at_once(stream: TextIO, text: str) -> None:
    """A terminal that cannot show a character gets a replacement, not a crash."""
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, errors="replace").decode(encoding))
    stream.flush()


def read_stdin() -> str:
    """All of stdin as UTF-8. Raises UsageError where it is not."""
    return _decode(sys.stdin.buffer.read())


def read_stdin_line() -> str:
    """The next line of stdin with its end, "" at the end of the input. Raises UsageError where it is not UTF-8."""
    return _decode(sys.stdin.buffer.readline())


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the input is not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}",
            hint="convert it, for example with `iconv -t utf-8`",
        ) from error


@contextmanager
def byte_progress(what: str) -> Iterator[Any]:
    """A bar with rate and time left, on a terminal only; gives the callback (bytes done, bytes in all)."""
    console = stderr_console()
    if not console.is_terminal:
        yield None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield update


@contextmanager
def token_progress(what: str, unit: str = "tokens") -> Iterator[Any]:
    """A bar over the tokens of a long prompt, on a terminal only; gives the callback (tokens done, tokens in all).

    The bar is there only between the callback's first call and its last: a live display that is still running while
    an answer streams would move the cursor between its words.
    """
    console = stderr_console()
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn(f"{{task.completed}}/{{task.total}} {unit}"))
    progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    task = progress.add_task(what, total=None)

    def update(done: int, total: int) -> None:
        if done < total:
            progress.start()
        progress.update(task, completed=done, total=total)
        if done >= total:
            progress.stop()

    try:
        yield update
    finally:
        progress.stop()


@contextmanager
def count_progress(what: str, done: int, total: int) -> Iterator[Any]:
    """A bar over things that are done one by one, below the notes, on a terminal only; gives the callback (done)."""
    console = stderr_console()
    if not console.is_terminal:
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total, completed=done)
        yield lambda count: progress.update(task, completed=count)
