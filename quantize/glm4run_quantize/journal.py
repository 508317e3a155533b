"""What of a packed folder is on disk already, so that a run that was killed goes on where it was.

A journal lies in the working folder: its first line says which run it belongs to, every other one how many tensors are
safely written and what the report will say of them. Calibrated runs keep the residuals of their tokens beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

JOURNAL = "resume.jsonl"
STATE = "resume-state-{}.safetensors"
FILES = (JOURNAL, "resume-state-*.safetensors", "*.resume-new")


class Journal:
    """The journal of a working folder. `entries` are those of the run that was interrupted."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.path = folder / JOURNAL
        lines = _lines(self.path)
        if not lines or lines[0] != {"fingerprint": fingerprint}:
            lines = [{"fingerprint": fingerprint}]
        # Written anew: a run that died while it appended may have left half a line.
        new = self.path.with_name("journal.resume-new")
        new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        new.replace(self.path)
        self.entries: list[dict[str, Any]] = lines[1:]

    def append(self, entry: Mapping[str, Any]) -> None:
        """One more line, on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save_state(self, number: int, state: Mapping[str, Tensor]) -> None:
        """Keeps `state` as that behind `number` layers."""
        new = self.folder / f"{STATE.format(number)}.resume-new"
        save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, new)
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(self.folder / STATE.format(number))

    def load_state(self, number: int) -> dict[str, Tensor]:
        """The state behind `number` layers."""
        return load_file(self.folder / STATE.format(number))

    def drop_state(self, number: int) -> None:
        """Forgets the state behind `number` layers."""
        (self.folder / STATE.format(number)).unlink(missing_ok=True)


def belongs_to(folder: Path, fingerprint: str) -> bool:
    """Whether a working folder holds an interrupted run of this fingerprint."""
    lines = _lines(folder / JOURNAL)
    return bool(lines) and lines[0] == {"fingerprint": fingerprint}


def remove_traces(folder: Path) -> None:
    """Removes what is only there to go on from."""
    for pattern in FILES:
        for path in folder.glob(pattern):
            path.unlink()


def is_trace(file: Path) -> bool:
    """Whether a file of a working folder is only there to go on from."""
    return any(file.match(pattern) for pattern in FILES)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal, up to the first that is damaged."""
    lines: list[dict[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return lines
    for line in text.splitlines(keepends=True):
        try:
            parsed = json.loads(line)
        except ValueError:
            break
        if not line.endswith("\n") or not isinstance(parsed, dict):
            break
        lines.append(parsed)
    return lines
