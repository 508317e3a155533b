"""What all keys of a head have in common, known from the weights alone: the bias of `k_proj`, as RoPE turns it.

A bias adds the same vector to every key. Where it is large (norms of 605 and 921 in two layers of Qwen2.5-7B, about
22 in the others: ggml-org/llama.cpp issue 21385; GLM-4's keys are biased too) a cache of few bits spends its steps on
it. Two parts of it are the same at every position: the dimensions that RoPE leaves alone, and the pairs that turn so
slowly that they hardly move within the model's context. A constant that is taken from every key changes each score of
a query by the same amount, which softmax does not see: it costs a subtraction when a row is written, and nothing when
it is read.

The constant is the mean of the turned bias over all positions of the context. Pairs that turn often have a mean of
zero, and keep their bias.
"""

from __future__ import annotations

from torch import Tensor

from glm4run.model import Attention, DecoderLayer, Glm4Model
from glm4run.rope import apply_rope


def key_offsets(model: Glm4Model) -> list[Tensor]:
    """Of each layer float32 [KVH, D] on the weights' device; an empty list where no key has a bias."""
    config = model.config
    mean = model.rope.mean_cos_sin(config.max_position_embeddings)
    biases = []
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer) and isinstance(layer.self_attn, Attention)
        bias = layer.self_attn.k_proj.bias
        if bias is None:
            return []
        biases.append(bias.detach().float().unflatten(0, (config.num_key_value_heads, config.head_dim)))
    if not any(bool(bias.any()) for bias in biases):
        return []
    turns = [part.to(biases[0].device) for part in mean]
    return [apply_rope(bias[:, None], *turns)[:, 0].contiguous() for bias in biases]
