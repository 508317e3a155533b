"""How keys and values are kept: rows of one KV head and one position each, as floats or as integers with scales.

The one description that the cache, the kernels and the files share, and the reference for all of them. Knows shapes
and dtypes; must not know the model.

A quantized row stands for itself alone, so that forgetting a token is forgetting its rows, exactly. What a bias adds
to all keys of a head alike (`key_offset.py`) is taken off first: it adds the same to every score of a query, and
softmax does not see it. Then the row is turned by a Hadamard matrix, which spreads the few large channels that are
left over all: scores do not change if the queries are turned too, and the weighted sum of values is turned back. Each
group of values gets its own step:

    8 bits  x = scale * q           q in -127 .. 127   scale float16
    4 bits  x = minimum + scale * u u in 0 .. 15       scale, minimum float16; even dimensions in bytes' low halves

`docs/quality.md` has what was tried. Sources: arXiv 2404.00456 (turning keys and values), 2402.02750 (keys'
outliers).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from glm4run.errors import UsageError
from glm4run.kv_format import LEVELS, SCALES, group_of


@dataclass(frozen=True, eq=False)
class KVRows:
    """Keys, or values, of one layer and one sequence.

    data: [KVH, S, D] floats (16 bits) or int8 (8 bits); uint8 [KVH, S, D / 2] (4 bits). scales: float16
    [KVH, S, groups * SCALES], None for floats. offset: float32 [KVH, D], taken from every row before it is quantized.
    """

    data: Tensor
    scales: Tensor | None = None
    bits: int = 16
    offset: Tensor | None = None

    @property
    def head_dim(self) -> int:
        return self.data.shape[-1] * (2 if self.bits == 4 else 1)

    def tensors(self) -> dict[str, Tensor]:
        """The memory by name, the token axis second."""
        return {"": self.data} if self.scales is None else {"": self.data, "_scales": self.scales}

    def write(self, start: int, rows: Tensor) -> None:
        """Keeps rows [KVH, T, D] from position `start` on."""
        end = start + rows.shape[-2]
        if self.scales is None:
            self.data[:, start:end] = rows
        else:
            kept = rows if self.offset is None else rows.float() - self.offset[:, None]
            self.data[:, start:end], self.scales[:, start:end] = quantize_rows(kept, self.bits)

    def read(self, end: int) -> Tensor:
        """The first `end` rows [KVH, end, D] as they were written, up to rounding: a view where they are floats."""
        turned = self.turned(end)
        if self.scales is None:
            return turned
        return turn(turned) if self.offset is None else turn(turned) + self.offset[:, None]

    def turned(self, end: int) -> Tensor:
        """The same; but quantized rows in float32 as they are kept: turned, and without the offset."""
        if self.scales is None:
            return self.data[:, :end]
        return dequantize_rows(self.data[:, :end], self.scales[:, :end], self.bits)


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
        named = {"keys": self.keys, "values": self.values}
        return {name + part: tensor for name, rows in named.items() for part, tensor in rows.tensors().items()}


def new_rows(
    kv_heads: int,
    capacity: int,
    head_dim: int,
    bits: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    offset: Tensor | None = None,
) -> KVRows:
    """Room for `capacity` rows. Nothing is touched: a page costs memory only once a token has been written to it.

    `offset` [KVH, D] is taken from rows that are quantized; floats are kept as they are.

    Raises:
        UsageError: `bits` is 4 and the head's width is odd.
    """
    if bits == 16:
        return KVRows(torch.empty(kv_heads, capacity, head_dim, dtype=dtype, device=device))
    if bits == 4 and head_dim % 2:
        raise UsageError(f"heads of {head_dim} values cannot be kept in 4 bits", hint="use --kv-bits 8")
    width, kind = (head_dim, torch.int8) if bits == 8 else (head_dim // 2, torch.uint8)
    scales = SCALES[bits] * (head_dim // group_of(bits, head_dim))
    return KVRows(
        torch.empty(kv_heads, capacity, width, dtype=kind, device=device),
        torch.empty(kv_heads, capacity, scales, dtype=torch.float16, device=device),
        bits,
        offset,
    )


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

    A group with a value that is not finite, or beyond what a float16 scale can reach, reads back as NaN.
    """
    groups = turn(rows).unflatten(-1, (-1, group_of(bits, rows.shape[-1])))  # [..., G, group]
    if bits == 8:
        scale = (groups.abs().amax(-1) * (1 / LEVELS[8])).half()
        steps = (groups * _inverse(scale)).nan_to_num(0).round().clamp(-LEVELS[8], LEVELS[8])
        return steps.to(torch.int8).flatten(-2), scale
    lowest = groups.amin(-1)
    scale, minimum = ((groups.amax(-1) - lowest) * (1 / LEVELS[4])).half(), lowest.half()
    steps = ((groups - minimum.float()[..., None]) * _inverse(scale)).nan_to_num(0).round().clamp(0, LEVELS[4])
    even, odd = steps.to(torch.uint8).flatten(-2).unflatten(-1, (-1, 2)).unbind(-1)
    return even | odd << 4, torch.stack((scale, minimum), dim=-1).flatten(-2)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale in float32 [..., 1]; 0 where the scale is 0."""
    wide = scale.float()[..., None]
    return torch.where(wide == 0, 0.0, 1 / wide)


def dequantize_rows(data: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Float32 [..., D] of what `quantize_rows` made; still turned."""
    if bits == 8:
        rows: Tensor = data.float()
        rows.unflatten(-1, (scales.shape[-1], -1)).mul_(scales.float()[..., None])
        return rows
    scale, minimum = scales.float().unflatten(-1, (-1, 2)).unbind(-1)
    steps = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
    rows = steps.float()
    rows.unflatten(-1, (scale.shape[-1], -1)).mul_(scale[..., None]).add_(minimum[..., None])
    return rows


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
