"""Keys and values of conversations on disk, in pieces of a run of tokens each, so that branches share their beginning.

A piece is a safetensors file: its token ids, keys and values of every layer, and the digest of all ids before it. A
conversation is continued from whatever pieces fit its beginning; what none has is prefilled. A piece is written beside
and renamed, so that a killed process leaves whole pieces only.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from glm4run.kv_cache import KVCache
from glm4run.steps import Context, common_prefix

PIECE_TOKENS = 1024  # of one file: bounds the memory that writing takes (42 MB for GLM-4-9B in bf16)
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Piece:
    """One file: the tokens from `start` on of a conversation whose earlier ids have the digest `before`."""

    path: Path
    start: int
    before: str
    ids: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + len(self.ids)


class KVFiles:
    """The pieces of one session, for one model."""

    def __init__(
        self, folder: Path, fingerprint: Mapping[str, str], *, on_problem: Callable[[str], None] = lambda _: None
    ) -> None:
        """`on_problem` gets one line where a piece cannot be read or written; the conversation goes on without."""
        self.folder = folder
        self.fingerprint = dict(fingerprint)
        self.on_problem = on_problem
        self.enabled = True
        for unfinished in folder.glob("*.partial"):
            unfinished.unlink(missing_ok=True)
        self.pieces = self._read_index() if folder.is_dir() else []

    def extend(self, context: Context, prompt: Sequence[int]) -> int:
        """Loads what is kept of `prompt` behind what the cache shares with it; returns how many tokens."""
        cache = context.cache
        have = common_prefix(context.ids[: cache.position], prompt)
        wanted = list(prompt[: cache.capacity])
        loaded = 0
        while (found := self._best(wanted, have + loaded)) is not None:
            piece, end = found
            if loaded == 0:  # only now: a prompt that nothing is kept of leaves the cache as it is
                cache.truncate(have)
                del context.ids[have:]
            if not self._load(piece, cache, have + loaded, end):
                break
            context.ids += wanted[have + loaded : end]
            loaded = end - have
        return loaded

    def save(self, context: Context) -> None:
        """Writes what the cache holds and no piece has. A failure is told once, and nothing more is written."""
        ids = context.ids[: context.cache.position]
        start = 0
        while (found := self._best(ids, start)) is not None:
            start = found[1]
        while self.enabled and start < len(ids):
            end = min(start + PIECE_TOKENS, len(ids))
            try:
                self._write(context.cache, ids, start, end)
            except OSError as error:
                self.enabled = False
                self.on_problem(f"the cache is not saved from here on, only the text: {error}")
            start = end

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.path.stat().st_size for piece in self.pieces if piece.path.exists())

    def _best(self, wanted: list[int], have: int) -> tuple[Piece, int] | None:
        """The piece that leads furthest beyond `have` tokens of `wanted`, and how far."""
        best: tuple[Piece, int] | None = None
        digests: dict[int, str] = {}
        for piece in self.pieces:
            if not piece.start <= have < piece.end:
                continue
            if piece.start not in digests:
                digests[piece.start] = digest(wanted[: piece.start])
            if piece.before == digests[piece.start]:
                end = piece.start + common_prefix(piece.ids, wanted[piece.start :])
                if end > have and (best is None or end > best[1]):
                    best = piece, end
        return best

    def _load(self, piece: Piece, cache: KVCache, start: int, end: int) -> bool:
        try:
            load_piece(piece, cache, start, end)
        except PieceError as error:
            self.pieces.remove(piece)
            self.on_problem(f"a part of the saved cache is damaged and is computed again: {piece.path.name}: {error}")
            return False
        return True

    def _write(self, cache: KVCache, ids: Sequence[int], start: int, end: int) -> None:
        path = self.folder / f"{start:07d}-{digest(ids[:end])[:16]}{SUFFIX}"
        before = digest(ids[:start])
        metadata = {"start": str(start), "before": before, "fingerprint": json.dumps(self.fingerprint)}
        self.pieces.append(write_piece(path, cache, ids[start:end], start, before, metadata))

    def _read_index(self) -> list[Piece]:
        """The pieces of this model; those of another are left alone."""
        found = []
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            try:
                with safe_open(path, framework="pt") as file:
                    metadata: dict[str, Any] = file.metadata() or {}
                    if json.loads(metadata["fingerprint"]) != self.fingerprint:
                        continue
                    ids = tuple(file.get_tensor("ids").tolist())
                    found.append(Piece(path, int(metadata["start"]), metadata["before"], ids))
            except (OSError, SafetensorError, ValueError, KeyError) as error:
                self.on_problem(f"a part of the saved cache cannot be read: {path.name}: {error}")
        return found


class PieceError(Exception):
    """A piece that cannot be read, or is not what was written."""


def load_piece(piece: Piece, cache: KVCache, start: int, end: int) -> None:
    """Puts the tokens `start` to `end` of a piece behind the cache's position, which is `start`.

    Raises:
        PieceError: it is damaged, or of another shape. The cache's position is as it was.
    """
    try:
        with safe_open(piece.path, framework="pt") as file:
            sums = json.loads((file.metadata() or {}).get("crc32", "{}"))
            for layer in range(len(cache.layers)):
                rows = {}
                for name in cache.rows(layer, 0, 0):
                    whole = file.get_tensor(f"{name}.{layer}")
                    if sums and sums.get(f"{name}.{layer}") != _crc32(whole):
                        raise PieceError(f"{name}.{layer} is not what was written")
                    rows[name] = whole[:, start - piece.start : end - piece.start]
                cache.restore(layer, start, rows)
    except (OSError, SafetensorError, ValueError) as error:
        raise PieceError(str(error)) from error
    cache.advance(end - start)


def write_piece(
    path: Path, cache: KVCache, ids: Sequence[int], start: int, before: str, metadata: Mapping[str, str]
) -> Piece:
    """Writes what the cache holds of `ids`, the tokens from `start` on. The file is whole or not there.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"ids": torch.tensor(ids, dtype=torch.int32)}
    for layer in range(len(cache.layers)):
        for name, rows in cache.rows(layer, start, start + len(ids)).items():
            tensors[f"{name}.{layer}"] = rows.cpu().contiguous()
    sums = {name: _crc32(tensor) for name, tensor in tensors.items()}
    beside = path.with_name(f"{path.stem}.{os.getpid()}.partial")
    try:
        save_file(tensors, beside, {**metadata, "crc32": json.dumps(sums)})
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.rename(path)
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(str(error)) from error
    finally:
        beside.unlink(missing_ok=True)
    return Piece(path, start, before, tuple(ids))


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data)


def digest(ids: Sequence[int]) -> str:
    """Of a run of token ids, by value and order."""
    return hashlib.sha256(array("I", ids).tobytes()).hexdigest()
