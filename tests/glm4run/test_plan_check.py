"""`--check-plan`, and the measured peak of real runs on the CPU, each in a process of its own."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4run import load_model
from glm4run.cards import demo_folder
from glm4run.memory import MIB, peak_resident_bytes
from glm4run.plan_check import PlanCheck, check_plan
from tests.builders import write_checkpoint

REPO = Path(__file__).resolve().parents[2]
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")


def glm4run(*words: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'quantize'}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    command = [sys.executable, "-m", "glm4run", *map(str, words)]
    return subprocess.run(
        command, env=environment, input=stdin, capture_output=True, text=True, timeout=120, check=True
    )


def error_of(text: str) -> float:
    """The error in percent that a run printed."""
    match = re.search(r"at the peak \d+\.\d+ GiB \(([+-]\d+\.\d)%\)", text)
    assert match is not None, text
    return float(match[1])


@linux
@pytest.mark.parametrize("words", [60, 1200])
def test_demo_takes_what_was_planned(words: int) -> None:
    """Within a few percent on any machine; docs/vram.md has the figures of one, for larger models."""
    prompt = " ".join(["memory"] * words)
    done = glm4run(
        "generate", prompt, "-m", "demo", "--ctx", "2k", "--max-tokens", "4", "--temperature", "0", "--check-plan"
    )
    # 250 MB of these 300 are the interpreter and its libraries, whose share another machine sees differently.
    assert -10 < error_of(done.stderr) < 8


@linux
def test_dense_model_of_a_hundred_megabytes(tmp_path: Path) -> None:
    """Weights that are converted while they are loaded: bf16 in the file, float32 in memory."""
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 128}
    folder = write_checkpoint(tmp_path / "dense", dtype=torch.bfloat16, dialect="chat-2024", **sizes)
    done = glm4run("generate", "hello " * 40, "-m", folder, "--dtype", "fp32", "--max-tokens", "4", "--check-plan")
    assert -10 < error_of(done.stderr) < 4


def test_chat_says_it_too() -> None:
    done = glm4run("chat", "demo", "--max-tokens", "4", "--check-plan", stdin="hello\n/exit\n")
    assert "of which the tokens of this run need" in done.stderr


def test_fewer_tokens_need_less_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(demo_folder())
    run, plan, cpu = model.memory_run, model.plan, torch.device("cpu")
    few, all_ = (check_plan(run, plan, cpu, n) for n in (10, plan.context_len))
    assert few.expected_bytes < all_.expected_bytes == all_.planned_bytes == plan.peak_bytes
    assert few.peak_bytes <= peak_resident_bytes()
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 * MIB)
    cuda_run = dataclasses.replace(run, compute=dataclasses.replace(run.compute, device="cuda"))
    on_gpu = check_plan(cuda_run, plan, torch.device("cuda"), 10)
    assert on_gpu.peak_bytes == 7 * MIB
    assert on_gpu.expected_bytes > plan.bytes_of("kv_cache")  # the whole cache is there from the start


def test_error_is_signed() -> None:
    assert PlanCheck(200, 100, 103, "resident").error == pytest.approx(0.03)
    assert "(-3.0%)" in PlanCheck(200, 100, 97, "resident").describe()
