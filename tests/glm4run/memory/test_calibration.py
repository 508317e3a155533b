"""What was measured is kept, taken by plans, and never believed where its file is damaged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from glm4run.memory import MIB, Calibration, device_overhead, process_overhead, read_calibration
from glm4run.memory.calibration import FILE_VARIABLE, calibration_file, write_calibration

CPU = Calibration("CPU: some", "2026-01-02", "2.6.0", 200 * MIB, 10 * MIB, None, 40.0)
GPU = Calibration("NVIDIA Some 12GB", "2026-01-03", "2.6.0", 500 * MIB, 0, 90 * MIB)


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "deep" / "calibration.json"
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    return path


def test_devices_are_kept_side_by_side_and_measured_anew(file: Path) -> None:
    assert read_calibration(CPU.device) is None
    assert write_calibration(CPU) == write_calibration(GPU) == file
    assert (read_calibration(CPU.device), read_calibration(GPU.device)) == (CPU, GPU)
    again = dataclasses.replace(CPU, context_bytes=7)
    write_calibration(again)
    assert (read_calibration(CPU.device), read_calibration(GPU.device)) == (again, GPU)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"schema_version": 2, "devices": []}',
        '{"schema_version": 1, "devices": [{"device": "CPU: some"}]}',
    ],
)
def test_a_damaged_file_is_no_calibration_and_is_written_anew(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    assert read_calibration(CPU.device) is None
    write_calibration(CPU)
    assert read_calibration(CPU.device) == CPU


@pytest.mark.parametrize("change", [{"context_bytes": -1}, {"context_bytes": 1 << 50}, {"later_bytes": 1.5}], ids=str)
def test_senseless_sizes_are_not_believed(file: Path, change: dict[str, int]) -> None:
    write_calibration(CPU)
    data = json.loads(file.read_text())
    data["devices"][0] |= change
    file.write_text(json.dumps(data))
    assert read_calibration(CPU.device) is None


def test_file_lies_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(FILE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration_file() == tmp_path / "glm4run" / "calibration.json"


def test_overheads_take_it_and_say_when_it_was_measured() -> None:
    usual, here = process_overhead(None, 5 * MIB), process_overhead(None, 5 * MIB, CPU)
    assert here.bytes == 215 * MIB
    assert (usual.kind, here.kind) == ("modelled", "measured")
    assert "measured here on 2026-01-02" in here.formula
    held = process_overhead(300 * MIB, 5 * MIB, CPU)  # a process that runs knows better what it holds already
    assert (held.bytes, held.held_bytes) == (315 * MIB, 300 * MIB)
    gpu = device_overhead(calibration=GPU, is_open=True)
    assert (gpu.bytes, gpu.slack_bytes, gpu.kind) == (500 * MIB, 90 * MIB, "measured")
    assert 0 < gpu.held_bytes < gpu.bytes
    assert device_overhead(400 * MIB, calibration=GPU).bytes == 400 * MIB  # what the user says counts
