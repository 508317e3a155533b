"""THE packed format: tensor names, shapes, packing, unpacking, dequantization. The only file that knows nibble order.

Layout (compressed-tensors `pack-quantized`), for a Linear with weight [N, K], `bits` b and groups of g along K:

    weight_packed      int32 [N, ceil(K*b/32)]  word j of a row holds elements k = j*32/b ..; lowest k in lowest bits
    weight_scale       model dtype [N, G]       G = K/g, or 1 for one scale per output row
    weight_shape       int64 [2]                N, K
    weight_zero_point  int32 [ceil(N*b/32), G]  asymmetric only; packed the same way, but along dim 0
    stored value u = q + 2^(b-1);  w = (q - zp) * scale

torch is imported inside the functions: the names and shapes here also serve `check` and `info`, which start without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm4run.quant_config import QuantScheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PACKED, SCALE, SHAPE, ZERO_POINT = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
GROUP_SIZES = (32, 64, 128)
WORD_BITS = 32
SCALE_DTYPES = ("BF16", "F16", "F32")


def num_groups(in_features: int, scheme: QuantScheme) -> int:
    """Scales per output row. The caller has checked that the group size divides `in_features`."""
    return 1 if scheme.group_size is None else in_features // scheme.group_size


def packed_width(count: int, bits: int) -> int:
    """int32 words that hold `count` values of `bits` bits."""
    return -(-count * bits // WORD_BITS)


def packed_tensor_shapes(
    out_features: int, in_features: int, scheme: QuantScheme
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Suffix to (shape, allowed safetensors dtypes) of every tensor of one packed linear."""
    groups = num_groups(in_features, scheme)
    shapes: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        PACKED: ((out_features, packed_width(in_features, scheme.bits)), ("I32",)),
        SCALE: ((out_features, groups), SCALE_DTYPES),
        SHAPE: ((2,), ("I64",)),
    }
    if not scheme.symmetric:
        shapes[ZERO_POINT] = ((packed_width(out_features, scheme.bits), groups), ("I32",))
    return shapes


@dataclass(frozen=True)
class PackedWeight:
    """One packed weight as it stands in the file.

    packed: int32 [N, ceil(K*b/32)]; scale: bf16, fp16 or fp32 [N, G]; zero_point: int32 [ceil(N*b/32), G] or None.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    out_features: int
    in_features: int
    scheme: QuantScheme

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(suffix, tensor) in the order in which they are written."""
        import torch

        yield PACKED, self.packed
        yield SCALE, self.scale
        yield SHAPE, torch.tensor([self.out_features, self.in_features], dtype=torch.int64)
        if self.zero_point is not None:
            yield ZERO_POINT, self.zero_point

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.scale.dtype

    def whole(self) -> PackedWeight:
        """This weight: it is in memory."""
        return self

    def side_tensors(self) -> tuple[Tensor, Tensor | None]:
        """Scales and packed zero points."""
        return self.scale, self.zero_point

    def stored(self) -> Mapping[str, Tensor]:
        """The tensors by suffix."""
        return dict(self.tensors())

    def location(self) -> None:
        """Not in a file."""

    @property
    def nbytes(self) -> int:
        """Bytes of the packed values, scales and zero points."""
        tensors = (self.packed, self.scale, *(() if self.zero_point is None else (self.zero_point,)))
        return sum(t.numel() * t.element_size() for t in tensors)


def pack(values: Tensor, bits: int) -> Tensor:
    """Packs signed values int8 [N, K] in [-2^(b-1), 2^(b-1)) into int32 [N, ceil(K*b/32)].

    Works bytewise: on a little-endian machine "lowest k in the lowest bits of the word" is "even k in the low
    nibble, bytes in order", which moves one byte per value instead of four.
    """
    import torch
    import torch.nn.functional as F

    per_word = WORD_BITS // bits
    padding = -values.shape[-1] % per_word
    if padding:
        values = F.pad(values, (0, padding), value=-(1 << (bits - 1)))  # u = 0
    unsigned = (values.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    if bits == 4:
        unsigned = unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
    # Flat first: a dimension of size 1 may carry any stride, and a view to a wider type looks at strides.
    return unsigned.reshape(-1).view(torch.int32).view(*unsigned.shape[:-1], -1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: int32 [N, W] to signed int8 [N, count]."""
    import torch

    unsigned = unpack_unsigned(packed, bits, count)
    if bits == 8:
        return (unsigned ^ 0x80).view(torch.int8)
    return unsigned.view(torch.int8) - (1 << (bits - 1))


def unpack_unsigned(packed: Tensor, bits: int, count: int) -> Tensor:
    """The stored values u = q + 2^(b-1): int32 [N, W] to uint8 [N, count]."""
    import torch

    as_bytes = packed.reshape(-1).view(torch.uint8).view(*packed.shape[:-1], 4 * packed.shape[-1])  # [N, 4W]
    if bits == 4:
        as_bytes = torch.stack((as_bytes & 0xF, as_bytes >> 4), dim=-1).flatten(-2)
    return as_bytes[..., :count]


def pack_zero_points(zero_points: Tensor, bits: int) -> Tensor:
    """Signed zero points int8 [N, G] to int32 [ceil(N*b/32), G], packed along dim 0."""
    return pack(zero_points.t().contiguous(), bits).t().contiguous()


def unpack_zero_points(packed: Tensor, bits: int, out_features: int) -> Tensor:
    """The inverse of `pack_zero_points`: int32 [ceil(N*b/32), G] to signed int8 [N, G]."""
    return unpack(packed.t().contiguous(), bits, out_features).t().contiguous()


def dequantize(weight: PackedWeight, dtype: torch.dtype | None = None, rows: slice = slice(None)) -> Tensor:
    """(q - zp) * scale as a dense [rows, K]; computed in float32, returned in `dtype` (float32 when None)."""

    scheme = weight.scheme
    values = unpack(weight.packed[rows], scheme.bits, weight.in_features)
    zero_points = None
    if weight.zero_point is not None:
        zero_points = _zero_points_of_rows(weight, weight.zero_point, rows)
    dense = scale_groups(values, weight.scale[rows], zero_points)
    return dense if dtype is None else dense.to(dtype)


def scale_groups(values: Tensor, scale: Tensor, zero_points: Tensor | None = None) -> Tensor:
    """(q - zp) * scale in float32: values int8 [N, K], scale [N, G], zero points int8 [N, G] or None; gives [N, K]."""
    import torch

    grouped = values.to(torch.float32).unflatten(-1, (scale.shape[-1], -1))  # [N, G, g]
    if zero_points is not None:
        grouped = grouped - zero_points.to(torch.float32).unsqueeze(-1)
    dense: Tensor = (grouped * scale.to(torch.float32).unsqueeze(-1)).flatten(-2)
    return dense


def _zero_points_of_rows(weight: PackedWeight, packed: Tensor, rows: slice) -> Tensor:
    """Zero points int8 [rows, G]; unpacks only the words that hold them."""
    first, last, step = rows.indices(weight.out_features)
    if step != 1 or first >= last:
        return unpack_zero_points(packed, weight.scheme.bits, weight.out_features)[rows]
    per_word = WORD_BITS // weight.scheme.bits
    first_word, last_word = first // per_word, -(-last // per_word)
    unpacked = unpack_zero_points(packed[first_word:last_word], weight.scheme.bits, (last_word - first_word) * per_word)
    return unpacked[first - first_word * per_word : last - first_word * per_word]
