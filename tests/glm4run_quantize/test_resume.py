"""A run that is killed goes on where it was, to the same bytes as one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4run_quantize import job, quantize_checkpoint
from glm4run_quantize.journal import JOURNAL, Journal, belongs_to
from glm4run_quantize.writer import FolderWriter, TensorSpec, replacing_folder
from tests.builders import write_checkpoint

REPO = Path(__file__).resolve().parents[2]
TEXT = "hello the 你好 in the hell, on the tin. " * 1500
STRUCK = """
import json, os, signal, sys
from glm4run_quantize import job, quantize_checkpoint

source, target, strike_at, options = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
job.COMMIT_BYTES = job.BLOCK_BYTES = 20_000
job.default_threads = lambda: 2
add, calls = job.FolderWriter.add, 0

def strike(self, name, tensor):
    global calls
    add(self, name, tensor)
    calls += 1
    if calls == strike_at:
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

job.FolderWriter.add = strike
quantize_checkpoint(source, target, **options)
"""


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run(source: Path, target: Path, strike_at: int, options: dict[str, Any]) -> int:
    environment = os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'quantize'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STRUCK, str(source), str(target), str(strike_at), json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return write_checkpoint(tmp_path / "source", "glm4", dtype=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_killed_and_started_again_gives_the_same_bytes(tmp_path: Path, source: Path, method: str) -> None:
    options: dict[str, Any] = {"method": method, "group_size": 32}
    if method == "gptq":
        options |= {"calibration": str(tmp_path / "text.txt"), "calibration_tokens": 2048}
    assert run(source, tmp_path / "whole", 0, options) == 0
    expected = snapshot(tmp_path / "whole")
    kills = 0
    for strike_at in (45, 25, 3):  # writes after which each attempt dies, unless it is done before
        kills += run(source, tmp_path / "packed", strike_at, options) != 0
    assert kills >= 2
    left = list(tmp_path.glob(".packed.partial-*"))
    assert len(left) == 1
    assert len(Journal(left[0], _fingerprint(left[0])).entries) >= 1  # it did not begin anew each time
    assert run(source, tmp_path / "packed", 0, options) == 0
    assert snapshot(tmp_path / "packed") == expected
    assert not list(tmp_path.glob(".packed*"))


def _fingerprint(folder: Path) -> str:
    found: str = json.loads((folder / JOURNAL).read_text().splitlines()[0])["fingerprint"]
    return found


def test_other_options_begin_anew(tmp_path: Path, source: Path) -> None:
    assert run(source, tmp_path / "packed", 40, {"group_size": 32}) == -signal.SIGKILL
    quantize_checkpoint(source, tmp_path / "packed", bits=8)
    quantize_checkpoint(source, tmp_path / "fresh", bits=8)
    assert snapshot(tmp_path / "packed") == snapshot(tmp_path / "fresh")
    assert not list(tmp_path.glob(".packed*"))


def test_changed_source_begins_anew(tmp_path: Path, source: Path) -> None:
    assert run(source, tmp_path / "packed", 40, {}) == -signal.SIGKILL
    os.utime(source / "model.safetensors", (time.time() + 5, time.time() + 5))
    quantize_checkpoint(source, tmp_path / "packed")
    quantize_checkpoint(source, tmp_path / "fresh")
    assert snapshot(tmp_path / "packed") == snapshot(tmp_path / "fresh")


def test_interrupted_by_the_user_goes_on_too(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "COMMIT_BYTES", 1)
    add, calls = FolderWriter.add, 0

    def interrupt(self: FolderWriter, name: str, tensor: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        add(self, name, tensor)

    monkeypatch.setattr(FolderWriter, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    first = calls
    quantize_checkpoint(source, tmp_path / "packed")
    total = calls - first
    quantize_checkpoint(source, tmp_path / "fresh")
    assert total < calls - first - total - 10  # it did not write again what was there
    assert snapshot(tmp_path / "packed") == snapshot(tmp_path / "fresh")


# --- the parts


SPECS = [TensorSpec(name, "U8", (size,)) for name, size in (("a", 5), ("b", 7), ("c", 3), ("d", 9))]


@pytest.mark.parametrize("limit", [10, 15, 1000])  # bytes of a shard
@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_writer_goes_on_behind_any_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int, limit: int
) -> None:
    monkeypatch.setattr("glm4run_quantize.writer.MAX_SHARD_BYTES", limit)
    data = {spec.name: torch.arange(spec.shape[0], dtype=torch.uint8) + 10 for spec in SPECS}
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    with FolderWriter(tmp_path / "whole", SPECS, {}) as writer:
        for spec in SPECS:
            writer.add(spec.name, data[spec.name])
    with pytest.raises(RuntimeError), FolderWriter(tmp_path / "cut", SPECS, {}) as writer:
        for spec in SPECS[:done]:
            writer.add(spec.name, data[spec.name])
        if done < len(SPECS):
            writer.add(SPECS[done].name, data[SPECS[done].name][:2])  # half a tensor, to be written again
        writer.commit()
        raise RuntimeError
    with FolderWriter(tmp_path / "cut", SPECS, {}, done) as writer:
        for spec in SPECS[done:]:
            writer.add(spec.name, data[spec.name])
    assert snapshot(tmp_path / "cut") == snapshot(tmp_path / "whole")


@pytest.mark.parametrize("damage", ['{"specs": 3', '{"specs": 3}', "\x00\x00\n", "[]\n"])
def test_journal_with_a_torn_end_keeps_what_is_whole(tmp_path: Path, damage: str) -> None:
    Journal(tmp_path, "x").append({"specs": 1})
    with (tmp_path / JOURNAL).open("a") as file:
        file.write(damage)
    again = Journal(tmp_path, "x")
    assert again.entries == [{"specs": 1}]
    again.append({"specs": 2})
    assert Journal(tmp_path, "x").entries == [{"specs": 1}, {"specs": 2}]


def test_journal_of_another_run_is_dropped(tmp_path: Path) -> None:
    Journal(tmp_path, "x").append({"specs": 1})
    assert belongs_to(tmp_path, "x") and not belongs_to(tmp_path, "y")
    assert Journal(tmp_path, "y").entries == []


def test_state_is_kept_per_layer_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "target", overwrite=False, fingerprint="x") as working:
        journal = Journal(working, "x")
        for number in random.Random(0).sample(range(5), 5):
            journal.save_state(number, {"x": torch.full((2,), float(number))})
        journal.drop_state(0)
        assert journal.load_state(3)["x"].tolist() == [3.0, 3.0]
        (working / "file").write_text("x")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["file"]
