"""Tables on the screen while they stream: rows are held until the columns' widths are known, then written once.

Widths are those of all rows, or of the first ones where the table is longer than what may be held; a cell that is wider
is wrapped inside its column. A window too narrow for columns gets each row as a list of "header: value" lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from rich.cells import cell_len

Run = tuple[str, str]  # text, and the name of its style
Align = Literal["left", "right", "center"]
GAP, RULE, CROSS = " │ ", "─", "─┼─"
MOST_HELD = 8  # rows: more would keep a reader of a slow model waiting
WIDEST_CHARACTER = 2  # columns
LEAST_COLUMNS = 8  # of the window, to which a column may be narrowed


@dataclass(frozen=True)
class TableRow:
    """One row as it was written: cells of styled text. A header begins a new table and says how columns are aligned."""

    cells: tuple[tuple[Run, ...], ...]
    aligns: tuple[Align, ...] = ()
    is_header: bool = False


@dataclass
class TableWriter:
    """Rows to lines; `write` gets a text and a style."""

    write: Callable[[str, str], None]
    width: Callable[[], int]  # columns of the window, now
    height: Callable[[], int]
    _header: TableRow | None = None
    _held: list[TableRow] = field(default_factory=list)
    _widths: list[int] | None = None  # of the columns as they would like to be; None while rows are held

    def push(self, row: TableRow) -> None:
        """One row more."""
        if row.is_header:
            self.end()
            self._header = row
            return
        self._held.append(row)
        if self._widths is not None or len(self._held) >= max(2, min(MOST_HELD, self.height() // 2)):
            self._write_held(may_follow=True)

    def end(self) -> None:
        """The table is over, if there is one."""
        if self._header is not None:
            self._write_held(may_follow=False)
        self._header, self._widths = None, None

    def _write_held(self, *, may_follow: bool) -> None:
        header, rows, self._held = self._header, self._held, []
        assert header is not None
        is_begin = self._widths is None
        if self._widths is None:
            every = [header, *rows]
            self._widths = [max(_cells(row.cells[n]) for row in every) for n in range(len(header.cells))]
        # Rows that follow may have a character where these have none, or a wide one where these have a narrow one.
        spare = sum(max(0, WIDEST_CHARACTER - width) for width in self._widths) if may_follow else 0
        widths = fit(self._widths, self.width() - 1 - spare)  # a full line would make some terminals wrap
        if widths is None:
            for number, row in enumerate(rows):
                self._write_record(header, row, is_first=is_begin and number == 0)
            if is_begin and not rows:
                self._write_lines(header, [max(1, self.width() - 1)])
            return
        if is_begin:
            self._write_lines(header, widths)
            self.write(CROSS.join(RULE * width for width in widths) + "\n", "dim")
        for row in rows:
            self._write_lines(row, widths)

    def _write_lines(self, row: TableRow, widths: list[int]) -> None:
        """A row in columns; in one column if there is but one width."""
        assert self._header is not None
        aligns = self._header.aligns
        if len(widths) < len(row.cells):
            for cell in row.cells:
                for line in wrap(cell, widths[0]):
                    self._write_runs([*line, ("\n", "")])
            return
        columns = [wrap(cell, width) for cell, width in zip(row.cells, widths, strict=True)]
        for number in range(max(map(len, columns))):
            for place, (lines, width, align) in enumerate(zip(columns, widths, aligns, strict=True)):
                if place:
                    self.write(GAP, "dim")
                line = lines[number] if number < len(lines) else []
                is_last = place == len(widths) - 1
                self._write_runs(_aligned(line, width, align, pad_right=not is_last))
            self.write("\n", "")

    def _write_record(self, header: TableRow, row: TableRow, *, is_first: bool) -> None:
        width = max(LEAST_COLUMNS, self.width() - 1)
        if not is_first:
            self.write(RULE * min(width, 20) + "\n", "dim")
        for name, cell in zip(header.cells, row.cells, strict=True):
            if not name and not cell:
                continue
            label: tuple[Run, ...] = (*name, (": ", "bold")) if name else ()
            for number, line in enumerate(wrap((*label, *cell), width - 2)):
                self.write("  " if number else "", "")
                self._write_runs([*line, ("\n", "")])

    def _write_runs(self, runs: list[Run]) -> None:
        for text, style in runs:
            self.write(text, style)


def fit(natural: list[int], available: int) -> list[int] | None:
    """Widths of columns that stand side by side in `available`: the widest give way. None: the window is too narrow."""
    room = available - len(GAP) * (len(natural) - 1)
    if sum(natural) <= room:
        return list(natural)
    cap = max(natural)
    while cap >= LEAST_COLUMNS and sum(min(width, cap) for width in natural) > room:
        cap -= 1
    if cap < LEAST_COLUMNS:
        return None
    widths = [min(width, cap) for width in natural]
    for place, width in enumerate(natural):  # what the cap leaves over
        if width > widths[place] and sum(widths) < room:
            widths[place] += 1
    return widths


def wrap(runs: tuple[Run, ...], width: int) -> list[list[Run]]:
    """Styled text in lines of at most `width` columns, broken between words, and anywhere in Chinese or a long word."""
    lines: list[list[Run]] = [[]]
    used = 0

    def put(text: str, style: str) -> None:
        line = lines[-1]
        if line and line[-1][1] == style:
            line[-1] = (line[-1][0] + text, style)
        else:
            line.append((text, style))

    for unit, blank in _units(runs):
        cells = sum(cell_len(character) for character, _ in unit)
        gap = 1 if blank is not None and used else 0
        if unit == [("\n", "")] or (used and used + gap + cells > width):
            lines.append([])
            used = gap = 0
        if unit == [("\n", "")]:
            continue
        if gap and blank is not None:
            put(" ", blank)
            used += 1
        for character, style in unit:
            size = cell_len(character)
            if used and used + size > width:
                lines.append([])
                used = 0
            put(character, style)
            used += size
    return lines


def _units(runs: tuple[Run, ...]) -> Iterator[tuple[list[Run], str | None]]:
    """What may not be broken, and the style of the blank before it, or None where there is none."""
    unit: list[Run] = []
    blank: str | None = None
    for text, style in runs:
        for character in text:
            if character in " \n" or cell_len(character) == 2:
                if unit:
                    yield unit, blank
                    unit, blank = [], None
                if character == " ":
                    blank = style
                else:
                    yield [(character, "" if character == "\n" else style)], blank
                    blank = None
            else:
                unit.append((character, style))
    if unit:
        yield unit, blank


def _cells(runs: tuple[Run, ...]) -> int:
    """Columns of a cell whose lines stay whole."""
    return max(cell_len(line) for line in "".join(text for text, _ in runs).split("\n"))


def _aligned(line: list[Run], width: int, align: Align, *, pad_right: bool) -> list[Run]:
    free = max(0, width - sum(cell_len(text) for text, _ in line))
    left = {"left": 0, "right": free, "center": free // 2}[align]
    right = free - left if pad_right else 0
    return [*([(" " * left, "")] if left else []), *line, *([(" " * right, "")] if right else [])]
