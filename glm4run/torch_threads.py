"""How many threads torch uses for a moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_torch_thread(wanted: bool = True) -> Iterator[None]:
    """Inside, torch computes with the calling thread alone, where `wanted`. Also a decorator.

    For small operations beside the native library's products. A second thread gains nothing there, and torch's waits
    for its next work by spinning for milliseconds, on a core that the products need. Entering and leaving takes 0.2 us.
    """
    threads = torch.get_num_threads()
    if not wanted or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
