"""The leaves of the model that are ours: RMSNorm, the embedding, and the linear whose weight stays packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm4run.kernels import Backend, Prepacked


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, computed in float32: x [..., size] to the same shape and dtype. Source: arXiv 1910.07467."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with its weight. `compute` is that function, or a faster one with the same results."""

    def __init__(self, size: int, eps: float, compute: Callable[[Tensor, Tensor, float], Tensor] = rms_norm) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] to the same shape and dtype."""
        return self.compute(x, self.weight, self.eps)


class Embedding(nn.Module):
    """A table [V, hidden] that stays in its stored dtype: only the rows of the tokens at hand are ever converted."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, size))

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] to rows [..., hidden] in the table's dtype."""
        return F.embedding(ids, self.weight)


class Linear(nn.Linear):
    """A dense linear that follows the dtype of its input: fp16 models feed some of theirs with float32."""

    def forward(self, input: Tensor) -> Tensor:
        """x [..., K] to [..., N] in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class QuantizedLinear(nn.Module):
    """y = x W^T + b where W stays in the form that its backend reads; no dense copy of W is ever kept.

    in_features K, out_features N; `prepacked` is the backend's own arrangement of the packed weight.
    """

    def __init__(self, prepacked: Prepacked, backend: Backend, bias: Tensor | None) -> None:
        super().__init__()
        self.backend = backend
        self.prepacked = prepacked
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N] in the dtype of x."""
        flat = x.reshape(-1, x.shape[-1])  # [M, K]
        y = self.backend.linear(flat, self.prepacked, self._bias(x.dtype))  # [M, N]
        return y.view(*x.shape[:-1], y.shape[-1])

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales and bias in memory."""
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self.prepacked.nbytes + bias

    def extra_repr(self) -> str:
        spec = self.prepacked.spec
        return f"{spec.in_features}, {spec.out_features}, {spec.scheme.describe()}, backend={self.backend.name}"


def linear_together(linears: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Several linears of one x [..., K], each to [..., N]. Packed ones of one backend go there in one call."""
    packed = [linear for linear in linears if isinstance(linear, QuantizedLinear)]
    if len(packed) < len(linears) or any(linear.backend is not packed[0].backend for linear in packed):
        return [linear(x) for linear in linears]
    parts = [(linear.prepacked, linear._bias(x.dtype)) for linear in packed]
    results = packed[0].backend.linear_together(x.reshape(-1, x.shape[-1]), parts)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in results]
