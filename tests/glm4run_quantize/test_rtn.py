"""Round to nearest: no weight is off by more than half a step, but for the end that does not fit the grid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from glm4run.qformat import PackedWeight, dequantize, pack
from glm4run.quant_config import QuantScheme
from glm4run_quantize.methods.rtn import quantize_rtn

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_scheme = pytest.mark.parametrize(
    "scheme", [QuantScheme(bits, size) for bits in (4, 8) for size in (32, 64, 128, None)], ids=QuantScheme.describe
)
each_scale_dtype = pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=["fp32", "bf16", "fp16"])


def random_weight(N: int, K: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator) * 0.02
    weight[:, ::17] *= 20
    return weight


def assert_within_half_a_step(weight: Tensor, q: Tensor, scale: Tensor, bits: int) -> None:
    """|w - q s| <= s/2, or q is the last value at the end where w lies and w is at most the rounding of s beyond."""
    half = 1 << (bits - 1)
    G = scale.shape[-1]
    wide = scale.double()[..., None]
    steps = weight.double().unflatten(-1, (G, -1)) / wide
    values = q.double().unflatten(-1, (G, -1))
    assert int(q.min()) >= -half
    assert int(q.max()) <= half - 1
    error = (steps - values).abs()
    clipped = ((values == half - 1) & (steps > values)) | ((values == -half) & (steps < values))
    # The quotient in float32 may tip an exact half over by an ulp.
    assert (
        float(error[~clipped].max(initial=0) if error.numel() == 0 else error.masked_fill(clipped, 0).max())
        <= 0.5 + 1e-4
    )
    # At the clipped end the largest weight is half - 1/2 steps, times at most the rounding of the scale.
    beyond = 0.5 + half * float(torch.finfo(scale.dtype).eps) / 2 + 1e-4
    assert float(error.masked_fill(~clipped, 0).max()) <= beyond


@each_scale_dtype
@each_scheme
def test_every_weight_is_within_half_a_step(scheme: QuantScheme, scale_dtype: torch.dtype) -> None:
    weight = random_weight(24, 256)
    q, scale = quantize_rtn(weight, scheme, scale_dtype)
    G = 1 if scheme.group_size is None else 256 // scheme.group_size
    assert (q.dtype, q.shape) == (torch.int8, (24, 256))
    assert (scale.dtype, scale.shape) == (scale_dtype, (24, G))
    assert_within_half_a_step(weight, q, scale, scheme.bits)
    assert len(q.unique()) > (1 << scheme.bits) // 2  # the grid is used


@each_scheme
def test_packed_and_dequantized_it_is_the_weight_within_half_a_step(scheme: QuantScheme) -> None:
    weight = random_weight(9, 256)
    q, scale = quantize_rtn(weight, scheme, torch.bfloat16)
    dense = dequantize(PackedWeight(pack(q, scheme.bits), scale, None, 9, 256, scheme))
    steps = scale.float().repeat_interleave(256 // scale.shape[-1], dim=-1)
    slack = 1 + (1 << scheme.bits) * 2.0**-8  # at the clipped end: the rounding of a bf16 scale
    assert float(((dense - weight).abs() / steps).max()) <= 0.5 * slack + 1e-3


def test_golden_group() -> None:
    # The largest magnitude is 7.5, so the scale is 7.5 / 7.5 = 1: -7.5 -> -8 (half to even), 7.4 -> 7, 2.5 -> 2.
    weight = torch.tensor([[-7.5, 7.4, 2.5, -2.4, 0.4, -0.6, 1.0, 0.0]])
    q, scale = quantize_rtn(weight, QuantScheme(4, 8), torch.float32)
    assert scale.tolist() == [[1.0]]
    assert q.tolist() == [[-8, 7, 2, -2, 0, -1, 1, 0]]
    # With 7.5 at the positive end: 7.5 -> 8, which does not exist -> 7.
    q, _ = quantize_rtn(-weight, QuantScheme(4, 8), torch.float32)
    assert q[0, :2].tolist() == [7, -7]


@each_scale_dtype
@each_scheme
def test_all_zero_groups_stay_zero_with_scale_one(scheme: QuantScheme, scale_dtype: torch.dtype) -> None:
    weight = random_weight(3, 256)
    weight[1] = 0
    q, scale = quantize_rtn(weight, scheme, scale_dtype)
    assert (q[1] == 0).all()
    assert (scale[1] == 1).all()
    assert q[0].any()
    assert (scale[0] < 1).all()


@each_scale_dtype
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_divided_by_the_scale_that_is_stored(bits: int, scale_dtype: torch.dtype) -> None:
    weight = random_weight(64, 128)
    q, scale = quantize_rtn(weight, QuantScheme(bits, 32), scale_dtype)
    half = 1 << (bits - 1)
    grouped = weight.unflatten(-1, (4, 32))
    assert torch.equal(scale, (grouped.abs().amax(-1) / (half - 0.5)).to(scale_dtype))
    best = torch.round(grouped / scale.float()[..., None]).clamp(-half, half - 1)
    assert torch.equal(q.unflatten(-1, (4, 32)).float(), best)


def test_groups_are_independent() -> None:
    weight = random_weight(2, 128)
    changed = weight.clone()
    changed[:, 32:64] *= 1000
    q, scale = quantize_rtn(weight, QuantScheme(4, 32), torch.float32)
    other_q, other_scale = quantize_rtn(changed, QuantScheme(4, 32), torch.float32)
    kept = [0, 2, 3]
    assert torch.equal(scale[:, kept], other_scale[:, kept])
    assert torch.equal(q.unflatten(-1, (4, 32))[:, kept], other_q.unflatten(-1, (4, 32))[:, kept])
    assert not torch.equal(scale[:, 1], other_scale[:, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_widened_first(dtype: torch.dtype) -> None:
    weight = random_weight(8, 128).to(dtype)
    narrow = quantize_rtn(weight, QuantScheme(8, 32), torch.float32)
    wide = quantize_rtn(weight.float(), QuantScheme(8, 32), torch.float32)
    assert torch.equal(narrow[0], wide[0])
    assert torch.equal(narrow[1], wide[1])


def test_the_input_is_left_alone() -> None:
    weight = random_weight(8, 128)
    before = weight.clone()
    quantize_rtn(weight, QuantScheme(4, 32), torch.bfloat16)
    assert torch.equal(weight, before)


@given(
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, None]),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    N=st.integers(1, 5),
    exponent=st.integers(-2, 3),
    outlier=st.floats(-100, 100, width=32),
    seed=st.integers(0, 10_000),
)
def test_the_bound_holds_for_any_magnitude(
    bits: int,
    group_size: int | None,
    scale_dtype: torch.dtype,
    N: int,
    exponent: int,
    outlier: float,
    seed: int,
) -> None:
    weight = torch.randn(N, 64, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    weight[0, seed % 64] *= outlier
    q, scale = quantize_rtn(weight, QuantScheme(bits, group_size), scale_dtype)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert_within_half_a_step(weight, q, scale, bits)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=32, max_size=32))
def test_the_bound_holds_for_any_group(values: list[float]) -> None:
    weight = torch.tensor([values])
    q, scale = quantize_rtn(weight, QuantScheme(4, 32), torch.float32)
    if float(weight.abs().max()) > 1e-30:  # below, the scale itself is a denormal
        assert_within_half_a_step(weight, q, scale, 4)


@pytest.mark.parametrize("largest", [1e-6, 3e-7, 1e-7])
def test_tiny_groups_with_fp16_scales(largest: float) -> None:
    """fp16 scales run out of precision here: the error must not exceed what all zeros would cost."""
    weight = torch.linspace(-1, 1, 32)[None] * largest
    q, scale = quantize_rtn(weight, QuantScheme(4, 32), torch.float16)
    dense = q.float() * scale.float()
    assert float((dense - weight).abs().max()) <= float(weight.abs().max())


def test_groups_too_large_for_fp16_scales_do_not_become_infinite() -> None:
    weight = torch.full((1, 32), 1e6)
    _, scale = quantize_rtn(weight, QuantScheme(4, 32), torch.float16)
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_passed_on_as_numbers(bad: float) -> None:
    weight = random_weight(1, 32)
    weight[0, 3] = bad
    try:
        q, scale = quantize_rtn(weight, QuantScheme(4, 32), torch.float32)
    except (ValueError, ArithmeticError, RuntimeError):
        return
    assert not torch.isfinite(q.float() * scale).all()


def test_a_group_size_that_does_not_divide_is_an_error() -> None:
    with pytest.raises((RuntimeError, ValueError)):
        quantize_rtn(random_weight(2, 100), QuantScheme(4, 32), torch.float32)
