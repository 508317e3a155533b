"""Every tensor of every published layout is accounted for, and nothing that is wrong with one goes unnoticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4run.checkpoint.layouts import expected_tensors, linear_shapes, locate, parameter_shapes, quantized_linears
from glm4run.checkpoint.safetensors_index import TensorEntry
from glm4run.config import ModelConfig, parse_config
from glm4run.model import Glm4Model
from tests.builders import LAYOUTS, Layout, hf_weights, in_layout, raw_config

# config file, shapes file, tensors, parameters (with the rotary buffer where the layout stores it)
PUBLISHED = {
    "base": ("glm-4-9b.config.reconstructed", "glm-4-9b_and_chat.remote-code", 284, 9_399_951_392),
    "chat": ("glm-4-9b-chat.config", "glm-4-9b_and_chat.remote-code", 284, 9_399_951_392),
    "chat-1m": ("glm-4-9b-chat-1m.config", "glm-4-9b-chat-1m.remote-code", 284, 9_483_857_952),
    "chat-hf": ("glm-4-9b-chat-hf.config", "glm-4-9b-chat-hf", 443, 9_399_951_360),
    "chat-1m-hf": ("glm-4-9b-chat-1m-hf.config", "glm-4-9b-chat-1m-hf", 443, 9_483_857_920),
    "0414": ("GLM-4-9B-0414.config", "GLM-4-9B-0414_GLM-Z1-9B-0414", 523, 9_400_279_040),
}


def entries_of(shapes: dict[str, Any], dtype: str = "BF16") -> dict[str, TensorEntry]:
    """What a scan of a folder with these tensors would give."""
    width = {"BF16": 2, "F32": 4, "I32": 4, "I64": 8}[dtype]
    found = {}
    for name, shape in shapes.items():
        nbytes = width * int(torch.Size(shape).numel())
        found[name] = TensorEntry(name, Path("model.safetensors"), dtype, tuple(shape), 0, nbytes)
    return found


def tiny_entries(layout: Layout) -> tuple[ModelConfig, dict[str, TensorEntry]]:
    raw = raw_config(layout)
    return parse_config(raw), entries_of({n: t.shape for n, t in in_layout(hf_weights(raw), layout).items()})


@pytest.mark.parametrize("member", PUBLISHED)
def test_published_checkpoint_is_accounted_for(shared: Path, member: str) -> None:
    config_name, shapes_name, count, parameters = PUBLISHED[member]
    config = read_config_file(shared / "data" / "configs" / f"{config_name}.json")
    stored = json.loads((shared / "data" / "layouts" / f"{shapes_name}.shapes.json").read_text())
    entries = entries_of(stored["tensors"])
    assert len(entries) == count == stored["n_tensors"]
    assert sum(torch.Size(e.shape).numel() for e in entries.values()) == parameters == stored["params"]
    sources, problems = locate(config, entries)
    assert problems == []
    assert {name: source.shape for name, source in sources.items()} == parameter_shapes(config)
    buffers = sum(torch.Size(e.shape).numel() for name, e in entries.items() if name.endswith("inv_freq"))
    assert config.num_parameters == parameters - buffers
    # Every stored row belongs to exactly one parameter: the bytes add up.
    assert sum(source.nbytes for source in sources.values()) == stored["total_size_bytes"] - 2 * buffers


@pytest.mark.parametrize("member", PUBLISHED)
def test_modules_have_exactly_these_parameters(shared: Path, member: str) -> None:
    config = read_config_file(shared / "data" / "configs" / f"{PUBLISHED[member][0]}.json")
    with torch.device("meta"):
        model = Glm4Model(config)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == parameter_shapes(config)
    linears = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linears == linear_shapes(config)


def read_config_file(path: Path) -> ModelConfig:
    return parse_config(json.loads(path.read_text()), where=path.name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_every_parameter(layout: Layout) -> None:
    config, entries = tiny_entries(layout)
    sources, problems = locate(config, entries)
    assert problems == []
    assert {name: source.shape for name, source in sources.items()} == parameter_shapes(config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_missing_tensor_is_named(layout: Layout) -> None:
    config, entries = tiny_entries(layout)
    for name in entries:
        if name.endswith("inv_freq"):
            continue
        _, problems = locate(config, {key: entry for key, entry in entries.items() if key != name})
        assert [p.what for p in problems] == ["missing"] * (3 if "qkv" in name or "query_key_value" in name else 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_wrong_shape_is_named(layout: Layout) -> None:
    config, entries = tiny_entries(layout)
    for name, entry in entries.items():
        if name.endswith("inv_freq"):
            continue
        wrong = TensorEntry(name, entry.file, entry.dtype, (entry.shape[0] + 1, *entry.shape[1:]), 0, 4)
        _, problems = locate(config, entries | {name: wrong})
        assert problems and all("config.json says" in p.what and p.file == entry.file.name for p in problems), name


def test_unexpected_tensors_are_named_but_rotary_buffers_are_not() -> None:
    config, entries = tiny_entries("glm")
    more = entries_of(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,), "model.layers.2.mlp.down_proj.weight": (1,)}
    )
    _, problems = locate(config, entries | more)
    assert [(p.tensor, p.what) for p in problems] == [("model.layers.2.mlp.down_proj.weight", "not part of this model")]


def test_the_same_tensor_under_two_names_is_named() -> None:
    config, entries = tiny_entries("glm")
    twice = entries_of({"transformer.output_layer.weight": (320, 128)})
    _, problems = locate(config, entries | twice)
    assert [(p.tensor, p.what) for p in problems] == [("transformer.output_layer.weight", "not part of this model")]


def test_integer_weights_are_no_weights() -> None:
    config, entries = tiny_entries("glm")
    _, problems = locate(config, entries | entries_of({"model.norm.weight": (128,)}, "I32"))
    assert [(p.tensor, p.what) for p in problems] == [("model.norm.weight", "dtype I32, expected BF16 or F16 or F32")]


@pytest.mark.parametrize(("layout", "model_type"), [("glm4", "glm"), ("glm", "glm4")])
def test_second_norms_and_model_type_must_agree(layout: Layout, model_type: str) -> None:
    _, entries = tiny_entries(layout)
    config = parse_config(raw_config(layout) | {"model_type": model_type})
    _, problems = locate(config, entries)
    assert "second norms" in problems[0].what
    assert problems[0].hint


def quantized_config(group_size: int, *targets: str) -> ModelConfig:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    groups = {"group_0": {"targets": list(targets), "weights": weights}}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    return parse_config(raw_config() | {"quantization_config": quantization | {"ignore": ["lm_head"]}})


def test_packed_linears_are_expected_as_their_parts() -> None:
    config = quantized_config(32, r"re:.*mlp\.down_proj$")
    assert list(quantized_linears(config)) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    expected = expected_tensors(config)
    module = "model.layers.0.mlp.down_proj"
    assert f"{module}.weight" not in expected
    assert expected[f"{module}.weight_packed"] == ((128, 20), ("I32",))
    assert expected[f"{module}.weight_scale"] == ((128, 5), ("BF16", "F16", "F32"))
    assert expected[f"{module}.weight_shape"] == ((2,), ("I64",))
    assert expected["lm_head.weight"][0] == (320, 128)


def test_group_size_that_does_not_divide_is_said_in_words() -> None:
    config = quantized_config(64, "Linear")
    _, problems = locate(config, {})
    found = [p for p in problems if "group size" in p.what]
    assert [p.tensor for p in found] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert found[0].what == "group size 64 does not divide its 160 input features"
    assert found[0].hint == "these do: 32"


def test_tied_embeddings_need_no_head() -> None:
    config = parse_config(raw_config() | {"tie_word_embeddings": True})
    assert "lm_head.weight" not in parameter_shapes(config)
