"""The packed model against its source: the part of the report that has to run both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4run.evaluation import compare
from glm4run.loading import DTYPES
from glm4run.text_windows import Cut, read_text

DEFAULT_WINDOWS = 16


@dataclass(frozen=True)
class Measure:
    """On which text, over how many windows of how many tokens; in which of `DTYPES`, or "auto"."""

    text: Path
    windows: int = DEFAULT_WINDOWS
    context: int = 512
    dtype: str = "auto"
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        assert self.dtype == "auto" or self.dtype in DTYPES


def measure(packed: Path, source: Path, wanted: Measure) -> dict[str, Any]:
    """Perplexity of both, KL divergence and same-top-1: the keys of `evaluation.Evaluation.as_report`."""
    from glm4run import load_model

    text = read_text(wanted.text)
    ours = load_model(packed, dtype=wanted.dtype, context_len=wanted.context)
    reference = load_model(source, dtype=wanted.dtype, context_len=wanted.context)
    cut = Cut(wanted.context, windows=wanted.windows)
    return compare(ours, reference, text, cut, progress=wanted.progress).as_report()
