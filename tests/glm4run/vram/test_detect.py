"""What the machine says of its GPUs: recorded answers of every source, and machines that have none."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from glm4run.memory import GIB, MIB
from glm4run.vram import detect
from glm4run.vram.detect import Found, detect_gpus, detect_ram
from glm4run.vram.targets import resolve_target

ONE = "0, NVIDIA GeForce RTX 4070, 12282, 9001\n"
TWO = ONE + "1, NVIDIA GeForce RTX 3090, 24576, 24200\n"
APPS = "4711, /usr/bin/python3, 2900\n815, /opt/game, 311\n"


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU of any kind, whatever the machine has."""
    monkeypatch.setattr(detect, "_load_nvml", lambda: None)
    monkeypatch.setattr(detect, "_output", lambda command: "")
    monkeypatch.setattr(detect, "DRM", tmp_path / "drm")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def nvidia_smi(monkeypatch: pytest.MonkeyPatch, gpus: str, apps: str = "") -> None:
    def output(command: Sequence[str]) -> str:
        assert command[0] == "nvidia-smi"
        return gpus if "--query-gpu" in command[1] else apps

    monkeypatch.setattr(detect, "_output", output)


def test_no_gpu_leaves_the_ram() -> None:
    assert detect_gpus() == []
    target = resolve_target("auto")
    ram = detect_ram()
    assert ram is not None
    assert (target.device, target.name) == ("cpu", ram.name)


def test_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(monkeypatch, ONE, APPS)
    (found,) = detect_gpus()
    assert (found.name, found.total_bytes, found.free_bytes) == ("NVIDIA GeForce RTX 4070", 12282 * MIB, 9001 * MIB)
    assert [(holder.name, holder.bytes // MIB) for holder in found.holders] == [("python3", 2900), ("game", 311)]
    target = resolve_target("auto")
    assert target.free_bytes == 9001 * MIB
    assert target.gpu is not None and target.gpu.name == "GeForce RTX 4070"


def test_two_gpus_take_the_freer_and_name_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(monkeypatch, TWO, APPS)
    target = resolve_target("auto")
    assert target.name == "NVIDIA GeForce RTX 3090"
    assert any("RTX 4070 (8.79 GiB free)" in note and "--gpus 2" in note for note in target.notes)
    assert all(found.holders == () for found in detect_gpus())  # of several GPUs the list does not say which


@pytest.mark.parametrize(
    ("visible", "names"),
    [("1", ["3090"]), ("1,0", ["3090", "4070"]), ("", []), ("-1", []), ("GPU-1", ["4070", "3090"])],
)
def test_visible_devices(monkeypatch: pytest.MonkeyPatch, visible: str, names: list[str]) -> None:
    nvidia_smi(monkeypatch, TWO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [found.name.split()[-1] for found in detect_gpus()] == names


@pytest.mark.parametrize("garbage", ["", "No devices were found\n", "0, x, [N/A], [N/A]\n", "a\nb,c\n"])
def test_answers_that_are_none(monkeypatch: pytest.MonkeyPatch, garbage: str) -> None:
    nvidia_smi(monkeypatch, garbage)
    assert detect_gpus() == []


def test_unknown_gpu_has_a_plan_and_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(monkeypatch, "0, NVIDIA Secret 9000, 20000, 19000\n")
    target = resolve_target("auto")
    assert target.gpu is None
    assert target.free_bytes == 19000 * MIB
    assert any("not in the catalogue" in note for note in target.notes)


class FakeNvml:
    """The management library's answers for one device and one process."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 1
        return 0

    def nvmlDeviceGetName(self, handle: Any, name: Any, size: int) -> int:
        name.value = b"NVIDIA A100-SXM4-80GB"
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.total, memory._obj.free, memory._obj.used = 80 * GIB, 70 * GIB, 10 * GIB
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: Any, count: Any, processes: Any) -> int:
        count._obj.value = 2
        processes[0].pid, processes[0].used = 1, 9 * GIB
        processes[1].pid, processes[1].used = 2, (1 << 64) - 1  # not said
        return 0


def test_management_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "_load_nvml", FakeNvml)
    (found,) = detect_gpus()
    assert (found.source, found.name, found.free_bytes) == ("NVML", "NVIDIA A100-SXM4-80GB", 70 * GIB)
    assert [(holder.pid, holder.bytes) for holder in found.holders] == [(1, 9 * GIB)]


def test_management_library_that_fails_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(FakeNvml):
        def nvmlInit_v2(self) -> int:
            return 9

    monkeypatch.setattr(detect, "_load_nvml", Broken)
    nvidia_smi(monkeypatch, ONE)
    assert detect_gpus()[0].source == "nvidia-smi"
    assert ctypes.sizeof(detect._NvmlProcess) == 24


def test_amd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = tmp_path / "drm" / "card1" / "device"
    device.mkdir(parents=True)
    for name, text in (
        ("vendor", "0x1002"),
        ("mem_info_vram_total", str(24 * GIB)),
        ("mem_info_vram_used", str(3 * GIB)),
        ("product_name", "Radeon RX 7900 XTX"),
    ):
        (device / name).write_text(text + "\n")
    intel = tmp_path / "drm" / "card0" / "device"
    intel.mkdir(parents=True)
    (intel / "vendor").write_text("0x8086\n")
    assert detect_gpus() == [Found("Radeon RX 7900 XTX", "AMD", 24 * GIB, 21 * GIB, "sysfs")]


def test_apple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    for ram, usable in ((36, 24), (64, 48)):
        text = f"Apple M2 Ultra\n{ram * GIB}\n"
        monkeypatch.setattr(detect, "_output", lambda command, text=text: text if command[0] == "sysctl" else "")
        (found,) = detect_gpus()
        assert (found.vendor, found.free_bytes) == ("Apple", usable * GIB)
        assert any("does not run on Apple" in note for note in resolve_target("auto").notes)


def test_command_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert detect._output(["glm4run-no-such-command"]) == ""
    assert detect._output(["false"]) == ""
