"""One token through the whole model as a CUDA graph.

A decode step of GLM-4-9B is some 360 kernels of a few microseconds: launched one after the other from Python they take
ten times as long as the card. A graph of them is launched at once. What changes from token to token, the token and its
position, lies in device memory where the kernels read it, so that one graph serves every position of a cache.
"""

from __future__ import annotations

from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from glm4run.interrupts import interrupts_held
from glm4run.kernels.triton.attention import attend
from glm4run.kernels.triton.cache import rope_append, why_not
from glm4run.kernels.triton.elementwise import add_rms_norm, rms_norm, silu_mul
from glm4run.kv_cache import KVCache
from glm4run.kv_format import KVFormat
from glm4run.kv_rows import KVLayer
from glm4run.layers import QuantizedLinear, RMSNorm, linear_together
from glm4run.model import DecoderLayer, Glm4Model
from glm4run.ops import TritonOps

CAPTURED_BACKENDS = ("triton", "torch")  # whose products neither wait for the device nor ask it anything


class CudaStep:
    """`model.DecodeStep` by a graph for each cache, made at the first token that goes through it."""

    def __init__(self, model: Glm4Model, device: torch.device) -> None:
        self.model, self.device = model, device
        with torch.inference_mode(False):  # written to from inside and outside of it
            self.ids = torch.zeros(1, dtype=torch.long, device=device)
            self.position = torch.zeros(1, dtype=torch.int32, device=device)
            self.inv_freq = model.rope.inv_freq.double().to(device)
        self._graphs: WeakKeyDictionary[KVLayer, tuple[torch.cuda.CUDAGraph, Tensor]] = WeakKeyDictionary()
        self._pool = torch.cuda.graph_pool_handle()  # one after the other they use the same memory

    @torch.no_grad()
    def logits(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Logits float32 [1, V] behind ids [1], which become part of the cache."""
        cache.require(1)
        self.ids.copy_(ids)
        self.position.fill_(cache.position)
        out = self._run(cache.layers)
        cache.advance(1)
        return out

    def _run(self, layers: list[KVLayer]) -> Tensor:
        first = layers[0]  # it stands for the cache: nothing of it is ever replaced
        if first not in self._graphs:
            out = self._step(layers)  # kernels are compiled and libraries set up here, which a capture cannot
            with interrupts_held():
                self._graphs[first] = self._capture(layers)
            return out
        graph, out = self._graphs[first]
        graph.replay()
        return out.clone()  # the next replay writes there again

    def _capture(self, layers: list[KVLayer]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = self._step(layers)
        return graph, out

    def _step(self, caches: list[KVLayer]) -> Tensor:
        """The modules' forward with the sums of the residual in the norms behind them."""
        model = self.model
        dtype = model.dtype
        cos, sin = model.rope.cos_sin_at(self.position.double(), self.inv_freq)
        x = model.model.embed_tokens(self.ids).to(model.residual_dtype)
        layers = [cast(DecoderLayer, layer) for layer in model.model.layers]
        norms = [*(layer.input_layernorm for layer in layers), model.model.norm]
        normed = rms_norm(x, norms[0].weight, norms[0].eps, dtype)
        for layer, cache, next_norm in zip(layers, caches, norms[1:], strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            query, key, value = linear_together((attention.q_proj, attention.k_proj, attention.v_proj), normed)
            attended = torch.empty_like(query)
            attend(rope_append(query, key, value, cos, sin, cache, self.position), cache, self.position, out=attended)
            branch = attention.o_proj(attended.to(x.dtype))
            x, normed = _join(x, branch, layer.post_self_attn_layernorm, layer.post_attention_layernorm, dtype)
            branch = mlp.down_proj(silu_mul(mlp.gate_up_proj(normed).to(x.dtype)))
            x, normed = _join(x, branch, layer.post_mlp_layernorm, next_norm, dtype)
        out: Tensor = model.lm_head(normed)
        return out.float()


def _join(x: Tensor, branch: Tensor, inner: nn.Module, norm: RMSNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The residual with a branch, which `inner` norms before where it is a norm; and its norm in `dtype`."""
    weight = inner.weight if isinstance(inner, RMSNorm) else None
    return add_rms_norm(x, branch, weight, norm.weight, norm.eps, dtype)


def captured_step(model: Glm4Model, device: torch.device, kv_format: KVFormat) -> CudaStep | None:
    """The step of a model on `device`; None where its kernels do not take the model or cannot be captured."""
    config, dtype = model.config, model.dtype
    first = cast(DecoderLayer, model.model.layers[0])
    packed = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if not isinstance(first.self_attn.ops, TritonOps):
        return None
    if any(module.backend.name not in CAPTURED_BACKENDS for module in packed):
        return None
    kept = KVCache(config, 1, dtype=dtype, device=device, kv_format=kv_format).layers[0]
    if why_not(kept, config.num_attention_heads, config.head_dim, dtype) is not None:
        return None
    return CudaStep(model, device)
