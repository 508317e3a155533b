"""A text as the windows of tokens that an evaluation feeds, and which of their tokens it scores.

Two ways of cutting, both the field's own:

* without a stride, as llama.cpp's `perplexity` does: windows side by side, the first half of each is context and the
  tokens behind it are scored, so that each has at least half a window before it; a last window that is not full is
  left out;
* with a stride, as Hugging Face's guide does: windows advance by it and overlap, each scores what no earlier one did,
  and the last may be short.

Every window begins with the family's `[gMASK]<sop>`, as every text that these models have seen does, where the
vocabulary has it. The prefix counts as part of the window and is never scored.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glm4run.errors import UsageError

DEFAULT_CONTEXT = 512


@dataclass(frozen=True)
class Text:
    """What is evaluated on. `sha256` is that of the file's bytes."""

    name: str
    content: str
    sha256: str


@dataclass(frozen=True)
class Window:
    """Token ids, prefix included; those from position `first` on are scored."""

    ids: tuple[int, ...]
    first: int

    @property
    def scored(self) -> int:
        return len(self.ids) - self.first


@dataclass(frozen=True)
class Cut:
    """How a text is cut: tokens of a window, and by how many text tokens the next one is ahead."""

    context: int = DEFAULT_CONTEXT
    stride: int | None = None  # None: side by side, the second half scored
    windows: int | None = None  # at most so many
    max_tokens: int | None = None  # of the text, at most


def read_text(path: Path) -> Text:
    """A file that `decode_text` takes. Raises UsageError where there is no such file, or it is no text."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", hint="give a text file in UTF-8") from error
    return decode_text(path.name, raw)


def decode_text(name: str, raw: bytes) -> Text:
    """UTF-8, of which the last character may be cut in two (a file's first so many bytes): it is then left out.

    Raises:
        UsageError: it is no text.
    """
    try:
        content = codecs.getincrementaldecoder("utf-8")().decode(raw)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}",
            hint="convert it, for example with `iconv -t utf-8`",
        ) from error
    return Text(name, content, hashlib.sha256(raw).hexdigest())


def cut_windows(ids: Sequence[int], prefix: Sequence[int], cut: Cut) -> list[Window]:
    """The windows of a text's `ids`, each behind `prefix`.

    Raises:
        UsageError: the sizes make no sense, or the text is too short to score anything.
    """
    room = cut.context - len(prefix)
    if room < 4:
        raise UsageError(f"a context of {cut.context} tokens is too small to evaluate in", hint="use --ctx 512")
    most = room if prefix else room - 1  # without a prefix nothing comes before a window's first token
    if cut.stride is not None and not 0 < cut.stride <= most:
        raise UsageError(
            f"a stride of {cut.stride} tokens does not fit a window of {cut.context}", hint=f"give 1 to {most}"
        )
    ids = ids[: cut.max_tokens]
    windows = _side_by_side(ids, tuple(prefix), cut) if cut.stride is None else _strided(ids, tuple(prefix), cut)
    windows = windows[: cut.windows]
    if sum(window.scored for window in windows) < 2:
        raise UsageError(
            f"the text has {len(ids)} tokens, too few for a window of {cut.context}",
            hint="give a longer text or a smaller --ctx",
        )
    return windows


def _side_by_side(ids: Sequence[int], prefix: tuple[int, ...], cut: Cut) -> list[Window]:
    room = cut.context - len(prefix)
    starts = range(0, len(ids) - room + 1, room)
    return [Window((*prefix, *ids[start : start + room]), cut.context // 2 + 1) for start in starts]


def _strided(ids: Sequence[int], prefix: tuple[int, ...], cut: Cut) -> list[Window]:
    assert cut.stride is not None
    room, windows = cut.context - len(prefix), []
    done = 0 if prefix else 1
    for start in range(0, len(ids), cut.stride):
        end = min(start + room, len(ids))
        if end > done:
            windows.append(Window((*prefix, *ids[start:end]), len(prefix) + done - start))
        done = end
        if end == len(ids):
            break
    return windows
