"""Activation-aware scaling: the input channels that carry the largest activations get the finer grid.

W x = (W s) (x / s) exactly, for any positive s per input channel. The division is folded into whatever makes x: the
weight of the norm before q, k, v and gate_up; the rows of v before o_proj (query heads that share a KV head share their
scales); the rows of up before down_proj, which the gated product passes through linearly. s = mean|x|^a, with the a of
a small grid that leaves the least error in the linear's output. Source: AWQ, arXiv 2306.00978; there every a is judged
by rounding to nearest, here by `mse`, which the scaled weights will be packed by.

Norm weights are stored in the model's dtype: they are rounded first, and the linears take up what the rounded ones
really divide by, so that folding itself costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glm4run.model import DecoderLayer
from glm4run.qformat import scale_groups
from glm4run.quant_config import QuantScheme
from glm4run_quantize.methods.mse import quantize_mse

EXPONENTS = tuple(i / 10 for i in range(11))  # 0 leaves all as it is


def choose_scale(
    weights: Sequence[Tensor],
    schemes: Sequence[QuantScheme],
    x: Tensor,
    scale_dtype: torch.dtype,
    shared: int = 1,
    width: int = 1,
) -> Tensor:
    """The s [K] for linears [N, K] of one input x [T, K]; all ones where scaling does not help.

    `shared` runs of `width` channels in a row get one s: the heads that share a KV head.
    """
    magnitude = x.abs().mean(0).unflatten(0, (-1, shared, width)).mean(1, keepdim=True).expand(-1, shared, -1).flatten()
    magnitude = magnitude.clamp(min=1e-4 * float(magnitude.mean()) + 1e-12)
    moments = x.square().mean(0)
    best, lowest = torch.ones_like(magnitude), float("inf")
    for exponent in EXPONENTS:
        scale = magnitude.pow(exponent)
        scale = scale / (scale.max() * scale.min()).sqrt()
        if exponent == 0:
            scale = torch.ones_like(scale)
        error = 0.0
        for weight, scheme in zip(weights, schemes, strict=True):
            restored = (
                scale_groups(*quantize_mse(weight * scale, scheme, scale_dtype, moments / scale.square())) / scale
            )
            error += float((x @ (weight - restored).t()).square().sum(dtype=torch.float64))
        if error < lowest:
            best, lowest = scale, error
    return best


def fold_into_norm(norm: Tensor, linears: Sequence[Tensor], scale: Tensor, dtype: torch.dtype) -> None:
    """Divides a norm's weight [K] by `scale`, rounds it to `dtype`, and makes up for both in the linears. In place."""
    divided = (norm / scale).to(dtype).float()
    usable = (divided != 0) & torch.isfinite(divided) & (norm != 0)
    divided = torch.where(usable, divided, norm)
    factor = torch.where(usable, norm / divided, torch.ones_like(norm))
    norm.copy_(divided)
    for linear in linears:
        linear.mul_(factor)


def fold_layer(
    layer: DecoderLayer,
    samples: dict[str, Tensor],
    schemes: dict[str, QuantScheme],
    scale_dtype: torch.dtype,
    query_heads_per_kv_head: int,
) -> None:
    """Scales one layer for rounding; its output stays the same. In place.

    `samples`: inputs [T, K] of "qkv", "o_proj", "gate_up_proj" and "down_proj"; `schemes` by the last part of names.
    A linear that stays dense gains nothing, and its inputs are left alone.
    """
    attention, mlp = layer.self_attn, layer.mlp
    if "o_proj" in schemes:
        scale = choose_scale(
            [attention.o_proj.weight],
            [schemes["o_proj"]],
            samples["o_proj"],
            scale_dtype,
            query_heads_per_kv_head,
            attention.head_dim,
        )
        rows = scale.unflatten(0, (-1, query_heads_per_kv_head, attention.head_dim))[:, 0].flatten()
        attention.o_proj.weight.mul_(scale)
        attention.v_proj.weight.div_(rows.unsqueeze(1))
        if attention.v_proj.bias is not None:
            attention.v_proj.bias.copy_((attention.v_proj.bias / rows).to(scale_dtype))
    if "down_proj" in schemes:
        scale = choose_scale([mlp.down_proj.weight], [schemes["down_proj"]], samples["down_proj"], scale_dtype)
        mlp.down_proj.weight.mul_(scale)
        mlp.gate_up_proj.weight[scale.shape[0] :].div_(scale.unsqueeze(1))
    names = [name for name in ("q_proj", "k_proj", "v_proj") if name in schemes]
    if len(names) == 3:
        weights = [getattr(attention, name).weight for name in names]
        scale = choose_scale(weights, [schemes[name] for name in names], samples["qkv"], scale_dtype)
        fold_into_norm(layer.input_layernorm.weight, weights, scale, scale_dtype)
    if "gate_up_proj" in schemes:
        weights = [mlp.gate_up_proj.weight]
        scale = choose_scale(weights, [schemes["gate_up_proj"]], samples["gate_up_proj"], scale_dtype)
        fold_into_norm(layer.post_attention_layernorm.weight, weights, scale, scale_dtype)
