"""Half-quadratic quantization: scales that are robust against a group's few large weights.

The error w - s q is measured by a norm below 1, which many small errors cost little less than few large ones. It is
split off as a sparse part e by a shrinkage step; what is left, w - e, is fitted by least squares. The two alternate
while the penalty grows. Source: "Half-Quadratic Quantization of Large Machine Learning Models", Mobius Labs, 2023;
there the zero point is fitted. Symmetric schemes have none, so the scale is. Errors count as in `mse`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4run.quant_config import QuantScheme
from glm4run_quantize.methods.grid import bounds, in_groups, round_to, stored
from glm4run_quantize.methods.mse import error_weights, find_scales

NORM = 0.7
PENALTY, PENALTY_GROWTH = 200.0, 1.15
ROUNDS = 8


def quantize_hqq(
    weight: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """weight [N, K] to (q int8 [N, K], scale [N, G] in `scale_dtype`), symmetric; `importance` is [K]."""
    low, high = bounds(scheme.bits)
    grouped = in_groups(weight.float(), scheme)
    weights = error_weights(weight, importance)
    h = in_groups(weights, scheme)
    # The published penalty is meant for weights as they are; ours are brought to one spread, so that it fits any model.
    spread = grouped.square().mean().sqrt().clamp(min=1e-12) * 8
    best = find_scales(weight, scheme, scale_dtype, importance, by_size=True).unsqueeze(-1)
    scale, lowest = best.float(), _cost(grouped, best.float(), spread, h, low, high)
    penalty = PENALTY
    for _ in range(ROUNDS):
        q = (grouped / scale).round_().clamp_(low, high)
        error = (grouped - q * scale) / spread
        sparse = _shrink(error, penalty) * spread
        size = (q.square() * h).sum(-1, keepdim=True)
        fitted = ((grouped - sparse) * q * h).sum(-1, keepdim=True) / size
        scale = stored(torch.where(size > 0, fitted, scale), scale_dtype).float()
        cost = _cost(grouped, scale, spread, h, low, high)
        better = cost < lowest
        best, lowest = torch.where(better, scale.to(scale_dtype), best), torch.where(better, cost, lowest)
        penalty *= PENALTY_GROWTH
    best = best.squeeze(-1)
    return round_to(weight, best, scheme), best


def _shrink(error: Tensor, penalty: float) -> Tensor:
    """The proximal step of the norm: sign(x) relu(|x| - |x|^(p-1) / penalty)."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-8).pow(NORM - 1) / penalty).clamp_(min=0)


def _cost(grouped: Tensor, scale: Tensor, spread: Tensor, h: Tensor, low: int, high: int) -> Tensor:
    q = (grouped / scale).round_().clamp_(low, high)
    return (((grouped - q * scale) / spread).abs_().pow_(NORM) * h).sum(-1, keepdim=True)
