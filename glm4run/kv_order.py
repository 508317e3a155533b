"""In what order integers of 8 bits lie in memory: as rows, or as the products of a CPU take them.

An instruction that multiplies four unsigned bytes by four signed ones, and adds up, meets keys as its unsigned side and
values as its signed one. What a key's 128 too much adds to a score is a number of the query alone, 128 times its sum.
A value's products add up over rows, so four rows lie side by side. And bytes lie in the order in which they are read,
16 sums at a time: memory is fetched ahead best where it is one stream. `docs/performance.md` has what attention took
over rows. Knows bytes; must not know what they stand for.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from glm4run.kv_format import ROWS_TOGETHER, rows_for

HALF = 128  # what makes a signed byte unsigned: its highest bit turned over
CPU_COLUMNS = 64  # rows of a multiple of so many lie otherwise on a CPU


class Order(Enum):
    """Of integers q of S rows, whole blocks of them, of D columns."""

    ROWS = "int8 q [KVH, S, D]"
    KEYS = "uint8 q + 128 [KVH, S / 16, D / 4, 16, 4]: 16 rows, and of each four columns"
    VALUES = "int8 q [KVH, S / 64, D / 16, 16, 16, 4]: 16 columns of 16 times four rows side by side"


def cpu_orders(head_dim: int) -> tuple[Order, Order]:
    """Of keys and of values, as the native library takes them."""
    return (Order.KEYS, Order.VALUES) if head_dim % CPU_COLUMNS == 0 else (Order.ROWS, Order.ROWS)


def put(data: Tensor, order: Order, start: int, rows: Tensor) -> None:
    """Writes rows int8 [KVH, T, D] from `start` on into data [KVH, S, D], whose bytes lie in `order`."""
    end = start + rows.shape[1]
    if order is Order.ROWS:
        data[:, start:end] = rows
        return
    first, last = _whole(start, end)
    blocks = taken(data, order, first, last)  # with what they hold beside the new rows
    blocks[:, start - first : end - first] = rows
    if order is Order.KEYS:
        blocks = blocks.view(torch.uint8).bitwise_xor_(HALF)
    as_rows = _as_rows(data[:, first:last], order)
    as_rows.copy_(blocks.view(as_rows.shape))


def taken(data: Tensor, order: Order, start: int, end: int) -> Tensor:
    """Rows `start` to `end` of such data, int8 [KVH, end - start, D]: a view where they lie as rows, else a copy."""
    if order is Order.ROWS:
        return data[:, start:end]
    first, last = _whole(start, end)
    blocks = _as_rows(data[:, first:last], order).clone(memory_format=torch.contiguous_format)
    if order is Order.KEYS:
        blocks.bitwise_xor_(HALF)
    return blocks.view(torch.int8).view(data.shape[0], last - first, data.shape[2])[:, start - first : end - first]


def _whole(start: int, end: int) -> tuple[int, int]:
    """The rows of the blocks that have a part in `start` to `end`."""
    return start // ROWS_TOGETHER * ROWS_TOGETHER, rows_for(end)


def _as_rows(blocks: Tensor, order: Order) -> Tensor:
    """Whole blocks [KVH, S, D] as a view whose axes, one behind the other, are those of rows."""
    heads, count, width = blocks.shape
    if order is Order.KEYS:
        return blocks.view(heads, count // 16, width // 4, 16, 4).transpose(2, 3)
    parts = blocks.view(heads, count // 64, width // 16, 16, 16, 4)
    return parts.permute(0, 1, 3, 5, 2, 4)
