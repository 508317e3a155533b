"""Writes a packed folder so that it appears whole or not at all.

Shards are written front to back: their headers are known before any weight has been read, so no tensor is ever held
for the sake of the file. Everything goes to a hidden folder beside the target, is flushed to disk, and is renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from glm4run.checkpoint.safetensors_index import DTYPE_BYTES, INDEX_NAME
from glm4run.errors import UsageError
from glm4run_quantize.journal import belongs_to, is_trace, remove_traces

MAX_SHARD_BYTES = 5_000_000_000  # as the hub's own tools split
HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written: name, safetensors dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * DTYPE_BYTES[self.dtype]


class FolderWriter:
    """Writes `specs`, in their order, into shards of `folder`. Use as a context manager; `add` in the same order.

    With `done`, the first so many are in the folder already, and writing goes on behind them.
    """

    def __init__(self, folder: Path, specs: list[TensorSpec], metadata: Mapping[str, str], done: int = 0) -> None:
        self.folder = folder
        self.metadata = {"format": "pt", **metadata}
        self._shards = _split(specs)
        self._pending = [spec for shard in self._shards for spec in shard]
        self._left_in_shard = 0
        self._next_shard = 0
        self._left_in_tensor = 0
        self._file: BinaryIO | None = None
        if done:
            self._go_on_behind(done)

    def _go_on_behind(self, done: int) -> None:
        self._pending = self._pending[done:]
        for number, shard in enumerate(self._shards):
            if done < len(shard):
                self._next_shard = number
                if done:
                    self._next_shard += 1
                    self._left_in_shard = sum(spec.nbytes for spec in shard[done:])
                    written = sum(spec.nbytes for spec in shard[:done])
                    self._file = (self.folder / self._name(number)).open("r+b")
                    self._file.truncate(len(self._header(shard)) + written)
                    self._file.seek(0, os.SEEK_END)
                return
            done -= len(shard)
        self._next_shard = len(self._shards)

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if error is None:
            assert not self._pending, f"{len(self._pending)} tensors were announced but not written"
            self._write_index()

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends `tensor`, all of the next spec or its next rows."""
        if self._left_in_tensor == 0:
            spec = self._pending[0]
            assert spec.name == name, f"{name} written where {spec.name} was announced"
            self._left_in_tensor = spec.nbytes
            if self._left_in_shard == 0:
                self._open_next_shard()
        data = memoryview(tensor.contiguous().view(torch.uint8).reshape(-1).numpy().data)
        assert len(data) <= self._left_in_tensor, f"{name} is larger than announced"
        assert self._file is not None
        self._file.write(data)
        self._left_in_tensor -= len(data)
        self._left_in_shard -= len(data)
        if self._left_in_tensor == 0:
            self._pending.pop(0)
        if self._left_in_shard == 0:
            self._close_shard()

    def commit(self) -> None:
        """Returns when all that was added is on disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def _name(self, shard: int) -> str:
        count = len(self._shards)
        return f"model-{shard + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"

    def _header(self, specs: list[TensorSpec]) -> bytes:
        header: dict[str, object] = {"__metadata__": self.metadata}
        end = 0
        for spec in specs:
            offsets = [end, end + spec.nbytes]
            header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
            end += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % HEADER_ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def _open_next_shard(self) -> None:
        specs = self._shards[self._next_shard]
        self._file = (self.folder / self._name(self._next_shard)).open("wb")
        self._file.write(self._header(specs))
        self._left_in_shard = sum(spec.nbytes for spec in specs)
        self._next_shard += 1

    def _close_shard(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None

    def _write_index(self) -> None:
        if len(self._shards) > 1:
            total = sum(spec.nbytes for shard in self._shards for spec in shard)
            names = {spec.name: self._name(i) for i, shard in enumerate(self._shards) for spec in shard}
            index = {"metadata": {"total_size": total}, "weight_map": names}
            write_json(self.folder / INDEX_NAME, index)


def _split(specs: list[TensorSpec]) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def write_json(path: Path, data: object) -> None:
    """One JSON file, readable by people, flushed to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing_folder(target: Path, *, overwrite: bool, fingerprint: str | None = None) -> Iterator[Path]:
    """Gives a folder beside `target` that becomes `target` when the block ends well, and vanishes otherwise.

    It is empty, unless a run of the same `fingerprint` was killed: then it is that run's, for a `Journal` to go on
    with. With a fingerprint, an interruption by the user keeps it too.

    Raises:
        UsageError: `target` exists and `overwrite` is not set, or is no folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = _remove_leftovers(target, fingerprint)  # first: it may bring back what must not be replaced unasked
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} exists and is no folder", hint="choose another output folder")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise UsageError(f"{target} exists already", hint="add --overwrite to replace it, or choose another -o")
    working = target.parent / f".{target.name}.partial-{os.getpid()}"
    if kept is None:
        working.mkdir()
    elif kept != working:
        kept.rename(working)
    try:
        yield working
        remove_traces(working)
        _sync_folder(working)
        _swap(working, target)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt) and fingerprint is not None
        if not interrupted or not belongs_to(working, fingerprint or ""):
            shutil.rmtree(working, ignore_errors=True)
        raise


def _swap(working: Path, target: Path) -> None:
    """Puts `working` in the place of `target`; what was there is removed only afterwards."""
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    if target.exists():
        target.rename(old)
    try:
        working.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(target: Path, fingerprint: str | None) -> Path | None:
    """Removes the working folders of runs that were killed; one whose process lives is left alone.

    One of this `fingerprint` is kept, and returned.
    """
    kept: Path | None = None
    for kind, path in _leftovers(target):
        if kind == "old" and not target.exists():
            path.rename(target)  # killed between the two renames: what the user had comes back
        elif kept is None and _is_resumable(kind, path, fingerprint):
            kept = path
        else:
            shutil.rmtree(path, ignore_errors=True)
    return kept


def resumable_bytes(target: Path, fingerprint: str) -> int:
    """What is written already by the killed run that `replacing_folder` would go on with."""
    for kind, path in _leftovers(target):
        if _is_resumable(kind, path, fingerprint):
            return sum(file.stat().st_size for file in path.glob("*.safetensors") if not is_trace(file))
    return 0


def _is_resumable(kind: str, path: Path, fingerprint: str | None) -> bool:
    return kind == "partial" and fingerprint is not None and belongs_to(path, fingerprint)


def _leftovers(target: Path) -> list[tuple[str, Path]]:
    """The working folders ("partial") and replaced ones ("old") of runs that are no longer alive."""
    if not target.parent.is_dir():
        return []
    found = []
    for path in sorted(target.parent.iterdir()):
        match = re.fullmatch(rf"\.{re.escape(target.name)}\.(partial|old)-(\d+)", path.name)
        if match is not None and not _is_alive(int(match[2])):
            found.append((match[1], path))
    return found


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
