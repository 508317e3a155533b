"""How keys and values are kept: rows of one KV head and one position each, as floats or as integers with scales.

The one description that the cache, the kernels and the files share, and the reference for all of them. Knows shapes
and dtypes; must not know the model.

A quantized row stands for itself alone, so that forgetting a token is forgetting its rows, exactly. What a bias adds
to all keys of a head alike (`key_offset.py`) is taken off first: it adds the same to every score of a query, and
softmax does not see it. Then the row is turned by a Hadamard matrix, which spreads the few large channels that are
left over all: scores do not change if the queries are turned too, and the weighted sum of values is turned back. What
is kept are integers:

    8 bits  x = scale * q                   q in -127 .. 127   scale float16, of a group of 128
    4 bits  x = scale * (lowest + step * u) u in 0 .. 15       scale float16, of the row; step, lowest of a group of 8

In memory the integers q, and bf16, may lie in another order (`kv_order.py`).

Step and lowest level are integers too, one of 64 pairs (`kv_format.CODES`), so that 4 bits become 8 bits of one scale a
row without a rounding. A group takes the pair that leaves the least squared error. Of u the even dimensions are in
bytes' low halves. A row's scale and its groups' codes, 6 bits each from the lowest up, are bytes side by side.

`docs/quality.md` has what was tried. Sources: arXiv 2404.00456 (turning keys and values), 2402.02750 (keys'
outliers).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from glm4run.errors import UsageError
from glm4run.kv_format import CODE_BITS, CODES, LEVELS, SCALE_BYTES, group_of, rows_for, tensor_widths
from glm4run.kv_order import Order, put, taken


@dataclass(frozen=True, eq=False)
class KVRows:
    """Keys, or values, of one layer and one sequence.

    data: [KVH, S, D] floats (16 bits) or bytes (8 bits) in some `order`; uint8 [KVH, S, D / 2] (4 bits). scales:
    float16 [KVH, S, groups] (8 bits); uint8 [KVH, S, 2 + codes] (4 bits); None for floats. offset: float32 [KVH, D],
    taken from every row before it is quantized.
    """

    data: Tensor
    scales: Tensor | None = None
    bits: int = 16
    offset: Tensor | None = None
    order: Order = Order.ROWS

    @property
    def head_dim(self) -> int:
        return self.data.shape[-1] * (2 if self.bits == 4 else 1)

    def tensors(self) -> dict[str, Tensor]:
        """The memory by name, the token axis second."""
        return {"": self.data} if self.scales is None else {"": self.data, "_scales": self.scales}

    def rows(self, start: int, end: int) -> dict[str, Tensor]:
        """The same of the rows `start` to `end`, in the order of rows: views where memory has them so."""
        kept = {name: tensor[:, start:end] for name, tensor in self.tensors().items()}
        return {**kept, "": taken(self.data, self.order, start, end)}

    def restore(self, start: int, rows: dict[str, Tensor]) -> None:
        """Writes what `rows` gave back at `start`. Raises ValueError where shape or dtype differ."""
        end = start + rows[""].shape[1]
        for name, target in self.tensors().items():
            kept, wanted = rows[name], target[:, start:end].shape
            kind = torch.int8 if self.bits == 8 and not name else target.dtype
            if kept.shape != wanted or kept.dtype != kind:
                raise ValueError(f"rows are {kept.dtype} {tuple(kept.shape)}, expected were {kind} {tuple(wanted)}")
        put(self.data, self.order, start, rows[""])
        if self.scales is not None:
            self.scales[:, start:end] = rows["_scales"]

    def copy_from(self, other: KVRows, count: int) -> None:
        """Becomes the first `count` rows of `other`, which has the same format and order."""
        end = count if self.order is Order.ROWS else rows_for(count)
        for target, source in zip(self.tensors().values(), other.tensors().values(), strict=True):
            target[:, :end] = source[:, :end]

    def write(self, start: int, rows: Tensor) -> None:
        """Keeps rows [KVH, T, D] from position `start` on."""
        if self.scales is not None:
            kept = rows if self.offset is None else rows.float() - self.offset[:, None]
            rows, self.scales[:, start : start + rows.shape[-2]] = quantize_rows(kept, self.bits)
        put(self.data, self.order, start, rows)

    def read(self, end: int) -> Tensor:
        """The first `end` rows [KVH, end, D] as they were written, up to rounding; a view of floats in that order."""
        turned = self.turned(end)
        if self.scales is None:
            return turned
        return turn(turned) if self.offset is None else turn(turned) + self.offset[:, None]

    def turned(self, end: int) -> Tensor:
        """The same; but quantized rows in float32 as they are kept: turned, and without the offset."""
        rows = taken(self.data, self.order, 0, end)
        return rows if self.scales is None else dequantize_rows(rows, self.scales[:, :end], self.bits)


@dataclass(frozen=True, eq=False)
class KVLayer:
    """What one layer keeps of one sequence."""

    keys: KVRows
    values: KVRows

    @property
    def is_quantized(self) -> bool:
        return self.keys.scales is not None or self.values.scales is not None

    def tensors(self) -> dict[str, Tensor]:
        """The memory by name, the token axis second."""
        return _named(self.keys.tensors(), self.values.tensors())

    def rows(self, start: int, end: int) -> dict[str, Tensor]:
        """`KVRows.rows` of both, by name."""
        return _named(self.keys.rows(start, end), self.values.rows(start, end))

    def restore(self, start: int, rows: dict[str, Tensor]) -> None:
        """Writes what `rows` gave back at `start`. Raises ValueError where shape or dtype differ."""
        for name, kept in (("keys", self.keys), ("values", self.values)):
            kept.restore(start, {part: rows[name + part] for part in kept.tensors()})


def _named(keys: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name + part: tensor for name, parts in (("keys", keys), ("values", values)) for part, tensor in parts.items()
    }


def new_rows(
    kv_heads: int,
    capacity: int,
    head_dim: int,
    bits: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    offset: Tensor | None = None,
    order: Order = Order.ROWS,
    empty: Callable[[tuple[int, ...], torch.dtype], Tensor] | None = None,
) -> KVRows:
    """Room for `capacity` rows. Nothing is touched: a page costs memory only once a token has been written to it.

    `offset` [KVH, D] is taken from rows that are quantized; floats are kept as they are. `order` is of rows of 8 bits
    and of bf16; others have one. `empty` gives the memory, of a shape and dtype; None: on `device`.

    Raises:
        UsageError: `bits` is 4 and the head's width is odd.
    """
    in_words = bits == 8 or (bits == 16 and dtype == torch.bfloat16)
    order = order if in_words else Order.ROWS
    assert order is Order.ROWS or capacity == rows_for(capacity)
    if empty is None:
        empty = partial(_empty_on, device)
    if bits == 16:
        return KVRows(empty((kv_heads, capacity, head_dim), dtype), order=order)
    if bits == 4 and head_dim % 2:
        raise UsageError(f"heads of {head_dim} values cannot be kept in 4 bits", hint="use --kv-bits 8")
    signed = bits == 8 and order is not Order.KEYS
    kinds = torch.int8 if signed else torch.uint8, torch.float16 if bits == 8 else torch.uint8
    data, scales = (
        empty((kv_heads, capacity, width // kind.itemsize), kind)
        for width, kind in zip(tensor_widths(head_dim, bits, 0), kinds, strict=True)
    )
    return KVRows(data, scales, bits, offset, order)


def _empty_on(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def turn(rows: Tensor) -> Tensor:
    """Rows [..., D] times the Hadamard matrix of the largest power of two that divides D, in float32.

    The matrix is its own inverse: turning twice gives the rows back, up to rounding.
    """
    head_dim = rows.shape[-1]
    size = head_dim & -head_dim
    turned = rows.float()
    step = 1
    while step < size:
        pairs = turned.unflatten(-1, (-1, 2, step))
        first, second = pairs.unbind(-2)
        turned = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        step *= 2
    return turned * (1 / math.sqrt(size))


def quantize_rows(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Rows [..., D] to what is kept of them: integers and scales, shapes as in `KVRows`.

    What shares a scale with a value that is not finite, or beyond what a float16 scale can reach, reads back as NaN.
    """
    turned = turn(rows)
    group = group_of(bits, rows.shape[-1])
    alike = turned.unflatten(-1, (-1, group if bits == 8 else rows.shape[-1]))  # [..., scales, values of one]
    scale = (alike.abs().amax(-1) * (1 / LEVELS[8])).half()
    if bits == 4:  # there is no level that infinity would make NaN
        scale = torch.where(scale.isfinite(), scale, torch.nan)
    steps = (alike * _inverse(scale)).nan_to_num(0).flatten(-2)  # -127 .. 127, not rounded
    if bits == 8:
        return steps.round().clamp(-LEVELS[8], LEVELS[8]).to(torch.int8), scale
    del turned, alike
    # Sixteenths: squared errors are then sums of whole numbers, which are the same in any order and by any instruction.
    groups = steps.mul_(16).round_().div_(16).unflatten(-1, (-1, group))  # [..., G, group]
    code = _best_code(groups)
    step, lowest = (table[code][..., None] for table in _tables(groups.device))
    even, odd = _levels(groups - lowest, step).to(torch.uint8).flatten(-2).unflatten(-1, (-1, 2)).unbind(-1)
    return even | odd << 4, torch.cat((scale.view(torch.uint8), _packed(code)), dim=-1)


def dequantize_rows(data: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Float32 [..., D] of what `quantize_rows` made; still turned."""
    if bits == 8:
        rows: Tensor = data.float()
        rows.unflatten(-1, (scales.shape[-1], -1)).mul_(scales.float()[..., None])
        return rows
    head_dim = 2 * data.shape[-1]
    scale, packed = scales[..., :SCALE_BYTES].contiguous().view(torch.float16), scales[..., SCALE_BYTES:]
    code = _unpacked(packed, head_dim // group_of(bits, head_dim)).int()
    rows = torch.stack((data & LEVELS[4], data >> 4), dim=-1).flatten(-2).float()
    for table, apply in zip(_tables(data.device), (Tensor.mul_, Tensor.add_), strict=True):
        apply(rows.unflatten(-1, (code.shape[-1], -1)), table[code][..., None])
    return rows.mul_(scale.float())


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale in float32 [..., 1]; 0 where the scale is 0."""
    wide = scale.float()[..., None]
    return torch.where(wide == 0, 0.0, 1 / wide)


def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Steps and lowest levels by code, float32 [64]."""
    step, lowest = torch.tensor(CODES, dtype=torch.float32, device=device).unbind(-1)
    return step, lowest


def _levels(above: Tensor, step: Tensor) -> Tensor:
    """Values that lie `above` the lowest level, in units of the row's scale, as levels 0 .. 15, in float32."""
    return (above * (1 / step)).round_().clamp_(0, LEVELS[4])


def _best_code(groups: Tensor) -> Tensor:
    """Of groups [..., G, group] the first code that leaves the least squared error: int64 [..., G]."""
    step, lowest = _tables(groups.device)
    error = torch.zeros(*groups.shape[:-1], len(CODES), device=groups.device)
    for value in groups.unbind(-1):
        above = value[..., None] - lowest
        error += _levels(above, step).mul_(step).sub_(above).square_()
        del above
    return error.argmin(-1)


def _packed(code: Tensor) -> Tensor:
    """Codes [..., G] of 6 bits, the first lowest, as uint8 [..., bytes]."""
    bits = (code[..., None] >> torch.arange(CODE_BITS, device=code.device) & 1).flatten(-2)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed: Tensor = (bits << torch.arange(8, device=code.device)).sum(-1).to(torch.uint8)
    return packed


def _unpacked(packed: Tensor, count: int) -> Tensor:
    """The first `count` codes of what `_packed` made, uint8 [..., count]. Three bytes are four codes."""
    threes = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 3)).unflatten(-1, (-1, 3))
    first, second, third = threes.unbind(-1)
    four = (first, first >> 6 | second << 2, second >> 4 | third << 4, third >> 2)
    return torch.stack(four, dim=-1).flatten(-2)[..., :count] & (1 << CODE_BITS) - 1


def attend_turned(
    query: Tensor, layer: KVLayer, end: int, attention: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Attention of query [H, T, D] over the first `end` rows, to [T, H * D] in its dtype.

    The few queries and results are turned, not the whole context.
    """
    keys, values = layer.keys, layer.values
    asked = query.float() if keys.scales is None else turn(query)
    out = attention(asked, keys.turned(end), values.turned(end))
    if values.scales is not None:
        out = turn(out.unflatten(-1, (-1, query.shape[-1]))).flatten(-2)
    return out.to(query.dtype)
