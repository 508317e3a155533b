"""Norms, SwiGLU and the fused sum in Triton against the torch code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glm4run.layers import rms_norm

elementwise = pytest.importorskip("glm4run.kernels.triton.elementwise", reason="triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Signed, with outliers."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[::37] *= 30
    return x.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 48, 257, 4096])
def test_rms_norm(dtype: torch.dtype, size: int) -> None:
    x, weight = values(3, size, dtype=dtype), values(size, dtype=torch.float32, seed=1)
    expected = rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(elementwise.rms_norm(x, weight, 1e-5), expected, rtol=TOLERANCE[dtype], atol=1e-6)


def test_rms_norm_narrows_as_a_cast_behind_it_would() -> None:
    x, weight = values(2, 96, dtype=torch.float32), values(96, dtype=torch.float32, seed=1)
    narrow = elementwise.rms_norm(x, weight, 1e-5, torch.float16)
    assert narrow.dtype == torch.float16
    torch.testing.assert_close(narrow, rms_norm(x, weight, 1e-5).half(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("residual", "dtype"), [(torch.bfloat16,) * 2, (torch.float32, torch.float16)])
@pytest.mark.parametrize("sandwich", [False, True])
def test_add_rms_norm(residual: torch.dtype, dtype: torch.dtype, sandwich: bool) -> None:
    x, branch = values(2, 5, 96, dtype=residual), values(2, 5, 96, dtype=residual, seed=1)
    weight, inner = (values(96, dtype=torch.float32, seed=seed) for seed in (2, 3))
    joined = rms_norm(branch, inner, 1e-5) if sandwich else branch
    expected = x + joined
    found, normed = elementwise.add_rms_norm(x, branch, inner if sandwich else None, weight, 1e-5, dtype)
    assert (found.dtype, normed.dtype) == (residual, dtype)
    # Where the two cancel, what is left shows the last bit of the normed branch.
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[residual], atol=1e-2)
    torch.testing.assert_close(normed, rms_norm(found, weight, 1e-5).to(dtype), rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter; the sigmoid is 0 there
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 3), (5, 1500), (2, 13696)])
def test_silu_mul(dtype: torch.dtype, rows: int, size: int) -> None:
    gate_up = values(rows, 2 * size, dtype=dtype)
    gate, up = gate_up.float().chunk(2, dim=-1)
    expected = (F.silu(gate) * up).to(dtype)
    torch.testing.assert_close(elementwise.silu_mul(gate_up), expected, rtol=TOLERANCE[dtype], atol=1e-6)


def test_what_is_not_finite_stays_so() -> None:
    x = values(2, 64, dtype=torch.bfloat16)
    x[0, 3] = float("nan")
    normed = elementwise.rms_norm(x, torch.ones(64, device=DEVICE), 1e-5)
    assert normed[0].isnan().all() and normed[1].isfinite().all()
