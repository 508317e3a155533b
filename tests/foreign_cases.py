"""Weights of other libraries: skipping where a library is absent, and checkpoints as transformers saves them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glm4run.kernels import LinearSpec
from glm4run.kernels.bitsandbytes import _library
from glm4run.quant_config import Kind, QuantScheme
from tests.builders import edit_json, write_checkpoint, write_shards

CPU = torch.device("cpu")
DIVISIBLE: Mapping[str, Any] = {"intermediate_size": 192}  # by bitsandbytes' blocks of 64


def require(package: str) -> None:
    """Skips the calling test module where an optional package is absent; in CI it must be there."""
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        assert not os.environ.get("CI"), f"in CI these tests may not be skipped: {package} is not installed"
        pytest.skip(f"{package} is not installed", allow_module_level=True)


def spec_of(N: int, K: int, scheme: QuantScheme, dtype: torch.dtype = torch.float32) -> LinearSpec:
    return LinearSpec(N, K, scheme, CPU, dtype)


class Dense:
    """A weight that is not quantized yet: a `kernels.WeightSource`."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def stored(self) -> Mapping[str, Tensor]:
        return {"weight": self.weight}

    scale_dtype = torch.bfloat16

    def whole(self) -> Any:
        raise AssertionError("not in the project's format")

    def side_tensors(self) -> Any:
        raise AssertionError("not in the project's format")

    def location(self) -> None:
        return None


class Stored(Dense):
    """A weight as a checkpoint holds it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def stored(self) -> Mapping[str, Tensor]:
        return self.tensors


def dense_weight(N: int, K: int, seed: int = 0) -> Tensor:
    """bf16 with rows of very different size and a few large values, as language models have them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator) * 10 ** (torch.rand(N, 1, generator=generator) * 2 - 2)
    weight[:, torch.randperm(K, generator=generator)[: max(1, K // 50)]] *= 8
    return weight.to(torch.bfloat16)


def saved_parts(weight: Tensor, kind: Kind, *, nested: bool = False) -> dict[str, Tensor]:
    """What bitsandbytes' own functions write of a weight [N, K] into a state dict, by suffix."""
    functional = _library().functional
    if kind == "llm_int8":
        values, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return {"weight": values, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    values, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
    return {"weight": values, **{f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}}


def write_bitsandbytes(folder: Path, kind: Kind, *, nested: bool = False, **settings: Any) -> Path:
    """A checkpoint of the `glm` layout whose layers' linears are stored as bitsandbytes has them."""
    write_checkpoint(folder, dtype=torch.bfloat16, **DIVISIBLE)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if re.fullmatch(r"model\.layers\..*_proj\.weight", name):
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{part}": t for part, t in saved_parts(tensor, kind, nested=nested).items()}
        else:
            tensors[name] = tensor
    write_shards(folder, tensors)
    config: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": kind != "llm_int8",
        "load_in_8bit": kind == "llm_int8",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kind if kind != "llm_int8" else "fp4",
        "bnb_4bit_use_double_quant": nested,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
    }
    edit_json(folder / "config.json", quantization_config={**config, **settings})
    return folder


def encode_facts(**facts: Any) -> Tensor:
    """A `quant_state` tensor."""
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
