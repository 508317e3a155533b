"""RoPE turns the right half of the right pairs by the right angle, also a million tokens in, also under YaRN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from glm4run.config import ModelConfig, RopeScaling
from glm4run.rope import Rope, apply_rope, yarn_attention_factor, yarn_inv_freq

CPU = torch.device("cpu")


def config_of(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "model_type": "glm4",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "intermediate_size": 64,
        "vocab_size": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
    }
    return ModelConfig(**(sizes | changes))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_position_zero_is_the_identity() -> None:
    x = random(2, 1, 128)
    cos, sin = Rope(config_of()).cos_sin(0, 1, CPU)
    assert torch.equal(apply_rope(x, cos, sin), x)


def test_golden_pairs() -> None:
    # head 8, rotary 4, base 10000: inv_freq = 10000^(0/4) = 1 and 10000^(-2/4) = 0.01. At position 1 the pair (1, 0)
    # turns by 1 rad: (cos 1, sin 1) = (0.5403023, 0.8414710); the pair (0, 2) by 0.01: (-2 sin .01, 2 cos .01).
    rope = Rope(config_of(head_dim=8))
    assert rope.inv_freq.tolist() == pytest.approx([1.0, 0.01])
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0, 5.0, 6.0, 7.0, 8.0]]])
    turned = apply_rope(x, *rope.cos_sin(1, 1, CPU))
    assert turned[0, 0].tolist() == pytest.approx(
        [0.5403023, 0.8414710, -0.0199997, 1.9999000, 5.0, 6.0, 7.0, 8.0], abs=1e-6
    )


@pytest.mark.parametrize("theta", [1e4, 5e6, 1e8])
def test_frequencies_are_the_powers_of_the_base(theta: float) -> None:
    inv_freq = Rope(config_of(rope_theta=theta)).inv_freq
    assert inv_freq.shape == (32,)
    assert inv_freq.tolist() == pytest.approx([theta ** (-2 * i / 64) for i in range(32)], rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dimensions_beyond_the_rotary_ones_pass_bit_for_bit(dtype: torch.dtype) -> None:
    x = (random(3, 7, 128) * 1e3).to(dtype)
    turned = apply_rope(x, *Rope(config_of()).cos_sin(1000, 7, CPU))
    assert turned.dtype == dtype
    assert turned.shape == x.shape
    assert torch.equal(turned[..., 64:], x[..., 64:])
    assert not torch.equal(turned[..., :64], x[..., :64])


def test_every_pair_keeps_its_norm() -> None:
    x = random(4, 33, 128)
    turned = apply_rope(x, *Rope(config_of()).cos_sin(12345, 33, CPU))
    before, after = (t[..., :64].unflatten(-1, (-1, 2)).norm(dim=-1) for t in (x, turned))
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_products_depend_on_the_distance_only() -> None:
    rope, q, k = Rope(config_of()), random(1, 1, 128, seed=1), random(1, 1, 128, seed=2)

    def product(at: int, distance: int) -> float:
        turned_q = apply_rope(q, *rope.cos_sin(at + distance, 1, CPU))
        return float((turned_q * apply_rope(k, *rope.cos_sin(at, 1, CPU))).sum())

    assert product(0, 5) == pytest.approx(product(100_000, 5), rel=1e-4)
    assert product(0, 5) != pytest.approx(product(0, 6), rel=1e-2)


def test_tables_of_a_later_start_are_the_rows_of_the_whole() -> None:
    rope = Rope(config_of())
    whole = rope.cos_sin(0, 40, CPU)
    part = rope.cos_sin(30, 10, CPU)
    for a, b in zip(whole, part, strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a[30:], b)


@pytest.mark.parametrize("theta", [1e4, 1e8])
def test_a_million_tokens_in_the_angles_are_still_accurate(theta: float) -> None:
    rope = Rope(config_of(rope_theta=theta, max_position_embeddings=1048576))
    start = 1_000_000
    cos, sin = rope.cos_sin(start, 3, CPU)
    for t in range(3):
        for i, frequency in enumerate(rope.inv_freq.tolist()):
            angle = (start + t) * frequency
            assert float(cos[t, i]) == pytest.approx(math.cos(angle), abs=1e-7)
            assert float(sin[t, i]) == pytest.approx(math.sin(angle), abs=1e-7)
    turned = apply_rope(random(2, 3, 128), cos, sin)
    assert torch.isfinite(turned).all()


# YaRN


def test_yarn_golden() -> None:
    # rotary 64, base 10000, native 32768, factor 4. A dimension i turns 32768 * 10000^(-i/32) / 2 pi times: 32 turns at
    # i = 32 ln(32768 / (32 * 2 pi)) / ln 10000 = 17.70 -> 17, one turn at 29.74 -> 30. Up to 17 the frequency is kept,
    # from 30 on it is a quarter; at 20 the ramp is 3/13, so 10000^(-20/32) * (1 - 3/13 * 3/4).
    scaling = RopeScaling(factor=4.0, original_max_position_embeddings=32768)
    rope = Rope(config_of(rope_scaling=scaling))
    plain = [10000 ** (-i / 32) for i in range(32)]
    got = rope.inv_freq.tolist()
    assert got[:18] == pytest.approx(plain[:18], rel=1e-6)
    assert got[20] == pytest.approx(plain[20] * (1 - 3 / 13 * 0.75), rel=1e-6)
    assert got[30:] == pytest.approx([f / 4 for f in plain[30:]], rel=1e-6)
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)


def test_yarn_scales_cosine_and_sine() -> None:
    scaling = RopeScaling(factor=4.0, original_max_position_embeddings=32768, attention_factor=1.25)
    cos, sin = Rope(config_of(rope_scaling=scaling)).cos_sin(0, 5, CPU)
    torch.testing.assert_close((cos.square() + sin.square()).sqrt(), torch.full((5, 32), 1.25))


def test_yarn_of_factor_one_changes_nothing() -> None:
    scaling = RopeScaling(factor=1.0, original_max_position_embeddings=32768)
    plain, stretched = Rope(config_of()), Rope(config_of(rope_scaling=scaling))
    torch.testing.assert_close(stretched.inv_freq, plain.inv_freq, rtol=1e-6, atol=0.0)
    assert stretched.attention_factor == 1.0


@pytest.mark.transformers
@pytest.mark.parametrize(
    ("theta", "native", "factor", "details"),
    [
        (1e4, 32768, 4.0, {}),
        (1e4, 64, 4.0, {}),
        (5e6, 131072, 8.0, {}),
        (1e4, 32768, 4.0, {"beta_fast": 16.0, "beta_slow": 2.0}),
        (1e4, 32768, 2.5, {"attention_factor": 1.3}),
        (1e4, 32768, 1.0, {}),
    ],
)
@pytest.mark.parametrize("head_dim", [128, 24])
def test_yarn_is_transformers_yarn(
    theta: float, native: int, factor: float, details: dict[str, float], head_dim: int
) -> None:
    from transformers import Glm4Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": native,
        "partial_rotary_factor": 0.5,
    }
    theirs = Glm4Config(
        head_dim=head_dim, max_position_embeddings=int(native * factor), rope_parameters=parameters | details
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, CPU)
    scaling = RopeScaling(factor=factor, original_max_position_embeddings=native, **details)
    rope = Rope(config_of(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling))
    torch.testing.assert_close(rope.inv_freq, expected, rtol=1e-6, atol=0.0)
    assert rope.attention_factor == pytest.approx(expected_factor, rel=1e-12)
    assert yarn_attention_factor(scaling) == rope.attention_factor
    plain = 1.0 / theta ** (torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
    torch.testing.assert_close(yarn_inv_freq(plain, theta, scaling), rope.inv_freq, rtol=1e-6, atol=0.0)
