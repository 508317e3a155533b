"""Memory that is read from end to end at every token, in pages of 2 MiB where the system can.

Streaming through pages of 4 KiB waits for the table that says where they lie. Huge pages from the start would cost
2 MiB for the first row written to each; so a page becomes huge once three quarters of it are filled. What is written
then takes at most a third more, and all of it never more than what was allocated. Linux 6.1 and later; elsewhere
nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any

HUGE_PAGE = 2 << 20
ENOUGH = HUGE_PAGE // 4 * 3
_MADV_COLLAPSE = 25  # linux/mman.h


class HugePages:
    """The huge pages of one run of memory, each asked for once. What it holds stays."""

    def __init__(self, address: int, nbytes: int) -> None:
        before = address % HUGE_PAGE  # what an allocator keeps before it may go along
        self._first = address - before if before < mmap.PAGESIZE else address - before + HUGE_PAGE
        self._end = (address + nbytes) // HUGE_PAGE * HUGE_PAGE
        self._asked: set[int] = set()

    def fill(self, pieces: Iterable[tuple[int, int]]) -> list[int]:
        """`pieces`: address and bytes of all that is filled by now, none in another. Returns the pages that became due,
        by their addresses."""
        filled: Counter[int] = Counter()
        for address, nbytes in pieces:
            for page in range(address // HUGE_PAGE * HUGE_PAGE, address + nbytes, HUGE_PAGE):
                filled[page] += min(address + nbytes, page + HUGE_PAGE) - max(address, page)
        due = [page for page, nbytes in filled.items() if nbytes >= ENOUGH and page not in self._asked]
        due = sorted(page for page in due if self._first <= page < self._end)
        self._asked.update(due)
        madvise = _madvise()
        for page in due:
            if madvise is not None:
                madvise(page, HUGE_PAGE, _MADV_COLLAPSE)  # refused is as good: nothing depends on it
        return due


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
