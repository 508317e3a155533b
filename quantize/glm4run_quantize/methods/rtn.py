"""Round to nearest: one scale per group from its largest magnitude, every weight to the nearest step.

The scale maps the largest magnitude to 2^b / 2 - 1/2 steps, as compressed-tensors does: the positive end then rounds
down by half a step, no more than any other weight may be off, and the grid is finer than with 2^(b-1) - 1 steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4run.quant_config import QuantScheme


def quantize_rtn(
    weight: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """weight [N, K] to (q int8 [N, K], scale [N, G] in `scale_dtype`), symmetric; every input counts alike.

    The scale is rounded to its stored dtype before the weights are divided by it, so that what is written is what
    was optimized. An all-zero group gets scale 1.
    """
    assert scheme.symmetric  # recipes ask for nothing else
    half_steps = (1 << scheme.bits) / 2 - 0.5
    group_size = scheme.group_size or weight.shape[-1]
    grouped = weight.float().unflatten(-1, (-1, group_size))  # [N, G, g]
    largest = torch.finfo(scale_dtype).max  # beyond it fp16 would store infinity
    scale = (grouped.abs().amax(-1) / half_steps).clamp(max=largest).to(scale_dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    low, high = -(1 << (scheme.bits - 1)), (1 << (scheme.bits - 1)) - 1
    q = torch.round(grouped / scale.float().unsqueeze(-1)).clamp_(low, high).to(torch.int8)
    return q.flatten(-2), scale
