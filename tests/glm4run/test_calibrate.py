"""`vram --calibrate` on this machine's CPU, for real; on a GPU by what its child would say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glm4run import calibrate
from glm4run.errors import Glm4RunError
from glm4run.memory import MIB, read_calibration, tokenizer_bytes
from glm4run.memory.calibration import FILE_VARIABLE
from glm4run.vram.targets import resolve_target

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "calibration.json"))
    return tmp_path / "calibration.json"


@linux
def test_this_machine_s_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "CASES", (64,))
    said: list[str] = []
    real_child = calibrate._run_child
    monkeypatch.setattr(
        calibrate, "_run_child", lambda words: {"read_gb_per_s": 20.0} if words == ["bandwidth"] else real_child(words)
    )
    found = calibrate.calibrate("CPU: here", "cpu", said.append)
    assert read_calibration("CPU: here") == found
    assert 50 * MIB < found.context_bytes < 1 << 30  # an interpreter with torch
    assert 0 <= found.later_bytes < 200 * MIB
    assert (found.slack_bytes, found.read_gb_per_s) == (None, 20.0)
    assert len(said) == 2


def test_the_most_of_all_cases_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = iter(range(1, 4))

    def child(words: Any) -> dict[str, Any]:
        number = next(cases)
        return {"version": "x", "context_bytes": 100 * number, "later_bytes": 0, "slack_bytes": -50 + 20 * number}

    monkeypatch.setattr(calibrate, "_run_child", child)
    found = calibrate.calibrate("NVIDIA Some", "cuda", lambda text: None)
    assert (found.context_bytes, found.slack_bytes, found.read_gb_per_s) == (300, 10, None)


def test_a_case_that_fails_says_why_and_keeps_nothing(file: Path) -> None:
    with pytest.raises(Glm4RunError, match=r"a run of the demo model failed: .*tpu"):
        calibrate.calibrate("TPU", "tpu", lambda text: None)
    assert not file.exists()


def test_plans_of_this_machine_take_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = resolve_target("cpu").overhead(tokenizer_bytes(None, 1000), None)
    cases: dict[str, Any] = {"version": "x", "context_bytes": 111 * MIB, "later_bytes": 3 * MIB, "slack_bytes": 0}
    monkeypatch.setattr(calibrate, "_run_child", lambda words: {**cases, "read_gb_per_s": 30.0})
    from glm4run.memory import calibrated_cpu

    calibrate.calibrate(calibrated_cpu(), "cpu", lambda text: None)
    target = resolve_target("cpu")
    after = target.overhead(tokenizer_bytes(None, 1000), None)
    assert after.bytes == 114 * MIB + tokenizer_bytes(None, 1000)
    assert (before.kind, after.kind) == ("modelled", "measured")
    assert resolve_target("12GB").calibration is None
    assert json.loads(file.read_text())["devices"][0]["context_bytes"] == 111 * MIB
