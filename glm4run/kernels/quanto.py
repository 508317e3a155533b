"""optimum-quanto's qint8 and qint4, made from a dense weight: its quantizers, and the products that it would run.

What runs where (optimum-quanto 0.2.7):

* qint8, one scale per output row: torch's int8 kernel on a CPU with bf16 activations; else the whole weight is
  dequantized at each call.
* qint4, scale and shift per group of 128 (or the next smaller multiple of 32 that divides K): torch's int4 kernel with
  bf16 activations and groups of 128; else the whole weight is dequantized at each call.

quanto would compile C++ at the first call to unpack 4-bit values; two lines of torch do it here instead.
Imported only when asked for: `pip install glm4run[quanto]`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glm4run.kernels import LinearSpec, Prepacked, WeightSource
from glm4run.quant_config import QUANTO_KINDS, Kind

PACKED_GROUP, PACKED_ROWS, INT8_COLUMNS = 128, 16, 4  # what torch's kernels take; `memory.kernels` has the same
WEIGHT = "weight"
PATHS = {
    "qint8 packed": "qint8 in torch's int8 kernel",
    "qint4 packed": "qint4 in torch's int4 kernel",
    "dequantized": "dequantized at each call",
}


@dataclass(frozen=True)
class QuantoWeight:
    """What a quanto tensor keeps.

    qint8: values int8 [N, K], scale [N, 1]. qint4 packed: torch's opaque int4 values, scale and shift in one, bf16
    [G, N, 2]. qint4 otherwise: values uint8 [ceil(N*G/2), g], scale and shift [N*G, 1]; w = u * scale - shift.
    """

    values: Tensor
    scale: Tensor
    shift: Tensor | None
    is_packed: bool
    spec: LinearSpec

    @property
    def nbytes(self) -> int:
        tensors = (self.values, self.scale, *(() if self.shift is None else (self.shift,)))
        return sum(t.numel() * t.element_size() for t in tensors)


class QuantoBackend:
    """Products by the kernels that quanto picks. `describe` counts which of them the prepacked weights take."""

    name = "quanto"
    kinds: tuple[Kind, ...] = QUANTO_KINDS
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __init__(self) -> None:
        self.paths: Counter[str] = Counter()

    def why_unavailable(self, spec: LinearSpec) -> str | None:
        if find_spec("optimum") is None or find_spec("optimum.quanto") is None:
            return "optimum-quanto is not installed (pip install 'glm4run[quanto]')"
        if spec.activations in ("int8", "int16"):
            return "activations stay as they are in it"
        return None if spec.device.type in ("cpu", "cuda") else f"it has no kernels for {spec.device.type}"

    def describe(self) -> str:
        paths = [f"{count} linears {PATHS[path]}" for path, count in self.paths.items()]
        return f"{self.name} {version('optimum-quanto')}" + (f" ({', '.join(paths)})" if paths else "")

    def prepacked_bytes(self, spec: LinearSpec, stored_bytes: int) -> int:
        N, K = spec.out_features, spec.in_features
        if spec.scheme.kind == "qint8":
            return N * K + spec.dtype.itemsize * N
        group = spec.scheme.group_size or K
        scales = N * K // group
        values = N * K // 2 if packed_kernel_runs(spec) else -(-scales // 2) * group
        return values + 2 * spec.dtype.itemsize * scales

    def prepack(self, weight: WeightSource, spec: LinearSpec) -> QuantoWeight:
        dense = weight.stored()[WEIGHT].to(spec.dtype)
        is_packed = packed_kernel_runs(spec)
        self.paths[f"{spec.scheme.kind} packed" if is_packed else "dequantized"] += 1
        if spec.scheme.kind == "qint8":
            tensor = _quantize(dense, spec, optimized=False)
            return QuantoWeight(tensor._data, tensor._scale, None, is_packed, spec)
        tensor = _quantize(dense, spec, optimized=is_packed)
        if is_packed:
            return QuantoWeight(tensor._data._data, tensor._scale_shift, None, is_packed, spec)
        return QuantoWeight(tensor._data._data, tensor._scale, tensor._shift, is_packed, spec)

    def linear(self, x: Tensor, weight: Prepacked, bias: Tensor | None = None) -> Tensor:
        """[M, K] to [M, N]."""
        assert isinstance(weight, QuantoWeight)
        y = self._multiply(x.contiguous(), weight)
        return y if bias is None else y + bias

    def linear_together(self, x: Tensor, parts: Sequence[tuple[Prepacked, Tensor | None]]) -> list[Tensor]:
        return [self.linear(x, weight, bias) for weight, bias in parts]

    def _multiply(self, x: Tensor, weight: QuantoWeight) -> Tensor:
        op, out = torch.ops.aten, x
        if weight.spec.scheme.kind == "qint8" and weight.is_packed:
            out = op._weight_int8pack_mm(x, weight.values, weight.scale.flatten())
        elif weight.is_packed:
            call = op._weight_int4pack_mm if x.is_cuda else op._weight_int4pack_mm_for_cpu
            out = call(x, weight.values, PACKED_GROUP, weight.scale)
        elif weight.spec.scheme.kind == "qint8":
            out = F.linear(x, weight.values * weight.scale)
        else:
            out = F.linear(x, _dequantize_qint4(weight))
        return out


def packed_kernel_runs(spec: LinearSpec) -> bool:
    """Whether one of torch's packed kernels takes a weight. Source: quanto's `qbytes_mm` and `WeightQBitsTensor`."""
    if spec.dtype != torch.bfloat16:
        return False
    if spec.scheme.kind == "qint8":
        return spec.device.type == "cpu" and spec.in_features % INT8_COLUMNS == 0
    if spec.device.type == "cuda" and torch.cuda.get_device_capability(spec.device) < (8, 0):
        return False
    return spec.scheme.group_size == PACKED_GROUP and spec.out_features % PACKED_ROWS == 0


def _quantize(dense: Tensor, spec: LinearSpec, *, optimized: bool) -> Any:
    """A quanto tensor of [N, K], with the quantizers that `quantize(model)` takes by default."""
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qtypes, quantize_weight

    qtype = qtypes[spec.scheme.kind]
    if spec.scheme.kind == "qint8":
        scale = AbsmaxOptimizer()(dense, qtype, axis=0)
        return quantize_weight(dense, qtype, 0, scale, optimized=optimized)
    group = spec.scheme.group_size
    scale, shift = MaxOptimizer()(dense, qtype, 0, group)
    return quantize_weight(dense, qtype, 0, scale, shift, group_size=group, optimized=optimized)


def _dequantize_qint4(weight: QuantoWeight) -> Tensor:
    """[N, K] in the dtype of the scales. Source: `pack_weights` and `QBitsDequantizer` of optimum-quanto."""
    assert weight.shift is not None
    values = torch.cat((weight.values & 0xF, weight.values >> 4))[: len(weight.scale)]  # first rows, then last rows
    dense: Tensor = weight.scale * values - weight.shift
    return dense.view(weight.spec.out_features, weight.spec.in_features)
