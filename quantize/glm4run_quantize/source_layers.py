"""The source a layer at a time in float32, and how residuals go through it.

Calibrated runs, sensitivity and the moments of random tokens share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from glm4run.checkpoint.reader import CheckpointReader
from glm4run.config import ModelConfig
from glm4run.model import DecoderLayer
from glm4run.ops import Ops, split_heads
from glm4run.rope import Rope

# Linears that are fed with the same input, in the order in which a layer computes them.
STAGES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": ("mlp.gate_up_proj",),
    "down_proj": ("mlp.down_proj",),
}
WINDOWS_AT_ONCE = 4
HEAD_ROWS, HEAD_TOKENS = 16384, 128


class SourceLayers:
    """The layers of `reader`'s model, for windows of `tokens` tokens. Streams of residuals are [W, T, hidden]."""

    def __init__(self, reader: CheckpointReader, config: ModelConfig, tokens: int, device: torch.device) -> None:
        self.reader, self.config, self.device = reader, config, device
        self.rope = Rope(config).cos_sin(0, tokens, device)

    def embed(self, ids: Tensor) -> Tensor:
        """ids [W, T] to the stream in front of the first layer.

        Rows are read one by one: the whole table may be larger than all else.
        """
        distinct, places = ids.unique(return_inverse=True)
        rows = [self.reader.read_rows("model.embed_tokens.weight", i, i + 1) for i in distinct.tolist()]
        return torch.cat(rows).float()[places].to(self.device)

    def layer(self, index: int, read: Callable[[str], Tensor] | None = None) -> DecoderLayer:
        """Layer `index`; `read` gives tensors by name in place of the reader."""
        read = read or self.reader.read
        with torch.device("meta"):
            layer = DecoderLayer(self.config, index, Ops())
        prefix = f"model.layers.{index}."
        state = {name: read(prefix + name).float().to(self.device) for name in layer.state_dict()}
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_(False)

    def forward(
        self, layer: DecoderLayer, stream: Tensor, visit: Callable[[str, Tensor], None] = lambda _, __: None
    ) -> Tensor:
        """A stream behind a layer, in new memory. `visit` gets each stage and its inputs [w, T, K]."""
        out = stream.clone()
        for part in parts(out.shape[0]):
            x = out[part]
            normed = layer.input_layernorm(x)
            visit("qkv", normed)
            attended = self.attend(layer, normed)
            visit("o_proj", attended)
            x += layer.post_self_attn_layernorm(layer.self_attn.o_proj(attended))
            normed = layer.post_attention_layernorm(x)
            visit("gate_up_proj", normed)
            product = gated(layer, normed)
            visit("down_proj", product)
            x += layer.post_mlp_layernorm(layer.mlp.down_proj(product))
        return out

    def attend(self, layer: DecoderLayer, normed: Tensor) -> Tensor:
        """Attention without its output projection: [W, T, hidden] to [W, T, H * D]."""
        attention = layer.self_attn
        query = attention.ops.rope(attention.q_proj(normed), attention.head_dim, *self.rope)
        key = attention.ops.rope(attention.k_proj(normed), attention.head_dim, *self.rope)
        value = split_heads(attention.v_proj(normed), attention.head_dim)
        return attention.ops.attention(query, key, value)

    def head(self) -> Tensor:
        """The weight of lm_head [V, hidden] as stored; the embedding where they are one."""
        tied = self.config.tie_word_embeddings
        return self.reader.read("model.embed_tokens.weight" if tied else "lm_head.weight").to(self.device)

    def final_norm(self) -> Callable[[Tensor], Tensor]:
        """The norm in front of lm_head."""
        weight = self.reader.read("model.norm.weight").float().to(self.device)
        return lambda x: Ops().rms_norm(x, weight, self.config.rms_norm_eps)


def parts(last: int, first: int = 0) -> Iterator[slice]:
    """The windows [first, last), a few at a time."""
    for at in range(first, last, WINDOWS_AT_ONCE):
        yield slice(at, min(at + WINDOWS_AT_ONCE, last))


def linear_of(layer: DecoderLayer, module: str) -> nn.Linear:
    """The linear of a layer that has this name in the model."""
    found = layer.get_submodule(".".join(module.split(".")[3:]))
    assert isinstance(found, nn.Linear)
    return found


def gated(layer: DecoderLayer, normed: Tensor) -> Tensor:
    """What goes into down_proj."""
    return layer.mlp.ops.silu_mul(layer.mlp.gate_up_proj(normed))


def log_probabilities(x: Tensor, head: Tensor) -> Tensor:
    """x [T, hidden] to [T, V], with a few rows of the head in float32 at a time."""
    logits = [x @ head[at : at + HEAD_ROWS].float().t() for at in range(0, head.shape[0], HEAD_ROWS)]
    return torch.cat(logits, dim=-1).log_softmax(-1)
