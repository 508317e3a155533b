"""The packed kernels that torch ships, and tiled dequantization where it ships none.

int4 with bf16 activations runs in torch's own int4 kernel (`_weight_int4pack_mm[_for_cpu]`), which reads the packed
weight. Everything else is dequantized a tile of rows at a time: a tile fits the cache, so the dense weight never
exists and never travels through memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glm4run.kernels import LinearSpec, Prepacked, WeightSource
from glm4run.qformat import PackedWeight, dequantize, num_groups, unpack_unsigned, unpack_zero_points
from glm4run.quant_config import Kind

INT4_GROUP_SIZES = (32, 64, 128, 256)
CPU_TILE_BYTES = 2 << 20  # of float32: half of it and the packed bytes stay in a core's L2
CUDA_TILE_BYTES = 64 << 20
CUDA_INNER_K_TILES = 8
CPU_CONVERT_ROWS = 256


@dataclass(frozen=True)
class Int4PackedWeight:
    """torch's arrangement: `packed` is opaque, scale_and_zero is bf16 [G, N, 2], w = (u - 8) * scale + zero."""

    packed: Tensor
    scale_and_zero: Tensor
    group_size: int
    spec: LinearSpec

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.packed, self.scale_and_zero))


@dataclass(frozen=True)
class TiledWeight:
    """The weight as it stands in the file, dequantized `tile_rows` rows at a time."""

    weight: PackedWeight
    tile_rows: int
    spec: LinearSpec

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


class TorchBackend:
    """What torch alone can do, on CPU and CUDA."""

    name = "torch"
    kinds: tuple[Kind, ...] = ("int",)
    devices: tuple[str, ...] = ("cpu", "cuda")

    def why_unavailable(self, spec: LinearSpec) -> str | None:
        if spec.activations in ("int8", "int16"):
            return "activations stay as they are in it"
        return None if spec.device.type in ("cpu", "cuda") else f"it has no kernels for {spec.device.type}"

    def describe(self) -> str:
        return f"torch {torch.__version__}"

    def prepacked_bytes(self, spec: LinearSpec, stored_bytes: int) -> int:
        if not _int4_kernel_runs(spec):
            return stored_bytes
        scale_and_zero = 2 * torch.bfloat16.itemsize * spec.out_features * num_groups(spec.in_features, spec.scheme)
        return spec.out_features * spec.in_features // 2 + scale_and_zero

    def prepack(self, weight: WeightSource, spec: LinearSpec) -> Int4PackedWeight | TiledWeight:
        if _int4_kernel_runs(spec):
            return _prepack_int4(weight.whole(), spec)
        tile_bytes = CUDA_TILE_BYTES if spec.device.type == "cuda" else CPU_TILE_BYTES
        return TiledWeight(weight.whole(), max(16, tile_bytes // (4 * spec.in_features)), spec)

    def linear(self, x: Tensor, weight: Prepacked, bias: Tensor | None = None) -> Tensor:
        """[M, K] to [M, N]."""
        y = self._multiply(x, weight)
        return y if bias is None else y + bias

    def linear_together(self, x: Tensor, parts: Sequence[tuple[Prepacked, Tensor | None]]) -> list[Tensor]:
        return [self.linear(x, weight, bias) for weight, bias in parts]

    def _multiply(self, x: Tensor, weight: Prepacked) -> Tensor:
        """Source of w: `Int4PackedWeight` or `TiledWeight`."""
        if isinstance(weight, Int4PackedWeight):
            op = torch.ops.aten
            call = op._weight_int4pack_mm if x.is_cuda else op._weight_int4pack_mm_for_cpu
            out: Tensor = call(x.contiguous(), weight.packed, weight.group_size, weight.scale_and_zero)
            return out
        assert isinstance(weight, TiledWeight)
        return _linear_tiled(x, weight)


def _int4_kernel_runs(spec: LinearSpec) -> bool:
    scheme = spec.scheme
    if scheme.bits != 4 or spec.dtype != torch.bfloat16 or scheme.group_size not in INT4_GROUP_SIZES:
        return False
    if spec.device.type == "cuda":
        capable = torch.cuda.get_device_capability(spec.device) >= (8, 0)
        return capable and spec.out_features % 8 == 0 and spec.in_features % (16 * CUDA_INNER_K_TILES) == 0
    return spec.out_features % 16 == 0


def _prepack_int4(weight: PackedWeight, spec: LinearSpec) -> Int4PackedWeight:
    if spec.device.type == "cuda":
        unsigned = unpack_unsigned(weight.packed, 4, spec.in_features)  # [N, K], u = q + 8
        # The CUDA converter takes two values a byte, the even k in the high nibble.
        pairs = (unsigned[:, 0::2] << 4) | unsigned[:, 1::2]
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, CUDA_INNER_K_TILES)
    else:
        packed = _convert_for_cpu(weight, spec)
    scale = weight.scale.float()
    zero = torch.zeros_like(scale)
    if weight.zero_point is not None:
        zero = -unpack_zero_points(weight.zero_point, 4, spec.out_features).float() * scale
    scale_and_zero = torch.stack((scale.t(), zero.t()), dim=-1).to(torch.bfloat16).contiguous()  # [G, N, 2]
    group_size = spec.scheme.group_size
    assert group_size is not None
    return Int4PackedWeight(packed, scale_and_zero, group_size, spec)


def _convert_for_cpu(weight: PackedWeight, spec: LinearSpec) -> Tensor:
    """torch's CPU arrangement, uint8 [N, K/2], made a block of rows at a time.

    The converter wants one int32 a value, eight times the packed size. It arranges blocks of 16, 32 or 64 rows (by
    instruction set) one after the other, so that converting multiples of 64 rows apart gives the same bytes.
    """
    packed = torch.empty(spec.out_features, spec.in_features // 2, dtype=torch.uint8)
    for first in range(0, spec.out_features, CPU_CONVERT_ROWS):
        rows = slice(first, first + CPU_CONVERT_ROWS)
        unsigned = unpack_unsigned(weight.packed[rows], 4, spec.in_features).to(torch.int32)
        packed[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    return packed


def _linear_tiled(x: Tensor, tiled: TiledWeight) -> Tensor:
    """Multiplies by one tile of rows after the other, in float32 on a CPU (few have fast bf16), else in x's dtype."""
    out_features = tiled.spec.out_features
    compute = x.dtype if x.is_cuda else torch.float32
    wide = x.to(compute)
    out = torch.empty(x.shape[0], out_features, dtype=x.dtype, device=x.device)
    for first in range(0, out_features, tiled.tile_rows):
        rows = slice(first, min(first + tiled.tile_rows, out_features))
        out[:, rows] = F.linear(wide, dequantize(tiled.weight, compute, rows))
    return out
