"""Where what belongs to the user lies, and writing such a file so that it is never half there. No torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

_BASES = {
    "cache": ("XDG_CACHE_HOME", "~/.cache"),
    "data": ("XDG_DATA_HOME", "~/.local/share"),
    "state": ("XDG_STATE_HOME", "~/.local/state"),
}


def user_path(kind: Literal["cache", "data", "state"], name: str, variable: str | None = None) -> Path:
    """`glm4run/<name>` in the user's folder of that kind (XDG Base Directory), or what `$variable` names instead."""
    configured = None if variable is None else os.environ.get(variable)
    if configured:
        return Path(configured).expanduser()
    home_variable, default = _BASES[kind]
    return Path(os.environ.get(home_variable) or default).expanduser() / "glm4run" / name


def replace_file(path: Path, data: bytes) -> None:
    """Writes a whole file; what was there stays whole until the new one is on disk.

    Raises:
        OSError: it cannot be written. Nothing is left beside it.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
