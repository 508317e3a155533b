"""The native products against float64, on every instruction set that this machine runs.

Exact activations are compared with the exact product. Quantized ones are compared with the exact product of what
`src/layout.h` says they become, to the same tolerance; that rounding itself is bounded apart from it.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm4run.checkpoint.reader import FileMapping
from glm4run.errors import CheckpointError
from glm4run.kernels import Activations, FileRange, load_backend
from glm4run.kernels.cpu import backend as native_backend
from glm4run.kernels.cpu.backend import NativeBackend, NativeWeight
from glm4run.kernels.cpu.library import available_isas, native
from glm4run.qformat import PackedWeight, num_groups, unpack, unpack_zero_points
from glm4run.quant_config import QuantScheme
from tests.native_library import ISAS, each_isa, needs_library, prepacked, product, running, same_bits, spec_for
from tests.packed_cases import Case, case_of, inputs_with_outliers, make_case

pytestmark = needs_library

# Around the numbers of tokens where the kernels change: decoding ends at 16, tiles have 2, 4, 8 or 12, a block 128.
BATCHES = (1, 2, 3, 5, 7, 8, 9, 16, 17, 33, 130)
GROUPED_SHAPES = ((1, 128), (33, 256), (5, 13696))
WHOLE_ROW_SHAPES = ((1, 7), (17, 100), (33, 256), (2, 1000), (5, 13696))  # one scale a row: K need not be a multiple
QUANTIZED: dict[Activations, float] = {"int8": 127.0, "int16": 127.0 * 256 + 127}  # the largest integer
EVERY: tuple[Activations, ...] = ("int8", "int16", "bf16")
# Sums of 13696 floats in some order; int16 puts sums above 2^24 into floats.
FROBENIUS, MAX_ABS = 2e-6, 4e-6

each_activations = pytest.mark.parametrize("activations", EVERY)
each_bits = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with running(threads=1):
        yield


def activation_group(K: int, scheme: QuantScheme) -> int:
    """Columns that are rounded together, as `activation_group` in src/layout.h says."""
    span = -(-K // 32) * 32 if scheme.group_size is None else scheme.group_size
    return 64 if span % 64 == 0 else 32


def grouped(x: Tensor, group: int) -> Tensor:
    """[M, K] to float64 [M, groups, group], padded with zeros."""
    padded = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % group))
    return padded.reshape(len(x), -1, group)


def amax_of(groups: Tensor) -> Tensor:
    return groups.abs().amax(-1, keepdim=True)


def quantized(x: Tensor, group: int, limit: float) -> Tensor:
    """What activations [M, K] become, in float64: per token and group, scale amax / limit, ties to even."""
    groups = grouped(x, group)
    amax = amax_of(groups).float()
    inverse = torch.where(amax > 0, limit / amax, 0).double()
    return ((groups * inverse).round() * (amax / limit).double()).flatten(1)[:, : x.shape[1]]


def away_from_ties(x: Tensor, group: int, limit: float) -> Tensor:
    """`x` with zeros where rounding is so close a call that the last bit of a float32 product decides it."""
    groups = grouped(x, group)
    scaled = groups * torch.where(amax_of(groups) > 0, limit / amax_of(groups), 0)
    close = ((scaled - scaled.floor()) - 0.5).abs() < limit * 1e-6
    return torch.where(close.flatten(1)[:, : x.shape[1]], torch.zeros_like(x), x)


def prepare(x: Tensor, case: Case, activations: Activations) -> tuple[Tensor, Tensor]:
    """Inputs for a comparison, and in float64 what the kernel should compute with them."""
    if activations == "bf16":
        return x, x.double() @ case.dense.T
    group, limit = activation_group(x.shape[1], case.weight.scheme), QUANTIZED[activations]
    x = away_from_ties(x, group, limit)
    return x, quantized(x, group, limit) @ case.dense.T


def assert_close(got: Tensor, expected: Tensor, label: str = "", frobenius: float = FROBENIUS) -> None:
    """Errors relative to all expected outputs; `got` is their first rows, to be compared in float64."""
    assert torch.isfinite(got).all(), label
    error = got.double() - expected[: got.shape[0]]
    size = float(expected.square().mean().sqrt())
    assert float(error.square().mean().sqrt()) <= frobenius * size, f"{label}: Frobenius"
    assert float(error.abs().max()) <= MAX_ABS / FROBENIUS * frobenius * float(expected.abs().max()), label


def shapes_and_groups() -> list[Any]:
    with_groups = itertools.product(GROUPED_SHAPES, (32, 64, 128))
    return [*with_groups, *itertools.product(WHOLE_ROW_SHAPES, (None,))]


# Products


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("shape", "group_size"), shapes_and_groups())
@each_bits
@each_isa
def test_products_equal_float64(
    isa: str, bits: int, shape: tuple[int, int], group_size: int | None, symmetric: bool
) -> None:
    N, K = shape
    case = make_case(N, K, QuantScheme(bits, group_size, symmetric), torch.bfloat16)
    with running(isa):
        for activations in EVERY:
            x, expected = prepare(inputs_with_outliers(max(BATCHES), K, torch.float32), case, activations)
            weight = prepacked(case, activations)
            for M in BATCHES:
                got = product(x[:M], weight)
                assert got.shape == (M, N)
                assert_close(got, expected, f"{activations} M={M}")


@each_bits
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("activations", QUANTIZED)
@each_isa
def test_rounding_activations_costs_half_a_step_at_most(
    isa: str, activations: Activations, group_size: int | None, bits: int
) -> None:
    """Every input is off by half of its group's step at most: a bound on every output, ties and outliers included."""
    M, N, K = 17, 33, 512
    case = make_case(N, K, QuantScheme(bits, group_size, symmetric=False), torch.float32)
    group = activation_group(K, case.weight.scheme)
    for dtype in (torch.float32, torch.bfloat16):
        x = inputs_with_outliers(M, K, dtype)
        step = (amax_of(grouped(x, group)) / QUANTIZED[activations]).expand(-1, -1, group).flatten(1)[:, :K]
        allowed = 0.5001 * step @ case.dense.abs().T + 1e-5 * x.double().abs() @ case.dense.abs().T
        with running(isa):
            error = (product(x.float(), prepacked(case, activations)).double() - x.double() @ case.dense.T).abs()
        assert (error <= allowed).all()


@pytest.mark.parametrize("activations", QUANTIZED)
@each_isa
def test_ties_round_to_even(isa: str, activations: Activations) -> None:
    limit = QUANTIZED[activations]
    values = torch.tensor([limit, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5])  # amax = limit: a step is exactly 1
    rounded = torch.tensor([limit, 0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 4.0])
    case = case_of(torch.ones(1, 32, dtype=torch.int8), torch.ones(1, 1), None, QuantScheme(8, 32))
    x = torch.zeros(9, 32)
    for i in range(8):
        x[i, 0], x[i, 1] = limit, values[i]
    with running(isa):
        got = product(x, prepacked(case, activations))[:8, 0] - limit
    assert torch.equal(got, rounded)


@each_activations
@each_bits
@each_isa
def test_the_unit_matrix_gives_the_weight_back(isa: str, bits: int, activations: Activations) -> None:
    for group_size, symmetric, K in itertools.product((32, 64, 128, None), (True, False), (128, 200)):
        if group_size is not None and K % group_size:
            continue
        case = make_case(19, K, QuantScheme(bits, group_size, symmetric), torch.float32)
        with running(isa):
            for x in (torch.eye(K), -torch.eye(K)[:8]):  # prefill; decoding
                got = product(x, prepacked(case, activations)).double()
                torch.testing.assert_close(got, x.double() @ case.dense.T, rtol=3e-7, atol=0)


@each_activations
@each_isa
def test_a_single_weight_that_is_off_by_one_is_seen(isa: str, activations: Activations) -> None:
    q = torch.randint(-8, 8, (33, 256), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    case = case_of(q, torch.ones(33, 4), None, QuantScheme(4, 64))
    x, expected = prepare(torch.randn(9, 256, generator=torch.Generator().manual_seed(1)), case, activations)
    case.dense[32, 200] += 1.0
    _, wrong = prepare(x, case, activations)
    with running(isa):
        got = product(x, prepacked(case, activations))
    assert_close(got, expected)
    with pytest.raises(AssertionError):
        assert_close(got, wrong)


# Extremes


@each_activations
@each_isa
def test_groups_of_zeros(isa: str, activations: Activations) -> None:
    scheme = QuantScheme(4, 64, symmetric=False)
    case = make_case(20, 256, scheme, torch.float32)
    scale = case.weight.scale.clone()
    scale[:, 1], scale[7] = 0.0, 0.0  # a group of every row; a whole row
    zero_point = case.weight.zero_point
    assert zero_point is not None
    case = case_of(unpack(case.weight.packed, 4, 256), scale, unpack_zero_points(zero_point, 4, 20), scheme)
    x = inputs_with_outliers(9, 256, torch.float32)
    x[:, 128:192] = 0.0
    x[3] = 0.0
    x[5, 64:] = 0.0
    x, expected = prepare(x, case, activations)
    with running(isa):
        weight = prepacked(case, activations)
        for M in (5, 9):
            got = product(x[:M], weight)
            assert_close(got, expected)
            assert torch.equal(got[3], torch.zeros(20))
            assert torch.equal(got[:, 7], torch.zeros(M))


SIGNS = {
    "+": torch.tensor([1.0]),
    "-": torch.tensor([-1.0]),
    "+-": torch.tensor([1.0, -1.0]),
    "++--": torch.tensor([1.0, 1.0, -1.0, -1.0]),
    "+---": torch.tensor([1.0, -1.0, -1.0, -1.0]),
}


def repeated(pattern: Tensor, K: int) -> Tensor:
    return pattern.repeat(-(-K // len(pattern)))[:K]


@each_activations
@each_bits
@each_isa
def test_saturated_sums_do_not_overflow(isa: str, bits: int, activations: Activations) -> None:
    """Every product as large as it gets, in every order of signs; the activations are exact, so the result is too."""
    half, K = 1 << (bits - 1), 512
    ends = {"+": half - 1, "-": -half}
    rows = [[repeated(SIGNS[p], K) for p in SIGNS], [torch.ones(K) * end for end in ends.values()]]
    signs = torch.stack(rows[0])
    q = torch.cat((torch.where(signs > 0, half - 1, -half).to(torch.int8), torch.stack(rows[1]).to(torch.int8)))
    x = torch.stack([repeated(SIGNS[p], K) * 3.0 for p in SIGNS]).repeat(4, 1)  # 20 tokens
    for group_size, zero in itertools.product((32, 128, None), (None, -half, half - 1, 0)):
        scheme = QuantScheme(bits, group_size, symmetric=zero is None)
        G = num_groups(K, scheme)
        zero_point = None if zero is None else torch.full((len(q), G), zero, dtype=torch.int8)
        case = case_of(q, torch.ones(len(q), G), zero_point, scheme)
        expected = x.double() @ case.dense.T
        with running(isa):
            weight = prepacked(case, activations)
            for M in (1, 2, 5, 8, 20):
                torch.testing.assert_close(product(x[:M], weight).double(), expected[:M], rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@each_activations
@each_isa
def test_what_is_not_finite_reaches_every_output_of_its_token_and_no_other(
    isa: str, activations: Activations, poison: float
) -> None:
    for (bits, group_size), (K, column) in itertools.product(
        [(4, 32), (4, None), (8, 128), (8, None)], [(256, 0), (256, 255), (256, 130)]
    ):
        scheme = QuantScheme(bits, group_size, symmetric=False)
        case = make_case(19, K, scheme, torch.float32)
        case.weight.scale[4] = 0.0  # 0 * inf is NaN, not 0
        x = inputs_with_outliers(33, K, torch.float32)
        bad = x.clone()
        bad[1, column] = poison
        with running(isa):
            weight = prepacked(case, activations)
            for M in (2, 5, 8, 33):
                good, got = product(x[:M], weight), product(bad[:M], weight)
                assert not torch.isfinite(got[1]).any(), (bits, group_size, column, M)
                others = [m for m in range(M) if m != 1]
                assert same_bits(got[others], good[others])


@each_activations
@each_isa
def test_a_nan_in_the_last_column_of_an_odd_width(isa: str, activations: Activations) -> None:
    case = make_case(3, 101, QuantScheme(4, None), torch.float32)
    x = torch.ones(9, 101)
    x[8, 100] = float("nan")
    with running(isa):
        got = product(x, prepacked(case, activations))
    assert got[8].isnan().all()
    assert torch.isfinite(got[:8]).all()


@each_activations
@each_isa
def test_tiny_and_huge_activations(isa: str, activations: Activations) -> None:
    case = make_case(19, 128, QuantScheme(4, 32), torch.float32)
    x, _ = prepare(inputs_with_outliers(9, 128, torch.float32), case, activations)
    for power in (-25, 15, 30, 33):
        scaled, expected = prepare(x * 10.0**power, case, activations)
        with running(isa):
            assert_close(product(scaled, prepacked(case, activations)), expected, f"1e{power}")
    # Below 1e-30 a group may count as zero; whatever comes out is smaller than the smallest normal number's like.
    for tiny in (1e-31, 1e-36, 1e-40, 1e-45):
        small = torch.full((9, 128), tiny)
        with running(isa):
            got = product(small, prepacked(case, activations)).double()
        exact = small.double() @ case.dense.T
        assert ((got - exact).abs() <= small.double() @ case.dense.abs().T).all()


# Forms of x, scales, bias


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@each_activations
@each_isa
def test_scales_of_every_dtype(isa: str, activations: Activations, scale_dtype: torch.dtype) -> None:
    for bits, group_size in itertools.product((4, 8), (32, 128, None)):
        case = make_case(33, 256, QuantScheme(bits, group_size, symmetric=False), scale_dtype)
        x, expected = prepare(inputs_with_outliers(9, 256, torch.float32), case, activations)
        with running(isa):
            weight = prepacked(case, activations)
            assert_close(product(x, weight), expected)
            assert_close(product(x[:3], weight), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@each_activations
@each_isa
def test_half_precision_activations_are_rounded_once_at_the_end(
    isa: str, activations: Activations, dtype: torch.dtype
) -> None:
    """The result is that of the same values in float32, rounded as torch rounds."""
    for N, K, group_size in ((33, 256, 64), (5, 77, None)):
        case = make_case(N, K, QuantScheme(4, group_size), torch.bfloat16)
        x = inputs_with_outliers(33, K, dtype)
        bias = torch.linspace(-3, 3, N).to(dtype)
        with running(isa):
            weight = prepacked(case, activations)
            for M in (1, 7, 33):
                got = product(x[:M], weight, bias)
                assert got.dtype == dtype
                assert same_bits(got, product(x[:M].float(), weight, bias.float()).to(dtype))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)], ids=["bf16", "fp16"])
@each_isa
def test_results_half_way_between_two_numbers_round_to_even(isa: str, dtype: torch.dtype, bits: int) -> None:
    """1 + n * 2^-bits, where the numbers from 1 to 2 are 2^(1-bits) apart."""
    case = case_of(torch.ones(3, 32, dtype=torch.int8), torch.ones(3, 1), None, QuantScheme(8, 32))
    x = torch.zeros(4, 32, dtype=dtype)
    x[:, 0] = 1.0
    x[:, 1] = torch.tensor([1.0, 3.0, 5.0, -3.0]) * 2.0**-bits
    expected = 1 + torch.tensor([0.0, 4.0, 4.0, -3.0]) * 2.0**-bits  # below 1 they lie twice as close
    with running(isa):
        got = product(x, prepacked(case, "bf16"))
    assert torch.equal(got.float(), expected[:, None].expand(4, 3))


@each_isa
def test_results_beyond_fp16_are_infinite(isa: str) -> None:
    case = case_of(torch.full((3, 32), 7, dtype=torch.int8), torch.ones(3, 1), None, QuantScheme(4, 32))
    x = torch.full((2, 32), 1000.0, dtype=torch.float16)
    x[1] = -1000.0
    with running(isa):
        got = product(x, prepacked(case, "bf16"))
    assert torch.equal(got, torch.tensor([[float("inf")] * 3, [float("-inf")] * 3], dtype=torch.float16))


@each_activations
@each_isa
def test_rows_of_any_stride(isa: str, activations: Activations) -> None:
    K = 96
    case = make_case(21, K, QuantScheme(4, 32), torch.float32)
    wide = inputs_with_outliers(34, K + 37, torch.bfloat16)
    views = {
        "wider rows": wide[:, 5 : 5 + K],
        "every other row": wide[::2, :K],
        "one row again and again": wide[:1, :K].expand(9, K),
        "columns apart": wide.t()[:9].t().repeat(1, 1)[:, :9].t().expand(9, 34)[:, :32].repeat(1, 3),
        "transposed": inputs_with_outliers(K, 12, torch.bfloat16).t(),
        "one row of a transposed": inputs_with_outliers(K, 12, torch.bfloat16).t()[:1],
    }
    with running(isa):
        weight = prepacked(case, activations)
        for name, view in views.items():
            for M in (1, min(9, len(view))):
                assert same_bits(product(view[:M], weight), product(view[:M].contiguous(), weight)), name


@each_activations
@each_isa
def test_bias_is_added(isa: str, activations: Activations) -> None:
    case = make_case(33, 64, QuantScheme(8, 64), torch.float32)
    x = inputs_with_outliers(17, 64, torch.float32)
    bias = torch.linspace(-500, 500, 33)
    with running(isa):
        weight = prepacked(case, activations)
        for M in (1, 4, 17):
            assert torch.equal(product(x[:M], weight, bias), product(x[:M], weight) + bias)


@each_activations
def test_no_tokens_no_outputs(activations: Activations) -> None:
    case = make_case(5, 64, QuantScheme(4, 32), torch.float32)
    got = NativeBackend().linear_together(torch.empty(0, 64), [(prepacked(case, activations), None)] * 2)
    assert [tuple(y.shape) for y in got] == [(0, 5), (0, 5)]


# Several weights of one x


class CountedCalls:
    """The library, counting the calls of g4_linear."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.products = 0

    def __getattr__(self, name: str) -> Any:
        if name == "g4_linear":
            self.products += 1
        return getattr(self.library, name)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> CountedCalls:
    calls = CountedCalls(native())
    monkeypatch.setattr(native_backend, "native", lambda: calls)
    return calls


def assert_together_as_alone(x: Tensor, parts: list[tuple[NativeWeight, Tensor | None]]) -> None:
    together = NativeBackend().linear_together(x, parts)
    assert len(together) == len(parts)
    for got, (weight, bias) in zip(together, parts, strict=True):
        assert same_bits(got, product(x, weight, bias))


@each_activations
@each_isa
def test_query_key_and_value_are_one_piece_of_work(isa: str, activations: Activations, counted: CountedCalls) -> None:
    """4096 to 4096 and twice 256 in the family; here an eighth, and widths that end in the middle of a panel."""
    for (bits, symmetric), widths in itertools.product(
        ((4, True), (4, False), (8, True)), ((512, 32, 32), (33, 1, 17))
    ):
        scales = (torch.bfloat16, torch.float32, torch.float16)
        scheme = QuantScheme(bits, 128, symmetric)
        cases = [make_case(N, 512, scheme, scale, seed=N) for N, scale in zip(widths, scales, strict=True)]
        biases = [torch.linspace(-1, 1, widths[0]), None, torch.linspace(5, 6, widths[2])]
        x = inputs_with_outliers(9, 512, torch.float32)
        with running(isa):
            weights = [prepacked(case, activations) for case in cases]
            for M in (1, 9):
                before = counted.products
                NativeBackend().linear_together(x[:M], list(zip(weights, biases, strict=True)))
                assert counted.products == before + 1
                assert_together_as_alone(x[:M], list(zip(weights, biases, strict=True)))


@pytest.mark.parametrize(
    "others",
    [
        [(QuantScheme(4, 32), "int8")],
        [(QuantScheme(4, None), "int8")],
        [(QuantScheme(8, 64), "int8")],
        [(QuantScheme(4, 64, symmetric=False), "int8")],
        [(QuantScheme(4, 64), "bf16")],
        [(QuantScheme(4, 64), "int16")],
        [(QuantScheme(4, 64), "int8")] * 3,
    ],
    ids=["group", "row", "bits", "asymmetric", "exact", "int16", "four"],
)
def test_weights_that_do_not_go_together_still_work(others: list[tuple[QuantScheme, Activations]]) -> None:
    parts: list[tuple[NativeWeight, Tensor | None]] = []
    for seed, (scheme, activations) in enumerate([(QuantScheme(4, 64), "int8"), *others]):
        case = make_case(18, 128, scheme, torch.float32, seed=seed)
        parts.append((prepacked(case, activations), torch.linspace(0, seed, 18)))
    for M in (1, 9):
        assert_together_as_alone(inputs_with_outliers(M, 128, torch.float32), parts)


# The same bits


@each_activations
@each_bits
@each_isa
def test_the_number_of_threads_and_repeating_change_nothing(isa: str, bits: int, activations: Activations) -> None:
    case = make_case(200, 512, QuantScheme(bits, 64, symmetric=False), torch.bfloat16)
    x = inputs_with_outliers(40, 512, torch.float32)
    with running(isa):
        weight = prepacked(case, activations)
        expected = {M: product(x[:M], weight) for M in (1, 3, 8, 9, 40)}
        for threads in (1, 2, 3, 5, 1):
            native().g4_set_threads(threads)
            for M, alone in expected.items():
                for _ in range(3):
                    assert same_bits(product(x[:M], weight), alone), (threads, M)


@each_activations
@each_bits
@each_isa
def test_a_token_comes_out_the_same_in_any_company(isa: str, bits: int, activations: Activations) -> None:
    """Up to rounding: other kernels run for many tokens."""
    case = make_case(33, 512, QuantScheme(bits, 64, symmetric=False), torch.bfloat16)
    x = inputs_with_outliers(33, 512, torch.float32)
    with running(isa):
        weight = prepacked(case, activations)
        together = product(x, weight)
        for m in range(0, 33, 4):
            alone = product(x[m : m + 1], weight)
            assert float((alone[0] - together[m]).norm() / together[m].norm()) < 1e-6


@each_activations
@each_bits
@pytest.mark.parametrize("group_size", [32, 128, None])
def test_instruction_sets_agree(group_size: int | None, bits: int, activations: Activations) -> None:
    case = make_case(
        33, 416 if group_size != 128 else 512, QuantScheme(bits, group_size, symmetric=False), torch.float16
    )
    x, _ = prepare(inputs_with_outliers(20, case.weight.in_features, torch.float32), case, activations)
    results = {}
    for isa in ISAS:
        with running(isa):
            weight = prepacked(case, activations)
            results[isa] = torch.cat((product(x[:3], weight), product(x, weight)))
    for isa in ISAS:
        assert float((results[isa] - results["scalar"]).norm() / results["scalar"].norm()) < 1e-6, isa


# Memory


def side_of(case: Case) -> bytes:
    """Scales and zero points, written down value by value from the description in src/layout.h."""
    weight = case.weight
    N, bits = weight.out_features, weight.scheme.bits
    zero_point = weight.zero_point
    zero_points = None if zero_point is None else unpack_zero_points(zero_point, bits, N).tolist()
    scale_bytes = weight.scale.element_size()
    flat = ctypes.string_at(weight.scale.contiguous().data_ptr(), weight.scale.numel() * scale_bytes)
    G = weight.scale.shape[1]
    out = bytearray()
    for first in range(0, N, 16):
        panel = bytearray()
        rows = range(first, first + 16)
        for g in range(G):
            for n in rows:
                at = (n * G + g) * scale_bytes
                panel += flat[at : at + scale_bytes] if n < N else bytes(scale_bytes)
        if zero_points is not None:
            for g in range(G):
                panel += bytes(zero_points[n][g] + (1 << (bits - 1)) if n < N else 0 for n in rows)
        out += panel + bytes(-len(panel) % 64)
    return bytes(out)


def rows_of(case: Case) -> list[bytes]:
    """Values as in the file, rows of whole 32 columns."""
    weight = case.weight
    padded = -(-weight.in_features // 32) * 4 * weight.scheme.bits
    return [bytes(row.numpy().tobytes()).ljust(padded, b"\0") for row in weight.packed]


def laid_out(rows: list[bytes], together: int, group_bytes: int) -> bytes:
    """Panels of 16 rows, in words of 32 bits: group by group of so many at a time, the last 8 each by itself."""
    width = len(rows[0])
    rows = [*rows, *[bytes(width)] * (-len(rows) % 16)]
    sixteens = (rows[first : first + 16] for first in range(0, len(rows), 16))
    words = (b"".join(row[at : at + 4] for at in range(0, width, 4) for row in sixteen) for sixteen in sixteens)
    panels = [panel + bytes(-len(panel) % 64) for panel in words]
    interleaved = max(0, len(panels) - 8) // together * together if together > 1 else 0
    sets = (panels[first : first + together] for first in range(0, interleaved, together))
    pieces = (
        panel[at : at + group_bytes] for one in sets for at in range(0, len(one[0]), group_bytes) for panel in one
    )
    return b"".join([*pieces, *panels[interleaved:]])


def assert_lies_as_described(weight: NativeWeight, case: Case) -> None:
    side, rows = side_of(case), rows_of(case)
    assert weight.struct.side is not None
    assert weight.struct.side % 64 == 0
    assert ctypes.string_at(weight.struct.side, len(side)) == side
    assert weight.struct.panels is not None or weight.struct.row_bytes == (len(rows[0]) if weight.is_mapped else 0)
    group = activation_group(case.weight.in_features, case.weight.scheme)
    words = laid_out(rows, weight.struct.together, group * 16 * case.weight.scheme.bits // 8)
    values = b"".join(rows) if weight.is_mapped else words
    place = weight.struct.panels or weight.struct.values
    assert ctypes.string_at(place, len(values)) == values
    assert weight.nbytes == len(side) + len(values)
    if not weight.is_mapped:
        assert place is not None
        assert place % 64 == 0
        assert NativeBackend().prepacked_bytes(weight.spec, case.weight.nbytes) == weight.nbytes


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("N", "K", "group_size"),
    [
        (1, 32, 32),
        (17, 96, 32),
        (33, 128, 64),
        (16, 256, 128),
        (5, 64, None),
        (3, 7, None),
        (18, 77, None),
        (2, 1, None),
    ],
)
@each_bits
def test_weights_lie_as_described(
    bits: int, N: int, K: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype
) -> None:
    scheme = QuantScheme(bits, group_size, symmetric)
    case = make_case(N, K, scheme, scale_dtype)
    assert_lies_as_described(prepacked(case, "int8"), case)


@pytest.mark.parametrize("threads", [2, 5])
def test_prepacking_with_threads_gives_the_same_bytes(threads: int) -> None:
    case = make_case(1000, 64, QuantScheme(4, 32, symmetric=False), torch.bfloat16)
    native().g4_set_threads(threads)
    assert_lies_as_described(prepacked(case, "int8"), case)


@pytest.mark.parametrize("together", [2, 3, 4, 5])
@pytest.mark.parametrize(("K", "group_size"), [(96, 32), (128, 64), (256, 128), (90, None)])
@each_isa
def test_panels_that_lie_together(isa: str, K: int, group_size: int | None, together: int) -> None:
    """Any number of them, on any instruction set; decoding in pieces of sets, of parts of sets and behind them."""
    case = make_case(16 * 14 + 3, K, QuantScheme(4, group_size, symmetric=together % 2 == 0), torch.bfloat16)
    for activations in EVERY:
        x, expected = prepare(inputs_with_outliers(20, K, torch.float32), case, activations)
        with lying_together(together):
            weight = prepacked(case, activations)
        assert weight.struct.together == together
        assert_lies_as_described(weight, case)
        apart = prepacked(case, activations)
        assert apart.struct.together == 1
        with running(isa):
            for M in (1, 3, 8, 20):
                for threads in (1, 3):
                    native().g4_set_threads(threads)
                    got = product(x[:M], weight)
                    assert_close(got, expected[:M], f"{activations} M={M}")
                    assert torch.equal(got, product(x[:M], apart))


@contextmanager
def lying_together(together: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native(), "g4_panels_together", lambda _: together)
        yield


def test_long_rows_of_int4_lie_together_where_that_is_faster() -> None:
    scheme = QuantScheme(4, 32, symmetric=True)
    with running("scalar"):
        assert prepacked(make_case(208, 8192, scheme, torch.bfloat16), "int8").struct.together == 1
    if available_isas().get("avx512-vnni"):
        with running("avx512-vnni"):
            long, wide = (make_case(208, K, scheme, torch.bfloat16) for K in (8192, 4096))
            weight = prepacked(long, "int8")
            assert weight.struct.together == 4
            assert_lies_as_described(weight, long)
            x, expected = prepare(inputs_with_outliers(2, 8192, torch.float32), long, "int8")
            assert_close(product(x, weight), expected)
            assert prepacked(wide, "int8").struct.together == 1


def test_prepacking_keeps_nothing_of_the_weight() -> None:
    case = make_case(20, 64, QuantScheme(4, 32, symmetric=False), torch.bfloat16)
    x, expected = prepare(inputs_with_outliers(3, 64, torch.float32), case, "int8")
    weight = prepacked(case, "int8")
    zero_point = case.weight.zero_point
    assert zero_point is not None
    for tensor in (case.weight.packed, case.weight.scale, zero_point):
        tensor.zero_()
    assert_close(product(x, weight), expected)


def test_a_weight_whose_tensors_are_views_is_read_right() -> None:
    case = make_case(20, 64, QuantScheme(4, 32, symmetric=False), torch.bfloat16)
    weight = case.weight
    zero_point = weight.zero_point
    assert zero_point is not None
    for name, tensor in (("packed", weight.packed), ("scale", weight.scale), ("zero_point", zero_point)):
        view = tensor.t().contiguous().t()
        assert not view.is_contiguous()
        object.__setattr__(weight, name, view)
    x, expected = prepare(inputs_with_outliers(3, 64, torch.float32), case, "bf16")
    assert_close(product(x, prepacked(case, "bf16")), expected)


@dataclass(frozen=True)
class WeightInFile:
    """A weight whose values lie somewhere in a file, and of which only scales and zero points are in memory."""

    weight: PackedWeight
    place: FileRange
    in_memory: PackedWeight | None = None  # where it may be asked for

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.weight.scale.dtype

    def whole(self) -> PackedWeight:
        assert self.in_memory is not None, "read into memory"
        return self.in_memory

    def side_tensors(self) -> tuple[Tensor, Tensor | None]:
        return self.weight.scale, self.weight.zero_point

    def stored(self) -> Mapping[str, Tensor]:
        raise AssertionError("read into memory")

    def location(self) -> FileRange:
        return self.place


@pytest.mark.parametrize("way", ["read", "mapped", "moved"])
@pytest.mark.parametrize(("N", "K", "group_size"), [(1, 64, 32), (33, 128, 64), (200, 256, 128), (300, 1024, None)])
@each_isa
@each_bits
def test_a_weight_is_taken_straight_from_its_file(
    bits: int, isa: str, N: int, K: int, group_size: int | None, way: str, tmp_path: Path
) -> None:
    case = make_case(N, K, QuantScheme(bits, group_size, symmetric=False), torch.bfloat16)
    path = tmp_path / "weights"
    path.write_bytes(b"x" * 37 + case.weight.packed.numpy().tobytes())
    native().g4_set_threads(3)
    with path.open("rb") as file:
        mapping = None if way == "read" else FileMapping(file)
        source = WeightInFile(case.weight, FileRange(file.fileno(), 37, path.name, mapping))
        weight = NativeBackend().prepack(source, spec_for(case, "int8"))
    path.unlink()  # or replaced: what is open or mapped stays
    for _ in weight.move() if way == "moved" else ():
        pass
    assert weight.is_mapped is (way == "mapped")
    assert_lies_as_described(weight, case)
    for activations in EVERY:
        spec = spec_for(case, activations)
        in_memory = prepacked(case, activations)
        weight.struct.activations = in_memory.struct.activations
        with running(isa, threads=2):
            for tokens in (1, 3, 8, 16, 40):
                x = inputs_with_outliers(tokens, K, torch.float32)
                assert same_bits(product(x, weight), product(x, in_memory)), (spec, tokens)
    held = None if mapping is None else weakref.ref(mapping)
    del mapping, source
    gc.collect()
    assert held is None or (held() is not None) is (way == "mapped")
    del weight
    gc.collect()
    assert held is None or held() is None


@each_isa
@each_bits
def test_rows_that_do_not_reach_to_whole_words_of_columns_are_copied(bits: int, isa: str, tmp_path: Path) -> None:
    case = make_case(50, 77, QuantScheme(bits, None), torch.bfloat16)
    source = WeightInFile(case.weight, FileRange(-1, 0, "unread"), in_memory=case.weight)
    weight = NativeBackend().prepack(source, spec_for(case, "int8"))
    assert_lies_as_described(weight, case)
    with running(isa):
        x, expected = prepare(inputs_with_outliers(3, 77, torch.float32), case, "int8")
        assert_close(product(x, weight), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_file_that_ends_early_is_an_error(threads: int, tmp_path: Path) -> None:
    case = make_case(100, 64, QuantScheme(4, 32), torch.bfloat16)
    path = tmp_path / "model.safetensors"
    path.write_bytes(case.weight.packed.numpy().tobytes()[:-1])
    native().g4_set_threads(threads)
    with path.open("rb") as file:
        source = WeightInFile(case.weight, FileRange(file.fileno(), 0, path.name))
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read to its end"):
            NativeBackend().prepack(source, spec_for(case, "int8"))


def test_a_product_too_large_for_memory_is_an_error_and_the_next_one_works() -> None:
    """In a process of its own, whose address space is limited."""
    code = """
        import resource
        import torch
        from glm4run.errors import GenerationError
        from glm4run.quant_config import QuantScheme
        from tests.native_library import native, prepacked, product
        from tests.packed_cases import make_case

        native().g4_set_threads(1)
        weight = prepacked(make_case(1, 4096, QuantScheme(4, 32), torch.float32), "bf16")
        x = torch.ones(1, 4096)
        expected = product(x, weight)
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, ((pages << 12) + (32 << 20),) * 2)
        try:
            product(x.expand(16384, 4096), weight)  # 256 MiB of floats
        except GenerationError as error:
            assert "memory" in str(error)
        else:
            raise SystemExit("no error")
        assert torch.equal(product(x, weight), expected)
        assert torch.equal(product(x.expand(100, 4096), weight)[7], expected[0])
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


# What the backend says of itself


@each_isa
def test_describe_names_the_instruction_set_and_the_threads(isa: str) -> None:
    with running(isa, threads=3):
        assert NativeBackend().describe() == f"native ({isa}, 3 threads)"


def test_auto_takes_int8_for_int4_and_int16_for_int8() -> None:
    defaults: dict[int, Activations] = {4: "int8", 8: "int16"}
    for bits, named in defaults.items():
        case = make_case(9, 64, QuantScheme(bits, 32), torch.float32)
        x = inputs_with_outliers(3, 64, torch.float32)
        got = {activations: product(x, prepacked(case, activations)) for activations in EVERY}
        assert same_bits(product(x, prepacked(case, "auto")), got[named])
        assert len({tuple(y.flatten().tolist()) for y in got.values()}) == 3


@pytest.mark.parametrize("group_size", [16, 48, 33])
def test_groups_that_are_no_multiple_of_32_are_refused(group_size: int) -> None:
    case = make_case(4, group_size * 4, QuantScheme(4, None), torch.float32)
    spec = spec_for(case, "int8")
    object.__setattr__(spec.scheme, "group_size", group_size)
    assert f"group size {group_size}" in str(load_backend("native").why_unavailable(spec))


def test_other_dtypes_and_devices_are_refused() -> None:
    case = make_case(4, 64, QuantScheme(4, 32), torch.float32)
    backend = load_backend("native")
    assert backend.why_unavailable(spec_for(case, "auto")) is None
    assert "float64" in str(backend.why_unavailable(spec_for(case, "auto", torch.float64)))
    meta = spec_for(case, "auto")
    object.__setattr__(meta, "device", torch.device("meta"))
    assert "meta" in str(backend.why_unavailable(meta))
