"""Finds out whether a loaded model's layers can run as one call of the native library, and binds them to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glm4run.kernels.cpu.backend import NativeWeight
from glm4run.kernels.cpu.stack import NativeStack, takes
from glm4run.layers import QuantizedLinear, RMSNorm
from glm4run.model import DecoderLayer, Glm4Model


def native_stack(model: Glm4Model) -> NativeStack | None:
    """The model's layers as one native call; None where one of its linears is not packed for the native backend."""
    if not takes(model.config, model.dtype):
        return None
    linears: list[list[tuple[NativeWeight, Tensor | None]]] = []
    norms: list[list[Tensor | None]] = []
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        attention, mlp = layer.self_attn, layer.mlp
        parts = [
            _native(linear, model.dtype)
            for linear in (
                attention.q_proj,
                attention.k_proj,
                attention.v_proj,
                attention.o_proj,
                mlp.gate_up_proj,
                mlp.down_proj,
            )
        ]
        if any(part is None for part in parts):
            return None
        linears.append([part for part in parts if part is not None])
        norms.append(
            [
                _weight(norm)
                for norm in (
                    layer.input_layernorm,
                    layer.post_attention_layernorm,
                    layer.post_self_attn_layernorm,
                    layer.post_mlp_layernorm,
                )
            ]
        )
    return NativeStack(model.config, model.dtype, linears, norms) if linears else None


def _native(linear: nn.Module, dtype: torch.dtype) -> tuple[NativeWeight, Tensor | None] | None:
    if not isinstance(linear, QuantizedLinear) or not isinstance(linear.prepacked, NativeWeight):
        return None
    bias = linear.bias
    if bias is not None and bias.dtype != dtype:
        return None
    return linear.prepacked, bias


def _weight(norm: nn.Module) -> Tensor | None:
    """A norm's weight as float32; None where the branch has no such norm."""
    return norm.weight.float() if isinstance(norm, RMSNorm) else None
