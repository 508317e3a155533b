"""bitsandbytes' weights multiply as what they stand for, however they came, and keep the bytes that were planned."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glm4run.errors import BackendError, CheckpointError
from glm4run.kernels import LinearSpec, bitsandbytes, select_backend
from glm4run.kernels.bitsandbytes import (
    CONVERT_ROWS,
    BitsandbytesBackend,
    Bnb4Weight,
    Bnb8Weight,
    _library,
    packed_kernel_runs,
)
from glm4run.machine import has_cpu_flag
from glm4run.memory.kernels import Linear, choose_kernel, kept_bytes
from glm4run.quant_config import Kind, QuantScheme
from tests.foreign_cases import Dense, Stored, dense_weight, encode_facts, require, saved_parts, spec_of
from tests.packed_cases import inputs_with_outliers

require("bitsandbytes")

# What the 16 values of NormalFloat4 stand for. Source: arXiv 2305.14314, appendix E.
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ],
    dtype=torch.float64,
)
# Sign, two bits of exponent, one of mantissa; the library's documentation of `create_fp8_map` and `get_4bit_type`.
FP4_POSITIVE = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=torch.float64) / 12
FP4 = torch.cat((FP4_POSITIVE, -FP4_POSITIVE))
SHAPES = ((32, 128), (33, 192), (600, 576), (64, 13696), (5, 64))
DTYPES = (torch.float32, torch.bfloat16)
# The packed kernel's scales are bf16; bf16 outputs and dequantized weights are rounded as well.
ALLOWED = {torch.float32: 4e-6, torch.bfloat16: 7e-3}

each_kind = pytest.mark.parametrize("kind", ["nf4", "fp4"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


def scheme_of(kind: Kind, *, nested: bool = False) -> QuantScheme:
    return QuantScheme(8, None, kind=kind) if kind == "llm_int8" else QuantScheme(4, 64, kind=kind, nested=nested)


def dequantized(parts: dict[str, Tensor], kind: Kind, N: int, K: int) -> Tensor:
    """float64 [N, K] of what is stored: the first value of a byte in its high half."""
    values = parts["weight"].flatten()
    codes = torch.stack((values >> 4, values & 0xF), dim=-1).flatten()
    table = NF4 if kind == "nf4" else FP4
    return (table[codes.int()].view(-1, 64) * parts["weight.absmax"].double()[:, None]).view(N, K)


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@each_dtype
@each_kind
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_4_bits_multiply_as_what_they_stand_for(kind: Kind, N: int, K: int, dtype: torch.dtype) -> None:
    weight = dense_weight(N, K)
    spec = spec_of(N, K, scheme_of(kind), dtype)
    backend = BitsandbytesBackend()
    assert backend.why_unavailable(spec) is None
    prepacked = backend.prepack(Dense(weight), spec)
    exact = dequantized(saved_parts(weight, kind), kind, N, K)
    for M in (1, 2, 7, 33):
        x = inputs_with_outliers(M, K, dtype)
        got = backend.linear(x, prepacked)
        assert got.dtype == dtype and got.shape == (M, N)
        assert relative_error(got, x.double() @ exact.T) < ALLOWED[dtype]


@each_kind
def test_each_weight_becomes_the_nearest_value(kind: Kind) -> None:
    weight = dense_weight(8, 128)
    parts = saved_parts(weight, kind)
    table = NF4 if kind == "nf4" else FP4
    scaled = weight.double().view(-1, 64) / parts["weight.absmax"].double()[:, None]
    nearest = (scaled[..., None] - table).abs().min(dim=-1).values
    chosen = (dequantized(parts, kind, 8, 128).view(-1, 64) / parts["weight.absmax"].double()[:, None] - scaled).abs()
    assert torch.equal(parts["weight.absmax"], weight.float().view(-1, 64).abs().amax(-1))
    # FP4's decision thresholds in the library are rounded.
    torch.testing.assert_close(chosen, nearest, rtol=0, atol=1e-4 if kind == "nf4" else 3e-2)


@each_dtype
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_llm_int8_rounds_all_but_the_outliers(N: int, K: int, dtype: torch.dtype) -> None:
    """The published algorithm in float64: columns with an activation of 6 or more stay as they are."""
    weight = dense_weight(N, K)
    spec = spec_of(N, K, scheme_of("llm_int8"), dtype)
    backend = BitsandbytesBackend()
    prepacked = backend.prepack(Dense(weight), spec)
    assert isinstance(prepacked, Bnb8Weight)
    assert torch.equal(prepacked.scales, weight.to(torch.float16).abs().amax(-1).float())
    rounded = prepacked.values.double() * prepacked.scales.double()[:, None] / 127
    assert float((rounded - weight.double()).abs().max() / weight.abs().max()) < 0.5 / 127 + 1e-3
    x = inputs_with_outliers(7, K, dtype)
    half = x.to(torch.float16)
    outliers = (half.abs() >= 6).any(dim=0)
    assert outliers.any() and not outliers.all()
    inner = torch.where(outliers, 0, half.double())
    largest = half.double().masked_fill(half.abs() >= 6, 0).abs().amax(-1, keepdim=True)
    quantized = (inner * 127 / largest).round() * largest / 127
    exact = (quantized + torch.where(outliers, x.double(), 0)) @ rounded.T
    assert relative_error(backend.linear(x, prepacked), exact) < (2e-4 if dtype == torch.float32 else 7e-3)


@each_dtype
@pytest.mark.parametrize("kind", ["nf4", "fp4", "llm_int8"])
def test_bytes_are_those_that_were_planned(kind: Kind, dtype: torch.dtype) -> None:
    backend, name = BitsandbytesBackend(), {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    for N, K in SHAPES:
        spec, linear = spec_of(N, K, scheme_of(kind), dtype), Linear(N, K, scheme_of(kind))
        prepacked = backend.prepack(Dense(dense_weight(N, K)), spec)
        kernel = choose_kernel(linear, backend="bitsandbytes", device="cpu", dtype=name)
        assert prepacked.nbytes == backend.prepacked_bytes(spec, 0) == kept_bytes(linear, kernel, dtype.itemsize)
        if kind != "llm_int8":
            assert (kernel == "bnb4_cpu") == packed_kernel_runs(spec)


def test_the_packed_kernel_is_known_by_the_library_s_own_test() -> None:
    assert has_cpu_flag(bitsandbytes.CPU_FLAG) == bool(_library().functional.has_avx512bf16())


@each_kind
def test_conversion_by_blocks_of_rows_is_the_library_s(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    N, K = 2 * CONVERT_ROWS + 32, 128
    weight, functional = dense_weight(N, K), _library().functional
    values, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    ours = BitsandbytesBackend().prepack(Dense(weight), spec_of(N, K, scheme_of(kind)))
    assert isinstance(ours, Bnb4Weight)
    assert torch.equal(ours.values, values) and torch.equal(ours.state.absmax, state.absmax)
    monkeypatch.setattr(bitsandbytes, "has_cpu_flag", lambda flag: True)  # the arrangement needs no such processor
    packed = BitsandbytesBackend().prepack(Dense(weight), spec_of(N, K, scheme_of(kind), torch.bfloat16))
    whole, whole_state = functional._convert_weight_packed_for_cpu(values, state)
    assert isinstance(packed, Bnb4Weight)
    assert torch.equal(packed.values, whole) and torch.equal(packed.state.absmax, whole_state.absmax)
    assert packed.state.shape == whole_state.shape


@pytest.mark.parametrize("nested", [False, True])
@each_kind
def test_saved_weights_are_those_that_were_made(kind: Kind, nested: bool) -> None:
    N, K = 64, 320
    weight = dense_weight(N, K)
    spec = spec_of(N, K, scheme_of(kind, nested=nested))
    saved = BitsandbytesBackend().prepack(Stored(saved_parts(weight, kind, nested=nested)), spec)
    made = BitsandbytesBackend().prepack(Dense(weight), spec)
    assert isinstance(saved, Bnb4Weight) and isinstance(made, Bnb4Weight)
    assert torch.equal(saved.values, made.values)
    if not nested:
        assert torch.equal(saved.state.absmax, made.state.absmax)
    else:
        assert saved.state.absmax.dtype == torch.float32
        assert 0 < relative_error(saved.state.absmax, made.state.absmax.double()) < 0.02
        whole = _library().functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=True)
        x = inputs_with_outliers(3, K, torch.float32)
        theirs = _library().matmul_4bit(x, whole[0], quant_state=whole[1])
        assert torch.equal(BitsandbytesBackend().linear(x, saved), theirs)


def test_saved_int8_weights_are_those_that_were_made() -> None:
    weight, spec = dense_weight(48, 128), spec_of(48, 128, scheme_of("llm_int8"))
    saved = BitsandbytesBackend().prepack(Stored(saved_parts(weight, "llm_int8")), spec)
    made = BitsandbytesBackend().prepack(Dense(weight), spec)
    assert isinstance(saved, Bnb8Weight) and isinstance(made, Bnb8Weight)
    assert torch.equal(saved.values, made.values) and torch.equal(saved.scales, made.scales)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"quant_type": "fp4"}, "quant_type 'fp4', expected 'nf4'"),
        ({"blocksize": 128}, "blocksize 128, expected 64"),
        ({"shape": [64, 64]}, r"shape \[64, 64\], expected \[32, 128\]"),
        ({"shape": None}, "shape None"),
    ],
)
def test_a_weight_that_says_something_else_is_refused(facts: dict[str, object], message: str) -> None:
    parts = saved_parts(dense_weight(32, 128), "nf4")
    right = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [32, 128]}
    parts["weight.quant_state.bitsandbytes__nf4"] = encode_facts(**{**right, **facts})
    with pytest.raises(CheckpointError, match=message):
        BitsandbytesBackend().prepack(Stored(parts), spec_of(32, 128, scheme_of("nf4")))


def test_damaged_parts_are_refused() -> None:
    spec, parts = spec_of(32, 128, scheme_of("nf4")), saved_parts(dense_weight(32, 128), "nf4")
    name = "weight.quant_state.bitsandbytes__nf4"
    for raw in (torch.tensor([1, 2, 3], dtype=torch.uint8), torch.tensor(list(b"[]"), dtype=torch.uint8)):
        with pytest.raises(CheckpointError, match="no JSON"):
            BitsandbytesBackend().prepack(Stored({**parts, name: raw}), spec)
    with pytest.raises(CheckpointError, match="maps its values"):
        BitsandbytesBackend().prepack(Stored({**parts, "weight.quant_map": parts["weight.quant_map"].flip(0)}), spec)


def test_bias_and_several_weights_of_one_input() -> None:
    backend, x = BitsandbytesBackend(), inputs_with_outliers(3, 128, torch.bfloat16)
    parts = []
    for N, kind in ((64, "nf4"), (33, "fp4"), (32, "llm_int8")):
        spec = spec_of(N, 128, scheme_of(kind), torch.bfloat16)  # type: ignore[arg-type]
        parts.append((backend.prepack(Dense(dense_weight(N, 128)), spec), torch.linspace(-900, 900, N).bfloat16()))
    for got, (weight, bias) in zip(backend.linear_together(x, parts), parts, strict=True):
        assert torch.equal(got, backend.linear(x, weight, bias))
        assert relative_error(got, backend.linear(x, weight).double() + bias.double()) < 4e-3
    described = backend.describe()
    assert described.startswith("bitsandbytes ")
    assert "1 linears as LLM.int8" in described
    paths = ("1 linears in its AVX512", "1 linears dequantized") if has_cpu_flag("avx512_bf16") else ("2 linears deq",)
    assert all(path in described for path in paths)


def test_what_it_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = BitsandbytesBackend()
    assert "do not divide 160" in str(backend.why_unavailable(spec_of(32, 160, scheme_of("nf4"))))
    meta = LinearSpec(32, 128, scheme_of("nf4"), torch.device("meta"), torch.bfloat16)
    assert "no kernels for meta" in str(backend.why_unavailable(meta))
    for kind, activations in product(("nf4", "llm_int8"), ("auto", "int8", "int16", "bf16")):
        spec = LinearSpec(32, 128, scheme_of(kind), torch.device("cpu"), torch.bfloat16, activations)  # type: ignore[arg-type]
        allowed = ("auto", "int8") if kind == "llm_int8" else ("auto", "bf16")
        assert (backend.why_unavailable(spec) is None) == (activations in allowed)
    monkeypatch.setattr(bitsandbytes, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"not installed \(pip install 'glm4run\[bitsandbytes\]'\)"):
        select_backend("auto", [spec_of(32, 128, scheme_of("nf4"))])


def test_the_library_never_asks_a_hub_for_code(tmp_path: Path) -> None:
    """The package `kernels`, which fetches code, is hidden while bitsandbytes is imported, and there afterwards."""
    (tmp_path / "kernels.py").write_text(
        "import sys; sys.imported_kernels = True\ndef get_kernel(*a, **k): raise OSError"
    )
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from glm4run.kernels.bitsandbytes import _library
        _library()
        assert not hasattr(sys, "imported_kernels")
        import kernels
        assert sys.imported_kernels
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
