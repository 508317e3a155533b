"""Which GPU is here, how much of its memory is free, and which processes hold the rest. No torch.

NVIDIA through its management library, else through nvidia-smi; AMD through sysfs; Apple through sysctl.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glm4run.memory import GIB, MIB, available_ram_bytes, total_ram_bytes

DRM = Path("/sys/class/drm")
AMD_VENDOR = "0x1002"
COMMAND_TIMEOUT_S = 5


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of a GPU."""

    pid: int
    name: str
    bytes: int


@dataclass(frozen=True)
class Found:
    """A device of this machine. `source` says who told its memory."""

    name: str
    vendor: str
    total_bytes: int
    free_bytes: int
    source: str
    index: int = 0
    holders: tuple[Holder, ...] = ()


def detect_gpus() -> list[Found]:
    """Every GPU that this process may use; empty where there is none."""
    nvidia = _visible(_from_nvml() or _from_nvidia_smi())
    return [*nvidia, *_from_sysfs(), *_from_sysctl()]


def detect_ram() -> Found | None:
    """The machine's memory as a device; a cgroup's limit counts, the page cache is free. None where unknown."""
    total, free = total_ram_bytes(), available_ram_bytes()
    if total is None or free is None:
        return None
    return Found("RAM of this machine", "CPU", total, min(free, total), "meminfo and cgroup limits")


def _visible(found: list[Found]) -> list[Found]:
    """What `CUDA_VISIBLE_DEVICES` leaves; indices only, as identifiers are not known here."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return found
    words = [word.strip() for word in listed.split(",")]
    if not all(word.isdigit() for word in words):
        return [] if listed.strip() in ("", "-1", "NoDevFiles") else found
    return [gpu for word in words for gpu in found if gpu.index == int(word)]


# --- NVIDIA


class _NvmlMemory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _NvmlProcess(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


def _load_nvml() -> ctypes.CDLL | None:
    for name in ("libnvidia-ml.so.1", "nvml.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _from_nvml() -> list[Found]:
    library = _load_nvml()
    if library is None or library.nvmlInit_v2() != 0:
        return []
    try:
        count = ctypes.c_uint()
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return []
        found = [_nvml_device(library, index) for index in range(count.value)]
        return [gpu for gpu in found if gpu is not None]
    finally:
        library.nvmlShutdown()


def _nvml_device(library: ctypes.CDLL, index: int) -> Found | None:
    handle, memory = ctypes.c_void_p(), _NvmlMemory()
    name = ctypes.create_string_buffer(96)
    failed = library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
    failed = failed or library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    if failed:
        return None
    library.nvmlDeviceGetName(handle, name, len(name))
    count = ctypes.c_uint(64)
    processes = (_NvmlProcess * 64)()
    holders: list[Holder] = []
    if library.nvmlDeviceGetComputeRunningProcesses_v3(handle, ctypes.byref(count), processes) == 0:
        holders = [
            Holder(item.pid, _process_name(item.pid), item.used)
            for item in processes[: count.value]
            if item.used < memory.total  # all bits set where the driver does not say
        ]
    text = name.value.decode(errors="replace")
    return Found(text, "NVIDIA", memory.total, memory.free, "NVML", index, tuple(holders))


def _process_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "?"


def _from_nvidia_smi() -> list[Found]:
    fields = "index,name,memory.total,memory.free"
    rows = _csv_of(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
    found = [
        Found(row[1], "NVIDIA", int(row[2]) * MIB, int(row[3]) * MIB, "nvidia-smi", int(row[0]))
        for row in rows
        if len(row) == 4 and row[0].isdigit() and row[2].isdigit() and row[3].isdigit()
    ]
    if len(found) != 1:  # the list of processes does not say on which of several GPUs
        return found
    apps = _csv_of(["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits"])
    holders = tuple(
        Holder(int(row[0]), Path(row[1]).name, int(row[2]) * MIB)
        for row in apps
        if len(row) == 3 and row[0].isdigit() and row[2].isdigit()
    )
    only = found[0]
    return [Found(only.name, only.vendor, only.total_bytes, only.free_bytes, only.source, only.index, holders)]


def _csv_of(command: Sequence[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.split(",")] for line in _output(command).splitlines()]


def _output(command: Sequence[str]) -> str:
    """What a command prints, "" where it is not there, fails or hangs."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout


# --- AMD and Apple


def _from_sysfs() -> list[Found]:
    found: list[Found] = []
    for device in sorted(DRM.glob("card[0-9]*/device")):
        try:
            if (device / "vendor").read_text().strip() != AMD_VENDOR:
                continue
            total = int((device / "mem_info_vram_total").read_text())
            used = int((device / "mem_info_vram_used").read_text())
        except (OSError, ValueError):
            continue
        try:
            name = (device / "product_name").read_text().strip() or "AMD GPU"
        except OSError:
            name = "AMD GPU"
        found.append(Found(name, "AMD", total, total - used, "sysfs", len(found)))
    return found


def _from_sysctl() -> list[Found]:
    """Apple's GPU shares the RAM; the system lets it use two thirds of up to 36 GiB, else three quarters."""
    if sys.platform != "darwin":
        return []
    lines = _output(["sysctl", "-n", "machdep.cpu.brand_string", "hw.memsize"]).splitlines()
    if len(lines) != 2 or not lines[1].isdigit() or not lines[0].startswith("Apple"):
        return []
    ram = int(lines[1])
    usable = ram * 2 // 3 if ram <= 36 * GIB else ram * 3 // 4
    return [Found(lines[0], "Apple", ram, usable, "sysctl")]
