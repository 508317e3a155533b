"""Prompts that were read once, kept on disk with their keys and values, so that nobody reads them twice.

Token ids are the key: a prompt begins with whatever kept pieces have its very ids, of the same weights computed in the
same way. Nothing is written before an answer has been shown (`keep`), and a piece is whole or not there, so that
processes need no locks: one that loses a file to another just computes.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from glm4run.fingerprint import of_computation
from glm4run.kv_cache import KVCache
from glm4run.kv_files import Piece, PieceError, load_piece, write_piece
from glm4run.prompt_store import (
    DEFAULT_BYTES,
    NAME_DIGITS,
    Room,
    describe_folder,
    list_pieces,
    piece_path,
    prompts_folder,
    touch,
)
from glm4run.steps import Context, common_prefix

if TYPE_CHECKING:
    from glm4run.generate import LoadedModel

PIECE_TOKENS = 256  # bounds the memory of a write: 10 MB for GLM-4-9B in bf16
MIN_TOKENS = 512  # computed at once, or to be loaded; docs/long-context.md has what that costs and saves
MIN_TAIL = 32  # a last piece of fewer is not worth a file
MOST_PENDING = 8
SHOWN_CHARACTERS = 36  # of a prompt's beginning and of its end


@dataclass(frozen=True)
class _Pending:
    context: Context
    prompt: list[int]


class PromptCache:
    """The kept prompts of one loaded model."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        most_bytes: int = DEFAULT_BYTES,
        root: Path | None = None,
        on_recall: Callable[[int, int], None] = lambda _, __: None,
        on_problem: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`on_recall` gets (tokens loaded, tokens of the prompt), `on_problem` a line where a file is of no use."""
        self.model = model
        self.most_bytes = most_bytes
        self.root = prompts_folder() if root is None else root
        self.on_recall, self.on_problem = on_recall, on_problem
        self.enabled = True
        self.unit = model.cut_unit
        self._pending: list[_Pending] = []
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        """Of this model's pieces. Reads samples of the weights the first time."""
        if self._folder is None:
            self._folder = self.root / hashlib.sha256(json.dumps(self._fingerprint()).encode()).hexdigest()[:16]
        return self._folder

    def _fingerprint(self) -> dict[str, str]:
        model = self.model
        kernels = re.sub(r",? \d+ threads?", "", model.backend_detail)
        computed = {"kernels": f"{kernels} on {model.device}", "unit": str(self.unit)}
        return dict(sorted({**of_computation(model), **computed}.items()))

    # --- loading

    def recall(self, context: Context, prompt: Sequence[int]) -> int:
        """Loads what is kept of `prompt` behind what the cache shares with it; returns how many tokens.

        The last token is always left to compute: it gives the logits. Of a long prompt some more are
        (`LoadedModel.read_together`).
        """
        cache = context.cache
        rest = self.model.read_together(len(prompt))
        wanted = list(prompt[: min(len(prompt) - rest, cache.capacity)])
        have = common_prefix(context.ids[: cache.position], prompt)
        if len(wanted) - have < MIN_TOKENS or not self.folder.is_dir():
            return 0
        found = list(self._find(wanted))
        end = max((piece.start + n for piece, n in found), default=0) // self.unit * self.unit
        if end - have < MIN_TOKENS:
            return 0
        cache.truncate(have)
        del context.ids[have:]
        reached = self._load(cache, found, have, end)
        context.ids += wanted[have:reached]
        if reached < end:  # a piece was damaged, or is gone
            reached = max(have, reached // self.unit * self.unit)
            reached = have if reached - have < MIN_TOKENS else reached  # what is computed is then kept in its place
            cache.truncate(reached)
            del context.ids[reached:]
        touch([piece.path for piece, _ in found])
        if reached > have:
            self.on_recall(reached - have, len(prompt))
        return reached - have

    def _load(self, cache: KVCache, found: Sequence[tuple[Piece, int]], have: int, end: int) -> int:
        """Loads [have, end) from the pieces; returns how far it came."""
        reached = have
        for piece, count in found:
            upto = min(piece.start + count, end)
            if upto <= reached:
                continue
            try:
                load_piece(piece, cache, reached, upto)
            except PieceError as error:
                if piece.path.exists():  # else another process has just removed it
                    self.on_problem(f"a kept prompt is damaged and is read again: {piece.path.name}: {error}")
                    piece.path.unlink(missing_ok=True)
                break
            reached = upto
        return reached

    def _find(self, wanted: Sequence[int]) -> Iterator[tuple[Piece, int]]:
        """The chain of pieces that have the ids of `wanted`, each with how many of its tokens fit."""
        by_place: dict[tuple[int, str], list[Path]] = {}
        for item in list_pieces(self.folder):
            by_place.setdefault((item.start, item.before), []).append(item.path)
        seen = hashlib.sha256()
        for start in range(0, len(wanted), PIECE_TOKENS):
            before = seen.hexdigest()
            part = list(wanted[start : start + PIECE_TOKENS])
            seen.update(_bytes(part))
            candidates = by_place.get((start, before[:NAME_DIGITS]), [])
            whole = piece_path(self.folder, start, before, seen.hexdigest())
            best: tuple[Piece, int] | None = None
            for path in [whole] if whole in candidates else candidates:
                ids = self._read_ids(path)
                count = common_prefix(ids, part)
                if count and (best is None or count > best[1]):
                    best = Piece(path, start, before, ids), count
            if best is None:
                return
            yield best
            if best[1] < PIECE_TOKENS:
                return

    def _read_ids(self, path: Path) -> tuple[int, ...]:
        try:
            with safe_open(path, framework="pt") as file:
                return tuple(file.get_tensor("ids").tolist())
        except (OSError, SafetensorError) as error:
            if path.exists():
                self.on_problem(f"a kept prompt is damaged and is read again: {path.name}: {error}")
                path.unlink(missing_ok=True)
            return ()

    # --- keeping

    def offer(self, context: Context, prompt: Sequence[int], start: int) -> None:
        """Notes a prompt that had to be computed from `start` on; `keep` writes it if that was worth it."""
        if self.enabled and len(context.ids) - start >= MIN_TOKENS and start % self.unit == 0:
            self._pending = [*self._pending[1 - MOST_PENDING :], _Pending(context, list(prompt))]

    def keep(self) -> None:
        """Writes what was offered, as far as its cache still holds it. A failure is told once, then nothing is kept."""
        pending, self._pending = self._pending, []
        for item in pending:
            if self.enabled:
                try:
                    self._write(item.context.cache, self._whole(item))
                except OSError as error:
                    self.enabled = False
                    self.on_problem(f"prompts are not kept from here on: {error}")

    def _whole(self, item: _Pending) -> list[int]:
        held = item.context.ids[: item.context.cache.position]
        return item.prompt[: common_prefix(held, item.prompt)]

    def _write(self, cache: KVCache, ids: list[int]) -> None:
        describe_folder(self.folder, self.model.name, self._fingerprint())
        room = Room(self.most_bytes, self.root)
        what = self._describe(ids)
        nbytes = cache.bytes_per_token
        seen, mine = hashlib.sha256(), []
        for start in range(0, len(ids), PIECE_TOKENS):
            part = ids[start : start + PIECE_TOKENS]
            if start and len(part) < MIN_TAIL:
                break
            before = seen.hexdigest()
            seen.update(_bytes(part))
            path = piece_path(self.folder, start, before, seen.hexdigest())
            mine.append(path)
            if path.exists():
                continue
            if not _is_finite(cache, start, start + len(part)):
                break
            if not room.make(nbytes * len(part), set(mine)):
                self.on_problem(
                    f"the first {start} of {len(ids)} prompt tokens are kept, as prompts may take "
                    f"{room.bound / 1e9:.1f} GB"
                )
                break
            metadata = {"start": str(start), "end": str(start + len(part)), "before": before, "what": what}
            write_piece(path, cache, part, start, before, metadata)
            room.taken += path.stat().st_size - nbytes * len(part)  # the header
        touch(mine)

    def _describe(self, ids: Sequence[int]) -> str:
        """The beginning and the end of a prompt's text, on one line."""
        tokenizer = self.model.tokenizer
        text = [i for i in ids if i not in tokenizer.special_ids]
        head = " ".join(tokenizer.decode(text[: 2 * SHOWN_CHARACTERS]).split())
        if len(head) <= 2 * SHOWN_CHARACTERS and len(text) <= 2 * SHOWN_CHARACTERS:
            return head
        tail = " ".join(tokenizer.decode(text[-2 * SHOWN_CHARACTERS :]).split())
        return f"{head[:SHOWN_CHARACTERS]} … {tail[-SHOWN_CHARACTERS:]}"


def _is_finite(cache: KVCache, start: int, end: int) -> bool:
    tensors = (tensor for n in range(len(cache.layers)) for tensor in cache.tensors(n).values())
    return all(bool(torch.isfinite(tensor[:, start:end]).all()) for tensor in tensors)


def _bytes(ids: Sequence[int]) -> bytes:
    return array("I", ids).tobytes()
