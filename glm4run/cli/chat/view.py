"""Answers and thoughts on the screen: appended only, wrapped at words, with wide glyphs counted as two columns.

The width is asked for at every line, so a window may change while an answer streams. On a pipe, with `--raw`, NO_COLOR
or TERM=dumb the text is written as it comes.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import TextIO

from rich.cells import cell_len

from glm4run.cli.chat.markdown import MarkdownStream, Piece
from glm4run.cli.chat.tables import TableRow, TableWriter
from glm4run.cli.console import write_error_text, write_text

_CODES = {
    "bold": "1",
    "italic": "3",
    "bold italic": "1;3",
    "code": "36",
    "heading": "1;35",
    "dim": "2",
}
DEFAULT_WIDTH, DEFAULT_HEIGHT = 80, 24
# Control characters could move the cursor or change the terminal: text of a model or a tool never may.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def inert(text: str) -> str:
    """Text that cannot control a terminal."""
    return _CONTROLS.sub("", text)


def is_plain(stream: TextIO) -> bool:
    """Whether text goes to `stream` without styles: no terminal, a dumb one, or NO_COLOR."""
    return not stream.isatty() or os.environ.get("TERM") == "dumb" or bool(os.environ.get("NO_COLOR"))


def terminal_width(stream: TextIO) -> int:
    """Columns of a terminal as it is now."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or DEFAULT_WIDTH
    except (OSError, ValueError):
        return DEFAULT_WIDTH


def terminal_height(stream: TextIO) -> int:
    """Rows of a terminal as it is now."""
    try:
        return os.get_terminal_size(stream.fileno()).lines or DEFAULT_HEIGHT
    except (OSError, ValueError):
        return DEFAULT_HEIGHT


def styled(text: str, style: str) -> str:
    """`text` with the codes of a style."""
    code = _CODES.get(style)
    return text if code is None else f"\x1b[{code}m{text}\x1b[0m"


class Wrapper:
    """Pieces of styled text to lines of a terminal: a word that does not fit goes to the next line, whole."""

    def __init__(self, write: Callable[[str], None], width: Callable[[], int]) -> None:
        self._write, self._width = write, width
        self._column = 0
        self._word: list[tuple[str, str]] = []  # the word that is not over yet, in runs of one style
        self._word_cells = 0
        self._spaces: tuple[str, str] = ("", "")
        self._hang = 0

    def push(self, piece: Piece) -> None:
        """Writes what is over of a piece; the last word is held."""
        if piece.text != "\n":  # the last word of a line still hangs as its line does
            self._hang = piece.hang
        if piece.is_fixed:
            self.flush()
            self._emit(piece.text, piece.style)
            return
        for character in piece.text.replace("\t", "    "):
            if character == "\n":
                self.flush()
                self._write("\n")
                self._column = 0
            elif character == " ":
                self._end_word()
                self._spaces = (self._spaces[0] + " ", piece.style)
            else:
                cells = cell_len(character)
                if cells == 2:  # Chinese is broken anywhere
                    self._end_word()
                self._add(character, piece.style, cells)
                if cells == 2:
                    self._end_word()

    def flush(self) -> None:
        """Writes what is held."""
        self._end_word()
        if self._spaces[0]:
            self._emit(*self._spaces)
            self._spaces = ("", "")

    @property
    def is_at_line_start(self) -> bool:
        return self._column == 0 and not self._word

    def _add(self, character: str, style: str, cells: int) -> None:
        if self._word and self._word[-1][1] == style:
            self._word[-1] = (self._word[-1][0] + character, style)
        else:
            self._word.append((character, style))
        self._word_cells += cells

    def _end_word(self) -> None:
        if not self._word:
            return
        width = self._width()
        needed = len(self._spaces[0]) + self._word_cells
        if self._column > self._hang and self._column + needed > width:
            hang = min(self._hang, width // 2)
            self._write("\n" + " " * hang)
            self._column = hang
        elif self._spaces[0]:
            self._emit(*self._spaces)
        self._spaces = ("", "")
        for text, style in self._word:
            self._emit(text, style)
        self._word, self._word_cells = [], 0

    def _emit(self, text: str, style: str) -> None:
        self._write(styled(text, style))
        cells, width = cell_len(text), self._width()
        self._column += cells
        if self._column > width > 0:  # a word longer than the line: the terminal has wrapped it
            self._column = (self._column - 1) % width + 1


class AnswerView:
    """Where an answer goes: stdout, rendered or as it comes."""

    def __init__(self, *, is_raw: bool) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._markdown = None if is_raw or is_plain(sys.stdout) else MarkdownStream()
        self._wrapper = Wrapper(write_text, lambda: terminal_width(sys.stdout))
        self._table = TableWriter(
            lambda text, style: write_text(styled(text, style)),
            lambda: terminal_width(sys.stdout),
            lambda: terminal_height(sys.stdout),
        )
        self._ends_line = True
        self.has_shown = False

    def show(self, text: str) -> None:
        """More of the answer."""
        if not text:
            return
        self.has_shown = True
        safe = inert(text) if self._is_terminal else text
        if self._markdown is None:
            write_text(safe)
            self._ends_line = text.endswith("\n")
            return
        for piece in self._markdown.push(safe):
            self._push(piece)

    def end(self) -> None:
        """The rest, and the end of the line."""
        if self._markdown is None:
            if not (self._ends_line and self._is_terminal):
                write_text("\n")
            return
        for piece in self._markdown.flush():
            self._push(piece)
        self._table.end()
        self._wrapper.flush()
        if not self._wrapper.is_at_line_start:
            write_text("\n")

    def _push(self, piece: Piece | TableRow) -> None:
        if isinstance(piece, TableRow):
            self._wrapper.flush()  # a line has ended: nothing but blanks is held
            self._table.push(piece)
        else:
            self._table.end()
            self._wrapper.push(piece)


class ThoughtView:
    """Where a thought goes: stderr, dim; or hidden behind one word."""

    def __init__(self, *, is_hidden: bool) -> None:
        self._is_hidden = is_hidden
        self._is_plain = is_plain(sys.stderr)
        self._has_begun = False
        self._wrapper = Wrapper(write_error_text, lambda: terminal_width(sys.stderr))

    def show(self, text: str) -> None:
        """More of the thought."""
        if not text:
            return
        if self._is_hidden:
            if not self._has_begun:
                self._push("(thinking)")
        else:
            self._push(inert(text))
        self._has_begun = True

    def end(self) -> None:
        """The thought is over, or the answer is. May be called again."""
        if self._has_begun:
            self._wrapper.flush()
            write_error_text("\n" if self._wrapper.is_at_line_start or self._is_plain else "\n\n")
            self._has_begun = False

    def _push(self, text: str) -> None:
        if self._is_plain:
            write_error_text(text)
        else:
            self._wrapper.push(Piece(text, "dim"))
