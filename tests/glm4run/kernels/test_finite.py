"""NaN and infinity are found wherever they are, in the library and without it."""

from __future__ import annotations

import math

import pytest
import torch

from glm4run.kernels.cpu.finite import all_finite
from tests.native_library import needs_library

pytestmark = needs_library
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr("glm4run.kernels.cpu.finite.why_missing", lambda: "of the test")
    return bool(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7, 4096, 4097, 9001])
def test_one_value_is_enough(count: int, dtype: torch.dtype, library: bool) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    assert all_finite(x)
    for place in {0, count // 2, count - 1}:
        for value in (math.nan, -math.nan, math.inf, -math.inf):
            spoiled = x.clone()
            spoiled[place] = value
            assert not all_finite(spoiled), (place, value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_and_the_smallest_are_finite(dtype: torch.dtype, library: bool) -> None:
    info = torch.finfo(dtype)
    assert all_finite(torch.tensor([info.max, info.min, info.smallest_normal, -info.tiny / 2, 0.0, -0.0], dtype=dtype))


def test_every_shape_is_looked_at(library: bool) -> None:
    assert all_finite(torch.empty(0, 3))
    x = torch.zeros(6, 8, dtype=torch.bfloat16)
    x[1, 5] = math.nan
    assert not all_finite(x)
    assert all_finite(x[:, ::2]) and not all_finite(x[:, 1::2]) and not all_finite(x.t())
    assert all_finite(torch.zeros(3, dtype=torch.float64)) and not all_finite(torch.tensor([math.inf]).double())
