"""The grid that all methods round to: whole steps of a group's scale, of either sign.

A scale may be negative: the range -2^(b-1) .. 2^(b-1) - 1 reaches one step further below than above, and a negative
scale turns that longer side to wherever a group's largest weight lies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4run.quant_config import QuantScheme


def bounds(bits: int) -> tuple[int, int]:
    """The lowest and the highest stored step."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def in_groups(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """[N, K] to a view [N, G, g]."""
    group_size = scheme.group_size or weight.shape[-1]
    grouped: Tensor = weight.unflatten(-1, (-1, group_size))
    return grouped


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as the file will hold them: rounded to `dtype`, never 0 and never beyond its range."""
    largest = torch.finfo(dtype).max
    rounded = scale.clamp(-largest, largest).to(dtype)
    return torch.where((rounded == 0) | ~torch.isfinite(rounded), torch.ones_like(rounded), rounded)


def round_to(weight: Tensor, scale: Tensor, scheme: QuantScheme) -> Tensor:
    """weight [N, K] on the grid of `scale` [N, G]: q int8 [N, K]."""
    low, high = bounds(scheme.bits)
    steps = in_groups(weight.float(), scheme) / scale.float().unsqueeze(-1)
    return steps.round_().clamp_(low, high).to(torch.int8).flatten(-2)
