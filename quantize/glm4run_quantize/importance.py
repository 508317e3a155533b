"""How large the inputs of a linear are, channel by channel, as far as the weights alone tell.

Behind a norm, channel j has the size of the norm's weight j, if the normed residual is alike in all channels. A head's
value channel then has that of its row in v_proj, and a channel of the gated product that of its rows in gate and up.
That is crude, and still better than taking all channels for equal: scales then fit the weights that matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4run.checkpoint.reader import CheckpointReader
from glm4run.config import ModelConfig

ROWS = 1024  # of a weight at a time


def input_importance(reader: CheckpointReader, config: ModelConfig, module: str) -> Tensor:
    """Second moments [K] of a linear's inputs, up to a factor, in float32."""
    layer, _, name = module.rpartition(".")
    if module == "lm_head":
        return _norm(reader, "model.norm")
    block = layer.rpartition(".")[0]  # model.layers.N
    if name in ("q_proj", "k_proj", "v_proj"):
        return _norm(reader, f"{block}.input_layernorm")
    if name == "gate_up_proj":
        return _norm(reader, f"{block}.post_attention_layernorm")
    if name == "o_proj":
        rows = _row_sizes(reader, f"{layer}.v_proj.weight", _norm(reader, f"{block}.input_layernorm"))
        heads = rows.unflatten(0, (config.num_key_value_heads, 1, config.head_dim))
        shared = config.num_attention_heads // config.num_key_value_heads
        spread: Tensor = heads.expand(-1, shared, -1).flatten()
        return spread
    assert name == "down_proj", module
    rows = _row_sizes(reader, f"{layer}.gate_up_proj.weight", _norm(reader, f"{block}.post_attention_layernorm"))
    gate, up = rows.chunk(2)
    return gate * up


def _norm(reader: CheckpointReader, name: str) -> Tensor:
    return reader.read(f"{name}.weight").float().square()


def _row_sizes(reader: CheckpointReader, name: str, columns: Tensor) -> Tensor:
    """Sums over each row of w^2 times the columns' second moments."""
    count = reader.sources[name].shape[0]
    parts = [
        reader.read_rows(name, first, min(first + ROWS, count)).float().square_() @ columns
        for first in range(0, count, ROWS)
    ]
    return torch.cat(parts)
