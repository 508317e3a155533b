"""In what order integers of 8 bits lie in memory: as rows, or as the instructions of a CPU take them.

An instruction that multiplies four unsigned bytes by four signed ones, and adds up, meets keys as its unsigned side and
values as its signed one. What a key's 128 too much adds to a score is a number of the query alone, 128 times its sum. A
value's products add up over rows, so four rows lie side by side. Kept otherwise, attention made them so each time:
`docs/performance.md` has what that took. Knows bytes; must not know what they stand for.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from glm4run.kv_format import ROWS_TOGETHER

HALF = 128  # what is added to make a signed byte unsigned: its highest bit turned over


class Order(Enum):
    """Of integers q of S rows; S is a multiple of four."""

    ROWS = "int8 q [KVH, S, D]"
    UNSIGNED = "uint8 q + 128 [KVH, S, D]"
    FOURS = "int8 q [KVH, S / 4, D, 4]"


CPU_ORDERS = (Order.UNSIGNED, Order.FOURS)  # of keys, of values


def put(data: Tensor, order: Order, start: int, rows: Tensor) -> None:
    """Writes rows int8 [KVH, T, D] from `start` on into data [KVH, S, D], whose bytes lie in `order`."""
    end = start + rows.shape[1]
    if order is Order.FOURS:
        position = torch.arange(start, end, device=rows.device)
        _fours(data)[:, position // ROWS_TOGETHER, :, position % ROWS_TOGETHER] = rows.transpose(0, 1)
    else:
        data[:, start:end] = rows.view(torch.uint8) ^ HALF if order is Order.UNSIGNED else rows


def taken(data: Tensor, order: Order, start: int, end: int) -> Tensor:
    """Rows `start` to `end` of such data, int8 [KVH, end - start, D]: a view where they lie as rows."""
    if order is Order.ROWS:
        return data[:, start:end]
    if order is Order.UNSIGNED:
        return (data[:, start:end] ^ HALF).view(torch.int8)
    first = start // ROWS_TOGETHER
    fours = _fours(data)[:, first : -(-end // ROWS_TOGETHER)]
    rows: Tensor = fours.transpose(-1, -2).flatten(1, 2)[:, start - first * ROWS_TOGETHER : end - first * ROWS_TOGETHER]
    return rows


def _fours(data: Tensor) -> Tensor:
    heads, capacity, width = data.shape
    return data.view(heads, capacity // ROWS_TOGETHER, width, ROWS_TOGETHER)
