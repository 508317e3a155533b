"""`check` finds what loading would trip over, and finds nothing in a good folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glm4run.checking import check_folder
from glm4run.checkpoint.safetensors_index import Problem
from tests.builders import LAYOUTS, Layout, edit_json, edit_tensors, write_checkpoint, write_packed


def only_problem(folder: Path) -> Problem:
    problems = check_folder(folder)
    assert len(problems) == 1, problems
    assert problems[0].hint
    return problems[0]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_good_folders_have_no_problems(tmp_path: Path, layout: Layout, shards: int) -> None:
    assert check_folder(write_checkpoint(tmp_path, layout, shards=shards, dtype=torch.bfloat16)) == []


@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"head_bits": 16}], ids=str)
def test_what_quantize_writes_has_no_problems(tmp_path: Path, options: dict[str, Any]) -> None:
    assert check_folder(write_packed(tmp_path / "packed", **options)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_scale_is_found(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    folder = write_packed(tmp_path / "packed", source={"dtype": dtype})
    name = "model.layers.1.mlp.down_proj.weight_scale"
    scale = load_file(folder / "model.safetensors")[name]
    assert scale.dtype == dtype
    scale[17, 3] = value
    edit_tensors(folder, {name: scale})
    problem = only_problem(folder)
    assert (problem.file, problem.tensor, problem.what) == ("model.safetensors", name, "holds NaN or infinity")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_a_bad_norm_or_bias_is_found(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path)
    vector = load_file(folder / "model.safetensors")[name]
    vector[3] = float("nan")
    edit_tensors(folder, {name: vector})
    assert only_problem(folder).tensor == name


def test_wrong_weight_shape_is_found(tmp_path: Path) -> None:
    folder = write_packed(tmp_path / "packed")
    edit_tensors(folder, {"lm_head.weight_shape": torch.tensor([320, 129])})
    problem = only_problem(folder)
    assert problem.what == "says [320, 129], config.json says [320, 128]"


def test_all_problems_are_listed_together(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    edit_tensors(folder, {"model.norm.weight": None, "lm_head.weight": torch.zeros(3, 128), "more": torch.zeros(1)})
    (folder / "tokenizer.model").write_text("damaged")
    (folder / "chat_template.jinja").write_text("unknown")
    tensors = {problem.tensor for problem in check_folder(folder) if problem.tensor}
    assert tensors == {"model.norm.weight", "lm_head.weight", "more"}
    assert {problem.file for problem in check_folder(folder)} >= {"tokenizer", "chat template"}


def test_tokenizer_of_another_model_is_found(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, vocab_size=288, eos_token_id=[1])
    problem = only_problem(folder)
    assert "the model has 288 rows" in problem.what


def test_missing_folder_and_config(tmp_path: Path) -> None:
    assert only_problem(tmp_path / "nowhere").what == "no such folder"
    folder = write_checkpoint(tmp_path / "model")
    (folder / "config.json").unlink()
    assert "no config.json" in only_problem(folder).what


def test_generation_config_and_provenance_that_are_no_json_are_found(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json" in only_problem(folder).what
    (folder / "generation_config.json").unlink()
    (folder / "glm4run.json").write_text("{")
    assert "glm4run.json" in only_problem(folder).what


def test_settings_that_loading_refuses_are_found(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    edit_json(folder / "config.json", num_attention_heads=3, head_dim=32)
    problems = check_folder(folder)
    assert "contradicts itself" in problems[0].what
