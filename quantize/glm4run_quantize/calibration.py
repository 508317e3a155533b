"""The text that calibrated methods look at: cut into windows of tokens, of which every eighth is held out.

The built-in text was written for this project: plain facts, questions and answers, and code, in English, Chinese and
some other languages. It is no excerpt of anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from glm4run.errors import UsageError
from glm4run.text_windows import Text, decode_text, read_text
from glm4run.tokenizer import Tokenizer

BUILT_IN = "calibration.txt"
DEFAULT_TOKENS = 32768
WINDOW = 512
HELD_OUT_EVERY = 8  # windows


@dataclass(frozen=True)
class Calibration:
    """ids [W, T]: windows to calibrate on first, then the `held_out` ones."""

    name: str
    sha256: str
    ids: Tensor
    held_out: int

    @property
    def tokens(self) -> int:
        """Tokens to calibrate on."""
        return (self.ids.shape[0] - self.held_out) * self.ids.shape[1]

    def as_json(self) -> dict[str, object]:
        """What `glm4run.json` keeps of it."""
        return {
            "text": {"name": self.name, "sha256": self.sha256},
            "tokens": self.tokens,
            "held_out_tokens": self.held_out * self.ids.shape[1],
        }


def built_in_text() -> Text:
    """The text that is used where the user gives none."""
    return decode_text(f"built-in {BUILT_IN}", (files("glm4run_quantize") / BUILT_IN).read_bytes())


def read_calibration(tokenizer: Tokenizer, path: str | Path | None, tokens: int, window: int = WINDOW) -> Calibration:
    """`tokens` tokens of a UTF-8 text file, spread evenly over it; of the built-in text where `path` is None.

    Each window begins with the model's own prefix, as every prompt does. A text that is shorter gives what it has.
    Raises UsageError where it is no text, or gives fewer than two windows.
    """
    text = built_in_text() if path is None else read_text(Path(path))
    prefix = list(tokenizer.prefix_ids)
    body = window - len(prefix)
    ids = tokenizer.encode(text.content)
    ids = ids[len(prefix) :] if ids[: len(prefix)] == prefix and prefix else ids
    available = len(ids) // body
    if available < 2:
        raise UsageError(
            f"{text.name} has {len(ids)} tokens, calibration takes at least {2 * body}", hint="use a longer text"
        )
    count = min(available, max(2, tokens // window))
    step = (len(ids) - body) / max(1, count - 1)
    starts = [int(i * step) for i in range(count)]
    windows = [prefix + ids[start : start + body] for start in starts]
    held = set(range(HELD_OUT_EVERY - 1, count, HELD_OUT_EVERY)) or {count - 1}
    ordered = [w for i, w in enumerate(windows) if i not in held] + [windows[i] for i in sorted(held)]
    return Calibration(text.name, text.sha256, torch.tensor(ordered), len(held))
