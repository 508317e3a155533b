"""What biased keys have in common is left out of the rows that are kept, and no answer shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm4run import LoadedModel, load_model
from glm4run.attention import grouped_query_attention
from glm4run.config import parse_config
from glm4run.fingerprint import of_computation
from glm4run.kv_cache import KVCache
from glm4run.kv_format import parse_kv_bits
from glm4run.ops import Ops, choose_ops
from glm4run.rope import Rope
from tests.builders import edit_tensors, hf_weights, raw_config, write_checkpoint
from tests.native_library import needs_library

SIZES: dict[str, Any] = {"num_attention_heads": 16, "head_dim": 32, "rope_theta": 5e6}  # dimensions 0 to 15 turn
LARGE = 40.0


def write_biased(folder: Path) -> Path:
    """A tiny model whose keys have large biases where nothing turns and where it turns slowly."""
    weights = hf_weights(raw_config(**SIZES))
    edited: dict[str, Tensor | None] = {}
    for name in weights:
        if name.endswith("k_proj.bias"):
            bias = weights[name].unflatten(0, (2, 32)).clone()
            bias[:, 30], bias[1, 15], bias[0, 17] = LARGE, -LARGE, 2 * LARGE
            edited[name] = bias.flatten()
    edit_tensors(write_checkpoint(folder, **SIZES), edited)
    return folder


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_biased(tmp_path_factory.mktemp("biased") / "m")


def load(folder: Path, kv_bits: str = "16", **options: Any) -> LoadedModel:
    return load_model(folder, dtype="fp32", context_len=160, threads=1, kv_bits=kv_bits, **options)


@pytest.mark.parametrize("count", [1, 2, 700, 40_000])
def test_the_mean_over_positions_is_that_of_their_sum(count: int) -> None:
    config = parse_config(raw_config(**SIZES))
    for variant in (config, config.with_yarn(4.0)):
        rope = Rope(variant)
        exact = [part.double().mean(0).float() for part in rope.cos_sin(0, count, torch.device("cpu"))]
        for mean, expected in zip(rope.mean_cos_sin(count), exact, strict=True):
            assert mean.shape == (1, 8) and torch.allclose(mean[0], expected, atol=1e-6)


def test_the_offset_is_what_stays_of_the_bias(biased: Path) -> None:
    model = load(biased, "8")
    bias = model.model.model.layers[1].self_attn.k_proj.bias.unflatten(0, (2, 32))  # type: ignore[union-attr, operator]
    offset = model.key_offsets[1]
    assert torch.equal(offset[:, 16:], bias[:, 16:])  # dimensions that do not turn
    assert float((offset[:, 14:16] - bias[:, 14:16]).abs().max()) < LARGE / 1000  # the slowest pair of 512 positions
    assert float((offset[:, :2]).abs().max()) < 0.02 * float(bias[:, :2].abs().max())  # the fastest one
    assert load(biased, "16:8").key_offsets == [] == load(biased).key_offsets


@pytest.mark.parametrize("kv_bits", ["8", "4"])
def test_attention_does_not_see_what_was_taken_off(kv_bits: str) -> None:
    generator = torch.Generator().manual_seed(0)
    offset = torch.randn(2, 32, generator=generator) * LARGE
    key, value = (torch.randn(2, 90, 32, generator=generator) for _ in range(2))
    query = torch.randn(16, 5, 32, generator=generator)
    key += offset[:, None]
    exact = grouped_query_attention(query.double(), key.double(), value.double()).float()
    config = parse_config(raw_config(**{**SIZES, "num_hidden_layers": 1}))
    errors = []
    for offsets in ([offset], []):
        cache = KVCache(
            config,
            90,
            dtype=torch.float32,
            device=torch.device("cpu"),
            kv_format=parse_kv_bits(kv_bits),
            key_offsets=offsets,
        )
        cache.append(0, key, value)
        found = [ops.attend(query, cache.layers[0], 90) for ops in (Ops(), choose_ops("auto", torch.device("cpu")))]
        if offsets:  # the library's queries have 15 bits, which scores of hundreds show
            assert torch.allclose(found[0], found[1], atol=5e-3)
        errors.append(float((found[0] - exact).square().mean().sqrt()))
        read = cache.layers[0].keys.read(90)
        assert float((read - key).abs().max()) < (0.2 if offsets and kv_bits == "8" else 1.0 if offsets else 40.0)
    assert errors[0] < errors[1] / 4


@pytest.mark.parametrize(("kv_bits", "most"), [("8", 0.003), ("4:16", 0.3)])
def test_a_model_with_biased_keys_keeps_its_answers(biased: Path, kv_bits: str, most: float) -> None:
    ids = [40 + n * n % 211 for n in range(150)]
    exact = load(biased).logits(ids).log_softmax(-1)

    def divergence(model: LoadedModel) -> float:
        ours = model.logits(ids).log_softmax(-1)
        return float((exact.exp() * (exact - ours)).sum(-1).mean())

    model, without = load(biased, kv_bits), load(biased, kv_bits)
    vars(without)["key_offsets"] = []
    assert divergence(model) < divergence(without) / 4
    assert divergence(model) < most


@needs_library
def test_one_call_of_all_layers_keeps_the_same_rows(biased: Path, tmp_path: Path) -> None:
    """Tokens that come one by one go through the native stack, a prompt through its modules."""
    from glm4run_quantize import quantize_checkpoint

    quantize_checkpoint(biased, tmp_path / "packed", bits=4)
    model = load_model(tmp_path / "packed", backend="native", context_len=60, threads=1, kv_bits="8:4")
    assert model.model.stack is not None and model.cut_unit == 1 and model.key_offsets
    ids = torch.tensor([40 + n * n % 211 for n in range(30)])
    whole, pieces = model.new_context().cache, model.new_context().cache
    with torch.inference_mode():
        model.model.hidden_states(ids, whole)
        for token in ids:
            model.model.hidden_states(token[None], pieces)
    for layer in range(2):
        for name, rows in whole.rows(layer, 0, 30).items():
            assert torch.equal(rows, pieces.rows(layer, 0, 30)[name]), (layer, name)


def test_models_without_bias_and_caches_before_this_are_told_apart(biased: Path, tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "m", **SIZES)
    weights = hf_weights(raw_config(**SIZES))
    edit_tensors(plain, {name: torch.zeros_like(t) for name, t in weights.items() if name.endswith("k_proj.bias")})
    assert load(plain, "4").key_offsets == []
    assert "bias" not in of_computation(load(plain, "4"))["cache"]
    assert "less their bias" in of_computation(load(biased, "4"))["cache"]
    assert "bias" not in of_computation(load(biased))["cache"]
