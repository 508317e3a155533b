"""Which kernel multiplies a linear, what it keeps of a weight and what it needs to run. No torch.

Mirrors the choices of `glm4run.kernels` so that a plan can be made without importing it; the tests compare both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glm4run.memory.sizes import MIB
from glm4run.qformat import num_groups, packed_width
from glm4run.quant_config import QuantScheme

Kernel = Literal["dense", "int4", "tiled", "native", "reference", "nf4"]  # nf4: estimated, not in this version
INT4_GROUP_SIZES = (32, 64, 128, 256)
CPU_TILE_BYTES, CUDA_TILE_BYTES = 2 * MIB, 64 * MIB  # of float32, as kernels/torch_ops.py has them
PANEL_ROWS, PANEL_COLUMNS = 16, 32  # of kernels/cpu/src/layout.h


@dataclass(frozen=True)
class Linear:
    """One kind of linear: weight [out_features, in_features], and how it is packed (None: dense)."""

    out_features: int
    in_features: int
    scheme: QuantScheme | None

    @property
    def groups(self) -> int:
        """Scales per output row."""
        assert self.scheme is not None
        return num_groups(self.in_features, self.scheme)

    @property
    def stored_bytes(self) -> int:
        """Packed values, 16-bit scales and zero points as they stand in the file. Source: docs/format.md."""
        assert self.scheme is not None
        bits, groups = self.scheme.bits, self.groups
        words = 4 * self.out_features * packed_width(self.in_features, bits)
        zero_points = 0 if self.scheme.symmetric else 4 * packed_width(self.out_features, bits) * groups
        return words + 2 * self.out_features * groups + zero_points


def choose_kernel(linear: Linear, *, backend: str, device: str, dtype: str) -> Kernel:
    """The kernel that `backend` runs a linear with. `device` is cpu or cuda, `dtype` what the linear is fed."""
    if linear.scheme is None:
        return "dense"
    named: dict[str, Kernel] = {"native": "native", "reference": "reference", "nf4": "nf4"}
    if backend in named:
        return named[backend]
    group = linear.scheme.group_size
    if linear.scheme.bits != 4 or dtype != "bf16" or group not in INT4_GROUP_SIZES:
        return "tiled"
    if device == "cuda":
        return "int4" if linear.out_features % 8 == 0 and linear.in_features % 128 == 0 else "tiled"
    return "int4" if linear.out_features % 16 == 0 else "tiled"


def kept_bytes(linear: Linear, kernel: Kernel, dtype_bytes: int, stored_bytes: int | None = None) -> int:
    """What stays in memory of a weight, without its bias. `stored_bytes` where the scales are not 16 bits wide."""
    out_features, in_features = linear.out_features, linear.in_features
    if linear.scheme is None:
        return out_features * in_features * dtype_bytes
    stored = linear.stored_bytes if stored_bytes is None else stored_bytes
    if kernel == "int4":  # scale and zero as bf16 pairs
        return out_features * in_features // 2 + 4 * out_features * linear.groups
    if kernel == "native":
        scale_bytes = 2 + (stored - linear.stored_bytes) // (out_features * linear.groups)
        per_group = PANEL_ROWS * (scale_bytes + (0 if linear.scheme.symmetric else 1))
        values = _up(in_features, PANEL_COLUMNS) * PANEL_ROWS * linear.scheme.bits // 8
        return -(-out_features // PANEL_ROWS) * (_up(per_group * linear.groups, 64) + _up(values, 64))
    if kernel == "nf4":  # a float32 maximum per group
        return out_features * in_features // 2 + 4 * out_features * linear.groups
    return stored


def scale_bytes(linear: Linear, kernel: Kernel, kept: int) -> int:
    """The part of `kept_bytes` that is scales and zero points (with a kernel's padding)."""
    if linear.scheme is None:
        return 0
    columns = _up(linear.in_features, PANEL_COLUMNS) if kernel == "native" else linear.in_features
    rows = _up(linear.out_features, PANEL_ROWS) if kernel == "native" else linear.out_features
    return kept - rows * columns * linear.scheme.bits // 8


def kernel_scratch_bytes(linear: Linear, kernel: Kernel, tokens: int, *, device: str, dtype_bytes: int) -> int:
    """What one product of `tokens` rows needs beside input and output, at its peak."""
    out_features, in_features = linear.out_features, linear.in_features
    if kernel in ("dense", "int4") or linear.scheme is None:
        return 0
    if kernel == "native":  # quantized activations, at most two bytes a value, with their scales and sums
        return tokens * _up(in_features, 64) * 2 + 8 * tokens * (in_features // 32 + 1)
    if kernel == "nf4":  # the dense weight of a product of several rows
        return out_features * in_features * dtype_bytes if tokens > 1 else 0
    if kernel == "reference":
        return _dequantize_bytes(linear, out_features, dtype_bytes)
    tile = CUDA_TILE_BYTES if device == "cuda" else CPU_TILE_BYTES
    rows = min(out_features, max(16, tile // (4 * in_features)))
    compute = dtype_bytes if device == "cuda" else 4
    widened = tokens * in_features * 4 if compute != dtype_bytes else 0
    # While one tile's product is written, its dense weight is there; the next tile is made after it is gone.
    product = rows * in_features * compute + tokens * rows * compute
    return widened + max(_dequantize_bytes(linear, rows, compute), product)


def _dequantize_bytes(linear: Linear, rows: int, dtype_bytes: int) -> int:
    """`qformat.dequantize` at its peak: int8 values, float32 values and their scaled copy, float32 scales."""
    values = rows * linear.in_features
    assert linear.scheme is not None
    zero_points = 0 if linear.scheme.symmetric else values * 4 + rows * linear.groups * 5
    scaled = 9 * values + rows * linear.groups * 4 + zero_points
    return max(scaled, (5 + dtype_bytes) * values)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
