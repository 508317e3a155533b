"""The GLM-4 decoder: configuration to modules to forward. Nothing here knows about bits or files.

Module names are the Hugging Face names, so that a state dict needs no renaming. Both norm orders of the family are
one block: the 0414 members (`glm4`) norm each branch once more before it joins the residual.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, Literal, ParamSpec, Protocol

import torch
from torch import Tensor, nn

from glm4run.config import ModelConfig
from glm4run.kv_cache import KVCache
from glm4run.kv_rows import KVLayer
from glm4run.layers import Embedding, Linear, RMSNorm, linear_together
from glm4run.memory import logits_block_rows
from glm4run.ops import Ops
from glm4run.rope import Rope
from glm4run.torch_threads import one_torch_thread

P = ParamSpec("P")


class LayerStack(Protocol):
    """All blocks in one call, for up to `max_tokens` new tokens, with the results of the blocks one after the other."""

    max_tokens: int

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, caches: list[KVLayer], position: int) -> Tensor:
        """The residual x [T, hidden] to the next one; the new keys and values go into the cache at `position`."""
        ...

    def run_sequences(
        self, x: Tensor, cos: Tensor, sin: Tensor, caches: list[list[KVLayer]], positions: list[int]
    ) -> Tensor:
        """The same for sequences that share every product: x [S * T, hidden], T new tokens of each in turn."""
        ...


class WholeForward(Protocol):
    """All of a forward but the head in one call, for the numbers of tokens that it takes."""

    def takes(self, count: int) -> bool:
        """Whether forwards of so many tokens go this way."""
        ...

    def hidden_states(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Ids [T] to normed hidden states [T, hidden], those of the modules; they become part of the cache."""
        ...


class Attention(nn.Module):
    """q, k, v with bias, partial RoPE, grouped-query attention, output projection."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.layer = layer
        self.ops = ops
        self.head_dim = config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(hidden, query_width, bias=bias)
        self.k_proj = Linear(hidden, kv_width, bias=bias)
        self.v_proj = Linear(hidden, kv_width, bias=bias)
        self.o_proj = Linear(query_width, hidden, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None, branch: torch.dtype) -> Tensor:
        """x [..., T, hidden] to [..., T, hidden] in dtype `branch`; `rope` is cos and sin of the T positions."""
        projected = linear_together((self.q_proj, self.k_proj, self.v_proj), x)
        if cache is None:
            attended = self.ops.attend_alone(projected, self.head_dim, rope)
        else:
            cache.require(x.shape[-2])
            attended = self.ops.attend_new(projected, self.head_dim, rope, cache.layers[self.layer], cache.position)
        out: Tensor = self.o_proj(attended.to(branch))
        return out


class MLP(nn.Module):
    """SwiGLU with one fused projection: the first half of its rows is the gate, the second half goes up."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, branch: torch.dtype) -> Tensor:
        """x [..., T, hidden] to [..., T, hidden] in dtype `branch`, in which the product of the halves is taken."""
        out: Tensor = self.down_proj(self.ops.silu_mul(self.gate_up_proj(x).to(branch)))
        return out


class DecoderLayer(nn.Module):
    """One transformer block; with sandwich norms where the configuration has them."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps, ops.rms_norm)

        self.self_attn = Attention(config, layer, ops)
        self.mlp = MLP(config, ops)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.post_self_attn_layernorm = norm() if config.has_sandwich_norms else nn.Identity()
        self.post_mlp_layernorm = norm() if config.has_sandwich_norms else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None, dtype: torch.dtype) -> Tensor:
        """The residual x [..., T, hidden] to the next one, in the residual's own dtype."""
        branch = self.self_attn(self.input_layernorm(x).to(dtype), rope, cache, x.dtype)
        x = x + self.post_self_attn_layernorm(branch)
        branch = self.mlp(self.post_attention_layernorm(x).to(dtype), x.dtype)
        out: Tensor = x + self.post_mlp_layernorm(branch)
        return out


class Decoder(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i, ops) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops.rms_norm)


def _beside_the_library(
    method: Callable[Concatenate[Glm4Model, P], Tensor],
) -> Callable[Concatenate[Glm4Model, P], Tensor]:
    """torch keeps to one thread: with a stack the native library computes everything that is worth another."""

    @functools.wraps(method)
    def alone(model: Glm4Model, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        with one_torch_thread(model.stack is not None):
            return method(model, *args, **kwargs)

    return alone


class Glm4Model(nn.Module):
    """A GLM-4-family causal language model.

    `dtype` is what the linears compute in. The residual stream has the same dtype, except that fp16 keeps it (and
    what is added to it) in float32: this family's activations pass fp16's 65504 in deep layers. `ops` computes what
    lies between the linears; torch does where it is None.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype = torch.float32, ops: Ops | None = None) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.residual_dtype = torch.float32 if dtype == torch.float16 else dtype
        self.rope = Rope(config)
        self.model = Decoder(config, ops or Ops())
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.stack: LayerStack | None = None
        self.whole: WholeForward | None = None

    @_beside_the_library
    def hidden_states(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids [..., T] to the normed hidden states [..., T, hidden].

        With a `cache` (ids then [T]) the tokens stand behind `cache.position`, and become part of it.
        """
        count = ids.shape[-1]
        if self.whole is not None and cache is not None and ids.ndim == 1 and self.whole.takes(count):
            return self.whole.hidden_states(ids, cache)
        start = 0 if cache is None else cache.position
        rope = self.rope.cos_sin(start, count, ids.device)
        x = self.model.embed_tokens(ids).to(self.residual_dtype)
        if self.stack is not None and cache is not None and ids.ndim == 1 and count <= self.stack.max_tokens:
            cache.require(count)
            x = self.stack.run(x, *rope, cache.layers, start)
        else:
            for layer in self.model.layers:
                x = layer(x, rope, cache, self.dtype)
        if cache is not None:
            cache.advance(count)
        normed: Tensor = self.model.norm(x).to(self.dtype)
        return normed

    @_beside_the_library
    def forward(self, ids: Tensor, cache: KVCache | None = None, *, logits: Literal["last", "all"] = "last") -> Tensor:
        """Logits in float32: of the last position [..., 1, V] unless `all` [..., T, V] are asked for."""
        hidden = self.hidden_states(ids, cache)
        out: Tensor = self.lm_head(hidden[..., -1:, :] if logits == "last" else hidden)
        return out.float()

    @_beside_the_library
    def decode_together(self, ids: Tensor, caches: list[KVCache]) -> Tensor:
        """One more token of several sequences, which share the read of every weight: ids [S] to logits float32 [S, V].

        Needs a `stack`. Every row is the same to the bit as that of its sequence alone.
        """
        assert self.stack is not None
        positions = [cache.position for cache in caches]
        for cache in caches:
            cache.require(1)
        turns = [self.rope.cos_sin(position, 1, ids.device) for position in positions]
        cos, sin = (torch.cat(rows) for rows in zip(*turns, strict=True))
        x = self.model.embed_tokens(ids).to(self.residual_dtype)
        x = self.stack.run_sequences(x, cos, sin, [cache.layers for cache in caches], positions)
        for cache in caches:
            cache.advance(1)
        out: Tensor = self.lm_head(self.model.norm(x).to(self.dtype))
        return out.float()

    def write_logits(self, ids: Tensor, cache: KVCache, out: Tensor) -> None:
        """The logits of every position of ids [T] into `out` float32 [T, V], a block of positions at a time.

        A block keeps the head's own output small beside `out`, which is large: 0.6 MB a position for this family.
        """
        hidden = self.hidden_states(ids, cache)
        rows = logits_block_rows(self.config.vocab_size, self.dtype.itemsize)
        for first in range(0, len(hidden), rows):
            out[first : first + rows] = self.lm_head(hidden[first : first + rows])
