"""Markdown to styled text while it streams: what was written is never written again, and nothing waits for long.

A span is held back until it closes, ends with its line or has grown too long; then it is shown styled, or literally. A
table comes row by row. Knows no terminal: pieces of text with the name of a style come out, and rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from glm4run.cli.chat.tables import Align, Run, TableRow

Style = Literal["", "bold", "italic", "code", "heading", "dim", "bold italic"]
SPAN_LIMIT = 240  # characters: a mark that is not closed within these is taken literally
ROW_LIMIT = 4000  # characters: a longer line is no row of a table
MARKER_LIMIT = 24  # characters at the start of a line that may still become a rule or a marker


@dataclass(frozen=True)
class Piece:
    """A stretch of text. `hang`: columns to indent wrapped lines by; `is_fixed`: never wrapped at words."""

    text: str
    style: Style = ""
    hang: int = 0
    is_fixed: bool = False


# The blanks behind a marker belong to it: more of them may come.
_UNDECIDED = re.compile(r"[ \t]*(#{1,6}[ \t]*|[-*_=+][-*_= \t]*|\d{1,4}([.)][ \t]*)?|>|`{1,2}|~{1,2})?")
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[^\n]*")
_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+")
_RULE = re.compile(r"[ \t]*([-*_])([ \t]*\1){2,}[ \t]*\n")
_BULLET = re.compile(r"([ \t]*)[-*+][ \t]+")
_NUMBER = re.compile(r"[ \t]*\d{1,4}[.)][ \t]+")
_QUOTE = re.compile(r"[ \t]*>[ \t]?")
_DELIMITER = re.compile(r"[ \t]*\|?[ \t]*:?-+:?[ \t]*(\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*")
_DELIMITER_BEGUN = re.compile(r"[ \t|:-]*")
_CELL_END = re.compile(r"(?<!\\)\|")
_LINE_BREAK = re.compile(r"<br */?>", re.IGNORECASE)
_SPECIAL = re.compile(r"[*_`\\\n]")
_ESCAPED = "*_`#\\"


class MarkdownStream:
    """One answer. `push` and `flush` give pieces whose texts are the answer without its marks."""

    def __init__(self) -> None:
        self._pending = ""
        self._fence = ""  # the one that opened the code block we are in
        self._columns = 0  # of the table we are in
        self._at_line_start = True
        self._line: Style = ""
        self._hang = 0
        self._is_fixed = False
        self._last = "\n"  # the character before the pending ones

    def push(self, text: str) -> Iterator[Piece | TableRow]:
        """What can be shown once `text` has come."""
        self._pending += text
        yield from self._advance(is_last=False)

    def flush(self) -> Iterator[Piece | TableRow]:
        """The rest, when no more will come."""
        yield from self._advance(is_last=True)

    def _advance(self, *, is_last: bool) -> Iterator[Piece | TableRow]:
        while self._pending:
            before = len(self._pending), self._at_line_start
            if self._at_line_start:
                yield from self._start_line(is_last=is_last)
            elif self._fence:
                yield from self._code()
            else:
                yield from self._inline(is_last=is_last)
            if before == (len(self._pending), self._at_line_start):
                return  # more must come first

    def _take(self, count: int) -> str:
        taken, self._pending = self._pending[:count], self._pending[count:]
        if taken:
            self._last = taken[-1]
        return taken

    def _begin(self, line: Style = "", hang: int = 0, *, is_fixed: bool = False) -> None:
        self._at_line_start = False
        self._line, self._hang, self._is_fixed = line, hang, is_fixed

    def _piece(self, text: str, style: Style | None = None) -> Piece:
        return Piece(text, self._line if style is None else style, self._hang, self._is_fixed)

    def _start_line(self, *, is_last: bool) -> Iterator[Piece | TableRow]:
        text = self._pending
        has_end = "\n" in text
        fence = _FENCE.match(text)
        if self._fence:
            stripped = text.lstrip()
            closes = stripped.startswith(self._fence) or self._fence.startswith(stripped.rstrip("\n"))
            if closes and not has_end and not is_last:
                return
            is_close = fence is not None and text[: fence.end()].strip().strip(self._fence[0]) == "" and closes
            self._begin("dim" if is_close else "code", is_fixed=True)
            if is_close and fence is not None:
                yield self._piece(self._take(fence.end()))
                self._fence = ""
            return
        if fence is not None:
            if not has_end and not is_last:
                return
            self._begin("dim", is_fixed=True)
            self._fence = fence.group(1)
            yield self._piece(self._take(fence.end()))
            return
        if not has_end and not is_last and len(text) < MARKER_LIMIT and _UNDECIDED.fullmatch(text):
            return
        if text.lstrip(" \t").startswith("|") and len(text.partition("\n")[0]) < ROW_LIMIT:
            row = self._row(text, is_last=is_last)
            if row is None:
                return
            if isinstance(row, TableRow):
                yield row
                return
        self._columns = 0
        yield from self._mark(text)

    def _row(self, text: str, *, is_last: bool) -> TableRow | bool | None:
        """The row that a line with a bar at its beginning is; False if it is none, None if more must come first."""
        line, newline, rest = text.partition("\n")
        if not newline and not is_last:
            return None
        if self._columns:
            self._take(len(line) + len(newline))
            return TableRow(_cells_of(line, self._columns, ""))
        following, ended, _ = rest.partition("\n")
        if not ended and not is_last and _DELIMITER_BEGUN.fullmatch(following):
            return None
        aligns = tuple(map(_align, _split(following)))
        if not _DELIMITER.fullmatch(following) or len(aligns) != len(_split(line)):
            return False
        self._columns = len(aligns)
        self._take(len(line) + len(newline) + len(following) + len(ended))
        return TableRow(_cells_of(line, self._columns, "bold"), aligns, is_header=True)

    def _mark(self, text: str) -> Iterator[Piece]:
        """The beginning of a line of prose, its marker taken off or made up."""
        if rule := _RULE.match(text):
            self._begin("dim")
            self._take(rule.end() - 1)
            yield self._piece("─" * 20)
        elif heading := _HEADING.match(text):
            self._begin("heading")
            self._take(heading.end())
        elif bullet := _BULLET.match(text):
            self._begin(hang=_indentation(text) + 2)
            self._take(bullet.end())
            yield self._piece(f"{bullet.group(1)}• ")
        elif number := _NUMBER.match(text):
            self._begin(hang=number.end())
            yield self._piece(self._take(number.end()))
        elif quote := _QUOTE.match(text):
            self._begin("italic", hang=2)
            self._take(quote.end())
            yield self._piece("│ ", "dim")
        else:
            self._begin(hang=_indentation(text), is_fixed=text.lstrip().startswith("|"))  # a row of no table

    def _code(self) -> Iterator[Piece]:
        line, newline, _ = self._pending.partition("\n")
        if line:
            yield self._piece(self._take(len(line)))
        if newline:
            yield from self._end_line()

    def _end_line(self) -> Iterator[Piece]:
        self._take(1)
        yield Piece("\n")
        self._at_line_start = True

    def _inline(self, *, is_last: bool) -> Iterator[Piece]:
        special = _SPECIAL.search(self._pending)
        plain = len(self._pending) if special is None else special.start()
        if plain:
            yield self._piece(self._take(plain))
        if special is None:
            return
        line, newline, _ = self._pending.partition("\n")
        if not line:
            yield from self._end_line()
            return
        certain = bool(newline) or is_last or len(line) > SPAN_LIMIT
        found = _span(line, self._last, self._line, is_whole=certain)
        if found is None:
            return
        length, parts = found
        self._take(length)
        for text, style in parts:
            yield self._piece(text, style)


def _indentation(text: str) -> int:
    """Columns before a line's first character; a line of code that is no block would hang too far."""
    return min(len(text) - len(text.lstrip(" \t")) + 3 * text[: len(text) - len(text.lstrip(" \t"))].count("\t"), 20)


def _split(line: str) -> list[str]:
    """The cells of a row."""
    inner = line.strip().removeprefix("|")
    cells = _CELL_END.split(inner)
    if len(cells) > 1 and not cells[-1].strip():  # the bar at the end
        cells.pop()
    return [cell.strip().replace("\\|", "|") for cell in cells]


def _cells_of(line: str, columns: int, style: Style) -> tuple[tuple[Run, ...], ...]:
    """As many cells as the table has columns; what a row has more of stays in the last."""
    cells = _split(line)
    cells = [*cells[: columns - 1], " | ".join(cells[columns - 1 :])]
    cells += [""] * (columns - len(cells))
    return tuple(tuple(_runs(cell, style)) for cell in cells)


def _runs(cell: str, style: Style) -> Iterator[Run]:
    for number, line in enumerate(_LINE_BREAK.split(cell)):
        if number:
            yield "\n", ""
        yield from _spans(line, style)


def _align(cell: str) -> Align:
    if cell.endswith(":"):
        return "center" if cell.startswith(":") else "right"
    return "left"


def _span(line: str, last: str, outer: Style, *, is_whole: bool) -> tuple[int, list[tuple[str, Style]]] | None:
    """What the mark at the start of `line` makes: characters taken, and styled texts. None: more must come first."""
    mark = line[0]
    run = len(line) - len(line.lstrip(mark))
    if run == len(line) and not is_whole:
        return None
    literal = run, [(line[:run], outer)]
    if mark == "\\":
        return (2, [(line[1], outer)]) if len(line) > 1 and line[1] in _ESCAPED else (1, [("\\", outer)])
    if mark == "`":
        close = re.compile(rf"(?<!`)`{{{run}}}(?!`)").search(line, run)
        if close is None or (close.end() == len(line) and not is_whole):
            return literal if is_whole else None
        inner = line[run : close.start()]
        return close.end(), [(inner[1:-1] if inner.strip() and inner[0] == inner[-1] == " " else inner, "code")]
    if run > 3 or not _may_open(mark, run, last, line[run : run + 1]):
        return literal
    edge = r"(?!\w)" if mark == "_" else ""
    close = re.compile(rf"(?<![\s{re.escape(mark)}]){re.escape(mark)}{{{run}}}(?!{re.escape(mark)}){edge}").search(
        line, run + 1
    )
    if close is None or (close.end() == len(line) and not is_whole):
        return literal if is_whole else None
    style: Style = outer if outer == "heading" else ("italic", "bold", "bold italic")[run - 1]
    return close.end(), list(_spans(line[run : close.start()], style))


def _spans(text: str, style: Style) -> Iterator[tuple[str, Style]]:
    """A whole text inside a span."""
    last = " "
    while text:
        special = _SPECIAL.search(text)
        plain = len(text) if special is None else special.start()
        if plain:
            yield text[:plain], style
            last, text = text[plain - 1], text[plain:]
            continue
        found = _span(text, last, style, is_whole=True)
        assert found is not None
        yield from found[1]
        last, text = text[found[0] - 1], text[found[0] :]


def _may_open(mark: str, run: int, last: str, following: str) -> bool:
    """Emphasis opens before a character: not inside a Latin word or a product (2*3), but inside Chinese text."""
    if not following or following.isspace():
        return False
    if mark == "_":
        return not last.isalnum()
    return run > 1 or not (last.isascii() and last.isalnum())
