"""Tables on the screen: each cell once, columns in line, never wider than the window."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from glm4run.cli.chat.markdown import MarkdownStream
from glm4run.cli.chat.tables import TableRow, TableWriter, fit, wrap


class Screen:
    """What was written, and what had been written after each line that came."""

    def __init__(self, width: int = 80, height: int = 24) -> None:
        self.text, self.width, self.height = "", width, height
        self.writer = TableWriter(self._write, lambda: self.width, lambda: self.height)

    def _write(self, text: str, style: str) -> None:
        self.text += text

    def show(self, *lines: str) -> list[str]:
        """The text after each line of Markdown, and behind the table."""
        stream, seen = MarkdownStream(), []
        for line in lines:
            for part in stream.push(line + "\n"):
                assert isinstance(part, TableRow)
                self.writer.push(part)
            seen.append(self.text)
        for part in stream.flush():
            assert isinstance(part, TableRow)
            self.writer.push(part)
        self.writer.end()
        return [*seen, self.text]


def test_columns_are_in_line_and_aligned() -> None:
    screen = Screen()
    screen.show("| Name | 数量 | **Mid** |", "|---|--:|:-:|", "| one | 5 | x |", "| 北京 | 1234 | `abcd` |", "| only |")
    lines = [line.rstrip() for line in screen.text.splitlines()]
    assert lines == [
        "Name │ 数量 │ Mid",
        "─────┼──────┼─────",
        "one  │    5 │  x",
        "北京 │ 1234 │ abcd",
        "only │      │",
    ]


def test_a_long_cell_is_wrapped_in_its_column() -> None:
    screen = Screen(width=31)
    screen.show(
        "| a | b |",
        "|---|---|",
        "| one | words that go on and on until the end |",
        "| two | 北京天气预报说明天会下大雨所以 |",
    )
    assert [line.rstrip() for line in screen.text.splitlines()] == [
        "a   │ b",
        "────┼─────────────────────────",
        "one │ words that go on and on",
        "    │ until the end",
        "two │ 北京天气预报说明天会下大",
        "    │ 雨所以",
    ]


def test_rows_are_held_until_the_table_ends_or_is_long() -> None:
    screen = Screen()
    seen = screen.show("| n | m |", "|---|---|", "| 1 | x |", "| 2 | x |")
    assert seen[:4] == [""] * 4 and seen[4].count("\n") == 4
    long = Screen(height=10)
    seen = long.show("| n | m |", "|---|---|", *(f"| {n} | {'x' * n} |" for n in range(1, 9)))
    assert seen[5] == "" and seen[6].count("\n") == 2 + 5  # half of the window
    assert seen[7].startswith(seen[6]) and seen[7] != seen[6]  # from then on as they come, nothing written again
    assert [line.rstrip() for line in long.text.splitlines()[-4:]] == ["7 │ xxxxx", "  │ xx", "8 │ xxxxx", "  │ xxx"]


def test_a_window_too_narrow_for_columns_gets_a_list() -> None:
    screen = Screen(width=40)
    head = "| Kommando | Was es tut | Seit | Vorgabe | Bereich |"
    screen.show(
        head,
        "|-|-|-|-|-|",
        "| temperature | how free the choice of words is | 0.1.0 | 0.8 | 0 to 2 |",
        "| top_p | | 0.1.0 | 1.0 |",
    )
    assert [line.rstrip() for line in screen.text.splitlines()] == [
        "Kommando: temperature",
        "Was es tut: how free the choice of",
        "  words is",
        "Seit: 0.1.0",
        "Vorgabe: 0.8",
        "Bereich: 0 to 2",
        "────────────────────",
        "Kommando: top_p",
        "Was es tut:",
        "Seit: 0.1.0",
        "Vorgabe: 1.0",
        "Bereich:",
    ]
    empty = Screen(width=10)
    empty.show(head, "|-|-|-|-|-|")
    assert empty.text.split() == [
        "Kommando",
        "Was",
        "es",
        "tut",
        "Seit",
        "Vorgabe",
        "Bereich",
    ]  # a header alone is shown too


def test_a_window_that_shrinks_is_asked_again() -> None:
    screen = Screen(width=60, height=4)
    stream = MarkdownStream()
    for number, line in enumerate(["| a | b |", "|---|---|", *(f"| {n} | {'word ' * 6}|" for n in range(6))]):
        if number == 5:
            screen.width = 24
        for part in stream.push(line + "\n"):
            assert isinstance(part, TableRow)
            screen.writer.push(part)
    screen.writer.end()
    lines = screen.text.splitlines()
    assert max(map(cell_len, lines)) > 24 and max(map(cell_len, lines[-3:])) < 24
    assert screen.text.count("word") == 36


def test_a_column_that_is_empty_at_first_has_room_for_what_comes() -> None:
    empty = "| | | | | |"
    for width in range(20, 30):
        screen = Screen(width, 3)
        screen.show(empty, "|---|---|---|---|---|", empty, "| | | | ab 你 | |", *[empty] * 4, "| 你 | | | | 你好 |")
        assert all(cell_len(line) < width for line in screen.text.splitlines())
        assert screen.text.count("你") == 3 and "好" in screen.text
    assert "─┼─" in screen.text


CELLS = st.text(st.sampled_from("ab 你好*`\\"), max_size=30)
ROWS = st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1, max_size=12))


@given(ROWS, st.integers(4, 90), st.integers(3, 30))
def test_every_character_comes_once_and_no_line_is_too_wide(rows: list[list[str]], width: int, height: int) -> None:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    screen = Screen(width, height)
    seen = screen.show(*lines)
    for before, after in itertools.pairwise(seen):
        assert after.startswith(before)  # appended only
    words = re.sub(r"[^ab你好]", "", screen.text)
    expected = re.sub(r"[^ab你好]", "", "".join(map("".join, rows)))
    assert set(expected) <= set(words)
    if "─┼─" in screen.text:
        assert sorted(words) == sorted(expected)  # wrapped cells stand side by side
        assert all(cell_len(line.rstrip()) < width or cell_len(line) <= 8 for line in screen.text.splitlines())


@pytest.mark.parametrize(
    ("natural", "available", "expected"),
    [
        ([3, 4], 80, [3, 4]),
        ([3, 40], 30, [3, 24]),
        ([40, 40], 31, [14, 14]),
        ([40, 40], 32, [15, 14]),
        ([9, 9, 9], 27, None),
        ([1, 1, 30], 20, [1, 1, 12]),
        ([5], 3, None),
    ],
)
def test_the_widest_columns_give_way(natural: list[int], available: int, expected: list[int] | None) -> None:
    assert fit(natural, available) == expected


@given(st.text(st.sampled_from("ab 你\n"), max_size=60), st.integers(2, 20))
def test_wrapped_lines_fit_and_lose_nothing(text: str, width: int) -> None:
    lines = ["".join(part for part, _ in line) for line in wrap(((text, ""),), width)]
    assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", text)
    assert all(cell_len(line) <= width for line in lines)
