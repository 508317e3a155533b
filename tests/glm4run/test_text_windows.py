"""Windows hold what llama.cpp's and Hugging Face's hold, and score each token once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4run.errors import UsageError
from glm4run.text_windows import Cut, Window, cut_windows, read_text

PREFIX = (1000, 1001)


def test_side_by_side_scores_the_second_halves_as_llama_cpp_does() -> None:
    windows = cut_windows(list(range(25)), (), Cut(context=8))
    assert [window.ids for window in windows] == [tuple(range(at, at + 8)) for at in (0, 8, 16)]  # 24 is left out
    # llama.cpp: first = n_ctx / 2, n_ctx - 1 - first tokens, the first of them behind position `first`
    assert [(window.first, window.scored) for window in windows] == [(5, 3)] * 3


def test_each_window_begins_with_the_prefix() -> None:
    windows = cut_windows(list(range(20)), PREFIX, Cut(context=8))
    assert [window.ids for window in windows] == [(*PREFIX, *range(at, at + 6)) for at in (0, 6, 12)]
    assert all(window.first == 5 for window in windows)


def test_a_stride_scores_what_is_new() -> None:
    windows = cut_windows(list(range(10)), (), Cut(context=6, stride=2))
    assert windows == [
        Window((0, 1, 2, 3, 4, 5), 1),
        Window((2, 3, 4, 5, 6, 7), 4),
        Window((4, 5, 6, 7, 8, 9), 4),
    ]
    assert cut_windows(list(range(5)), PREFIX, Cut(context=6, stride=4)) == [
        Window((*PREFIX, 0, 1, 2, 3), 2),
        Window((*PREFIX, 4), 2),
    ]


@given(
    count=st.integers(4, 200),
    context=st.integers(6, 40),
    stride=st.integers(1, 40),
    prefix=st.sampled_from([(), PREFIX]),
)
def test_a_stride_scores_every_token_exactly_once(
    count: int, context: int, stride: int, prefix: tuple[int, ...]
) -> None:
    cut = Cut(context, min(stride, context - max(1, len(prefix))))
    windows = cut_windows(list(range(count)), prefix, cut)
    scored = [token for window in windows for token in window.ids[window.first :]]
    assert scored == list(range(0 if prefix else 1, count))
    assert all(window.ids[: len(prefix)] == prefix and len(window.ids) <= context for window in windows)
    assert all(window.first >= 1 for window in windows)


@given(count=st.integers(40, 400), context=st.integers(6, 40), prefix=st.sampled_from([(), PREFIX]))
def test_side_by_side_gives_each_scored_token_half_a_window(count: int, context: int, prefix: tuple[int, ...]) -> None:
    windows = cut_windows(list(range(count)), prefix, Cut(context))
    assert len(windows) == count // (context - len(prefix))
    for window in windows:
        assert len(window.ids) == context
        assert window.first == context // 2 + 1


def test_limits() -> None:
    ids = list(range(100))
    assert len(cut_windows(ids, (), Cut(10, windows=3))) == 3
    assert len(cut_windows(ids, (), Cut(10, max_tokens=45))) == 4
    assert cut_windows(ids, (), Cut(10, 5, max_tokens=12))[-1].ids[-1] == 11


@pytest.mark.parametrize(
    ("count", "cut", "message"),
    [
        (100, Cut(5), "context of 5"),
        (5, Cut(8), "too few"),
        (100, Cut(8, 7), "stride of 7"),
        (0, Cut(8, 2), "too few"),
        (100, Cut(8, max_tokens=3), "too few"),
    ],
)
def test_sizes_that_make_no_sense(count: int, cut: Cut, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        cut_windows(list(range(count)), PREFIX, cut)
    assert caught.value.hint


def test_a_text_may_end_inside_a_character(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("你好".encode()[:-1])
    text = read_text(path)
    assert (text.name, text.content) == ("text.txt", "你")
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"abc\xff\xfe")
    with pytest.raises(UsageError, match="0xff at position 3"):
        read_text(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_text(tmp_path / "missing")
