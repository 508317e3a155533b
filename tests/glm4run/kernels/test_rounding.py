"""Rounding in the native library gives what the torch code gives, to the bit."""

from __future__ import annotations

import pytest
import torch

from glm4run.kernels.cpu.rounding import round_and_pack, takes_rounding
from glm4run.qformat import pack, scale_groups
from glm4run.quant_config import QuantScheme
from glm4run_quantize.methods.rtn import quantize_rtn
from tests.native_library import needs_library
from tests.packed_cases import each_weight_to_round, weight_to_round

pytestmark = needs_library


@each_weight_to_round
def test_same_bytes_as_in_torch(shape: tuple[int, int], group_size: int, bits: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(shape[0] + group_size + bits)
    weight = weight_to_round(shape, dtype, generator)
    scheme = QuantScheme(bits, group_size)
    assert takes_rounding(weight, scheme)
    result = round_and_pack(weight, scheme)
    assert result is not None
    q, scale = quantize_rtn(weight, scheme, dtype)
    assert torch.equal(result[1], scale)
    assert torch.equal(result[0], pack(q, bits))
    assert result[2] == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
    noise = (weight.double() - scale_groups(q, scale).double()).square().sum()
    assert result[3] == pytest.approx(float(noise), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_seen(value: float, dtype: torch.dtype) -> None:
    weight = torch.ones(3, 64, dtype=dtype)
    weight[1, 37] = value
    assert round_and_pack(weight, QuantScheme(4, 32)) is None


def test_what_it_does_not_take() -> None:
    weight = torch.ones(4, 96)
    assert takes_rounding(weight, QuantScheme(4, 32))
    assert not takes_rounding(weight, QuantScheme(4, 64))  # does not divide
    assert not takes_rounding(weight, QuantScheme(4, None))
    assert not takes_rounding(weight, QuantScheme(4, 32, symmetric=False))
    assert not takes_rounding(weight[:, :64], QuantScheme(4, 32))
    assert not takes_rounding(weight.double(), QuantScheme(4, 32))
