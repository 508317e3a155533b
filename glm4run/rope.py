"""Rotary position embedding of this family: partial, interleaved, with YaRN.

Only the first `rotary_dim` of `head_dim` dimensions turn, in pairs (x[0], x[1]), (x[2], x[3]), ...; the others pass
through bit for bit. One `Rope` belongs to a model; its cosines are computed once per forward and shared by all layers.

Sources: GLM-4's published modelling code (base 10000 x rope_ratio, interleaved), arXiv 2309.00071 (YaRN).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glm4run.config import ModelConfig, RopeScaling


class Rope:
    """The frequencies of one model.

    `inv_freq` [rotary_dim / 2] is rounded to float32, as in every published implementation; the angle
    position * inv_freq is then taken in float64, so that positions up to a million keep their precision.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.rotary_dim = config.rotary_dim
        # Also where the modules are made on the meta device.
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device="cpu") / self.rotary_dim
        inv_freq = 1.0 / (config.rope_theta**exponents)
        self.attention_factor = 1.0
        if config.rope_scaling is not None:
            inv_freq = yarn_inv_freq(inv_freq, config.rope_theta, config.rope_scaling)
            self.attention_factor = yarn_attention_factor(config.rope_scaling)
        self.inv_freq = inv_freq

    def cos_sin(self, start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine for positions start .. start+count-1: two float32 [count, rotary_dim / 2]."""
        cos, sin = self.cos_sin_at(torch.arange(start, start + count, dtype=torch.float64), self.inv_freq.double())
        return cos.to(device), sin.to(device)

    def cos_sin_at(self, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        """The same for positions [T], where they are; `inv_freq` is the attribute beside them. Both float64."""
        angles = torch.outer(positions, inv_freq)
        return (angles.cos() * self.attention_factor).float(), (angles.sin() * self.attention_factor).float()

    def mean_cos_sin(self, count: int) -> tuple[Tensor, Tensor]:
        """The means of cosine and sine over positions 0 .. count-1: two float32 [1, rotary_dim / 2].

        A pair that turns slowly keeps what it was; of one that turns often nothing is left.
        """
        # sum of exp(i p f) = sin(n f / 2) / sin(f / 2) * exp(i (n - 1) f / 2)
        half = self.inv_freq.double() / 2
        size = (count * half).sin() / half.sin() / count * self.attention_factor
        angle = (count - 1) * half
        return (size * angle.cos()).float()[None], (size * angle.sin()).float()[None]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the leading dimensions of `x` [..., heads, T, D] by `cos`, `sin` [T, R / 2]; returns the same shape.

    The rotation runs in float32 whatever the dtype of `x`; dimensions R .. D-1 come back unchanged.
    """
    rotary_dim = 2 * cos.shape[-1]
    pairs = x[..., :rotary_dim].float().unflatten(-1, (-1, 2))  # [..., T, R/2, 2]
    even, odd = pairs.unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), x[..., rotary_dim:]), dim=-1)


def yarn_attention_factor(scaling: RopeScaling) -> float:
    """The factor on cosine and sine. Source: arXiv 2309.00071, equation 22 (its square root of 1/t)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 1.0 if scaling.factor <= 1 else 0.1 * math.log(scaling.factor) + 1.0


def yarn_inv_freq(inv_freq: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """NTK-by-parts: fast dimensions keep their frequency, slow ones are divided by the factor, a ramp between.

    Source: arXiv 2309.00071, section 3.2; the ramp's ends are rounded outwards as in the published implementations.
    """
    half = inv_freq.shape[0]

    def dimension_at(rotations: float) -> float:
        # The (half-)dimension that makes `rotations` full turns over the native context.
        length = scaling.original_max_position_embeddings
        return half * math.log(length / (rotations * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(dimension_at(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_at(scaling.beta_slow)), 2 * half - 1)
    width = max(high - low, 0.001)
    ramp = ((torch.arange(half, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    return inv_freq / scaling.factor * ramp + inv_freq * (1 - ramp)
