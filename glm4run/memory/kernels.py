"""Which kernel multiplies a linear, what it keeps of a weight and what it needs to run. No torch.

Mirrors the choices of `glm4run.kernels` so that a plan can be made without importing it; the tests compare both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glm4run.machine import has_cpu_flag
from glm4run.memory.sizes import MIB
from glm4run.qformat import num_groups, packed_width
from glm4run.quant_config import QuantScheme

# Of other libraries (kernels/bitsandbytes.py, kernels/quanto.py): bnb4 dequantizes at each call, bnb4_cpu reads the
# packed weight; qint4 and qint8 likewise dequantize, and with _packed run torch's kernels.
Foreign = Literal["bnb4", "bnb4_cpu", "llm_int8", "qint4", "qint4_packed", "qint8", "qint8_packed"]
Kernel = Literal["dense", "int4", "tiled", "native", "triton", "reference", Foreign]
BNB_CPU_FLAG, BNB_CPU_ROWS = "avx512_bf16", 32  # what bitsandbytes' packed CPU kernel needs
BNB_CODE_BYTES = 16 * 4
QUANTO_PACKED_GROUP, QUANTO_PACKED_ROWS, QUANTO_INT8_COLUMNS = 128, 16, 4
INT4_GROUP_SIZES = (32, 64, 128, 256)
CPU_TILE_BYTES, CUDA_TILE_BYTES = 2 * MIB, 64 * MIB  # of float32, as kernels/torch_ops.py has them
PANEL_ROWS, PANEL_COLUMNS = 16, 32  # of kernels/cpu/src/layout.h
TRITON_MANY_ROWS, TRITON_MOST_TILED, TRITON_MOST_TILED_OF_FEW = 8192, 64, 32  # of kernels/triton/linear.py
TRITON_TILE_BYTES, TRITON_TILE_STEP = 64 * MIB, 2048


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
    if linear.scheme.kind != "int":
        return _choose_foreign(linear, linear.scheme, device=device, dtype=dtype)
    named: dict[str, Kernel] = {"native": "native", "triton": "triton", "reference": "reference"}
    if backend in named:
        return named[backend]
    group = linear.scheme.group_size
    if linear.scheme.bits != 4 or dtype != "bf16" or group not in INT4_GROUP_SIZES:
        return "tiled"
    if device == "cuda":
        return "int4" if linear.out_features % 8 == 0 and linear.in_features % 128 == 0 else "tiled"
    return "int4" if linear.out_features % 16 == 0 else "tiled"


def _choose_foreign(linear: Linear, scheme: QuantScheme, *, device: str, dtype: str) -> Kernel:
    if scheme.kind == "llm_int8":
        return "llm_int8"
    if scheme.kind == "qint8":
        packed = device == "cpu" and dtype == "bf16" and linear.in_features % QUANTO_INT8_COLUMNS == 0
        return "qint8_packed" if packed else "qint8"
    if scheme.kind == "qint4":
        fits = scheme.group_size == QUANTO_PACKED_GROUP and linear.out_features % QUANTO_PACKED_ROWS == 0
        return "qint4_packed" if dtype == "bf16" and fits else "qint4"
    fits = linear.out_features % BNB_CPU_ROWS == 0
    return "bnb4_cpu" if device == "cpu" and dtype == "bf16" and fits and has_cpu_flag(BNB_CPU_FLAG) else "bnb4"


def kept_bytes(linear: Linear, kernel: Kernel, dtype_bytes: int, stored_bytes: int | None = None) -> int:
    """What stays in memory of a weight, without its bias. `stored_bytes` where the scales are not 16 bits wide.

    `dtype_bytes`: of what the linear is fed.
    """
    out_features, in_features = linear.out_features, linear.in_features
    if linear.scheme is None:
        return out_features * in_features * dtype_bytes
    if linear.scheme.kind != "int":
        return _foreign_bytes(linear, kernel, dtype_bytes)
    stored = linear.stored_bytes if stored_bytes is None else stored_bytes
    if kernel == "int4":  # scale and zero as bf16 pairs
        return out_features * in_features // 2 + 4 * out_features * linear.groups
    if kernel == "native":
        scale_bytes = 2 + (stored - linear.stored_bytes) // (out_features * linear.groups)
        per_group = PANEL_ROWS * (scale_bytes + (0 if linear.scheme.symmetric else 1))
        values = _up(in_features, PANEL_COLUMNS) * PANEL_ROWS * linear.scheme.bits // 8
        return -(-out_features // PANEL_ROWS) * (_up(per_group * linear.groups, 64) + _up(values, 64))
    return stored


def _foreign_bytes(linear: Linear, kernel: Kernel, dtype_bytes: int) -> int:
    """Values and scales as bitsandbytes and optimum-quanto keep them."""
    count, scales = linear.out_features * linear.in_features, linear.out_features * linear.groups
    if kernel == "bnb4":  # a float32 maximum per block
        return count // 2 + 4 * scales + BNB_CODE_BYTES
    if kernel == "bnb4_cpu":  # rounded to bf16
        return count // 2 + 2 * scales + BNB_CODE_BYTES
    if kernel == "llm_int8":
        return count + 4 * linear.out_features
    if kernel in ("qint8", "qint8_packed"):
        return count + dtype_bytes * linear.out_features
    if kernel == "qint4_packed":
        return count // 2 + 2 * dtype_bytes * scales
    # The first half of the (grouped) rows lies in the low halves of the bytes, the second in the high ones.
    return -(-scales // 2) * (count // scales) + 2 * dtype_bytes * scales


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
    if kernel in ("dense", "int4", "qint4_packed", "qint8_packed") or linear.scheme is None:
        return 0
    if linear.scheme.kind != "int":
        return _foreign_scratch_bytes(linear, kernel, tokens, device=device, dtype_bytes=dtype_bytes)
    if kernel == "native":  # quantized activations, at most two bytes a value, with their scales and sums
        return tokens * _up(in_features, 64) * 2 + 8 * tokens * (in_features // 32 + 1)
    if kernel == "triton":
        tiled = TRITON_MOST_TILED if out_features >= TRITON_MANY_ROWS else TRITON_MOST_TILED_OF_FEW
        return 0 if tokens <= tiled else _triton_tile_rows(linear, dtype_bytes) * in_features * dtype_bytes
    if kernel == "reference":
        return _dequantize_bytes(linear, out_features, dtype_bytes)
    tile = CUDA_TILE_BYTES if device == "cuda" else CPU_TILE_BYTES
    rows = min(out_features, max(16, tile // (4 * in_features)))
    compute = dtype_bytes if device == "cuda" else 4
    widened = tokens * in_features * 4 if compute != dtype_bytes else 0
    # While one tile's product is written, its dense weight is there; the next tile is made after it is gone.
    product = rows * in_features * compute + tokens * rows * compute
    return widened + max(_dequantize_bytes(linear, rows, compute), product)


def _triton_tile_rows(linear: Linear, dtype_bytes: int) -> int:
    """Rows that are dense at once where many tokens meet a weight: whole steps of them where one fits."""
    fitting = TRITON_TILE_BYTES // (linear.in_features * dtype_bytes)
    return min(linear.out_features, fitting // TRITON_TILE_STEP * TRITON_TILE_STEP or max(fitting, 16))


def _foreign_scratch_bytes(linear: Linear, kernel: Kernel, tokens: int, *, device: str, dtype_bytes: int) -> int:
    count = linear.out_features * linear.in_features
    if kernel == "bnb4":  # a GPU multiplies one row by the packed weight
        return 0 if device == "cuda" and tokens == 1 else count * dtype_bytes
    if kernel == "bnb4_cpu":
        return 2 * tokens * linear.in_features
    if kernel == "llm_int8":  # x in fp16, its absolute values, quantized; int32 and float32 products
        return tokens * (linear.in_features * 8 + linear.out_features * 12)
    if kernel == "qint8":
        return count * dtype_bytes
    return count * (2 + 2 * dtype_bytes)  # qint4: unpacked halves and values, scaled, shifted


def _dequantize_bytes(linear: Linear, rows: int, dtype_bytes: int) -> int:
    """`qformat.dequantize` at its peak: int8 values, float32 values and their scaled copy, float32 scales."""
    values = rows * linear.in_features
    assert linear.scheme is not None
    zero_points = 0 if linear.scheme.symmetric else values * 4 + rows * linear.groups * 5
    scaled = 9 * values + rows * linear.groups * 4 + zero_points
    return max(scaled, (5 + dtype_bytes) * values)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
