"""A reference's next-token distributions in a file, so that two models need never be in memory at once.

A safetensors file, version 1, over R scored tokens and a vocabulary of C tokens (padding rows of the model left out):

    log_probs  F16 [R, C]  log-probabilities, in the order of the windows
    losses     F64 [R]     -log p of the token that came: exact, so that the reference's perplexity is
    top1       I32 [R]     the likeliest column: exact, as two log-probabilities may be equal in 16 bits
    ids        I32 [I]     the windows' token ids one after the other, prefixes included
    metadata               format, version, model, text and its sha256, context, stride, prefix, vocabulary's sha256

16 bits keep a log-probability to a part in 2048. Distributions are normalized again when they are read; a model's
divergence from its own file is then below 1e-6. That is what the file's rounding costs.
"""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glm4run.errors import CheckpointError, DoesNotFitError, UsageError
from glm4run.fidelity import ReferenceRows

FORMAT, VERSION = "glm4run-reference-logits", "1"
SMALLEST = torch.finfo(torch.float16).min


@dataclass(frozen=True)
class Provenance:
    """What a file was made from. Everything but `model` and `text` must be the same where it is used."""

    model: str
    text: str
    text_sha256: str
    context: str
    stride: str
    prefix: str
    vocabulary_sha256: str


class ReferenceWriter:
    """Writes a file row block by row block, beside its place, and moves it there when it is whole. A context manager.

    Raises:
        DoesNotFitError: the disk has no room for it. Before anything is computed.
    """

    def __init__(self, path: Path, provenance: Provenance, ids: Sequence[int], rows: int, columns: int) -> None:
        self.path, self.ids, self.rows, self.columns = path, ids, rows, columns
        self.partial = path.with_name(f".{path.name}.part")
        self.losses = array("d")  # plain arrays, as `Tally` has them
        self.top1 = array("i")
        header = _header(provenance, len(ids), rows, columns)
        needed = len(header) + rows * (2 * columns + 12) + 4 * len(ids)
        if not path.parent.is_dir():
            raise UsageError(f"no folder {path.parent}", hint="create it, or save elsewhere")
        free = shutil.disk_usage(path.parent).free
        if needed > free:
            raise DoesNotFitError(
                f"the reference's logits take {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free in {path.parent}",
                hint="save fewer --windows, or elsewhere",
            )
        self.file: BinaryIO = self.partial.open("wb")
        self.file.write(header)

    def write(self, rows: ReferenceRows) -> None:
        """The next rows."""
        narrow = rows.log_probs.clamp(min=SMALLEST).to(torch.float16).cpu().contiguous()
        self.file.write(narrow.numpy().data)
        self.losses.extend(rows.losses.tolist())
        self.top1.extend(rows.top1.tolist())

    def __enter__(self) -> ReferenceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.file:
            if kind is None:
                assert len(self.losses) == self.rows
                for part in (self.losses, self.top1, array("i", self.ids)):
                    self.file.write(part)
                self.file.flush()
                os.fsync(self.file.fileno())
        if kind is None:
            self.partial.replace(self.path)
        else:
            self.partial.unlink()


class SavedReference:
    """A file that `ReferenceWriter` made.

    Raises:
        UsageError: it is not one, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = cast(Any, safe_open(path, framework="pt"))  # its stubs leave the methods untyped
            metadata = self._file.metadata() or {}
            self._log_probs = self._file.get_slice("log_probs") if "format" in metadata else None
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{path} cannot be read: {error}", hint="make one with --save-logits") from error
        if self._log_probs is None or metadata.get("format") != FORMAT:
            raise UsageError(f"{path} holds no reference logits", hint="make one with --save-logits")
        if metadata.get("version") != VERSION:
            raise UsageError(f"{path} is of version {metadata.get('version')}, expected {VERSION}", hint="make it anew")
        self.provenance = Provenance(**{field.name: metadata.get(field.name, "") for field in fields(Provenance)})
        self.ids: Tensor = self._file.get_tensor("ids")
        self.losses: Tensor = self._file.get_tensor("losses")
        self.top1: Tensor = self._file.get_tensor("top1")
        self.rows, self.columns = self._log_probs.get_shape()

    def require(self, wanted: Provenance, ids: Sequence[int]) -> None:
        """Raises UsageError unless the file is of the same text, windows and vocabulary; it may hold more windows."""
        for field in fields(Provenance):
            ours, theirs = getattr(wanted, field.name), getattr(self.provenance, field.name)
            if field.name not in ("model", "text") and ours != theirs:
                what = field.name.replace("_", " ")
                raise UsageError(
                    f"{self.path} was made with another {what}: {theirs}, here it is {ours}",
                    hint="evaluate with the same text and sizes, or make the file anew with --save-logits",
                )
        if len(ids) > len(self.ids):
            raise UsageError(
                f"{self.path} holds windows of {len(self.ids)} tokens in all, {len(ids)} are asked for",
                hint="evaluate fewer --windows, or make the file anew with --save-logits",
            )
        if self.ids[: len(ids)].tolist() != list(ids):
            raise UsageError(f"{self.path} was made of other windows", hint="make the file anew with --save-logits")

    def read(self, first: int, last: int) -> ReferenceRows:
        """Rows [first, last), their log-probabilities normalized."""
        assert self._log_probs is not None
        rows: Tensor = self._log_probs[first:last]
        if not torch.isfinite(rows).all():
            raise CheckpointError(f"{self.path} holds NaN or infinity", hint="the file is damaged: make it anew")
        return ReferenceRows(rows.double().log_softmax(-1), self.losses[first:last], self.top1[first:last])


def _header(provenance: Provenance, ids: int, rows: int, columns: int) -> bytes:
    """A safetensors header, padded so that the tensors begin at a multiple of 8."""
    shapes: Mapping[str, tuple[str, list[int], int]] = {
        "log_probs": ("F16", [rows, columns], 2 * rows * columns),
        "losses": ("F64", [rows], 8 * rows),
        "top1": ("I32", [rows], 4 * rows),
        "ids": ("I32", [ids], 4 * ids),
    }
    header: dict[str, object] = {"__metadata__": {"format": FORMAT, "version": VERSION, **asdict(provenance)}}
    at = 0
    for name, (dtype, shape, nbytes) in shapes.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
