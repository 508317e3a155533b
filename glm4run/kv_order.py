"""In what order integers of 8 bits, and bf16, lie in memory: as rows, or as the products of a CPU take them.

An instruction that multiplies four unsigned bytes by four signed ones, and adds up, meets keys as its unsigned side and
values as its signed one. What a key's 128 too much adds to a score is a number of the query alone, 128 times its sum.
Another multiplies two bf16 by two. So words of 32 bits hold four or two numbers: of a key columns, of values rows, as
their products add up over rows. And words lie in the order in which they are read, 16 sums at a time: memory is fetched
ahead best where it is one stream. `docs/performance.md` has what attention took over rows. Knows bytes; must not know
what they stand for.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from glm4run.kv_format import CPU_COLUMNS, ROWS_TOGETHER, rows_for

HALF = 128  # what makes a signed byte unsigned: its highest bit turned over
WORD_BYTES = 4


class Order(Enum):
    """Of S rows, whole blocks of them, of D columns: W to a word, 4 integers q of 8 bits or 2 bf16."""

    ROWS = "[KVH, S, D]"
    KEYS = "[KVH, S / 16, D / W, 16, W]: 16 rows, and of each W columns; integers as uint8 q + 128"
    VALUES = "[KVH, S / 64, D / 16, 64 / W, 16, W]: 16 columns of 64 / W times W rows side by side"


def cpu_orders(head_dim: int) -> tuple[Order, Order]:
    """Of keys and of values, as the native library takes them."""
    return (Order.KEYS, Order.VALUES) if head_dim % CPU_COLUMNS == 0 else (Order.ROWS, Order.ROWS)


def put(data: Tensor, order: Order, start: int, rows: Tensor) -> None:
    """Writes rows [KVH, T, D] from `start` on into data [KVH, S, D], whose numbers lie in `order`: int8, or floats."""
    end = start + rows.shape[1]
    if order is Order.ROWS:
        data[:, start:end] = rows
        return
    first, last = _whole(start, end)
    blocks = taken(data, order, first, last)  # with what they hold beside the new rows
    blocks[:, start - first : end - first] = rows
    if order is Order.KEYS and not blocks.is_floating_point():
        blocks = blocks.view(torch.uint8).bitwise_xor_(HALF)
    as_rows = _as_rows(data[:, first:last], order)
    as_rows.copy_(blocks.view(as_rows.shape))


def taken(data: Tensor, order: Order, start: int, end: int) -> Tensor:
    """Rows `start` to `end` of such data, [KVH, end - start, D]: a view where they lie as rows, else a copy."""
    if order is Order.ROWS:
        return data[:, start:end]
    first, last = _whole(start, end)
    blocks = _as_rows(data[:, first:last], order).clone(memory_format=torch.contiguous_format)
    if not blocks.is_floating_point():
        blocks = (blocks.bitwise_xor_(HALF) if order is Order.KEYS else blocks).view(torch.int8)
    return blocks.view(data.shape[0], last - first, data.shape[2])[:, start - first : end - first]


def _whole(start: int, end: int) -> tuple[int, int]:
    """The rows of the blocks that have a part in `start` to `end`."""
    return start // ROWS_TOGETHER * ROWS_TOGETHER, rows_for(end)


def _as_rows(blocks: Tensor, order: Order) -> Tensor:
    """Whole blocks [KVH, S, D] as a view whose axes, one behind the other, are those of rows."""
    heads, count, width = blocks.shape
    word = WORD_BYTES // blocks.element_size()
    if order is Order.KEYS:
        return blocks.view(heads, count // 16, width // word, 16, word).transpose(2, 3)
    parts = blocks.view(heads, count // 64, width // 16, 64 // word, 16, word)
    return parts.permute(0, 1, 3, 5, 2, 4)
