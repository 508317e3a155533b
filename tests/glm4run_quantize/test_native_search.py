"""The native scale search finds what the torch code finds, but for the last bits of sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glm4run.kernels.cpu.library import why_missing
from glm4run.kernels.cpu.rounding import search_and_pack, takes_rounding
from glm4run.qformat import pack, scale_groups
from glm4run.quant_config import QuantScheme
from glm4run_quantize.methods.grid import round_to
from glm4run_quantize.methods.mse import STEPS, error_weights, quantize_mse
from tests.packed_cases import weight_to_round

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=f"no native library: {why_missing()}")


def weighted_errors(weight: Tensor, q: Tensor, scale: Tensor, importance: Tensor, group: int) -> Tensor:
    """[N, G] in float64."""
    off = (weight.double() - scale_groups(q, scale).double()).square() * error_weights(weight, importance).double()
    total: Tensor = off.unflatten(-1, (-1, group)).sum(-1)
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", [(1, 128), (7, 384), (33, 1280)])
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
    expected_q, expected_scale = quantize_mse(weight.float(), scheme, dtype, importance)
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
