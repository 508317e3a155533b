"""Which prompts are kept on disk: their files by name, how much they may take, what goes first. No torch.

A prompt is a chain of pieces. A piece's name has its first position, the digest of all tokens before it and the digest
of all tokens up to its end, so that a chain is found by looking at names; prompts that begin alike share pieces. Each
model has a folder of its own, named by the fingerprint of all that its keys and values depend on. What the pieces hold
is `prompt_cache`'s business.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from glm4run.errors import UsageError
from glm4run.user_files import replace_file, user_path

FOLDER_VARIABLE = "GLM4RUN_PROMPTS"
DEFAULT_BYTES = 8 << 30
FREE_SHARE = 0.2  # of what the disk has free (these files included): never more, whatever is asked for
SUFFIX = ".safetensors"
NAME_DIGITS = 16  # of a digest in a file's name
SHOWN_DIGITS = 8  # of an entry's name
STALE_PARTIAL_S = 3600.0  # a file that nobody has finished after so long never will be
MODEL_NAME = "model.json"


def prompts_folder() -> Path:
    """`$GLM4RUN_PROMPTS`, else `glm4run/prompts` in the user's cache folder (XDG)."""
    return user_path("cache", "prompts", FOLDER_VARIABLE)


@dataclass(frozen=True)
class PieceFile:
    """One file, by its name."""

    path: Path
    start: int  # position of its first token
    before: str  # digest of the tokens before it
    through: str  # digest of the tokens up to its end
    nbytes: int
    used: float  # seconds since the epoch


@dataclass(frozen=True)
class Entry:
    """One kept prompt: the last piece of a chain and all before it. `own_bytes`: those that no other prompt needs."""

    name: str
    model: str
    folder: Path
    what: str  # how it begins and ends
    tokens: int
    nbytes: int
    own_bytes: int
    used: float
    files: tuple[Path, ...]  # that no other prompt needs

    def as_json(self) -> dict[str, object]:
        """The keys of `cache ls --json`."""
        return {
            "name": self.name,
            "model": self.model,
            "what": self.what,
            "tokens": self.tokens,
            "bytes": self.nbytes,
            "own_bytes": self.own_bytes,
            "last_used": self.used,
        }


def piece_path(folder: Path, start: int, before: str, through: str) -> Path:
    """Where a piece lies."""
    return folder / f"{start:07d}-{before[:NAME_DIGITS]}-{through[:NAME_DIGITS]}{SUFFIX}"


def list_pieces(folder: Path) -> list[PieceFile]:
    """Every piece of a model's folder. Files that another process has just removed are left out."""
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        parts = path.name.removesuffix(SUFFIX).split("-")
        with contextlib.suppress(OSError, ValueError):
            start, before, through = parts
            status = path.stat()
            found.append(PieceFile(path, int(start), before, through, status.st_size, status.st_mtime))
    return found


def model_folders(root: Path | None = None) -> list[Path]:
    """The folder of every model that has prompts here."""
    root = prompts_folder() if root is None else root
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def describe_folder(folder: Path, model: str, fingerprint: dict[str, str]) -> None:
    """Writes which model a folder is of, if that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / MODEL_NAME
    if not path.exists():
        replace_file(path, json.dumps({"model": model, "fingerprint": fingerprint}, indent=1).encode())


def model_of(folder: Path) -> str:
    """The name that a folder's model had; "?" where that cannot be read."""
    try:
        name = json.loads((folder / MODEL_NAME).read_bytes())["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return "?"
    return name if isinstance(name, str) else "?"


def entries(root: Path | None = None) -> list[Entry]:
    """Every kept prompt, the last used first."""
    found = [entry for folder in model_folders(root) for entry in _entries_of(folder)]
    return sorted(found, key=lambda entry: entry.used, reverse=True)


def _entries_of(folder: Path) -> Iterator[Entry]:
    pieces = list_pieces(folder)
    by_end = {piece.through: piece for piece in pieces}
    continued = {piece.before for piece in pieces if piece.start}
    chains = [_chain(piece, by_end) for piece in pieces if piece.through not in continued]
    shared: dict[Path, int] = {}
    for chain in chains:
        for piece in chain:
            shared[piece.path] = shared.get(piece.path, 0) + 1
    model = model_of(folder)
    for chain in chains:
        tokens, what = _read_last(chain[-1])
        own = [piece for piece in chain if shared[piece.path] == 1]
        yield Entry(
            name=chain[-1].through[:SHOWN_DIGITS],
            model=model,
            folder=folder,
            what=what if chain[0].start == 0 else f"(its beginning is gone) {what}",
            tokens=tokens,
            nbytes=sum(piece.nbytes for piece in chain),
            own_bytes=sum(piece.nbytes for piece in own),
            used=max(piece.used for piece in chain),
            files=tuple(piece.path for piece in own),
        )


def _chain(last: PieceFile, by_end: dict[str, PieceFile]) -> list[PieceFile]:
    chain = [last]
    while chain[-1].start and (previous := by_end.get(chain[-1].before)) is not None:
        if previous.start >= chain[-1].start:
            break
        chain.append(previous)
    return chain[::-1]


def _read_last(piece: PieceFile) -> tuple[int, str]:
    """How many tokens a prompt has, and how it reads, by the header of its last piece."""
    try:
        with piece.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            metadata = json.loads(file.read(min(length, 1 << 24)))["__metadata__"]
        return int(metadata["end"]), str(metadata["what"])
    except (OSError, ValueError, KeyError, TypeError):
        return piece.start, "(damaged)"


def remove(found: Sequence[Entry]) -> int:
    """Removes what only these prompts need, and all of it where they need it together; returns the bytes."""
    freed = 0
    for entry in found:
        # Anew for each: what two of them share belongs to the last one alone.
        current = next((e for e in _entries_of(entry.folder) if e.name == entry.name), None)
        for path in () if current is None else current.files:
            with contextlib.suppress(OSError):
                freed += path.stat().st_size
                path.unlink()
    for folder in {entry.folder for entry in found}:
        if not list_pieces(folder):
            shutil.rmtree(folder, ignore_errors=True)
    return freed


def total_bytes(root: Path | None = None) -> int:
    """Of all kept prompts of all models."""
    return sum(piece.nbytes for folder in model_folders(root) for piece in list_pieces(folder))


class Room:
    """The bound, while one prompt is being written: makes room by removing what was used least recently."""

    def __init__(self, most_bytes: int, root: Path | None = None) -> None:
        root = prompts_folder() if root is None else root
        self.pieces = sorted((p for folder in model_folders(root) for p in list_pieces(folder)), key=lambda p: p.used)
        self.taken = sum(piece.nbytes for piece in self.pieces)
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.bound = min(most_bytes, int((shutil.disk_usage(root).free + self.taken) * FREE_SHARE))
        for folder in model_folders(root):
            for partial in folder.glob("*.partial"):
                with contextlib.suppress(OSError):
                    if time.time() - partial.stat().st_mtime > STALE_PARTIAL_S:
                        partial.unlink()

    def make(self, nbytes: int, keep: set[Path]) -> bool:
        """Room for `nbytes` more; False where only files of `keep` could go for it. They count from here on."""
        while self.taken + nbytes > self.bound:
            goes = next((piece for piece in self.pieces if piece.path not in keep), None)
            if goes is None:
                return False
            self.pieces.remove(goes)
            goes.path.unlink(missing_ok=True)
            self.taken -= goes.nbytes
        self.taken += nbytes
        return True


def touch(paths: Sequence[Path]) -> None:
    """Marks the pieces of a prompt as used now; of pieces used together the last ones go first."""
    now = time.time_ns()
    for number, path in enumerate(paths):
        with contextlib.suppress(OSError):
            os.utime(path, ns=(now - number * 1000, now - number * 1000))


def require_entries(names: Sequence[str], known: Sequence[Entry]) -> list[Entry]:
    """The entries that these names (or their beginnings) mean. Raises UsageError for one that means none or several."""
    found = []
    for name in names:
        matching = [entry for entry in known if entry.name.startswith(name)]
        if len(matching) != 1:
            many = f"{len(matching)} prompts begin" if matching else "no kept prompt begins"
            raise UsageError(f"{many} with {name!r}", hint="`glm4run cache ls` shows the names")
        found += matching
    return found
