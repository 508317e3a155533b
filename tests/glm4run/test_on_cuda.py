"""Whole models on a GPU against the reference on the CPU. All of it needs a GPU."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glm4run import LoadedModel, SamplingParams, load_model
from glm4run.cards import demo_folder
from glm4run.chat_format import Message
from glm4run.cli import main
from glm4run.errors import GenerationError
from glm4run.evaluation import evaluate
from glm4run.kv_files import load_piece, write_piece
from glm4run.sampling import Sampler
from glm4run.text_windows import Cut, read_text
from tests.builders import write_checkpoint, write_packed
from tests.conftest import REPO

pytestmark = pytest.mark.gpu

KEPT = ["16", "8", "4", "8:4", "4:16"]
GREEDY = SamplingParams(temperature=0, max_new_tokens=60)
QUESTION = [Message("user", "How do I quantize a model to 4 bits?")]


@pytest.fixture(scope="module")
def ids() -> list[int]:
    model = load_model(demo_folder(), device="cpu")
    return model.tokenizer.encode(" ".join(read_text(REPO / "README.md").content.split()))[:300]


@pytest.fixture(scope="module")
def expected(ids: list[int]) -> Tensor:
    """Of the demo in float32 by the reference kernels on the CPU."""
    return load_model(demo_folder(), device="cpu", backend="reference", dtype="fp32").logits(ids)


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean KL divergence in nats."""
    wanted, got = expected.double().log_softmax(-1), found.double().cpu().log_softmax(-1)
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


def step_by_step(model: LoadedModel, ids: list[int], read: int) -> Tensor:
    """The logits of all but the first `read` ids, which are fed at once; the others one by one."""
    context = model.new_context()
    rows = []
    with torch.inference_mode():
        model.model(model.tensor(ids[:read]), context.cache)
        for token in ids[read:]:
            rows.append(model.model(model.tensor([token]), context.cache))
    return torch.cat(rows)


@pytest.mark.parametrize("backend", ["auto", "triton", "torch", "reference"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_logits_are_those_of_the_reference(backend: str, dtype: str, ids: list[int], expected: Tensor) -> None:
    model = load_model(demo_folder(), device="cuda", backend=backend, dtype=dtype)
    limit = {"bf16": 2e-3, "fp16": 1e-4, "fp32": 1e-6}[dtype]
    assert divergence(expected, model.logits(ids)) < limit
    if backend == "auto":
        assert model.backend == "triton"
        assert model.model.whole is not None


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_decoding_is_that_of_the_reference(kept: str, dtype: str, ids: list[int], expected: Tensor) -> None:
    model = load_model(demo_folder(), device="cuda", dtype=dtype, kv_bits=kept)
    found = step_by_step(model, ids, 150)
    limit = 2e-3 if "4" not in kept.split(":") else 0.1  # heads of this little model have 32 values
    assert divergence(expected[150:], found) < limit
    model.model.whole = None
    eager = step_by_step(model, ids, 150)
    exact = {"bf16": 2e-3, "fp16": 1e-4, "fp32": 1e-5}[dtype]
    # Where rows are quantized the last bit of a sum decides how a value is rounded.
    assert divergence(eager.cpu(), found) < (exact if kept == "16" else 2e-3)


@pytest.mark.parametrize("layout", ["glm", "glm4"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_random_models_of_every_kind(layout: str, dtype: str, tmp_path: Path) -> None:
    """Biases, sandwich norms, dense and packed in both widths."""
    tokens = [5, 77, 120, 3, 200, 41, 9, 9, 260, 18, 130, 6, 7, 301, 44, 250, 91, 17, 66, 2]
    folders = {"dense": write_checkpoint(tmp_path / "dense", layout)}  # type: ignore[arg-type]
    for bits in (4, 8):
        folders[str(bits)] = write_packed(tmp_path / str(bits), layout, bits=bits, group_size=32)  # type: ignore[arg-type]
    for name, folder in folders.items():
        wanted = load_model(folder, device="cpu", backend="auto" if name == "dense" else "reference", dtype="fp32")
        model = load_model(folder, device="cuda", dtype=dtype)
        limit = {"bf16": 3e-3, "fp16": 3e-4, "fp32": 1e-6}[dtype]
        logits = wanted.logits(tokens)
        assert divergence(logits, model.logits(tokens)) < limit, name
        assert divergence(logits[8:], step_by_step(model, tokens, 8)) < limit, name


def test_one_graph_serves_every_position_and_each_cache_has_its_own(ids: list[int]) -> None:
    model = load_model(demo_folder(), device="cuda")
    alone = [step_by_step(model, ids[start : start + 90], 30) for start in (0, 100)]
    contexts = [model.new_context(), model.new_context()]
    rows: list[list[Tensor]] = [[], []]
    with torch.inference_mode():
        for context, start in zip(contexts, (0, 100), strict=True):
            model.model(model.tensor(ids[start : start + 30]), context.cache)
        for offset in range(30, 90):
            for context, start, found in zip(contexts, (0, 100), rows, strict=True):
                found.append(model.model(model.tensor([ids[start + offset]]), context.cache))
    assert all(torch.equal(torch.cat(found), wanted) for found, wanted in zip(rows, alone, strict=True))
    with torch.inference_mode():  # what was taken back is computed anew, to the same bits
        contexts[0].cache.truncate(40)
        again = torch.cat([model.model(model.tensor([token]), contexts[0].cache) for token in ids[40:90]])
    assert torch.equal(again, alone[0][10:])


@pytest.mark.parametrize("kept", ["16", "8:4"])
def test_a_prompt_by_graphs_is_the_prompt_by_modules(
    kept: str, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glm4run.memory.plan.LARGER_CHUNKS", (64,))
    monkeypatch.setattr("glm4run.cuda_graphs.LARGER_CHUNKS", (64,))
    model = load_model(demo_folder(), device="cuda", kv_bits=kept)
    assert model.plan.chunk == 64 and model.model.whole is not None
    found = []
    for _ in range(2):
        context = model.new_context()
        model.prefill(ids, context)  # four chunks and a rest
        with torch.inference_mode():
            found.append(model.model(model.tensor([ids[5]]), context.cache))
        model.model.whole = None
    assert divergence(found[1].cpu(), found[0]) < 2e-3


def test_graphs_go_with_their_caches(ids: list[int]) -> None:
    """Also the last of them, with which their common memory goes; the next cache's graph finds new memory."""
    model = load_model(demo_folder(), device="cuda")
    used = []
    for _ in range(5):
        step_by_step(model, ids[:40], 30)
        gc.collect()
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] <= used[0] + (1 << 20)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_demo_answers_as_on_the_cpu(backend: str) -> None:
    model = load_model(demo_folder(), device="cuda", backend=backend)
    text = "".join(step.text for step in model.stream(QUESTION, GREEDY))
    assert "--bits 4" in text
    sampled = [
        "".join(step.text for step in model.stream(QUESTION, SamplingParams(seed=5, temperature=0.9, top_p=0.8)))
        for _ in range(2)
    ]
    assert sampled[0] == sampled[1]


@pytest.mark.parametrize("kept", ["16", "8", "4"])
def test_a_copied_and_a_saved_cache_go_on_where_it_was(kept: str, ids: list[int], tmp_path: Path) -> None:
    model = load_model(demo_folder(), device="cuda", kv_bits=kept)
    contexts = [model.new_context() for _ in range(3)]
    first, copied, loaded = (context.cache for context in contexts)
    with torch.inference_mode():
        model.model(model.tensor(ids[:64]), first)
        copied.copy_from(first, 64)
        piece = write_piece(tmp_path / "piece.safetensors", first, ids[:64], 0, "", {})
        load_piece(piece, loaded, 0, 64)
        rows = [model.model(model.tensor([ids[64]]), cache) for cache in (first, copied, loaded)]
    assert torch.equal(rows[1], rows[0])
    assert torch.equal(rows[2], rows[0])


def test_perplexity_is_that_of_the_cpu() -> None:
    text, cut = read_text(REPO / "README.md"), Cut(context=256)
    found = [evaluate(load_model(demo_folder(), device=device), text, cut) for device in ("cpu", "cuda")]
    cpu, cuda = (evaluation.summary.perplexity.value for evaluation in found)
    assert cuda == pytest.approx(cpu, rel=0.01)


def test_a_context_that_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "hello", "-m", "demo", "--device", "cuda", "--ctx", "1m"])
    assert ended.value.code == 2
    assert "hint:" in capsys.readouterr().err


def test_bench_compares_with_the_cards_own_memory(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "demo", "--device", "cuda", "--prompt", "64", "--generate", "8", "--json"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert result["machine"] == torch.cuda.get_device_name()
    assert result["read_bandwidth_gb_per_s"] > 100
    assert all(row["fraction_of_bandwidth"] is not None for row in result["rows"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sampling_refuses_what_is_not_finite(value: float) -> None:
    logits = torch.zeros(1000, device="cuda")
    logits[77] = value
    with pytest.raises(GenerationError, match="not finite"):
        Sampler(GREEDY, torch.ones(1000, dtype=torch.bool)).sample(logits, [])
