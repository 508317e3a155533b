"""optimum-quanto's weights multiply as what its quantizers made, and keep the bytes that were planned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glm4run.errors import BackendError
from glm4run.kernels import LinearSpec, quanto, select_backend
from glm4run.kernels.quanto import QuantoBackend, packed_kernel_runs
from glm4run.memory.kernels import Linear, choose_kernel, kept_bytes
from glm4run.quant_config import QuantScheme, on_load_scheme
from tests.foreign_cases import CPU, Dense, dense_weight, require, spec_of
from tests.packed_cases import inputs_with_outliers

require("optimum.quanto")

SHAPES = ((32, 128), (33, 256), (600, 576), (48, 13696), (5, 64), (7, 127), (16, 150))
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ALLOWED = {torch.float32: 4e-6, torch.bfloat16: 9e-3, torch.float16: 1e-3}
SHIFTED = 8  # times as much where u * scale and the shift, which cancel, are each rounded to the dtype

each_dtype = pytest.mark.parametrize("dtype", list(NAMES), ids=list(NAMES.values()))
each_kind = pytest.mark.parametrize("kind", ["qint8", "qint4"])


def stands_for(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """float64 [N, K]: quanto's arithmetic by its own operators, before anything is packed."""
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint4, qint8

    if scheme.kind == "qint8":
        scale = AbsmaxOptimizer()(weight, qint8, axis=0)
        dense: Tensor = torch.ops.quanto.quantize_symmetric(weight, torch.int8, 0, scale).double() * scale.double()
        return dense
    scale, shift = MaxOptimizer()(weight, qint4, 0, scheme.group_size)
    values = torch.ops.quanto.quantize_affine(weight, 4, 0, scheme.group_size, scale, shift)
    dense = values.double() * scale.double() - shift.double()
    return dense.view(weight.shape)


@each_dtype
@each_kind
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_products_are_those_of_what_was_quantized(kind: str, N: int, K: int, dtype: torch.dtype) -> None:
    scheme = on_load_scheme(kind, K)
    spec, backend, weight = spec_of(N, K, scheme, dtype), QuantoBackend(), dense_weight(N, K)
    assert backend.why_unavailable(spec) is None
    prepacked = backend.prepack(Dense(weight), spec)
    exact = stands_for(weight.to(dtype), scheme)
    allowed = ALLOWED[dtype] * (SHIFTED if kind == "qint4" and not prepacked.is_packed else 1)
    for M in (1, 2, 7, 33):
        x = inputs_with_outliers(M, K, dtype)
        got = backend.linear(x, prepacked)
        assert got.dtype == dtype and got.shape == (M, N)
        product = x.double() @ exact.T
        assert float((got.double() - product).norm() / product.norm()) < allowed
    assert prepacked.nbytes == backend.prepacked_bytes(spec, 0)
    linear = Linear(N, K, scheme)
    kernel = choose_kernel(linear, backend="quanto", device="cpu", dtype=NAMES[dtype])
    assert prepacked.nbytes == kept_bytes(linear, kernel, dtype.itemsize)
    assert kernel.endswith("_packed") == prepacked.is_packed == packed_kernel_runs(spec)


@each_kind
def test_packed_products_are_quanto_s_own(kind: str) -> None:
    """To the bit, with its own linear function on its own tensor."""
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qtypes, quantize_weight

    N, K = 64, 256
    weight, scheme = dense_weight(N, K), on_load_scheme(kind, K)
    scale, shift = AbsmaxOptimizer()(weight, qtypes["qint8"], axis=0), None
    if kind == "qint4":
        scale, shift = MaxOptimizer()(weight, qtypes["qint4"], 0, 128)
    theirs = quantize_weight(weight, qtypes[kind], 0, scale, shift, group_size=scheme.group_size)
    backend = QuantoBackend()
    prepacked = backend.prepack(Dense(weight), spec_of(N, K, scheme, torch.bfloat16))
    assert prepacked.is_packed
    for M in (1, 9):
        x = inputs_with_outliers(M, K, torch.bfloat16)
        assert torch.equal(backend.linear(x, prepacked), torch.nn.functional.linear(x, theirs))


@pytest.mark.parametrize(
    ("in_features", "group"), [(64, None), (128, None), (256, 128), (576, 96), (13696, 128), (160, 32), (150, None)]
)
def test_groups_are_those_that_quanto_picks(in_features: int, group: int | None) -> None:
    from optimum.quanto import qint4
    from optimum.quanto.nn import QLinear

    assert on_load_scheme("qint4", in_features).group_size == group
    assert QLinear(in_features, 8, weights=qint4).weight_group_size == group


def test_bias_and_several_weights_of_one_input() -> None:
    backend, x = QuantoBackend(), inputs_with_outliers(3, 256, torch.bfloat16)
    parts = []
    for N, kind in ((64, "qint4"), (33, "qint4"), (32, "qint8")):
        spec = spec_of(N, 256, on_load_scheme(kind, 256), torch.bfloat16)
        parts.append((backend.prepack(Dense(dense_weight(N, 256)), spec), torch.linspace(-900, 900, N).bfloat16()))
    for got, (weight, bias) in zip(backend.linear_together(x, parts), parts, strict=True):
        assert torch.equal(got, backend.linear(x, weight) + bias)
    described = backend.describe()
    assert described.startswith("quanto ")
    for path in ("1 linears qint4 in torch's int4", "1 linears dequantized", "1 linears qint8 in torch's int8"):
        assert path in described


def test_what_it_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = on_load_scheme("qint8", 128)
    rounded = LinearSpec(32, 128, scheme, CPU, torch.bfloat16, "int8")
    assert "stay as they are" in str(QuantoBackend().why_unavailable(rounded))
    meta = LinearSpec(32, 128, scheme, torch.device("meta"), torch.bfloat16)
    assert "no kernels for meta" in str(QuantoBackend().why_unavailable(meta))
    monkeypatch.setattr(quanto, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"not installed \(pip install 'glm4run\[quanto\]'\)"):
        select_backend("quanto", [spec_of(32, 128, scheme)])
