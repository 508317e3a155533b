"""The oracle: dequantize, then multiply. Slow, obviously right, and never changed for speed."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from glm4run.kernels import LinearSpec, Prepacked
from glm4run.qformat import PackedWeight, dequantize


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

    def why_unavailable(self, spec: LinearSpec) -> str | None:
        return None

    def prepacked_bytes(self, spec: LinearSpec, stored_bytes: int) -> int:
        return stored_bytes

    def prepack(self, weight: PackedWeight, spec: LinearSpec) -> ReferenceWeight:
        return ReferenceWeight(weight, spec)

    def linear(self, x: Tensor, weight: Prepacked) -> Tensor:
        """[M, K] to [M, N]; the dense weight [N, K] lives for the length of the call."""
        assert isinstance(weight, ReferenceWeight)
        return F.linear(x, dequantize(weight.weight, x.dtype))
