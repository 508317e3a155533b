"""The native scale search finds what the torch code finds, but for the last bits of sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glm4run.kernels.cpu.rounding import search_and_pack, takes_rounding
from glm4run.kernels.cpu.rounding import search_scales as native_search
from glm4run.qformat import pack, scale_groups
from glm4run.quant_config import QuantScheme
from glm4run_quantize.methods.grid import round_to
from glm4run_quantize.methods.mse import STEPS, error_weights, find_scales, search_scales
from tests.native_library import needs_library
from tests.packed_cases import each_weight_to_round, weight_to_round

pytestmark = needs_library


def weighted_errors(weight: Tensor, q: Tensor, scale: Tensor, importance: Tensor, group: int) -> Tensor:
    """[N, G] in float64."""
    off = (weight.double() - scale_groups(q, scale).double()).square() * error_weights(weight, importance).double()
    total: Tensor = off.unflatten(-1, (-1, group)).sum(-1)
    return total


@each_weight_to_round
def test_as_good_as_in_torch(shape: tuple[int, int], group_size: int, bits: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(shape[0] + group_size + bits)
    weight = weight_to_round(shape, dtype, generator)
    importance = torch.rand(shape[1], generator=generator).square()
    importance[::50] = 0.0  # inputs that are always 0
    importance[3] = 100.0
    scheme = QuantScheme(bits, group_size)
    assert takes_rounding(weight, scheme)
    result = search_and_pack(weight, scheme, importance, STEPS[bits])
    assert result is not None
    packed, scale, signal, noise = result
    expected_scale = search_scales(weight, scheme, dtype, error_weights(weight, importance))
    expected_q = round_to(weight, expected_scale, scheme)
    q = round_to(weight.float(), scale, scheme)
    assert torch.equal(packed, pack(q, bits))
    assert scale.dtype == dtype
    found = weighted_errors(weight, q, scale, importance, group_size)
    expected = weighted_errors(weight, expected_q, expected_scale, importance, group_size)
    # The candidates' worth is a small difference of large sums in float32, at 8 bits of sums 10^5 times as large: where
    # two are nearly alike, the other one may win. Never at the price of more than that.
    assert float(found.sum()) == pytest.approx(float(expected.sum()), rel=2e-3 if bits == 4 else 3e-2)
    if bits == 4 and scale.numel() > 20:
        assert float(torch.isclose(scale.float(), expected_scale.float(), rtol=1e-5).float().mean()) > 0.95
    assert signal == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
    off = (weight.double() - scale_groups(q, scale).double()).square().sum()
    assert noise == pytest.approx(float(off), rel=1e-4)


def test_weights_that_are_no_numbers_are_seen() -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        weight = torch.ones(3, 64, dtype=torch.bfloat16)
        weight[1, 37] = value
        assert search_and_pack(weight, QuantScheme(8, 32), torch.ones(64), STEPS[8]) is None


@pytest.mark.parametrize("by_size", [False, True])
def test_scales_alone_in_a_dtype_of_their_own(by_size: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = weight_to_round((33, 1280), torch.float32, generator)
    importance = torch.rand(1280, generator=generator).square()
    scheme = QuantScheme(4, 64)
    scale = native_search(weight, scheme, importance, STEPS[4], torch.bfloat16, by_size=by_size)
    assert scale is not None and scale.dtype == torch.bfloat16
    counts = error_weights(weight, importance) if by_size else importance.expand_as(weight)
    expected = search_scales(weight, scheme, torch.bfloat16, counts)
    assert float((scale == expected).float().mean()) > 0.98
    errors = [
        float(((weight - scale_groups(round_to(weight, s, scheme), s)).double().square() * counts).sum())
        for s in (scale, expected)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_weights_that_the_library_does_not_take_are_searched_in_torch() -> None:
    weight = torch.randn(4, 72, generator=torch.Generator().manual_seed(6))
    weight[1, 3] = float("nan")
    for scheme in (QuantScheme(4, 24), QuantScheme(4, 36)):  # groups that are no multiple of 16
        found = find_scales(weight[2:], scheme, torch.float32, None, by_size=False)
        assert torch.equal(found, search_scales(weight[2:], scheme, torch.float32))
    assert find_scales(weight[:, :64].contiguous(), QuantScheme(4, 32), torch.float32, None, by_size=True).shape == (
        4,
        2,
    )
