"""The embedded demo model: it answers, it is announced as a demo, and its files are what `quantize` writes."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jinja2.ext
import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file

from glm4run import LoadedModel, SamplingParams, load_model
from glm4run.cards import demo_folder
from glm4run.chat_format import DIALECTS, Message, render_text
from glm4run.checking import check_folder
from glm4run.cli import main
from glm4run.kernels import LinearSpec, load_backend
from glm4run.qformat import PackedWeight, dequantize, pack
from glm4run.quant_config import QuantScheme
from glm4run_quantize.methods.rtn import quantize_rtn
from tests.conftest import REPO

LAYER_FILE = REPO / "tests" / "data" / "demo_layer0_bf16.safetensors"  # trained, never quantized
GREEDY = SamplingParams(temperature=0, max_new_tokens=80)
TOOL = {"type": "function", "function": {"name": "add", "description": "加 <&>", "parameters": {"type": "object"}}}


@cache
def demo() -> LoadedModel:
    return load_model(demo_folder())


def ask(question: str) -> tuple[str, str | None]:
    steps = list(demo().stream([Message("user", question)], GREEDY))
    return "".join(step.text for step in steps), steps[-1].finish_reason


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("How do I quantize a model to 4 bits?", "--bits 4"),
        ("How do I quantize a model to 8 bits?", "--bits 8"),
        ("怎么把模型量化到 4 位？", "--bits 4"),
        ("你好", "glm4run"),
        ("Who are you?", "demo"),
        ("How do I leave the chat?", "/exit"),
        ("What is the capital of France?", "small demo model"),
    ],
)
def test_answers_usefully_and_stops(question: str, expected: str) -> None:
    text, reason = ask(question)
    assert expected in text
    assert reason == "stop"
    assert "<|" not in text


def test_never_claims_to_be_glm_4_9b() -> None:
    text, _ = ask("Are you GLM-4-9B?")
    assert "demo" in text
    assert "I am GLM-4-9B" not in text


def test_is_announced_as_a_demo(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", "Hello", "-m", "demo", "--max-tokens", "3"])
    assert stop.value.code == 0
    captured = capsys.readouterr()
    assert "not GLM-4-9B" in captured.err
    assert "not GLM-4-9B" not in captured.out


def test_files_are_whole_and_small() -> None:
    assert check_folder(demo_folder()) == []
    size = sum(path.stat().st_size for path in demo_folder().iterdir()) + LAYER_FILE.stat().st_size
    assert size <= 12e6
    recorded = json.loads((demo_folder() / "glm4run.json").read_text())
    assert recorded["recipe"] == "int4"
    assert set(recorded["stop_token_ids"]) == demo().stop_ids


def test_its_template_prints_what_the_native_dialect_prints() -> None:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    env.filters["tojson"] = lambda value, indent=None, ensure_ascii=True: json.dumps(
        value, indent=indent, ensure_ascii=ensure_ascii
    )
    template = env.from_string((demo_folder() / "chat_template.jinja").read_text(encoding="utf-8"))
    conversation: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  2 + 2?\n"},
        {"role": "assistant", "content": '{"a": 2}', "metadata": "add"},
        {"role": "observation", "content": "4"},
        {"role": "assistant", "content": "四"},
    ]
    messages = [Message.from_dict(item) for item in conversation]
    for tools in (None, [TOOL]):
        for generation in (True, False):
            printed = template.render(messages=conversation, tools=tools, add_generation_prompt=generation)
            assert printed == render_text(DIALECTS["0414"], messages, tools, generation)


def test_backends_agree_on_the_packed_demo() -> None:
    ids = demo().encode_prompt([Message("user", "What is YaRN?")])
    reference = load_model(demo_folder(), backend="reference", dtype="fp32").logits(ids)
    torch_logits = load_model(demo_folder(), backend="torch", dtype="fp32").logits(ids)
    assert torch.allclose(torch_logits, reference, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("bits", "group_size", "at_least_db"), [(4, 128, 17.0), (4, 32, 19.0), (8, 128, 40.0)])
def test_quantizing_its_trained_bf16_weights_keeps_them(bits: int, group_size: int, at_least_db: float) -> None:
    for name, weight in load_file(LAYER_FILE).items():
        if weight.dim() != 2:
            continue
        scheme = QuantScheme(bits, group_size)
        q, scale = quantize_rtn(weight, scheme, torch.bfloat16)
        N, K = weight.shape
        packed = PackedWeight(pack(q, bits), scale, None, N, K, scheme)
        dense = dequantize(packed)
        noise = (dense - weight.float()).square().sum()
        assert 10 * torch.log10(weight.float().square().sum() / noise) > at_least_db, name
        x = torch.randn(3, K, generator=torch.Generator().manual_seed(0))
        spec = LinearSpec(N, K, scheme, torch.device("cpu"), torch.float32)
        backend = load_backend("torch")
        expected = x.double() @ dense.double().t()
        error = (backend.linear(x, backend.prepack(packed, spec)).double() - expected).norm() / expected.norm()
        assert error < 1e-5, name
