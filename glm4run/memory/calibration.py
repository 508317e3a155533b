"""What was measured on this machine instead of assumed: a small file in the user's cache folder. No torch.

`glm4run vram --calibrate` writes it (see `glm4run.calibrate`), later plans take what it says of their device.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from glm4run.machine import cpu_name
from glm4run.user_files import replace_file, user_path

FILE_VARIABLE = "GLM4RUN_CALIBRATION"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """Of one device, in bytes.

    context_bytes: on a CPU, the process before it loads anything; on a GPU, the CUDA context and cuBLAS. later_bytes:
    on a CPU, library pages that are touched while loading and running. slack_bytes: on a GPU, what the allocator
    reserved beyond the plan of tensors. date: ISO. version: of torch.
    """

    device: str
    date: str
    version: str
    context_bytes: int
    later_bytes: int = 0
    slack_bytes: int | None = None
    read_gb_per_s: float | None = None  # of the memory, in decimal GB/s; of a CPU only


def calibration_file() -> Path:
    """`$GLM4RUN_CALIBRATION`, else `glm4run/calibration.json` in the user's cache folder (XDG)."""
    return user_path("cache", "calibration.json", FILE_VARIABLE)


def calibrated_cpu() -> str:
    """The name under which this machine's CPU is kept: the file may lie in a home that several machines share."""
    return f"CPU: {cpu_name()}"


def read_calibration(device: str) -> Calibration | None:
    """What was measured of a device; None where nothing was. A file that is damaged or of another version is nothing:
    it is a cache, and the next calibration writes it anew."""
    return _read_all(calibration_file()).get(device)


def write_calibration(calibration: Calibration) -> Path:
    """Keeps it beside those of other devices; returns the file. The old file is whole until the new one is.

    Raises:
        OSError: the file cannot be written.
    """
    path = calibration_file()
    every = _read_all(path) | {calibration.device: calibration}
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"schema_version": SCHEMA_VERSION, "devices": [dataclasses.asdict(item) for item in every.values()]}
    replace_file(path, json.dumps(data, indent=2).encode())
    return path


def _read_all(path: Path) -> dict[str, Calibration]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema_version"] != SCHEMA_VERSION:
            return {}
        found = [Calibration(**item) for item in data["devices"]]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {item.device: item for item in found if _is_sane(item)}


def _is_sane(item: Calibration) -> bool:
    sizes = (item.context_bytes, item.later_bytes, item.slack_bytes or 0)
    return all(isinstance(size, int) and 0 <= size < 1 << 40 for size in sizes) and isinstance(item.device, str)
