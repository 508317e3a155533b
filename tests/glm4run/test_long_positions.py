"""Positions deep in a long context: the same logits as transformers', from all the keys before them.

A model of one layer shows it exactly and in seconds: its keys and values depend on tokens and positions alone, so both
sides fill their caches with attention left out, and then attend from one position to everything before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glm4run.config import ModelConfig, RopeScaling
from glm4run.kernels.cpu.library import why_missing
from glm4run.kv_cache import KVCache
from glm4run.model import Attention, Glm4Model
from glm4run.ops import NativeOps, Ops
from glm4run.rope import Rope
from tests.glm4run.test_model import config_of, random_ids, randomize, relative_error, tiny_transformers

CPU = torch.device("cpu")
POSITIONS = (0, 1, 4095, 32767, 131071)
FILL = 8192  # tokens at once
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
}
PLAIN = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
ROPES = pytest.mark.parametrize("rope", [PLAIN, YARN], ids=["plain", "yarn"])


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


class _NoAttention(Ops):
    def attention(self, query: Tensor, *_: Any) -> Tensor:
        return torch.zeros(query.shape[-2], query.shape[-3] * query.shape[-1])


class _AnglesInFloat32(Rope):
    """As transformers computes them: at position 131071 an angle is then off by up to 1/256 of a radian."""

    def cos_sin(self, start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        angles = torch.arange(start, start + count, dtype=torch.float32)[:, None] * self.inv_freq
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor


def sharpen(model: Any) -> None:
    """Large queries: attention that is spread over 131,072 keys would be blind to where they stand."""
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            parameter.data *= 4.0


def use_ops(model: Glm4Model, ops: Ops) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.ops = ops


def our_logits(model: Glm4Model, ids: Tensor, positions: tuple[int, ...], ops: Ops | None = None) -> dict[int, Tensor]:
    """Logits [V] of each position, with all before it in the cache."""
    cache = KVCache(model.config, len(ids), dtype=torch.float32, device=CPU)
    use_ops(model, _NoAttention())
    for part in ids[:-1].split(FILL):
        model.hidden_states(part, cache)
    use_ops(model, ops or Ops())
    found = {}
    for position in sorted(positions, reverse=True):
        cache.truncate(position)
        found[position] = model(ids[position : position + 1], cache)[-1]
    return found


def their_logits(model: Any, ids: Tensor) -> dict[int, Tensor]:
    from transformers import AttentionInterface, DynamicCache

    AttentionInterface.register(
        "left_out", lambda module, query, key, value, mask, **_: (torch.zeros_like(query.transpose(1, 2)), None)
    )
    cache = DynamicCache(config=model.config)
    model.config._attn_implementation = "left_out"
    for part in ids[:-1].split(FILL):
        model(input_ids=part[None], past_key_values=cache, logits_to_keep=1)
    model.config._attn_implementation = "sdpa"
    found = {}
    for position in sorted(POSITIONS, reverse=True):
        for layer in cache.layers:  # their `crop` takes other arguments in every other version
            layer.keys, layer.values = layer.keys[..., :position, :], layer.values[..., :position, :]
        assert cache.get_seq_length() == position
        found[position] = model(input_ids=ids[None, position : position + 1], past_key_values=cache).logits[0, -1]
    return found


@pytest.mark.transformers
@ROPES
@pytest.mark.parametrize("kind", ["glm", "glm4"])
def test_logits_at_long_positions_are_those_of_transformers(kind: str, rope: dict[str, Any]) -> None:
    theirs, ours = tiny_transformers(
        kind,
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=131072,
        rope_parameters=rope,
    )
    for model in (theirs, ours):
        sharpen(model)
    assert (ours.config.rope_scaling is not None) is (rope is YARN)
    ids = random_ids(POSITIONS[-1] + 1)

    expected, exact = their_logits(theirs, ids), our_logits(ours, ids, POSITIONS)
    ours.rope = _AnglesInFloat32(ours.config)
    rounded = our_logits(ours, ids, POSITIONS)
    for position in POSITIONS:
        assert float(expected[position].std()) > 0.1
        assert relative_error(rounded[position], expected[position]) < 1e-4, position
        assert relative_error(exact[position], expected[position]) < 2e-3, position
    ours.rope = Rope(config_of(head_dim=16, rope_theta=1e4 if rope is YARN else 1e6))  # no YaRN, or another base
    other = our_logits(ours, ids[:32768], (32767,))[32767]
    assert relative_error(other, exact[32767]) > 5e-3  # what is compared above does depend on the angles


# The angles, by an independent formula


def angles_by_formula(position: int, config: ModelConfig) -> tuple[np.ndarray[Any, Any], float]:
    """Angles [R/2] in float64 as the papers write them (RoFormer; YaRN section 3.2), and the factor on both tables."""
    dims = config.rotary_dim
    theta = config.rope_theta ** (-2.0 * np.arange(dims // 2) / dims)
    scaling = config.rope_scaling
    if scaling is None:
        return position * theta, 1.0
    # r(d): turns of a dimension over the native context; the ramp between alpha and beta is over d, as published.
    length = scaling.original_max_position_embeddings
    ends = [
        dims * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    ]
    low, high = math.floor(ends[0]), math.ceil(ends[1])
    share = np.clip((np.arange(dims // 2) - low) / (high - low), 0.0, 1.0)  # of the stretched frequency
    return position * ((1 - share) * theta + share * theta / scaling.factor), 0.1 * math.log(scaling.factor) + 1


MEMBERS = {
    "chat-128k": config_of(head_dim=128, rope_theta=5e6, max_position_embeddings=131072),
    "chat-1m": config_of(head_dim=128, rope_theta=1e8, max_position_embeddings=1048576),
    "0414": config_of(head_dim=128, rope_theta=1e4, max_position_embeddings=32768),
    "0414-yarn": config_of(
        head_dim=128, rope_theta=1e4, max_position_embeddings=131072, rope_scaling=RopeScaling(4.0, 32768)
    ),
}


@pytest.mark.parametrize("position", [*POSITIONS, 1_000_000, 1_048_575])
@pytest.mark.parametrize("config", MEMBERS.values(), ids=MEMBERS.keys())
def test_cosine_and_sine_are_the_papers(config: ModelConfig, position: int) -> None:
    angles, factor = angles_by_formula(position, config)
    cos, sin = Rope(config).cos_sin(position, 1, CPU)
    # The frequencies are those of the published implementations, rounded to float32; beyond that nothing is lost.
    allowed = 2.0**-22 * angles + 1e-7
    assert (np.abs(cos[0].double().numpy() - factor * np.cos(angles)) <= allowed * factor).all()
    assert (np.abs(sin[0].double().numpy() - factor * np.sin(angles)) <= allowed * factor).all()
    exact = position * Rope(config).inv_freq.double().numpy()
    np.testing.assert_allclose(cos[0].numpy(), Rope(config).attention_factor * np.cos(exact), atol=1e-7)


# A million tokens


def test_a_million_tokens_in_attention_is_that_of_numpy() -> None:
    """Positions, offsets and strides: everything that 32 bits or a rounded index would spoil shows here."""
    start, heads, kv_heads, size = 1_000_000, 16, 2, 16
    config = config_of(
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_theta=1e8,
        max_position_embeddings=1048576,
    )
    model = Glm4Model(config).eval()
    randomize(model)
    cache = KVCache(config, 1048576, dtype=torch.float32, device=CPU)
    generator = torch.Generator().manual_seed(3)
    for name, rows in cache.rows(0, 0, start).items():
        rows.normal_(std=2.0 if name == "keys" else 1.0, generator=generator)
    cache.position = start
    seen: dict[str, Tensor] = {}

    class Noting(Ops if why_missing() is not None else NativeOps):  # type: ignore[misc]
        def attend(self, query: Tensor, *rest: Any) -> Tensor:
            seen["query"] = query.clone()
            seen["out"] = super().attend(query, *rest)
            return seen["out"]

    use_ops(model, Noting())
    keys, values = (rows.double().numpy() for rows in cache.rows(0, 0, start).values())
    for tokens, allowed in ((1, 2e-4), (9, 4e-3)):  # a decode; a prefill, whose running float32 sum is 0.2 % off
        cache.truncate(start)
        logits = model(random_ids(tokens), cache)
        assert cache.position == start + tokens and torch.isfinite(logits).all()
        query = seen["query"].double().numpy()  # [H, T, D]
        new_keys, new_values = (rows.double().numpy() for rows in cache.rows(0, start, start + tokens).values())
        for head, t in ((0, 0), (heads - 1, tokens - 1)):
            kv_head = head * kv_heads // heads
            scores = np.concatenate((keys[kv_head], new_keys[kv_head, : t + 1])) @ query[head, t] / math.sqrt(size)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            expected = weights[:start] @ values[kv_head] + weights[start:] @ new_values[kv_head, : t + 1]
            got = seen["out"][t, head * size : (head + 1) * size].double().numpy()
            np.testing.assert_allclose(got, expected, atol=allowed * np.abs(expected).max())
