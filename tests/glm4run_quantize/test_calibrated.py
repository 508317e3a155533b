"""Calibrated runs: folding changes nothing, each linear beats rounding on held-out text or is rounded, folders load."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glm4run import load_model
from glm4run.checkpoint.reader import CheckpointReader
from glm4run.config import parse_config
from glm4run.errors import BackendError, UsageError
from glm4run.tokenizer import load_tokenizer
from glm4run_quantize import importance, job, quantize_checkpoint
from glm4run_quantize.calibration import read_calibration
from glm4run_quantize.importance import head_moments
from glm4run_quantize.layerwise import Layerwise
from glm4run_quantize.methods import gptq
from glm4run_quantize.methods.mse import quantize_mse
from glm4run_quantize.recipes import choose_recipe
from glm4run_quantize.source_layers import SourceLayers
from tests.builders import PREFIX, Layout, write_checkpoint

TOKENS = 2048


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    words = ("hello", "the", "hell", "在", "你好", "on", "tin", "x", "42", "\n")
    picks = torch.randint(0, len(words), (4000,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words[i] for i in picks), encoding="utf-8")
    return path


def run_of(source: Path, text: Path, method: str) -> Layerwise:
    config = parse_config(json.loads((source / "config.json").read_text()))
    schemes = choose_recipe(config, 4, group_size=32)[0].schemes(config)
    calibration = read_calibration(load_tokenizer(source), text, TOKENS)
    reader = CheckpointReader(source, config)
    run = Layerwise(reader, config, schemes, method, calibration, torch.bfloat16, torch.device("cpu"))
    run.embed()
    return run


def test_windows_are_what_was_asked_for(tmp_path: Path, text: Path) -> None:
    tokenizer = load_tokenizer(write_checkpoint(tmp_path / "source"))
    calibration = read_calibration(tokenizer, text, 8 * 512)
    assert (tuple(calibration.ids.shape), calibration.held_out, calibration.tokens) == ((8, 512), 1, 7 * 512)
    assert calibration.ids[:, :2].tolist() == [list(PREFIX)] * 8
    assert len({tuple(window) for window in calibration.ids.tolist()}) == 8
    built_in = read_calibration(tokenizer, None, 1 << 20)  # more than there is: all of it
    assert built_in.name == "built-in calibration.txt"
    assert built_in.ids.shape[0] > 20


def test_calibration_texts_that_cannot_be_used(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_checkpoint(tmp_path / "source"))
    (tmp_path / "short.txt").write_text("hello")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 900)
    for name, message in (("short.txt", "calibration takes at least"), ("latin.txt", "not UTF-8"), ("no", "cannot")):
        with pytest.raises(UsageError, match=message):
            read_calibration(tokenizer, tmp_path / name, TOKENS)


@pytest.mark.parametrize("layout", ["glm4", "chatglm"])
def test_streams_are_those_of_the_model(tmp_path: Path, text: Path, layout: Layout) -> None:
    """With nothing packed, both streams are the model's own residuals."""
    source = write_checkpoint(tmp_path / "source", layout)
    run = run_of(source, text, "gptq")
    run.schemes = {}
    for index in range(2):
        run.run_layer(index, run.layers.reader.read)
    model = load_model(source, dtype="fp32").model
    with torch.inference_mode():
        expected = model.hidden_states(run.calibration.ids)
    for stream in (run.source, run.ours):
        assert torch.allclose(model.model.norm(stream), expected, atol=1e-3)
    assert torch.allclose(model.model.norm(run.rounded), expected[run.fitted :], atol=1e-3)


@pytest.mark.parametrize("layout", ["glm4", "chatglm"])
def test_folding_leaves_the_layer_as_it_was(tmp_path: Path, text: Path, layout: Layout) -> None:
    run = run_of(write_checkpoint(tmp_path / "source", layout), text, "awq")
    before = run.layers.layer(0)
    after = copy.deepcopy(before)
    with torch.no_grad():
        run._fold(0, after)
        assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
        one, two = (run.layers.forward(layer, run.source) for layer in (before, after))
    # The bias of v alone is rounded to the model's dtype; all else is made up for.
    assert float((one - two).norm() / one.norm()) < 2e-3


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_calibrated_beats_rounding_and_loads(tmp_path: Path, text: Path, method: str) -> None:
    source = write_checkpoint(tmp_path / "source", "glm4", dtype=torch.bfloat16)
    options: dict[str, Any] = {"calibration": text, "calibration_tokens": TOKENS, "group_size": 32}
    report = quantize_checkpoint(source, tmp_path / "packed", method=method, **options)
    assert report.held_out is not None
    assert report.held_out.kl_mean < 0.9 * report.held_out.kl_mean_rtn
    for tensor in report.tensors:
        if tensor.name != "lm_head":
            assert tensor.held_out_error is not None and tensor.held_out_error_rtn is not None
            assert tensor.held_out_error <= tensor.held_out_error_rtn
    record = json.loads((tmp_path / "packed" / "glm4run.json").read_text())
    assert record["method"] == method
    assert record["calibration"]["text"]["name"] == "text.txt"
    assert len(record["calibration"]["held_out"]["layers"]) == 2
    ids = load_model(source).tokenizer.encode(text.read_text())[:200]
    exact = load_model(source, dtype="fp32").logits(ids).log_softmax(-1)
    ours = load_model(tmp_path / "packed", dtype="fp32", backend="reference").logits(ids).log_softmax(-1)
    quantize_checkpoint(source, tmp_path / "rounded", group_size=32, method="rtn")
    rounded = load_model(tmp_path / "rounded", dtype="fp32", backend="reference").logits(ids).log_softmax(-1)

    def divergence(other: Tensor) -> float:
        return float((exact.exp() * (exact - other)).sum(-1).mean())

    assert divergence(ours) < divergence(rounded)
    assert sorted(load_file(tmp_path / "packed" / "model.safetensors")) == sorted(
        load_file(tmp_path / "rounded" / "model.safetensors")
    )


@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_inputs_of_the_head_are_measured_once(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Not for each of its blocks."""
    calls: list[Tensor] = []

    def counted(layers: SourceLayers, stream: Tensor) -> Tensor:
        calls.append(head_moments(layers, stream))
        return calls[-1]

    for module in (importance, job):
        monkeypatch.setattr(module, "head_moments", counted)
    monkeypatch.setattr(job, "BLOCK_BYTES", 4096)
    source = write_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    options: dict[str, Any] = {"calibration": text, "calibration_tokens": TOKENS} if method == "gptq" else {}
    quantize_checkpoint(source, tmp_path / "packed", method=method, **options)
    assert len(calls) == 1


def worse(weight: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """A method that is worse than rounding."""
    q, scale = quantize_mse(weight, rest[1], rest[2])
    return torch.zeros_like(q), scale


def test_linears_where_the_method_is_worse_are_rounded(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "quantize_gptq", worse)
    source = write_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    options: dict[str, Any] = {"calibration": text, "calibration_tokens": TOKENS, "group_size": 32}
    report = quantize_checkpoint(source, tmp_path / "packed", method="gptq", **options)
    assert {t.kept for t in report.tensors if t.name != "lm_head"} == {"rtn"}
    quantize_checkpoint(source, tmp_path / "rounded", group_size=32, method="rtn")
    packed, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "rounded"))
    for name in packed:
        if "layers" in name:
            assert torch.equal(packed[name], rounded[name]), name


def test_method_that_is_worse_overall_is_not_written(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Layerwise, "held_out_divergence", lambda self: (0.5, 0.4))
    source = write_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    options: dict[str, Any] = {"calibration": text, "calibration_tokens": TOKENS, "group_size": 32}
    report = quantize_checkpoint(source, tmp_path / "packed", method="awq", **options)
    assert report.method == "rtn"
    assert any("awq did worse than rounding to nearest" in notice for notice in report.notices)
    record = json.loads((tmp_path / "packed" / "glm4run.json").read_text())
    assert (record["method"], record["calibration"]["held_out"]["kl_mean"]) == ("rtn", 0.5)
    quantize_checkpoint(source, tmp_path / "rounded", group_size=32, method="rtn")
    packed, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "rounded"))
    assert all(torch.equal(packed[name], rounded[name]) for name in rounded)


@pytest.mark.parametrize("target", [4.9, 6.0, 7.5])
def test_targets_are_met(tmp_path: Path, text: Path, target: float) -> None:
    source = write_checkpoint(tmp_path / "source", "glm4", dtype=torch.bfloat16)
    options: dict[str, Any] = {"calibration": text, "calibration_tokens": TOKENS}
    report = quantize_checkpoint(source, tmp_path / "packed", target_bpw=target, head_bits=16, method="mse", **options)
    assert target - 0.8 < report.bits_per_weight <= target  # a tiny model has few linears to choose from
    ids = list(range(40))
    exact = load_model(source, dtype="fp32").logits(ids)
    ours = load_model(tmp_path / "packed", dtype="fp32", backend="reference").logits(ids)
    assert float((ours - exact).norm() / exact.norm()) < 0.5


def test_target_in_gib_is_the_size_of_the_file(tmp_path: Path, text: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "glm4", dtype=torch.bfloat16)
    options: dict[str, Any] = {"calibration": text, "calibration_tokens": TOKENS}
    size = 300_000
    quantize_checkpoint(source, tmp_path / "packed", target_gib=size / 2**30, **options)
    written = (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert size * 0.85 < written < size + 10_000  # the header
    with pytest.raises(UsageError, match="the target is below"):
        quantize_checkpoint(source, tmp_path / "small", target_gib=size / 2**31, **options)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("bits", [4, 8])
def test_backends_take_scales_of_either_sign(tmp_path: Path, bits: int, backend: str) -> None:
    source = write_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    quantize_checkpoint(source, tmp_path / "packed", method="mse", bits=bits, group_size=32)
    scales = [t for n, t in load_file(tmp_path / "packed" / "model.safetensors").items() if n.endswith("_scale")]
    assert any(bool((scale < 0).any()) for scale in scales)
    activations: Any = "bf16" if backend == "native" else "auto"
    ids = list(range(30))
    expected = load_model(tmp_path / "packed", dtype="fp32", backend="reference").logits(ids)
    try:
        model = load_model(tmp_path / "packed", dtype="fp32", backend=backend, activations=activations)
    except BackendError as error:
        pytest.skip(str(error))
    assert float((model.logits(ids) - expected).norm() / expected.norm()) < 2e-2


def test_options_that_exclude_each_other(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    for options in (
        {"group_size": 32, "recipe": "int4-g32"},
        {"target_bpw": 5.0, "target_gib": 1.0},
        {"calibration": tmp_path / "x"},
        {"calibration_tokens": 3},
    ):
        with pytest.raises(UsageError):
            quantize_checkpoint(source, tmp_path / "packed", **options)
