"""Markdown while it streams: however it is cut, the same pieces come out, and no character of the text is lost."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4run.cli.chat.markdown import SPAN_LIMIT, MarkdownStream, Piece
from glm4run.cli.chat.tables import TableRow
from glm4run.cli.chat.view import Wrapper, inert


def as_piece(part: Piece | TableRow) -> Piece:
    """A row of a table as one piece: its cells between bars, the marks about its words taken off."""
    if isinstance(part, Piece):
        return part
    cells = ["".join(text for text, _ in cell) for cell in part.cells]
    more = f"{','.join(part.aligns)}\n" if part.is_header else ""
    return Piece(f"[{'|'.join(cells)}]\n{more}", "bold" if part.is_header else "dim")


def pieces(*chunks: str) -> list[tuple[str, str]]:
    """(text, style), neighbours of one style joined."""
    stream = MarkdownStream()
    found: list[Piece] = []
    for chunk in chunks:
        found += map(as_piece, stream.push(chunk))
    found += map(as_piece, stream.flush())
    joined: list[tuple[str, str]] = []
    for piece in found:
        if joined and joined[-1][1] == piece.style:
            joined[-1] = (joined[-1][0] + piece.text, piece.style)
        elif piece.text:
            joined.append((piece.text, piece.style))
    return joined


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", [("plain", "")]),
        ("a **b c** d", [("a ", ""), ("b c", "bold"), (" d", "")]),
        ("*a* _b_ ***c***", [("a", "italic"), (" ", ""), ("b", "italic"), (" ", ""), ("c", "bold italic")]),
        ("run `a*b*` now", [("run ", ""), ("a*b*", "code"), (" now", "")]),
        ("``a`b``", [("a`b", "code")]),
        ("**use `x` now**", [("use ", "bold"), ("x", "code"), (" now", "bold")]),
        ("中文**加粗**中文", [("中文", ""), ("加粗", "bold"), ("中文", "")]),
        ("# Title", [("Title", "heading")]),
        ("### A **b**\nc", [("A b", "heading"), ("\nc", "")]),
        ("- a\n* b\n+ c", [("• a\n• b\n• c", "")]),
        ("  - a", [("  • a", "")]),
        ("1. a\n10) b", [("1. a\n10) b", "")]),
        ("> said\nx", [("│ ", "dim"), ("said", "italic"), ("\nx", "")]),
        ("a\n---\nb", [("a\n", ""), ("─" * 20, "dim"), ("\nb", "")]),
        ("```\n# *\n```\ny", [("```", "dim"), ("\n", ""), ("# *", "code"), ("\n", ""), ("```", "dim"), ("\ny", "")]),
        ("~~~\n```\n~~~", [("~~~", "dim"), ("\n", ""), ("```", "code"), ("\n", ""), ("~~~", "dim")]),
        # What only looks like Markdown is text.
        ("2*3*4 and a_b_c", [("2*3*4 and a_b_c", "")]),
        ("def f(*args, **kwargs)", [("def f(*args, **kwargs)", "")]),
        ("a ** b ** c", [("a ** b ** c", "")]),
        ("**never closed\nnext*", [("**never closed\nnext*", "")]),
        ("`never", [("`never", "")]),
        (r"\*a\* \(x\) \\", [(r"*a* \(x\) " + "\\", "")]),
        ("#no heading", [("#no heading", "")]),
        ("-no list\n1.5 apples\n--", [("-no list\n1.5 apples\n--", "")]),
        # Tables: a header, a line of dashes with as many cells, and rows for as long as lines begin with a bar.
        ("| a | **b** |\n|---|---|", [("[a|b]\nleft,left\n", "bold")]),
        (
            "| a | b |\n|:-:|--:|\n| `x` | *y* |\n|1|\n|1|2|3|\n\nz",
            [("[a|b]\ncenter,right\n", "bold"), ("[x|y]\n[1|]\n[1|2 | 3]\n", "dim"), ("\nz", "")],
        ),
        ("| a\\|b |\n|-|\n| c<br>d |", [("[a|b]\nleft\n", "bold"), ("[c\nd]\n", "dim")]),
        ("| a |\n- b", [("| a |\n• b", "")]),
        ("| a | b |\n|---|", [("| a | b |\n|---|", "")]),
        ("|", [("|", "")]),
        ("```\n| a |\n```", [("```", "dim"), ("\n", ""), ("| a |", "code"), ("\n", ""), ("```", "dim")]),
        ("", []),
        ("\n\n", [("\n\n", "")]),
    ],
)  # fmt: skip
def test_what_comes_out(text: str, expected: list[tuple[str, str]]) -> None:
    assert pieces(text) == expected
    assert pieces(*text) == expected  # a character at a time


WORDS = [
    "a",
    " ",
    "\n",
    "*",
    "**",
    "_",
    "`",
    "```",
    "# ",
    "- ",
    "1. ",
    "> ",
    "\\",
    "中",
    "---",
    "~~~",
    "|",
    "|-|\n",
    "\n|a",
    "  ",
    "b*c",
]
MARKDOWN = st.lists(st.sampled_from(WORDS), max_size=30).map("".join)


@given(MARKDOWN, st.data())
def test_cutting_changes_nothing(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert pieces(*chunks) == pieces(text)


@pytest.mark.parametrize("text", [" #  ", "##   a", "-\t\ta", "1.  a", ">  a"])
def test_blanks_behind_a_marker_may_come_one_by_one(text: str) -> None:
    assert pieces(*text) == pieces(text)


@given(MARKDOWN)
def test_only_marks_go_and_every_line_end_stays(text: str) -> None:
    shown = "".join(part for part, _ in pieces(text))
    if "|" not in text:
        assert shown.count("\n") == text.count("\n")
    assert re.sub(r"[^abc中]", "", shown) == re.sub(r"[^abc中]", "", text)


def test_nothing_waits_for_long() -> None:
    stream = MarkdownStream()
    text = "**" + "word " * 100
    shown = ""
    for count, character in enumerate(text, 1):
        shown += "".join(as_piece(piece).text for piece in stream.push(character))
        assert count - len(shown) <= SPAN_LIMIT + 1
    at_once = "".join(as_piece(piece).text for piece in MarkdownStream().push("plain words are shown at once"))
    assert len(at_once) == 29


def wrapped(text: str, width: int) -> str:
    out: list[str] = []
    wrapper = Wrapper(out.append, lambda: width)
    stream = MarkdownStream()
    for piece in [*stream.push(text + "\n"), *stream.flush()]:
        assert isinstance(piece, Piece)
        wrapper.push(piece)
    wrapper.flush()
    return re.sub(r"\x1b\[[0-9;]*m", "", "".join(out))


def test_words_wrap_whole_and_lists_hang() -> None:
    assert wrapped("one two three", 8) == "one two\nthree\n"
    assert wrapped("- one two three", 8) == "• one\n  two\n  three\n"
    assert wrapped("**one two** three", 9) == "one two\nthree\n"
    assert wrapped("abcdefghij klm", 4) == "abcdefghij\nklm\n"  # the terminal itself cuts what is too long
    assert wrapped("| a | b | c | d |", 8) == "| a | b | c | d |\n"
    assert wrapped("```\nlong line of code\n```", 6) == "```\nlong line of code\n```\n"


def test_wide_characters_count_as_two_columns() -> None:
    assert wrapped("你好你好", 6) == "你好你\n好\n"
    assert wrapped("a你好 b", 5) == "a你好\nb\n"


@given(st.text(st.sampled_from("ab 你好\n"), max_size=80), st.integers(4, 20))
def test_no_line_is_wider_than_the_window_unless_a_word_is(text: str, width: int) -> None:
    from rich.cells import cell_len

    shown = wrapped(text, width)
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", text)
    for line in shown.split("\n"):
        longest = max((len(word) for word in re.findall("[ab]+", line)), default=0)
        assert cell_len(line.rstrip()) <= width or longest > width - 2 or line.startswith(" ")


def test_text_cannot_control_a_terminal() -> None:
    assert inert("a\x1b[2Jb\x9bc\rd\te\nf\x00") == "a[2Jbcd\te\nf"
