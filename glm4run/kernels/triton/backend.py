"""The Triton kernels behind the `Backend` protocol. Imports without Triton: `linear.py` comes with the first weight."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from torch import Tensor

from glm4run.kernels import LinearSpec, Prepacked, WeightSource
from glm4run.kernels import triton as package
from glm4run.quant_config import Kind

if TYPE_CHECKING:
    from glm4run.kernels.triton.linear import TritonWeight

LARGEST = 1 << 31  # words of a weight: indices are of 32 bits


class TritonBackend:
    """Packed weights on CUDA, read as they stand in the file."""

    name = "triton"
    kinds: tuple[Kind, ...] = ("int",)
    devices: tuple[str, ...] = ("cuda",)

    def why_unavailable(self, spec: LinearSpec) -> str | None:
        if spec.activations in ("int8", "int16"):
            return "activations stay as they are in it"
        missing = package.why_missing(spec.device)
        if missing is not None:
            return missing
        if spec.dtype not in package.DTYPES:
            return f"it takes bf16, fp16 and fp32, not {spec.dtype}"
        if spec.out_features * spec.in_features * spec.scheme.bits // 32 >= LARGEST:
            return f"a weight of {spec.out_features} x {spec.in_features} is too large for its indices"
        return None

    def describe(self) -> str:
        return f"triton {version('triton')}"

    def prepacked_bytes(self, spec: LinearSpec, stored_bytes: int) -> int:
        return stored_bytes

    def prepack(self, weight: WeightSource, spec: LinearSpec) -> TritonWeight:
        from glm4run.kernels.triton.linear import prepack

        return prepack(weight.whole(), spec)

    def linear(self, x: Tensor, weight: Prepacked, bias: Tensor | None = None) -> Tensor:
        """[M, K] to [M, N]."""
        return self.linear_together(x, [(weight, bias)])[0]

    def linear_together(self, x: Tensor, parts: Sequence[tuple[Prepacked, Tensor | None]]) -> list[Tensor]:
        """In one launch where the weights have the same form."""
        from glm4run.kernels.triton.linear import TritonWeight, multiply

        weights = [weight for weight, _ in parts if isinstance(weight, TritonWeight)]
        assert len(weights) == len(parts)
        return multiply(x, weights, [bias for _, bias in parts])
