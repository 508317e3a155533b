"""Which pages become huge, and when. What the system makes of it is its own matter."""

from __future__ import annotations

import pytest

from glm4run import huge_pages
from glm4run.huge_pages import ENOUGH, HUGE_PAGE, HugePages

BASE = 7 * HUGE_PAGE


@pytest.fixture(autouse=True)
def nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda page, nbytes, advice: asked.append((page, nbytes)))
    return asked


def test_a_page_is_due_once_most_of_it_is_filled(nothing_is_asked: list[tuple[int, int]]) -> None:
    pages = HugePages(BASE, 4 * HUGE_PAGE)
    assert pages.fill([(BASE, ENOUGH - 1)]) == []
    assert pages.fill([(BASE, ENOUGH)]) == [BASE]
    assert pages.fill([(BASE, 2 * HUGE_PAGE + 100)]) == [BASE + HUGE_PAGE]
    assert nothing_is_asked == [(BASE, HUGE_PAGE), (BASE + HUGE_PAGE, HUGE_PAGE)]


def test_pieces_in_one_page_add_up() -> None:
    part = ENOUGH // 2
    pages = HugePages(BASE, 2 * HUGE_PAGE)
    assert pages.fill([(BASE + HUGE_PAGE, part)]) == []
    ends = [(BASE + 2 * HUGE_PAGE - part, part), (BASE + HUGE_PAGE - 10, part + 10)]
    assert pages.fill(ends) == [BASE + HUGE_PAGE]


@pytest.mark.parametrize(("offset", "first"), [(0, 0), (64, 0), (5000, 1)])
def test_pages_that_others_have_a_part_of_stay_as_they_are(offset: int, first: int) -> None:
    """But for what an allocator writes before the memory that it gives."""
    address, nbytes = BASE + offset, 3 * HUGE_PAGE + ENOUGH - 5000
    due = HugePages(address, nbytes).fill([(address, nbytes)])
    assert due == [BASE + page * HUGE_PAGE for page in range(first, 3)]
    assert HugePages(address, ENOUGH).fill([(address, ENOUGH)]) == []


def test_where_there_are_none_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    assert HugePages(BASE, HUGE_PAGE).fill([(BASE, HUGE_PAGE)]) == [BASE]
