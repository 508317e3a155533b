"""Memory that is read from end to end at every token, in pages of 2 MiB where the system can.

Streaming through pages of 4 KiB waits for the table that says where they lie. Huge pages from the start would cost
2 MiB for the first row written to each; so rows are moved into huge pages once they fill one. Linux 6.1 and later;
elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

HUGE_PAGE = 2 << 20
_MADV_COLLAPSE = 25  # linux/mman.h


def collapse(address: int, nbytes: int) -> None:
    """Asks for huge pages for what `nbytes` from `address` on fill of them. What they hold stays.

    The page that `address` lies in must have been written to.
    """
    before = address % HUGE_PAGE
    first = address - before if before < mmap.PAGESIZE else address - before + HUGE_PAGE
    last = (address + nbytes) // HUGE_PAGE * HUGE_PAGE
    madvise = _madvise()
    if madvise is not None and first < last:
        madvise(first, last - first, _MADV_COLLAPSE)  # refused is as good: nothing depends on it


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
