"""Every backend multiplies by the weight that the file stands for, and the choice of one never surprises."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from glm4run import kernels
from glm4run.errors import BackendError, UsageError
from glm4run.kernels import (
    BACKEND_NAMES,
    Activations,
    Backend,
    LinearSpec,
    Prepacked,
    WeightSource,
    load_backend,
    select_backend,
)
from glm4run.kernels.reference import ReferenceBackend, ReferenceWeight
from glm4run.kernels.torch_ops import Int4PackedWeight, TiledWeight, TorchBackend
from glm4run.layers import QuantizedLinear
from glm4run.qformat import PackedWeight, pack
from glm4run.quant_config import KINDS, Kind, QuantScheme
from tests.packed_cases import assert_close, inputs_with_outliers, make_case

CPU = torch.device("cpu")
BATCHES = (1, 2, 7, 16, 33)
# N, K. 13696 = 107 x 128 is the family's odd one; N odd, N one tile of torch's int4 kernel, N many tiles.
SHAPES = ((16, 128), (33, 256), (48, 13696), (5, 13696), (600, 384))

# Those that read the project's own format on a CPU; the others are tested beside what they read, or interpreted.
PACKED_BACKENDS = tuple(name for name in BACKEND_NAMES if "int" in load_backend(name).kinds and name != "triton")
each_backend = pytest.mark.parametrize("name", PACKED_BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def spec_of(
    N: int = 32,
    K: int = 128,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    activations: Activations = "auto",
) -> LinearSpec:
    return LinearSpec(N, K, QuantScheme(4, 32), torch.device(device), dtype, activations)


def exact_spec(N: int, K: int, scheme: QuantScheme, dtype: torch.dtype) -> LinearSpec:
    """Activations as they are: what every backend can do, and the reference for those that round them."""
    return LinearSpec(N, K, scheme, CPU, dtype, activations="bf16")


def backend_for(name: str, spec: LinearSpec) -> Backend:
    """The backend called `name`; skips where it cannot run `spec`, which in CI none may do."""
    backend = load_backend(name)
    reason = backend.why_unavailable(spec)
    if reason is not None:
        assert not os.environ.get("CI"), f"{name}: {reason}"
        pytest.skip(f"{name}: {reason}")
    return backend


@each_dtype
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("N", "K"), SHAPES)
@each_backend
def test_linear_equals_float64(
    name: str, N: int, K: int, bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype
) -> None:
    scheme = QuantScheme(bits, group_size, symmetric)
    case = make_case(N, K, scheme, torch.bfloat16)
    spec = exact_spec(N, K, scheme, dtype)
    backend = backend_for(name, spec)
    prepacked = backend.prepack(case.weight, spec)
    assert prepacked.spec == spec
    assert prepacked.nbytes == backend.prepacked_bytes(spec, case.weight.nbytes)
    x = inputs_with_outliers(max(BATCHES), K, dtype)
    for M in BATCHES:
        assert_close(backend.linear(x[:M], prepacked), x, case, dtype)


def test_backends_that_must_run_everywhere_do() -> None:
    """What may skip above: nothing that needs no compiler."""
    for name, dtype, bits in itertools.product(("torch", "reference"), (torch.float32, torch.bfloat16), (4, 8)):
        for group_size, symmetric in itertools.product((32, 64, 128, None), (True, False)):
            for spec in (
                LinearSpec(33, 256, QuantScheme(bits, group_size, symmetric), CPU, dtype),
                exact_spec(33, 256, QuantScheme(bits, group_size, symmetric), dtype),
            ):
                assert load_backend(name).why_unavailable(spec) is None


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@each_dtype
@each_backend
def test_scales_of_other_dtypes(name: str, dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    scheme = QuantScheme(4, 32)
    case = make_case(48, 256, scheme, scale_dtype)
    spec = exact_spec(48, 256, scheme, dtype)
    backend = backend_for(name, spec)
    prepacked = backend.prepack(case.weight, spec)
    x = inputs_with_outliers(7, 256, dtype)
    assert_close(backend.linear(x, prepacked), x, case, dtype)


@each_backend
def test_fp16_activations(name: str) -> None:
    scheme = QuantScheme(4, 32)
    case = make_case(48, 256, scheme, torch.float16)
    spec = exact_spec(48, 256, scheme, torch.float16)
    backend = backend_for(name, spec)
    x = inputs_with_outliers(7, 256, torch.float16)
    got = backend.linear(x, backend.prepack(case.weight, spec))
    exact = x.double() @ case.dense.T
    assert got.dtype == torch.float16
    assert float((got.double() - exact).norm() / exact.norm()) < 1e-3


@each_dtype
@each_backend
def test_activations_that_are_no_contiguous_rows(name: str, dtype: torch.dtype) -> None:
    scheme = QuantScheme(4, 32)
    case = make_case(32, 128, scheme, torch.bfloat16)
    spec = exact_spec(32, 128, scheme, dtype)
    backend = backend_for(name, spec)
    prepacked = backend.prepack(case.weight, spec)
    x = inputs_with_outliers(128, 7, dtype).t()
    assert not x.is_contiguous()
    assert_close(backend.linear(x, prepacked), x, case, dtype)


@each_backend
def test_one_wrong_value_is_seen(name: str) -> None:
    """The comparison notices a single weight that is off by one step."""
    scheme = QuantScheme(4, 32)
    case = make_case(16, 128, scheme, torch.bfloat16)
    case.dense[3, 77] += float(case.weight.scale[3, 77 // 32])
    spec = exact_spec(16, 128, scheme, torch.float32)
    backend = backend_for(name, spec)
    x = torch.zeros(1, 128)
    x[0, 77] = 1.0
    got = backend.linear(x, backend.prepack(case.weight, spec))
    with pytest.raises(AssertionError, match="error"):
        assert_close(got, x, case, torch.float32)


@pytest.mark.parametrize("tokens", [1, 9])
@each_dtype
@each_backend
def test_bias_joins_the_product(name: str, dtype: torch.dtype, tokens: int) -> None:
    scheme = QuantScheme(8, 64)
    case = make_case(37, 128, scheme, torch.bfloat16)
    spec = exact_spec(37, 128, scheme, dtype)
    backend = backend_for(name, spec)
    prepacked = backend.prepack(case.weight, spec)
    x = inputs_with_outliers(tokens, 128, dtype)
    bias = torch.linspace(-1000, 1000, 37).to(dtype)
    got = backend.linear(x, prepacked, bias).double()
    expected = x.double() @ case.dense.T + bias.double()
    allowed = 1e-5 if dtype == torch.float32 else 1e-2
    assert float((got - expected).norm() / expected.norm()) < allowed


@each_dtype
@each_backend
def test_weights_multiplied_together_give_what_each_gives_alone(name: str, dtype: torch.dtype) -> None:
    schemes = (QuantScheme(4, 32), QuantScheme(4, 32, symmetric=False), QuantScheme(8, None))
    x = inputs_with_outliers(5, 128, dtype)
    for count in (1, 2, 3):
        parts: list[tuple[Prepacked, Tensor | None]] = []
        for N, scheme in zip((64, 16, 33), schemes[:count], strict=False):
            spec = exact_spec(N, 128, scheme, dtype)
            backend = backend_for(name, spec)
            prepacked = backend.prepack(make_case(N, 128, scheme, torch.bfloat16, seed=N).weight, spec)
            parts.append((prepacked, torch.linspace(-9, 9, N).to(dtype) if N != 16 else None))
        together = backend.linear_together(x, parts)
        assert len(together) == count
        for got, (prepacked, bias) in zip(together, parts, strict=True):
            assert torch.equal(got, backend.linear(x, prepacked, bias))


@each_backend
def test_describe_begins_with_the_name(name: str) -> None:
    assert backend_for(name, spec_of()).describe().split()[0] == name


@pytest.mark.parametrize("activations", ["int8", "int16"])
def test_backends_that_keep_activations_refuse_to_round_them(activations: Activations) -> None:
    for name in ("torch", "reference"):
        assert "activations stay as they are" in str(
            load_backend(name).why_unavailable(spec_of(activations=activations))
        )
        with pytest.raises(BackendError, match="activations stay"):
            select_backend(name, [spec_of(activations=activations)])


def test_the_native_backend_rounds_activations_or_keeps_them() -> None:
    every: tuple[Activations, ...] = ("auto", "int8", "int16", "bf16")
    for activations in every:
        backend_for("native", spec_of(activations=activations))


# torch's own kernels


@pytest.mark.parametrize("symmetric", [True, False])
def test_torch_reads_int4_packed_with_bf16(symmetric: bool) -> None:
    scheme = QuantScheme(4, 32, symmetric)
    prepacked = TorchBackend().prepack(
        make_case(48, 256, scheme, torch.bfloat16).weight, LinearSpec(48, 256, scheme, CPU, torch.bfloat16)
    )
    assert isinstance(prepacked, Int4PackedWeight)
    assert prepacked.nbytes == 48 * 256 // 2 + 48 * 8 * 2 * 2  # half a byte a weight, scale and zero per group


@pytest.mark.parametrize(
    ("N", "scheme", "dtype"),
    [
        (48, QuantScheme(8, 32), torch.bfloat16),
        (48, QuantScheme(4, 32), torch.float32),
        (48, QuantScheme(4, 32), torch.float16),
        (48, QuantScheme(4, None), torch.bfloat16),
        (33, QuantScheme(4, 32), torch.bfloat16),
    ],
)
def test_torch_dequantizes_tiles_of_the_rest(N: int, scheme: QuantScheme, dtype: torch.dtype) -> None:
    weight = make_case(N, 256, scheme, torch.bfloat16).weight
    prepacked = TorchBackend().prepack(weight, LinearSpec(N, 256, scheme, CPU, dtype))
    assert isinstance(prepacked, TiledWeight)
    assert prepacked.nbytes == weight.nbytes


def test_torch_cuts_large_weights_into_several_tiles() -> None:
    scheme = QuantScheme(8, 32, symmetric=False)
    case = make_case(100, 13696, scheme, torch.bfloat16)
    prepacked = TorchBackend().prepack(case.weight, LinearSpec(100, 13696, scheme, CPU, torch.float32))
    assert isinstance(prepacked, TiledWeight)
    assert prepacked.tile_rows < 50
    x = inputs_with_outliers(2, 13696, torch.float32)
    assert_close(TorchBackend().linear(x, prepacked), x, case, torch.float32)


@pytest.mark.parametrize("tile_rows", [1, 3, 8, 13, 32, 99, 100, 1000])
@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_of_any_height_give_the_same(bits: int, tile_rows: int) -> None:
    scheme = QuantScheme(bits, 32, symmetric=False)
    case = make_case(100, 64, scheme, torch.bfloat16)
    tiled = TiledWeight(case.weight, tile_rows, LinearSpec(100, 64, scheme, CPU, torch.float32))
    x = inputs_with_outliers(3, 64, torch.float32)
    assert_close(TorchBackend().linear(x, tiled), x, case, torch.float32)


def test_reference_keeps_the_weight_as_it_stands_in_the_file() -> None:
    weight = make_case(33, 256, QuantScheme(4, 32), torch.bfloat16).weight
    prepacked = ReferenceBackend().prepack(weight, spec_of(33, 256))
    assert isinstance(prepacked, ReferenceWeight)
    assert prepacked.weight is weight
    assert prepacked.nbytes == weight.nbytes


# QuantizedLinear


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3)])
@each_backend
def test_quantized_linear_takes_any_leading_dimensions_and_adds_its_bias(name: str, leading: tuple[int, ...]) -> None:
    scheme = QuantScheme(4, 32)
    case = make_case(33, 64, scheme, torch.bfloat16)
    spec = exact_spec(33, 64, scheme, torch.float32)
    backend = backend_for(name, spec)
    bias = torch.linspace(-5, 5, 33)
    linear = QuantizedLinear(backend.prepack(case.weight, spec), backend, bias)
    x = torch.randn(*leading, 64, generator=torch.Generator().manual_seed(0))
    got = linear(x)
    assert got.shape == (*leading, 33)
    torch.testing.assert_close(got.double(), x.double() @ case.dense.T + bias.double(), rtol=1e-5, atol=1e-5)
    assert linear.nbytes == linear.prepacked.nbytes + 33 * 4
    assert f"backend={name}" in repr(linear)


# The choice


class FakeBackend:
    """Refuses with a fixed reason, and remembers what it was asked."""

    kinds: tuple[Kind, ...] = ("int",)
    devices: tuple[str, ...] = ("cpu",)

    def __init__(self, name: str, reason: str | None) -> None:
        self.name = name
        self.reason = reason
        self.asked: list[LinearSpec] = []

    def why_unavailable(self, spec: LinearSpec) -> str | None:
        self.asked.append(spec)
        return self.reason if spec.out_features == 32 else None

    def describe(self) -> str:
        return self.name

    def prepacked_bytes(self, spec: LinearSpec, stored_bytes: int) -> int:
        return stored_bytes

    def prepack(self, weight: WeightSource, spec: LinearSpec) -> Prepacked:
        raise NotImplementedError

    def linear(self, x: Tensor, weight: Prepacked, bias: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def linear_together(self, x: Tensor, parts: Sequence[tuple[Prepacked, Tensor | None]]) -> list[Tensor]:
        raise NotImplementedError


def install(monkeypatch: pytest.MonkeyPatch, *backends: FakeBackend) -> None:
    by_name: dict[str, Backend] = {backend.name: backend for backend in backends}
    monkeypatch.setattr(kernels, "BACKEND_NAMES", tuple(by_name))
    monkeypatch.setattr(kernels, "load_backend", by_name.__getitem__)


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_every_name_loads_the_backend_of_that_name(name: str) -> None:
    assert load_backend(name).name == name


def test_every_kind_has_a_backend() -> None:
    assert {kind for name in BACKEND_NAMES for kind in load_backend(name).kinds} == set(KINDS)
    assert PACKED_BACKENDS == ("native", "torch", "reference")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "int"])
@each_backend
def test_other_libraries_weights_are_refused(name: str, kind: Kind) -> None:
    spec = LinearSpec(32, 128, QuantScheme(4, 64, kind=kind), CPU, torch.bfloat16)
    with pytest.raises(BackendError, match=f"reads int, not {kind}"):
        select_backend(name, [spec])


@pytest.mark.parametrize("name", ["bitsandbytes", "quanto"])
def test_other_libraries_refuse_the_project_s_weights(name: str) -> None:
    with pytest.raises(BackendError, match=r"it reads .*, not int4 g32"):
        select_backend(name, [spec_of()])


@pytest.mark.parametrize("name", ["cuda", "", "Torch", "auto "])
def test_an_unknown_name_is_a_usage_error_with_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        select_backend(name, [spec_of()])
    assert caught.value.hint is not None
    for known in ("auto", *BACKEND_NAMES):
        assert known in caught.value.hint


def test_a_named_backend_is_taken_although_a_better_one_runs() -> None:
    backend, reason = select_backend("reference", [spec_of()])
    assert (backend.name, reason) == ("reference", "asked for")


def test_a_named_backend_never_falls_back() -> None:
    # No kernels for this device: `auto` has another to take, the named one must not.
    with pytest.raises(BackendError, match=r"torch.*meta") as caught:
        select_backend("torch", [spec_of(), spec_of(64, device="meta")])
    assert caught.value.hint is not None
    assert "auto" in caught.value.hint
    backend, reason = select_backend("auto", [spec_of(), spec_of(64, device="meta")])
    assert backend.name == "reference"
    assert "native cannot" in reason
    assert "torch cannot" in reason
    assert "meta" in reason


def test_auto_takes_the_first_that_runs_everything_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = FakeBackend("a", "no A"), FakeBackend("b", None), FakeBackend("c", None)
    install(monkeypatch, first, second, third)
    chosen, reason = select_backend("auto", [spec_of(64), spec_of(32)])
    assert chosen is second
    assert "a cannot: no A" in reason
    assert third.asked == []
    chosen, reason = select_backend("auto", [spec_of(64)])
    assert chosen is first
    assert "cannot" not in reason


def test_auto_without_any_backend_lists_all_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeBackend("a", "no A"), FakeBackend("b", "no B"))
    with pytest.raises(BackendError, match=r"no A.*no B"):
        select_backend("auto", [spec_of()])


def test_equal_linears_are_asked_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    only = FakeBackend("a", None)
    install(monkeypatch, only)
    select_backend("auto", iter([spec_of(), spec_of(), spec_of(64), spec_of()]))
    assert only.asked == [spec_of(), spec_of(64)]


@pytest.mark.parametrize("out_features", [16, 240, 256, 272, 1040])
def test_converting_rows_in_blocks_gives_the_bytes_of_one_conversion(out_features: int) -> None:
    scheme = QuantScheme(4, 32)
    generator = torch.Generator().manual_seed(out_features)
    q = torch.randint(-8, 8, (out_features, 64), dtype=torch.int8, generator=generator)
    weight = PackedWeight(pack(q, 4), torch.ones(out_features, 2), None, out_features, 64, scheme)
    prepacked = TorchBackend().prepack(weight, LinearSpec(out_features, 64, scheme, CPU, torch.bfloat16))
    assert isinstance(prepacked, Int4PackedWeight)
    whole = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32) + 8, 1)
    assert torch.equal(prepacked.packed, whole)
