"""The cache holds what was appended, moves only when told, and never reallocates."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from glm4run.config import ModelConfig
from glm4run.kv_cache import KVCache

CONFIG = ModelConfig(
    model_type="glm4",
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=64,
    vocab_size=32,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
)


def new_cache(capacity: int = 8, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(CONFIG, capacity, dtype=dtype, device=torch.device("cpu"))


def tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, 16, generator=generator), torch.randn(2, count, 16, generator=generator)


def test_a_new_cache_is_empty_and_of_the_planned_size() -> None:
    cache = new_cache(8, torch.bfloat16)
    assert (cache.position, cache.capacity) == (0, 8)
    assert len(cache.layers) == 3
    assert cache.nbytes == 2 * 3 * 2 * 8 * 16 * 2


def test_bytes_per_token_of_the_real_shape() -> None:
    config = dataclasses.replace(CONFIG, num_hidden_layers=40, head_dim=128)
    cache = KVCache(config, 10, dtype=torch.bfloat16, device=torch.device("meta"))
    assert cache.nbytes == 10 * 40_960


def test_append_returns_everything_so_far() -> None:
    cache = new_cache()
    first, second = tokens(3, seed=1), tokens(2, seed=2)
    for layer in range(3):
        key, value = cache.append(layer, *first)
        assert torch.equal(key, first[0])
        assert torch.equal(value, first[1])
    cache.advance(3)
    key, value = cache.append(1, *second)
    assert key.shape == value.shape == (2, 5, 16)
    assert torch.equal(key, torch.cat((first[0], second[0]), dim=1))
    assert torch.equal(value, torch.cat((first[1], second[1]), dim=1))


def test_append_alone_does_not_move() -> None:
    cache = new_cache()
    cache.append(0, *tokens(3, seed=1))
    assert cache.position == 0
    key, _ = cache.append(0, *tokens(2, seed=2))
    assert torch.equal(key, tokens(2, seed=2)[0])


def test_layers_are_separate() -> None:
    cache = new_cache()
    key_0, _ = cache.append(0, *tokens(3, seed=1))
    cache.append(1, *tokens(3, seed=2))
    assert torch.equal(key_0, tokens(3, seed=1)[0])


def test_append_returns_views_of_memory_allocated_once() -> None:
    cache = new_cache()
    addresses = [t.data_ptr() for layer in range(3) for t in cache.tensors(layer).values()]
    for _ in range(4):
        for layer in range(3):
            key, value = cache.append(layer, *tokens(2))
            assert key.data_ptr() == cache.layers[layer].keys.data.data_ptr()
            assert value.data_ptr() == cache.layers[layer].values.data.data_ptr()
        cache.advance(2)
    assert [t.data_ptr() for layer in range(3) for t in cache.tensors(layer).values()] == addresses


def test_append_rounds_to_the_caches_dtype() -> None:
    cache = new_cache(dtype=torch.bfloat16)
    key, value = tokens(3)
    got_key, got_value = cache.append(0, key, value)
    assert torch.equal(got_key, key.bfloat16())
    assert torch.equal(got_value, value.bfloat16())


def test_a_full_cache_takes_no_more_and_says_so() -> None:
    cache = new_cache(8)
    cache.append(0, *tokens(8))
    cache.advance(8)
    with pytest.raises(ValueError, match=r"8 tokens, 9"):
        cache.append(0, *tokens(1))
    assert cache.position == 8
    with pytest.raises(ValueError, match="9 were asked for"):
        new_cache(8).append(0, *tokens(9))


def test_truncate_forgets_the_end_and_keeps_the_beginning() -> None:
    cache = new_cache()
    first, other = tokens(6, seed=1), tokens(2, seed=2)
    cache.append(0, *first)
    cache.advance(6)
    cache.truncate(4)
    assert cache.position == 4
    key, value = cache.append(0, *other)
    assert torch.equal(key, torch.cat((first[0][:, :4], other[0]), dim=1))
    assert torch.equal(value, torch.cat((first[1][:, :4], other[1]), dim=1))
    cache.truncate(0)
    assert cache.position == 0


@pytest.mark.parametrize("position", [-1, 4, 100])
def test_truncate_goes_back_only(position: int) -> None:
    cache = new_cache()
    cache.append(0, *tokens(3))
    cache.advance(3)
    with pytest.raises(ValueError, match="cannot truncate"):
        cache.truncate(position)
    assert cache.position == 3
