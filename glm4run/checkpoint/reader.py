"""Reads single tensors, or rows of them, into fresh memory.

Plain reads instead of a memory map: what has been repacked and dropped is then gone from the process, so that
loading never holds two copies of the model, and a file that is replaced meanwhile cannot crash the run.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from glm4run.checkpoint.layouts import Source, locate
from glm4run.checkpoint.safetensors_index import as_error, read_index
from glm4run.config import ModelConfig
from glm4run.errors import CheckpointError

HUGE_BYTES = 64 << 20
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointReader:
    """The tensors of one folder under their Hugging Face names, whatever the layout. A context manager.

    `sources` maps every name that the model needs to its place; opening fails with all problems at once.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        sources, problems = locate(config, read_index(folder))
        if problems:
            raise as_error(folder, problems)
        self.folder = folder
        self.sources: Mapping[str, Source] = sources
        self._files: dict[Path, BinaryIO] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, as stored. Raises CheckpointError where the file ends early."""
        return self.read_rows(name, 0, self.sources[name].shape[0])

    def location(self, name: str) -> tuple[int, int]:
        """The open file that the tensor called `name` lies in, as a descriptor, and the byte where it begins there."""
        source = self.sources[name]
        row_bytes = source.entry.nbytes // max(1, source.entry.shape[0])
        return self._descriptor(source.entry.file), source.entry.offset + source.first * row_bytes

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of the tensor called `name`."""
        source = self.sources[name]
        entry = source.entry
        shape = (last - first, *entry.shape[1:])
        row_bytes = entry.nbytes // max(1, entry.shape[0])
        out = _empty(shape, TORCH_DTYPES[entry.dtype])
        if math.prod(shape) == 0:
            return out
        descriptor = self._descriptor(entry.file)
        at = entry.offset + (source.first + first) * row_bytes
        view = memoryview(out.view(torch.uint8).reshape(-1).numpy().data)
        while view:
            count = os.preadv(descriptor, [view], at)
            if not count:
                raise CheckpointError(f"{entry.file} ends inside {entry.name}", hint="download the file again")
            view, at = view[count:], at + count
        return out

    def _descriptor(self, path: Path) -> int:
        with self._lock:  # one that loses a race to open would be closed under its reader
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = path.open("rb", buffering=0)
            return file.fileno()


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialized memory; a large piece in huge pages where the system grants them, which fill many times faster."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
