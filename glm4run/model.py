"""The GLM-4 decoder: configuration to modules to forward. Nothing here knows about bits or files.

Module names are the Hugging Face names, so that a state dict needs no renaming. Both norm orders of the family are
one block: the 0414 members (`glm4`) norm each branch once more before it joins the residual.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm4run.attention import grouped_query_attention
from glm4run.config import ModelConfig
from glm4run.kv_cache import KVCache
from glm4run.layers import Embedding, Linear, RMSNorm
from glm4run.rope import Rope, apply_rope


class Attention(nn.Module):
    """q, k, v with bias, partial RoPE, grouped-query attention, output projection."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
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
        query = apply_rope(self._heads(self.q_proj(x)), *rope)
        key = apply_rope(self._heads(self.k_proj(x)), *rope)
        value = self._heads(self.v_proj(x))
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        out: Tensor = self.o_proj(grouped_query_attention(query, key, value).to(branch))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)
        return heads  # [..., heads, T, D]


class MLP(nn.Module):
    """SwiGLU with one fused projection: the first half of its rows is the gate, the second half goes up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, branch: torch.dtype) -> Tensor:
        """x [..., T, hidden] to [..., T, hidden] in dtype `branch`, in which the product of the halves is taken."""
        gate, up = self.gate_up_proj(x).to(branch).chunk(2, dim=-1)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out


class DecoderLayer(nn.Module):
    """One transformer block; with sandwich norms where the configuration has them."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps)

        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
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

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Glm4Model(nn.Module):
    """A GLM-4-family causal language model.

    `dtype` is what the linears compute in. The residual stream has the same dtype, except that fp16 keeps it (and
    what is added to it) in float32: this family's activations pass fp16's 65504 in deep layers.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.residual_dtype = torch.float32 if dtype == torch.float16 else dtype
        self.rope = Rope(config)
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def hidden_states(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids [..., T] to the normed hidden states [..., T, hidden].

        With a `cache` (ids then [T]) the tokens stand behind `cache.position`, and become part of it.
        """
        count = ids.shape[-1]
        start = 0 if cache is None else cache.position
        rope = self.rope.cos_sin(start, count, ids.device)
        x = self.model.embed_tokens(ids).to(self.residual_dtype)
        for layer in self.model.layers:
            x = layer(x, rope, cache, self.dtype)
        if cache is not None:
            cache.advance(count)
        normed: Tensor = self.model.norm(x).to(self.dtype)
        return normed

    def forward(self, ids: Tensor, cache: KVCache | None = None, *, logits: Literal["last", "all"] = "last") -> Tensor:
        """Logits in float32: of the last position [..., 1, V] unless `all` [..., T, V] are asked for."""
        hidden = self.hidden_states(ids, cache)
        out: Tensor = self.lm_head(hidden[..., -1:, :] if logits == "last" else hidden)
        return out.float()
