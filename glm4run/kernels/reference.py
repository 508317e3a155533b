"""The oracle: dequantize, then multiply. Slow, obviously right, and never changed for speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from glm4run.kernels import LinearSpec, Prepacked, WeightSource
from glm4run.qformat import PackedWeight, dequantize
from glm4run.quant_config import Kind


@dataclass(frozen=True)
class ReferenceWeight:
    """The weight exactly as it stands in the file."""

    weight: PackedWeight
    spec: LinearSpec

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


class ReferenceBackend:
    """Runs everything, everywhere."""

    name = "reference"
    kinds: tuple[Kind, ...] = ("int",)
    devices: tuple[str, ...] = ("cpu", "cuda")

    def why_unavailable(self, spec: LinearSpec) -> str | None:
        return "activations stay as they are in it" if spec.activations in ("int8", "int16") else None

    def describe(self) -> str:
        return "reference"

    def prepacked_bytes(self, spec: LinearSpec, stored_bytes: int) -> int:
        return stored_bytes

    def prepack(self, weight: WeightSource, spec: LinearSpec) -> ReferenceWeight:
        return ReferenceWeight(weight.whole(), spec)

    def linear(self, x: Tensor, weight: Prepacked, bias: Tensor | None = None) -> Tensor:
        """[M, K] to [M, N]; the dense weight [N, K] lives for the length of the call."""
        assert isinstance(weight, ReferenceWeight)
        y = F.linear(x, dequantize(weight.weight, x.dtype))
        return y if bias is None else y + bias

    def linear_together(self, x: Tensor, parts: Sequence[tuple[Prepacked, Tensor | None]]) -> list[Tensor]:
        return [self.linear(x, weight, bias) for weight, bias in parts]
