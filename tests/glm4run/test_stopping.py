"""A stop string is never shown, however the text is cut; a loop is seen, and what only looks like one is not."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glm4run.stopping import LOOP_LONGEST_PERIOD, LOOP_REPEATS, LOOP_TOKENS, StopStrings, is_looping


def stream(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, str | None]:
    """What is shown of a text that comes in `pieces`, and the stop string that ended it."""
    watcher = StopStrings(stops)
    shown = ""
    for piece in pieces:
        new, found = watcher.push(piece)
        shown += new
        if found is not None:
            assert watcher.flush() == ""
            return shown, found
    return shown + watcher.flush(), None


def cut(text: str, positions: list[int]) -> list[str]:
    bounds = [0, *sorted(min(p, len(text)) for p in positions), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


SMALL = st.text(alphabet="ab<", max_size=12)


@given(st.lists(st.text(alphabet="ab<", min_size=1, max_size=4), max_size=3), SMALL, st.lists(st.integers(0, 12)))
@example(["aab"], "aaab", [1, 2, 3])
@example(["ab", "abab"], "aabab", [1, 2, 3, 4])
@example(["b", "ab"], "ab", [1])
def test_stop_strings_are_never_shown_and_nothing_else_is_lost(stops: list[str], text: str, cuts: list[int]) -> None:
    shown, found = stream(tuple(stops), cut(text, cuts))
    assert not any(stop in shown for stop in stops)
    if found is None:
        assert shown == text
        assert not any(stop in text for stop in stops)
    else:
        assert found in stops
        assert text.startswith(shown + found)


@given(st.text(max_size=40), st.lists(st.integers(0, 40)))
def test_without_stop_strings_text_passes_at_once(text: str, cuts: list[int]) -> None:
    watcher = StopStrings(())
    for piece in cut(text, cuts):
        assert watcher.push(piece) == (piece, None)
    assert watcher.flush() == ""


def test_only_what_may_still_become_a_stop_string_is_held() -> None:
    watcher = StopStrings(("STOP", "好了"))
    assert watcher.push("abcS") == ("abc", None)
    assert watcher.push("T") == ("", None)
    assert watcher.push("x好") == ("STx", None)
    assert watcher.push("!") == ("好!", None)
    assert watcher.push("STO") == ("", None)
    assert watcher.flush() == "STO"


def test_the_first_stop_string_in_the_text_wins() -> None:
    assert stream(("two", "one"), ["zero one two"]) == ("zero ", "one")


def one_token_at_a_time(tokens: list[int]) -> int | None:
    """How many tokens had come when a loop was seen."""
    return next((n for n in range(1, len(tokens) + 1) if is_looping(tokens[:n])), None)


@pytest.mark.parametrize("period", [1, 2, 3, 7, 16, 17, 40, LOOP_LONGEST_PERIOD])
@pytest.mark.parametrize("before", [0, 5, 200])
def test_loops_are_seen(period: int, before: int) -> None:
    start = list(range(1000, 1000 + before))
    loop = list(range(period)) * (LOOP_TOKENS // period + LOOP_REPEATS)
    seen = one_token_at_a_time(start + loop)
    assert seen == before + max(LOOP_TOKENS, LOOP_REPEATS * period)


@pytest.mark.parametrize(
    "tokens",
    [
        [],
        [5] * 90,  # a ruler of dashes
        list(range(500)),
        [*range(20)] * 5,  # five times the same stanza
        [n // 2 for n in range(400)],
        [7 if n % 3 else n for n in range(400)],  # a table: the same marks between new numbers
        [*range(LOOP_LONGEST_PERIOD + 1)] * 20,
    ],
    ids=["empty", "dashes", "count", "stanzas", "doubled", "table", "long-period"],
)
def test_what_only_looks_like_a_loop_goes_on(tokens: list[int]) -> None:
    assert one_token_at_a_time(tokens) is None
