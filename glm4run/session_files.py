"""Sessions on disk: a journal of what was said, one JSON record a line, and the cache beside it.

A record is appended and synced as soon as it is true, so a kill loses at most what was being said. Knows files and
records; must not know a terminal. One process at a time holds a session.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from glm4run.conversation import Conversation, Record
from glm4run.errors import CheckpointError, UsageError
from glm4run.user_files import user_path

SESSIONS_VARIABLE = "GLM4RUN_SESSIONS"
JOURNAL_NAME, KV_NAME = "conversation.jsonl", "kv"
FORMAT_VERSION = 1
UNNAMED_CACHE_BYTES = 4 << 30  # of sessions that were never given a name; beyond it the oldest keep their text only
_UNNAMED = re.compile(r"\d{4}-\d\d-\d\d-\d{6}(-\d+)?")
VALUE_KEYS = ("model", "model_folder", "fingerprint", "system", "params", "overflow", "format")
_NAME = re.compile(r"[\w][\w.-]{0,99}")


@dataclass(frozen=True)
class Summary:
    """What a list of sessions shows of one."""

    name: str
    folder: Path
    changed: float  # seconds since the epoch
    model: str
    turns: int
    first_words: str
    cache_bytes: int


@dataclass
class Saved:
    """What a journal says: the conversation, and the last value of everything else."""

    conversation: Conversation
    values: Record  # model, model_folder, fingerprint, system, params, overflow, format
    problem: str | None = None  # a line that could not be read; all before it is here


def sessions_folder() -> Path:
    """`$GLM4RUN_SESSIONS`, else `glm4run/sessions` in the user's data folder (XDG)."""
    return user_path("data", "sessions", SESSIONS_VARIABLE)


def session_path(name: str) -> Path:
    """The folder of a session called `name`. Raises UsageError for what is no name."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name for a session", hint="use letters, digits, dots, dashes and underscores, no slash"
        )
    return sessions_folder() / name


def new_name() -> str:
    """A name that is free: the date and the time."""
    stem = time.strftime("%Y-%m-%d-%H%M%S")
    name, count = stem, 2
    while session_path(name).exists():
        name, count = f"{stem}-{count}", count + 1
    return name


def _folders() -> list[tuple[float, Path]]:
    """When each session was changed, and its folder; the last one first. Reads no journal."""
    root = sessions_folder()
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        with contextlib.suppress(OSError):  # no session, or one that another process is just moving
            found.append(((folder / JOURNAL_NAME).stat().st_mtime, folder))
    return sorted(found, reverse=True)


def latest() -> str:
    """The session that was changed last. Raises UsageError where there is none."""
    found = _folders()
    if not found:
        raise UsageError("there is no saved session", hint=f"they are kept under {sessions_folder()}")
    return found[0][1].name


def list_sessions() -> list[Summary]:
    """Every session with at least one message, the last one first. Unreadable ones are left out."""
    found = []
    for changed, folder in _folders():
        try:
            saved = read_journal(folder)
        except CheckpointError:
            continue
        if saved.conversation.turns:
            path = saved.conversation.path()
            words = next((turn.message.content for turn in path if turn.message.role == "user"), "")
            model = str(saved.values.get("model", "?"))
            found.append(Summary(folder.name, folder, changed, model, len(path), words, _cache_bytes(folder)))
    return found


def _cache_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / KV_NAME).glob("*.safetensors"))


def prune_unnamed() -> list[str]:
    """Removes the cache (never the text) of the oldest unnamed sessions beyond a bound; returns their names."""
    total, pruned = 0, []
    for _, folder in _folders():
        if not _UNNAMED.fullmatch(folder.name):
            continue
        nbytes = _cache_bytes(folder)
        total += nbytes
        if total > UNNAMED_CACHE_BYTES and nbytes:
            shutil.rmtree(folder / KV_NAME, ignore_errors=True)
            pruned.append(folder.name)
    return pruned


def read_journal(folder: Path) -> Saved:
    """Replays a session's journal. What stands behind an unreadable line is not taken, and `problem` says so.

    Raises:
        CheckpointError: there is no journal, or it is of a later version.
    """
    path = folder / JOURNAL_NAME
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{folder} is no saved session: {error}", hint="/sessions lists them") from error
    saved = Saved(Conversation(), {})
    for number, record in enumerate(_records(lines[:-1]), 1):  # behind the last line end: what a kill cut off
        try:
            if record is None:
                raise ValueError("not a JSON object")
            saved.conversation.apply(record)
        except (KeyError, TypeError, ValueError) as error:
            saved.problem = f"{path}, line {number} is damaged ({error}); what stands behind it was not read"
            break
        version = record.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version}, this is {FORMAT_VERSION}", hint="use a newer glm4run"
            )
        saved.values |= {k: v for k, v in record.items() if k in VALUE_KEYS}
    return saved


def _records(lines: list[bytes]) -> Iterator[Record | None]:
    for line in lines:
        try:
            data = json.loads(line)
        except ValueError:
            data = None
        yield data if isinstance(data, dict) else None


class SessionFiles:
    """An open session: appends records, and holds the lock. Nothing is on disk before the first record."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._file: BinaryIO | None = None
        self._waiting: list[Record] = []  # before the first turn a session is not worth a folder
        if self.folder.is_dir():
            self._open()

    @property
    def folder(self) -> Path:
        return session_path(self.name)

    @property
    def is_named(self) -> bool:
        """Whether the user gave the name."""
        return _UNNAMED.fullmatch(self.name) is None

    def __enter__(self) -> SessionFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, record: Record) -> None:
        """Adds a record. It is on the disk when this returns, but for what precedes the first turn."""
        if self._file is None and "turn" not in record:
            self._waiting.append(record)
            return
        self.flush()
        self._write(record)

    def flush(self) -> None:
        """Creates the session if it is not there yet."""
        if self._file is None:
            self._open()
            for waiting in ({"format_version": FORMAT_VERSION}, *self._waiting):
                self._write(waiting)
            self._waiting = []

    def rename(self, name: str) -> None:
        """Another name. Raises UsageError where it is taken."""
        target = session_path(name)
        if name != self.name and target.exists():
            raise UsageError(f"there is a session {name!r} already", hint="choose another name; /sessions lists them")
        self.flush()
        self.folder.rename(target)
        self.name = name

    def close(self) -> None:
        """Gives the session free for others."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.folder / JOURNAL_NAME
        file = path.open("r+b" if path.exists() else "w+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise UsageError(
                f"session {self.name!r} is open in another chat", hint="leave that one first, or start a new session"
            ) from None
        whole = file.read()
        file.truncate(whole.rfind(b"\n") + 1)  # what a kill cut off in the middle of a line
        file.seek(0, os.SEEK_END)
        self._file = file

    def _write(self, record: Record) -> None:
        assert self._file is not None
        self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
