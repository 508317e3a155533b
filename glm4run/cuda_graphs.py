"""A forward of all layers as a CUDA graph: of one token, and of a whole chunk of a prompt.

A forward of GLM-4-9B is some 400 kernels, for one token of a few microseconds each: launched one after the other from
Python they take ten times as long as on the card, and still longer than a chunk of 2048 tokens on a fast one. A graph
of them is launched at once. What changes, the tokens and their position, lies in device memory where the kernels read
it, so that one graph serves every position of a cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from glm4run.interrupts import interrupts_held
from glm4run.kernels.triton.attention import attend
from glm4run.kernels.triton.cache import rope_append, why_not
from glm4run.kernels.triton.elementwise import add_rms_norm, rms_norm, silu_mul
from glm4run.kernels.triton.launch import current
from glm4run.kv_cache import KVCache
from glm4run.kv_format import KVFormat
from glm4run.kv_rows import KVLayer
from glm4run.layers import QuantizedLinear, RMSNorm, linear_together
from glm4run.memory import LARGER_CHUNKS
from glm4run.model import DecoderLayer, Glm4Model
from glm4run.ops import TritonOps

CAPTURED_BACKENDS = ("triton", "torch")  # whose products neither wait for the device nor ask it anything


@dataclass
class _Graphs:
    """Of one cache: by how many tokens, how often they came, and the graph with its result."""

    runs: dict[int, int] = field(default_factory=dict)
    captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = field(default_factory=dict)


class CapturedForward:
    """`model.WholeForward` by graphs, which go with their cache.

    The first forward of each kind over a cache is launched kernel by kernel, which compiles them. It is captured when a
    second one comes: what has one chunk only has nothing of a graph.
    """

    def __init__(self, model: Glm4Model, device: torch.device, chunk: int) -> None:
        self.model, self.device = model, device
        counts = {1, chunk} if chunk in LARGER_CHUNKS else {1}
        with torch.inference_mode(False):  # written to from inside and outside of it
            self.ids = {count: torch.zeros(count, dtype=torch.long, device=device) for count in counts}
            self.position = torch.zeros(1, dtype=torch.int32, device=device)
            self.inv_freq = model.rope.inv_freq.double().to(device)
        self._graphs: WeakKeyDictionary[KVLayer, _Graphs] = WeakKeyDictionary()
        self._pool: Any = None

    def takes(self, count: int) -> bool:
        """Whether forwards of so many tokens go this way."""
        return count in self.ids

    @torch.no_grad()
    def hidden_states(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Ids [T], for which `takes` says yes, to normed hidden states [T, hidden]. They become part of the cache."""
        count = len(ids)
        cache.require(count)
        self.ids[count].copy_(ids)
        self.position.fill_(cache.position)
        with current(self.device):
            out = self._run(count, cache.layers)
        cache.advance(count)
        return out

    def _run(self, count: int, layers: list[KVLayer]) -> Tensor:
        graphs = self._graphs.setdefault(layers[0], _Graphs())  # the first layer stands for the cache
        runs = graphs.runs[count] = graphs.runs.get(count, 0) + 1
        if count not in graphs.captured and runs > 1:
            with interrupts_held():  # a capture that ends in the middle leaves the device in no good state
                graphs.captured[count] = self._capture(count, layers)
        if count not in graphs.captured:
            return self._forward(count, layers)
        graph, out = graphs.captured[count]
        graph.replay()
        return out.clone()  # the next replay writes there again

    def _capture(self, count: int, layers: list[KVLayer]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        if not any(graphs.captured for graphs in self._graphs.values()):
            # All graphs share memory, as they run one after the other. With the last of them it is given back, and its
            # handle is good for nothing then.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = self._forward(count, layers)
        return graph, out

    def _forward(self, count: int, caches: list[KVLayer]) -> Tensor:
        """The modules' forward with the sums of the residual in the norms behind them."""
        model = self.model
        dtype = model.dtype
        positions = self.position.double() + torch.arange(count, dtype=torch.float64, device=self.device)
        cos, sin = model.rope.cos_sin_at(positions, self.inv_freq)
        x = model.model.embed_tokens(self.ids[count]).to(model.residual_dtype)
        layers = [cast(DecoderLayer, layer) for layer in model.model.layers]
        norms = [*(layer.input_layernorm for layer in layers), model.model.norm]
        normed = rms_norm(x, norms[0].weight, norms[0].eps, dtype)
        for layer, cache, next_norm in zip(layers, caches, norms[1:], strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            query, key, value = linear_together((attention.q_proj, attention.k_proj, attention.v_proj), normed)
            attended = torch.empty_like(query)
            attend(rope_append(query, key, value, cos, sin, cache, self.position), cache, self.position, out=attended)
            del query, key, value
            branch = attention.o_proj(attended.to(x.dtype))
            del attended
            x, normed = _join(x, branch, layer.post_self_attn_layernorm, layer.post_attention_layernorm, dtype)
            branch = mlp.down_proj(silu_mul(mlp.gate_up_proj(normed).to(x.dtype)))
            x, normed = _join(x, branch, layer.post_mlp_layernorm, next_norm, dtype)
        return normed


def _join(x: Tensor, branch: Tensor, inner: nn.Module, norm: RMSNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The residual with a branch, which `inner` norms before where it is a norm; and its norm in `dtype`."""
    weight = inner.weight if isinstance(inner, RMSNorm) else None
    return add_rms_norm(x, branch, weight, norm.weight, norm.eps, dtype)


def captured_forward(model: Glm4Model, device: torch.device, kv_format: KVFormat, chunk: int) -> CapturedForward | None:
    """The forward of a model on `device`; None where its kernels do not take the model or cannot be captured."""
    config, dtype = model.config, model.dtype
    first = cast(DecoderLayer, model.model.layers[0])
    packed = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if not isinstance(first.self_attn.ops, TritonOps):
        return None
    if any(module.backend.name not in CAPTURED_BACKENDS for module in packed):
        return None
    kept = KVCache(config, 1, dtype=dtype, device=device, kv_format=kv_format, for_cpu=False).layers[0]
    if why_not(kept, config.num_attention_heads, config.head_dim, dtype) is not None:
        return None
    return CapturedForward(model, device, chunk)
