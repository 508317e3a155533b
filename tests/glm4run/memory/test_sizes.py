"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4run.memory import GIB, MIB, gib_text, parse_bytes, parse_size, tokens_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("8k", 8192), ("128k", 131072), ("128K", 131072), ("1m", 1 << 20), ("8192", 8192), (" 1k ", 1024)),
        *(("1", 1), ("128000", 128000)),
    ],
)
def test_tokens(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "k", "0", "0k", "-1", "-1k", "1.5k", "8kb", "eight", "1e3", "nan"])
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@given(st.integers(1, 1 << 24))
def test_tokens_are_written_so_that_they_read_back(tokens: int) -> None:
    assert parse_size(tokens_text(tokens)) == tokens


def test_tokens_are_written_short_only_where_that_is_exact() -> None:
    assert [tokens_text(n) for n in (131072, 128000, 1023, 1 << 20)] == ["128k", "125k", "1023", "1m"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("12", 12 * GIB), ("12GB", 12 * GIB), ("12 GiB", 12 * GIB), ("12g", 12 * GIB)),
        *(("7.5gib", 15 * GIB // 2), ("7800MiB", 7800 * MIB)),
    ],
)
def test_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "0", "-8", "12 tons", "1e3", "RTX 3060", "4090"])
def test_what_is_no_size_of_memory(text: str) -> None:
    with pytest.raises(ValueError):
        parse_bytes(text)


def test_differences_keep_their_sign() -> None:
    assert gib_text(-GIB // 2) == "-0.50"
