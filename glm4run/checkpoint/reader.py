"""Reads single tensors, or rows of them, into fresh memory, or maps the files that they lie in.

What is repacked and dropped is read: it is then gone from the process, so that loading never holds two copies of the
model. What stays as it is in the file may be mapped: it takes no memory of its own and no time. A mapped file may be
replaced (renamed over, deleted) but must not be cut short while it is in use.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
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


class FileMapping:
    """A whole file in memory, to read only, for as long as the object or a tensor of it lives."""

    def __init__(self, file: BinaryIO) -> None:
        self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(self._memory, dtype=np.uint8)
        self.address = int(self._bytes.ctypes.data)

    def drop(self, address: int, nbytes: int) -> None:
        """Takes whole pages from `address` on out of the process; what is read there comes from the file again."""
        first = -(-(address - self.address) // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (address - self.address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < end and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, first, end - first)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The numbers from byte `offset` on. Nothing may be written to them."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(self._memory, dtype=dtype, count=math.prod(shape), offset=offset)
        return flat.view(shape)


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
        self._mappings: dict[Path, FileMapping | None] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._mappings.clear()  # each lives on with what was taken of it

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, as stored. Raises CheckpointError where the file ends early."""
        return self.read_rows(name, 0, self.sources[name].shape[0])

    def location(self, name: str) -> tuple[int, int]:
        """The open file that the tensor called `name` lies in, as a descriptor, and the byte where it begins there."""
        source = self.sources[name]
        row_bytes = source.entry.nbytes // max(1, source.entry.shape[0])
        return self._descriptor(source.entry.file), source.entry.offset + source.first * row_bytes

    def mapping(self, name: str) -> FileMapping | None:
        """The file that the tensor called `name` lies in, mapped; None where the system cannot map it."""
        path = self.sources[name].entry.file
        if path not in self._mappings:
            self._descriptor(path)
            try:
                self._mappings[path] = FileMapping(self._files[path])
            except (OSError, ValueError):
                self._mappings[path] = None
        return self._mappings[path]

    def mapped(self, name: str) -> Tensor | None:
        """The tensor called `name` as it lies in its file; None where it cannot be mapped."""
        source, dtype = self.sources[name], TORCH_DTYPES[self.sources[name].entry.dtype]
        _, offset = self.location(name)
        mapping = self.mapping(name)
        if mapping is None or offset % dtype.itemsize or source.nbytes == 0:
            return None
        return mapping.tensor(offset, source.shape, dtype)

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of the tensor called `name`."""
        source = self.sources[name]
        entry = source.entry
        shape = (last - first, *entry.shape[1:])
        row_bytes = entry.nbytes // max(1, entry.shape[0])
        out = empty(shape, TORCH_DTYPES[entry.dtype])
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


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialized memory; a large piece in huge pages where the system grants them, which fill many times faster."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
