"""Triton's products with packed weights: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from glm4run.errors import BackendError
from glm4run.kernels import Activations, LinearSpec, load_backend, select_backend
from glm4run.kernels import triton as package
from glm4run.layers import Linear as DenseLinear
from glm4run.layers import QuantizedLinear, linear_together
from glm4run.memory import kernels as memory
from glm4run.qformat import PackedWeight
from glm4run.quant_config import QuantScheme
from tests.packed_cases import Case, inputs_with_outliers, make_case

pytest.importorskip("triton")

from glm4run.kernels.triton import linear as launchers
from glm4run.kernels.triton.backend import TritonBackend
from glm4run.kernels.triton.linear import MOST_FEW, MOST_TILED_OF_FEW, TritonWeight, dense_tile_rows, multiply, prepack

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BATCHES = (1, 2, 4, 7, 16, 33, 130)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}

# Relative Frobenius error, and max-abs error relative to the largest output. The interpreter cuts bf16 off, which a GPU
# rounds; weights and outputs each lose twice as much.
TOLERANCE = {FP32: (2e-6, 2e-6), FP16: (7e-4, 1e-3), BF16: (4e-3, 8e-3) if ON_GPU else (1.2e-2, 1.6e-2)}


@pytest.fixture(autouse=True)
def kernels_run_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend takes CPU tensors where the kernels are interpreted."""
    if not ON_GPU:
        monkeypatch.setattr(package, "why_missing", lambda device: None)
    yield


def on_device(weight: PackedWeight) -> PackedWeight:
    zero_point = None if weight.zero_point is None else weight.zero_point.to(DEVICE)
    return PackedWeight(
        weight.packed.to(DEVICE), weight.scale.to(DEVICE), zero_point, weight.out_features, weight.in_features,
        weight.scheme,
    )  # fmt: skip


def spec_of(N: int, K: int, scheme: QuantScheme, dtype: torch.dtype, activations: Activations = "auto") -> LinearSpec:
    return LinearSpec(N, K, scheme, DEVICE, dtype, activations)


def prepacked(case: Case, dtype: torch.dtype = BF16) -> TritonWeight:
    weight = on_device(case.weight)
    return prepack(weight, spec_of(weight.out_features, weight.in_features, weight.scheme, dtype))


def check(got: Tensor, x: Tensor, case: Case, bias: Tensor | None = None) -> None:
    """`got` is the product of the first rows of x; errors are relative to the products of all of them."""
    exact = (x.to(case.dense.device).double() @ case.dense.T).cpu()
    if bias is not None:
        exact = exact + bias.double()
    assert got.dtype == x.dtype
    assert got.shape == (len(got), case.dense.shape[0])
    error = got.cpu().double() - exact[: len(got)]
    frobenius = float(error.square().mean().sqrt() / exact.square().mean().sqrt())
    largest = float(error.abs().max() / exact.abs().max())
    allowed = TOLERANCE[x.dtype]
    assert frobenius < allowed[0], f"relative Frobenius error {frobenius:.2e} at M={len(got)}"
    assert largest < allowed[1], f"max-abs error {largest:.2e} of the largest output at M={len(got)}"


def inputs(M: int, K: int, dtype: torch.dtype) -> Tensor:
    """In fp16 small enough for sums of a few thousand products to be finite."""
    x = inputs_with_outliers(M, K, FP32)
    return (x * 0.01 if dtype == FP16 else x).to(dtype)


def _columns(bits: int, group_size: int | None) -> int:
    step = 128 * 32 // bits  # of the kernel for few rows
    return step + (group_size or 32)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=NAMES.__getitem__)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_equal_float64(bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype) -> None:
    """N is odd and passes a block; K is more than a step and, where the group allows it, no multiple of a block."""
    if dtype == FP16 and (group_size == 64 or not symmetric):
        pytest.skip("as in bf16")
    N, K = 33, _columns(bits, group_size)
    case = make_case(N, K, QuantScheme(bits, group_size, symmetric), BF16 if dtype != FP16 else FP16)
    weight = prepacked(case, dtype)
    x = inputs(max(BATCHES), K, dtype)
    for M in BATCHES if group_size == 32 and symmetric and dtype != FP16 else (1, 7, 130):
        check(multiply(x[:M].to(DEVICE), [weight], [None])[0], x, case)


@pytest.mark.parametrize(("N", "K"), [(1, 32), (5, 64), (3, 96), (2, 13696), (33, 160)])
def test_small_odd_and_long_shapes(N: int, K: int) -> None:
    long = K > 1024
    for bits, dtype in [(4, BF16)] if long else itertools.product((4, 8), (FP32, BF16)):
        case = make_case(N, K, QuantScheme(bits, 32, symmetric=long), BF16)
        x = inputs(17, K, dtype)
        for M in (1, 5) if long else (2, 17):
            check(multiply(x[:M].to(DEVICE), [prepacked(case, dtype)], [None])[0], x, case)


@pytest.mark.parametrize("scale_dtype", [FP16, FP32], ids=NAMES.__getitem__)
def test_scales_of_other_dtypes(scale_dtype: torch.dtype) -> None:
    case = make_case(33, 256, QuantScheme(4, 128), scale_dtype)
    x = inputs(130, 256, BF16)
    for M in (1, 7, 130):
        check(multiply(x[:M].to(DEVICE), [prepacked(case)], [None])[0], x, case)


def test_every_place_in_a_word_meets_its_activation() -> None:
    """One activation at a time: a value that is read from the wrong bits shows exactly."""
    for bits in (4, 8):
        case = make_case(8, 32, QuantScheme(bits, 32, symmetric=False), FP32)
        x = torch.eye(32)
        weight = prepacked(case, FP32)
        few = torch.cat([multiply(x[k : k + 4].to(DEVICE), [weight], [None])[0] for k in range(0, 32, 4)])
        tiled = multiply(x.to(DEVICE), [weight], [None])[0]
        many = multiply(torch.cat([x] * 5).to(DEVICE), [weight], [None])[0]
        for got in (few, tiled, many[128:]):
            torch.testing.assert_close(got.cpu().double(), case.dense.T, rtol=1e-6, atol=1e-6)


def test_large_and_small_activations_stay_exact() -> None:
    """Activations are moved by powers of two: far from 1 nothing may overflow or vanish."""
    case = make_case(9, 128, QuantScheme(4, 32), BF16)
    for factor in (2.0**30, 2.0**-60):
        x = inputs(4, 128, FP32) * factor / 512
        check(multiply(x.to(DEVICE), [prepacked(case, FP32)], [None])[0], x, case)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_does_not_become_finite() -> None:
    case = make_case(9, 128, QuantScheme(4, 32), BF16)
    for bad, M in itertools.product((float("nan"), float("inf")), (1, 7, 130)):
        x = torch.ones(M, 128, dtype=BF16)
        x[:, 77] = bad
        assert not torch.isfinite(multiply(x.to(DEVICE), [prepacked(case)], [None])[0]).any()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=NAMES.__getitem__)
def test_several_weights_give_what_each_gives_alone(dtype: torch.dtype) -> None:
    """In one launch where they have the same form, one after the other where not."""
    backend = TritonBackend()
    x = inputs(130, 128, dtype)
    one_form = [QuantScheme(4, 32, symmetric=False)] * 3
    for schemes in (one_form, [QuantScheme(4, 32), QuantScheme(8, 32), QuantScheme(4, None)]):
        cases = [make_case(N, 128, scheme, BF16, seed=N) for N, scheme in zip((9, 3, 8), schemes, strict=True)]
        weights = [prepacked(case, dtype) for case in cases]
        biases = [torch.linspace(-9, 9, N).to(dtype) for N in (9, 3, 8)]
        for M, with_bias in itertools.product((2, 5, 130), ((True, True, True), (True, False, True))):
            given = [bias.to(DEVICE) if has else None for bias, has in zip(biases, with_bias, strict=True)]
            rows = x[:M].to(DEVICE)
            together = backend.linear_together(rows, list(zip(weights, given, strict=True)))
            for got, weight, bias, case in zip(together, weights, given, cases, strict=True):
                if M <= MOST_TILED_OF_FEW:  # beyond, one product has other blocks than three
                    assert torch.equal(got, backend.linear(rows, weight, bias))
                check(got, x[:M], case, None if bias is None else bias.cpu())


@pytest.mark.parametrize("M", [1, 4, 16, 130])
def test_results_go_where_they_are_wanted_and_repeat_to_the_bit(M: int) -> None:
    case = make_case(37, 160, QuantScheme(4, 32), BF16)
    weight, x = prepacked(case), inputs(M, 160, BF16)
    wide = torch.full((M, 100), 7.0, dtype=BF16, device=DEVICE)
    out = wide[:, 20:57]
    assert multiply(x.to(DEVICE), [weight], [None], [out])[0] is out
    check(out, x, case)
    assert (wide[:, :20] == 7).all()
    assert (wide[:, 57:] == 7).all()
    assert torch.equal(out, multiply(x.to(DEVICE), [weight], [None])[0])


def test_inputs_that_are_no_contiguous_rows() -> None:
    case = make_case(33, 128, QuantScheme(4, 32), BF16)
    weight = prepacked(case)
    turned = inputs(128, 7, BF16).t()
    check(multiply(turned.to(DEVICE), [weight], [None])[0], turned, case)
    inside = inputs(9, 300, BF16).to(DEVICE)[:, 37:165]
    for M in (1, 4, 9):
        check(multiply(inside[:M], [weight], [None])[0], inside.cpu(), case)
    assert multiply(inside[:0], [weight], [None])[0].shape == (0, 33)


def test_tiles_of_the_dense_weight_cover_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "TILE_BYTES", 16 * 128 * 4)
    case = make_case(67, 128, QuantScheme(8, 64, symmetric=False), BF16)
    x = inputs(140, 128, FP32)
    bias = torch.linspace(-50, 50, 67)
    check(multiply(x.to(DEVICE), [prepacked(case, FP32)], [bias.to(DEVICE)])[0], x, case, bias)


def test_a_model_s_linears_run_in_it() -> None:
    """What `layers` does with a backend: leading dimensions, biases, several linears of one input."""
    backend = TritonBackend()
    linears = []
    for N in (32, 8, 8):
        case = make_case(N, 64, QuantScheme(4, 32), BF16, seed=N)
        weight = backend.prepack(on_device(case.weight), spec_of(N, 64, case.weight.scheme, BF16))
        dense = DenseLinear(64, N, dtype=FP32)
        dense.weight.data = case.dense.float()
        dense.bias.data = torch.linspace(-1, 1, N)
        linears.append((QuantizedLinear(weight, backend, dense.bias.data.bfloat16().to(DEVICE)), dense))
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for got, (packed, dense) in zip(linear_together([p for p, _ in linears], x.to(DEVICE)), linears, strict=True):
        torch.testing.assert_close(got.cpu().float(), dense(x.float()), rtol=3e-2, atol=3e-2)
        assert "backend=triton" in repr(packed)


# The backend


def test_it_refuses_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, scheme = TritonBackend(), QuantScheme(4, 32)
    rounding: tuple[Activations, ...] = ("int8", "int16")
    for activations in rounding:
        assert "activations stay" in str(backend.why_unavailable(spec_of(32, 64, scheme, BF16, activations)))
    assert backend.why_unavailable(spec_of(32, 64, scheme, BF16, "bf16")) is None
    assert "float64" in str(backend.why_unavailable(spec_of(32, 64, scheme, torch.float64)))
    assert "too large" in str(backend.why_unavailable(spec_of(1 << 24, 1 << 12, scheme, BF16)))
    with pytest.raises(BackendError, match=r"reads int, not nf4"):
        select_backend("triton", [spec_of(32, 64, QuantScheme(4, 64, kind="nf4"), BF16)])
    monkeypatch.undo()
    on_cpu = LinearSpec(32, 64, scheme, torch.device("cpu"), BF16)
    with pytest.raises(BackendError, match=r"'triton' cannot run this model: its kernels run on CUDA devices"):
        select_backend("triton", [on_cpu])
    assert select_backend("auto", [on_cpu])[0].name != "triton"


def test_auto_takes_it_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "why_missing", lambda device: None)
    spec = LinearSpec(32, 64, QuantScheme(4, 32), torch.device("cuda"), BF16)
    chosen, reason = select_backend("auto", [spec])
    assert chosen.name == "triton"
    assert reason == "the fastest that is built in"
    assert load_backend("triton").describe().split()[0] == "triton"


@pytest.mark.parametrize("symmetric", [True, False])
def test_memory_knows_what_it_keeps(symmetric: bool) -> None:
    backend = TritonBackend()
    for bits, group, (n, k) in itertools.product((4, 8), (32, 64, 128, None), ((33, 256), (24, 128))):
        scheme = QuantScheme(bits, group, symmetric)
        case = make_case(n, k, scheme, BF16)
        weight = prepacked(case)
        spec, linear = weight.spec, memory.Linear(n, k, scheme)
        kernel = memory.choose_kernel(linear, backend="triton", device="cuda", dtype="bf16")
        assert kernel == "triton"
        kept = memory.kept_bytes(linear, kernel, 2)
        assert weight.nbytes == kept == backend.prepacked_bytes(spec, linear.stored_bytes)
        assert weight.packed.data_ptr() == on_device(case.weight).packed.data_ptr() or ON_GPU


def test_memory_knows_the_scratch() -> None:
    for (n, k), size in itertools.product(((27392, 4096), (4096, 13696), (33, 256), (9, 1 << 23)), (2, 4)):
        linear = memory.Linear(n, k, QuantScheme(4, 32))
        expected = dense_tile_rows(n, k, size) * k * size
        tiled = launchers.most_tiled(n)
        for tokens in (1, MOST_FEW, tiled):
            assert memory.kernel_scratch_bytes(linear, "triton", tokens, device="cuda", dtype_bytes=size) == 0
        for tokens in (tiled + 1, 2048):
            got = memory.kernel_scratch_bytes(linear, "triton", tokens, device="cuda", dtype_bytes=size)
            assert got == expected


def test_the_9b_s_tiles_are_whole_waves() -> None:
    assert dense_tile_rows(27392, 4096, 2) == 8192
    assert dense_tile_rows(4096, 13696, 2) == 2048
    assert dense_tile_rows(256, 4096, 2) == 256


# On a GPU: the shapes of the 9B


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("N", "K", "bits", "group_size"),
    [(4096, 4096, 4, 128), (27392, 4096, 4, 128), (4096, 13696, 4, 32), (4096, 13696, 8, 128), (256, 4096, 8, 128)],
)
def test_shapes_of_the_9b(N: int, K: int, bits: int, group_size: int) -> None:
    case = make_case(N, K, QuantScheme(bits, group_size), BF16)
    case = Case(case.weight, case.dense.to(DEVICE))
    weight, x = prepacked(case), inputs(300, K, BF16)
    for M in (1, 2, 4, 5, 16, 33, 64, 128, 300):
        check(multiply(x[:M].to(DEVICE), [weight], [None])[0], x, case)


@pytest.mark.gpu
def test_products_can_be_part_of_a_graph() -> None:
    case = make_case(512, 4096, QuantScheme(4, 128), BF16)
    weight = prepacked(case)
    for M in (1, 16, 200):
        x = inputs(M, 4096, BF16)
        held, out = torch.zeros_like(x, device=DEVICE), torch.empty(M, 512, dtype=BF16, device=DEVICE)
        multiply(held, [weight], [None], [out])  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            multiply(held, [weight], [None], [out])
        held.copy_(x)
        graph.replay()
        check(out, x, case)
