"""Packed weights with known values, inputs as language models have them, and how far a product may be off.

Nothing here uses a kernel: what a weight stands for is computed in float64 from its parts.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from glm4run.qformat import PackedWeight, num_groups, pack, pack_zero_points
from glm4run.quant_config import QuantScheme

# Relative Frobenius error, and max-abs error relative to the largest output. fp32: 13696 products summed in some order.
# bf16: rounding the output costs 2^-9 at most; bf16 weights (the reference) or bf16 zeros (torch's int4) as much again.
TOLERANCE = {torch.float32: (4e-6, 4e-6), torch.bfloat16: (7e-3, 8e-3)}


@dataclass(frozen=True)
class Case:
    """A packed weight, and in float64 what it stands for, computed from its parts without `qformat`."""

    weight: PackedWeight
    dense: Tensor


def make_case(N: int, K: int, scheme: QuantScheme, scale_dtype: torch.dtype, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    half, G = 1 << (scheme.bits - 1), num_groups(K, scheme)
    q = torch.randint(-half, half, (N, K), generator=generator, dtype=torch.int8)
    # Scales over three orders of magnitude: a scale that goes to the wrong group must show.
    scale = (10 ** (torch.rand(N, G, generator=generator) * 3 - 3)).to(scale_dtype)
    signed = None
    if not scheme.symmetric:
        signed = torch.randint(-half, half, (N, G), generator=generator, dtype=torch.int8)
    return case_of(q, scale, signed, scheme)


def case_of(q: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Case:
    """The case of values int8 [N, K], scales [N, G] and signed zero points int8 [N, G]."""
    (N, K), G = q.shape, scale.shape[1]
    centred, packed_zero_point = q.double().reshape(N, G, K // G), None
    if zero_point is not None:
        centred = centred - zero_point.double()[..., None]
        packed_zero_point = pack_zero_points(zero_point, scheme.bits)
    dense = (centred * scale.double()[..., None]).reshape(N, K)
    return Case(PackedWeight(pack(q, scheme.bits), scale, packed_zero_point, N, K, scheme), dense)


each_weight_to_round = pytest.mark.parametrize(
    ("shape", "group_size", "bits", "dtype"),
    list(
        itertools.product(
            [(1, 128), (7, 384), (33, 1280)], [32, 64, 128], [4, 8], [torch.float32, torch.bfloat16, torch.float16]
        )
    ),
)


def weight_to_round(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Weights [N, K] as models have them, with what rounding may get wrong among them. K is 128 at least."""
    weight = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator).exp()
    weight[0, :40] = 0.0  # a group of nothing but zeros, at g32
    weight[-1, -3] = 60.0  # an outlier
    weight[0, 64:96] = torch.arange(32) - 15.5  # ties
    weight[-1, :32] = 1e-7  # scales that fp16 rounds to 0
    return weight.to(dtype)


def inputs_with_outliers(M: int, K: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Signed, with a few channels a hundred times as large as the rest, as language models have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=generator)
    x[:, torch.randperm(K, generator=generator)[: max(1, K // 100)]] *= 100
    return x.to(dtype)


def assert_close(got: Tensor, x: Tensor, case: Case, dtype: torch.dtype) -> None:
    """`got` is the product of the first rows of `x`; errors are relative to the products of all of its rows.

    A single row can come out small by cancellation, and its error would then say nothing.
    """
    assert got.dtype == dtype
    exact = x.double() @ case.dense.T
    M, N = got.shape
    assert exact.shape[1] == N
    error = got.double() - exact[:M]
    frobenius = float(error.square().mean().sqrt() / exact.square().mean().sqrt())
    max_abs = float(error.abs().max() / exact.abs().max())
    allowed_frobenius, allowed_max_abs = TOLERANCE[dtype]
    assert frobenius < allowed_frobenius, f"relative Frobenius error {frobenius:.2e} at M={M}"
    assert max_abs < allowed_max_abs, f"max-abs error {max_abs:.2e} of the largest output at M={M}"
