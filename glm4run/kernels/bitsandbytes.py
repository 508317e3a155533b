"""bitsandbytes' NF4, FP4 and LLM.int8, made from a dense weight or read from a checkpoint that transformers saved.

All arithmetic is the library's own. What runs where (bitsandbytes 0.50):

* 4 bits on a CPU with AVX512-BF16, bf16 activations, N a multiple of 32: its packed kernel, whose scales are bf16.
* 4 bits otherwise on a CPU: the whole weight is dequantized at each call, then multiplied by torch.
* LLM.int8 on a CPU: torch's int8 product where there is AVX-512, between conversions in plain torch: slow.
* CUDA: the library's kernels. Not tested here.

On a CPU the library dequantizes wrongly where its blocks of 64 straddle rows (0.50.2), so that such K is refused.
Imported only when asked for: `pip install glm4run[bitsandbytes]`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from glm4run.bnb_format import (
    ABSMAX,
    NESTED_ABSMAX,
    NESTED_BLOCK,
    NESTED_QUANT_MAP,
    QUANT_MAP,
    SCALES_INT8,
    WEIGHT,
    quant_state_name,
)
from glm4run.errors import CheckpointError
from glm4run.kernels import LinearSpec, Prepacked, WeightSource
from glm4run.machine import has_cpu_flag
from glm4run.quant_config import BITSANDBYTES_KINDS, LLM_INT8_THRESHOLD, Kind

CPU_FLAG, CPU_ROWS = "avx512_bf16", 32  # of the packed CPU kernel; `memory.kernels` has the same
CONVERT_ROWS = 256  # at once, so that a conversion needs little beside the weight
PATHS = {
    "packed": "in its AVX512-BF16 kernel",
    "dequantized": "dequantized at each call",
    "int8": "as LLM.int8 by torch's int8 product",
    "cuda": "in its CUDA kernels",
}


@dataclass(frozen=True)
class Bnb4Weight:
    """4-bit values in the library's order, absmax float32 [N*K/64], or bf16 [K/64, N] for the packed CPU kernel."""

    values: Tensor
    state: Any  # bitsandbytes.functional.QuantState
    spec: LinearSpec

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.values, self.state.absmax, self.state.code))


@dataclass(frozen=True)
class Bnb8Weight:
    """values int8 [N, K], scales float32 [N]: w = values * scales / 127."""

    values: Tensor
    scales: Tensor
    spec: LinearSpec

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.values, self.scales))


class BitsandbytesBackend:
    """Products by bitsandbytes. `describe` counts which of its paths the prepacked weights take."""

    name = "bitsandbytes"
    kinds: tuple[Kind, ...] = BITSANDBYTES_KINDS
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __init__(self) -> None:
        self.paths: Counter[str] = Counter()

    def why_unavailable(self, spec: LinearSpec) -> str | None:
        if find_spec("bitsandbytes") is None:
            return "bitsandbytes is not installed (pip install 'glm4run[bitsandbytes]')"
        if spec.device.type not in ("cpu", "cuda"):
            return f"it has no kernels for {spec.device.type}"
        if spec.scheme.kind == "llm_int8":
            return None if spec.activations in ("auto", "int8") else "LLM.int8 rounds activations to int8 by itself"
        if spec.activations in ("int8", "int16"):
            return "activations stay as they are in its 4-bit kernels"
        if spec.scheme.group_size is None or spec.in_features % spec.scheme.group_size:
            return f"its blocks of {spec.scheme.group_size} weights do not divide {spec.in_features} input features"
        return None

    def describe(self) -> str:
        version = _library().__version__
        paths = [f"{count} linears {PATHS[path]}" for path, count in self.paths.items()]
        return f"{self.name} {version}" + (f" ({', '.join(paths)})" if paths else "")

    def prepacked_bytes(self, spec: LinearSpec, stored_bytes: int) -> int:
        count = spec.out_features * spec.in_features
        if spec.scheme.kind == "llm_int8":
            return count + 4 * spec.out_features
        assert spec.scheme.group_size is not None
        scale_bytes = 2 if packed_kernel_runs(spec) else 4
        return count // 2 + scale_bytes * (count // spec.scheme.group_size) + 16 * 4

    def prepack(self, weight: WeightSource, spec: LinearSpec) -> Bnb4Weight | Bnb8Weight:
        stored = weight.stored()
        dense = stored[WEIGHT] if stored.keys() == {WEIGHT} else None
        if spec.scheme.kind == "llm_int8":
            self.paths["cuda" if spec.device.type == "cuda" else "int8"] += 1
            values, scales = (stored[WEIGHT], stored[SCALES_INT8]) if dense is None else _quantize_int8(dense)
            return Bnb8Weight(values, scales, spec)
        values, absmax = _read_4bit(stored, spec) if dense is None else _quantize_4bit(dense, spec)
        if packed_kernel_runs(spec):
            self.paths["packed"] += 1
            return _pack_for_cpu(values, absmax, spec)
        self.paths["cuda" if spec.device.type == "cuda" else "dequantized"] += 1
        return Bnb4Weight(values, _state(absmax, spec, spec.out_features), spec)

    def linear(self, x: Tensor, weight: Prepacked, bias: Tensor | None = None) -> Tensor:
        """[M, K] to [M, N]."""
        library = _library()
        x = x.contiguous()
        if isinstance(weight, Bnb4Weight):
            y: Tensor = library.matmul_4bit(x, weight.values, quant_state=weight.state, bias=bias)
            return y
        assert isinstance(weight, Bnb8Weight)
        state = library.MatmulLtState()
        state.CB, state.SCB, state.threshold = weight.values, weight.scales, LLM_INT8_THRESHOLD
        state.has_fp16_weights = state.is_training = False
        y = library.matmul(x, weight.values, bias=bias, state=state)
        return y.to(x.dtype)

    def linear_together(self, x: Tensor, parts: Sequence[tuple[Prepacked, Tensor | None]]) -> list[Tensor]:
        return [self.linear(x, weight, bias) for weight, bias in parts]


def packed_kernel_runs(spec: LinearSpec) -> bool:
    """Whether the library's packed CPU kernel takes a 4-bit weight. It computes in bf16 whatever it is fed."""
    return (
        spec.device.type == "cpu"
        and spec.dtype == torch.bfloat16
        and spec.out_features % CPU_ROWS == 0
        and has_cpu_flag(CPU_FLAG)
    )


@cache
def _library() -> ModuleType:
    """bitsandbytes. While it is imported the package `kernels` is hidden, by which it would fetch code from a hub."""
    logger = logging.getLogger("bitsandbytes")
    level, hidden = logger.level, sys.modules.get("kernels")
    logger.setLevel(logging.ERROR)  # it warns of the missing package, and at each call of casts that are its own
    sys.modules["kernels"] = None  # type: ignore[assignment]  # what makes an import fail
    try:
        import bitsandbytes
    finally:
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden
        logger.setLevel(max(level, logging.ERROR))
    module: ModuleType = bitsandbytes
    return module


def _state(absmax: Tensor, spec: LinearSpec, rows: int) -> Any:
    functional = _library().functional
    return functional.QuantState(
        absmax=absmax,
        shape=torch.Size((rows, spec.in_features)),
        code=functional.get_4bit_type(spec.scheme.kind, device=absmax.device),
        blocksize=spec.scheme.group_size,
        quant_type=spec.scheme.kind,
        dtype=spec.dtype,
    )


def _quantize_4bit(dense: Tensor, spec: LinearSpec) -> tuple[Tensor, Tensor]:
    """Dense [N, K] to values uint8 [N*K/2, 1] and absmax float32 [N*K/64]. Rows are independent, as 64 divides K."""
    functional, parts = _library().functional, []
    for rows in dense.split(CONVERT_ROWS):
        values, state = functional.quantize_4bit(
            rows.contiguous(), blocksize=spec.scheme.group_size, quant_type=spec.scheme.kind
        )
        parts.append((values, state.absmax))
    return torch.cat([values for values, _ in parts]), torch.cat([absmax for _, absmax in parts])


def _quantize_int8(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Dense [N, K] to values int8 [N, K] and scales float32 [N], by way of fp16, as `Int8Params` does."""
    quantize = _library().functional.int8_vectorwise_quant
    parts = [quantize(rows.to(torch.float16))[:2] for rows in dense.split(CONVERT_ROWS)]
    return torch.cat([values for values, _ in parts]), torch.cat([scales for _, scales in parts])


def _read_4bit(stored: Mapping[str, Tensor], spec: LinearSpec) -> tuple[Tensor, Tensor]:
    """Values and absmax of a saved weight; scales that are quantized once more are decoded.

    Raises:
        CheckpointError: what the file says of itself is not what config.json says, or not what this version reads.
    """
    functional = _library().functional
    facts = _facts(stored[quant_state_name(spec.scheme)])
    expected = {
        "quant_type": spec.scheme.kind,
        "blocksize": spec.scheme.group_size,
        "shape": [spec.out_features, spec.in_features],
        **({"nested_blocksize": NESTED_BLOCK} if spec.scheme.nested else {}),
    }
    for key, value in expected.items():
        if facts.get(key) != value:
            raise CheckpointError(
                f"a bitsandbytes weight says {key} {facts.get(key)!r}, expected {value!r}",
                hint="config.json belongs to another model, or the weights were saved with other settings",
            )
    code = functional.get_4bit_type(spec.scheme.kind, device="cpu")
    if not torch.allclose(stored[QUANT_MAP].cpu(), code, atol=1e-6):
        raise CheckpointError(
            f"a bitsandbytes weight maps its values in another way than {spec.scheme.kind}",
            hint="save it with a current version of bitsandbytes",
        )
    absmax = stored[ABSMAX]
    if spec.scheme.nested:
        offset = facts.get("nested_offset")
        if not isinstance(offset, int | float):
            raise CheckpointError(f"a bitsandbytes weight says nested_offset {offset!r}, expected a number")
        inner = functional.QuantState(
            absmax=stored[NESTED_ABSMAX], code=stored[NESTED_QUANT_MAP], blocksize=NESTED_BLOCK, dtype=torch.float32
        )
        absmax = functional.dequantize_blockwise(absmax, inner) + offset
    return stored[WEIGHT], absmax


def _facts(raw: Tensor) -> Mapping[str, Any]:
    try:
        facts = json.loads(bytes(raw.tolist()).decode())
    except ValueError as error:
        raise CheckpointError(f"a bitsandbytes weight's quant_state is no JSON: {error}") from error
    if not isinstance(facts, dict):
        raise CheckpointError("a bitsandbytes weight's quant_state is no JSON object")
    return facts


def _pack_for_cpu(values: Tensor, absmax: Tensor, spec: LinearSpec) -> Bnb4Weight:
    """The packed CPU kernel's arrangement, made a block of rows at a time: the library's own takes 16 times the room.

    It arranges blocks of 32 rows one after the other, and scales by columns.
    """
    convert = _library().functional._convert_weight_packed_for_cpu
    row_values = values.view(spec.out_features, -1)
    row_absmax = absmax.view(spec.out_features, -1)
    packed, scales, state = [], [], None
    for first in range(0, spec.out_features, CONVERT_ROWS):
        rows = slice(first, first + CONVERT_ROWS)
        some = row_values[rows]
        part, state = convert(some.reshape(-1, 1), _state(row_absmax[rows].reshape(-1), spec, len(some)))
        packed.append(part)
        scales.append(state.absmax)
    assert state is not None
    state.absmax = torch.cat(scales, dim=1).contiguous()
    state.shape = torch.Size((spec.out_features, spec.in_features))
    return Bnb4Weight(torch.cat(packed), state, spec)
