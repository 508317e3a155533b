"""What `quantize` writes is what transformers with compressed-tensors reads, to the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glm4run import load_model
from glm4run_quantize import quantize_checkpoint
from tests.builders import VOCAB, Layout, write_checkpoint

pytestmark = pytest.mark.transformers

RECIPES: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4},  # mixed groups, int8 head
    "int8": {"bits": 8},
    "int4-head16": {"bits": 4, "head_bits": 16},
    "int4-g32": {"bits": 4, "group_size": 32},
}


def transformers_logits(folder: Path, ids: list[int]) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def compare(folder: Path) -> None:
    ids = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    ours = load_model(folder, backend="reference", dtype="fp32").logits(ids)
    theirs = transformers_logits(folder, ids)
    assert float(theirs.std()) > 0.1  # not a comparison of zeros
    assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", ["glm", "glm4"])
def test_packed_folder_gives_the_same_logits_in_transformers(tmp_path: Path, layout: Layout, recipe: str) -> None:
    source = write_checkpoint(tmp_path / "source", layout)
    quantize_checkpoint(source, tmp_path / "packed", **RECIPES[recipe])
    compare(tmp_path / "packed")


@pytest.mark.parametrize("method", ["mse", "hqq", "awq", "gptq"])
def test_every_method_gives_the_same_logits_in_transformers(tmp_path: Path, method: str) -> None:
    """Scales of either sign, folded norms and biases, config groups by layer: all of it is plain to other readers."""
    source = write_checkpoint(tmp_path / "source", "glm4", dtype=torch.bfloat16)
    options: dict[str, Any] = {"method": method, "target_bpw": 5.5, "head_bits": 8, "calibration_tokens": 1024}
    report = quantize_checkpoint(source, tmp_path / "packed", **options)
    assert report.method == method
    assert len({(t.scheme.bits, t.scheme.group_size) for t in report.tensors}) > 2
    scales = [t for n, t in load_file(tmp_path / "packed" / "model.safetensors").items() if n.endswith("_scale")]
    assert any(bool((scale < 0).any()) for scale in scales)
    compare(tmp_path / "packed")


@pytest.mark.parametrize("layout", ["chatglm", "glm4"])
def test_bf16_source_has_bf16_scales_and_the_same_logits(tmp_path: Path, layout: Layout) -> None:
    source = write_checkpoint(tmp_path / "source", layout, dtype=torch.bfloat16)
    quantize_checkpoint(source, tmp_path / "packed")
    compare(tmp_path / "packed")


def test_sharded_source_in_the_original_layout(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "chatglm", shards=3, rope_theta=5e6)
    quantize_checkpoint(source, tmp_path / "packed")
    compare(tmp_path / "packed")


YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
ROPE_SPELLINGS: dict[str, dict[str, Any]] = {
    "yarn-type": {"rope_scaling": {"type": "yarn", **YARN}},
    "yarn-rope_type": {"rope_scaling": {"rope_type": "yarn", **YARN}},
    "yarn-nested": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4, **YARN}, "rope_theta": None},
    "nested": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "rope_theta": None},
}


@pytest.mark.parametrize("spelling", ROPE_SPELLINGS)
def test_every_spelling_of_rope_means_the_same_there(tmp_path: Path, spelling: str) -> None:
    source = write_checkpoint(tmp_path / "source", "glm4", max_position_embeddings=64, **ROPE_SPELLINGS[spelling])
    quantize_checkpoint(source, tmp_path / "packed")
    compare(tmp_path / "packed")


def test_tokenizer_of_the_packed_folder_gives_the_same_ids_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = write_checkpoint(tmp_path / "source", "chatglm")
    quantize_checkpoint(source, tmp_path / "packed")
    text = "hello the 你好, 12345!\n  indented"
    ours = load_model(tmp_path / "packed", backend="reference", dtype="fp32").tokenizer.encode(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "packed")
    assert theirs.encode(text, add_special_tokens=False) == ours
    assert theirs.decode(ours) == text
