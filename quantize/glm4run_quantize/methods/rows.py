"""A weight's rows shared among the cores: rows have nothing to do with each other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

ROWS_AT_ONCE = 1024  # so that a block of columns stays in the cache, and temporaries stay small


def on_all_cores(quantize: Callable[[Tensor], tuple[Tensor, Tensor]], weight: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize` of the rows of weight [N, K], some on each core: its two results for all of them.

    Left to torch, all cores would share each of the thousands of small steps, and wait for one another after every one;
    where another program holds a core, that takes many times as long as a single thread.
    """
    threads = torch.get_num_threads() if weight.device.type == "cpu" else 1
    if threads == 1:
        parts = [quantize(rows) for rows in weight.split(ROWS_AT_ONCE)]
    else:
        at_once = min(ROWS_AT_ONCE, -(-weight.shape[0] // threads))
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                parts = list(pool.map(quantize, weight.split(at_once)))
        finally:
            torch.set_num_threads(threads)
    first, second = zip(*parts, strict=True)
    return torch.cat(first), torch.cat(second)
