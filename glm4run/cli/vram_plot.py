"""Memory against context: a chart in the terminal, and the same as SVG or PNG where matplotlib is installed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glm4run.cli.vram_text import choice_text, wrap
from glm4run.errors import Glm4RunError
from glm4run.memory import GIB, tokens_text
from glm4run.vram.answers import Question

CARD_SIZES_GIB = (8, 12, 16, 24, 32, 48, 80)
HEIGHT = 18  # lines of the chart
POINTS = 48  # contexts of an image
MARGIN = 8  # columns of the scale on the left
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def chart(question: Question, width: int) -> Iterator[str]:
    """A line of letters for each choice, dashes at the common card sizes and at what is free of the device."""
    columns = max(16, min(width, 120) - MARGIN)
    limit = max(question.contexts)
    contexts = [max(1, limit * (i + 1) // columns) for i in range(columns)]
    curves = [_curve(question, i, contexts) for i in range(len(question.choices))]
    lowest, highest = _bounds(question, curves)
    free = question.target.free_bytes / GIB
    grid = [[" "] * columns for _ in range(HEIGHT)]
    scale = {}
    for size in CARD_SIZES_GIB:
        if lowest <= size <= highest:
            line = _line_of(size, lowest, highest)
            grid[line] = ["-"] * columns
            scale[line] = f"{size}"
    if lowest <= free <= highest:
        line = _line_of(free, lowest, highest)
        grid[line] = ["="] * columns
        scale[line] = f"{free:.1f}"
    for letter, curve in zip(LETTERS, curves, strict=False):
        for column, gib in enumerate(curve):
            grid[_line_of(gib, lowest, highest)][column] = letter
    yield from wrap(f"GiB at the peak against tokens of context, up to {limit}", width)
    for number, cells in enumerate(grid):
        label = scale.get(number, f"{highest:.1f}" if number == 0 else f"{lowest:.1f}" if number == HEIGHT - 1 else "")
        yield f"{label:>{MARGIN - 2}} |{''.join(cells)}"
    middle, end = tokens_text(limit // 2), tokens_text(limit)
    yield " " * (MARGIN - 1) + "0" + middle.rjust(columns // 2 - 1) + end.rjust(columns - columns // 2)
    for letter, choice in zip(LETTERS, question.choices, strict=False):
        yield f"{letter}  {choice_text(choice, question.choices)}"
    yield "-  card sizes"
    yield from wrap(f"=  {free:.2f} GiB, what a run may take of {question.target.name}", width, indent="   ")


def _curve(question: Question, index: int, contexts: Sequence[int]) -> list[float]:
    choice = question.choices[index]
    return [question.plan(choice, context_len).peak_bytes / GIB for context_len in contexts]


def _bounds(question: Question, curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The curves, and the device's free memory where it is not far from them."""
    lowest, highest = min(map(min, curves)), max(map(max, curves))
    free = question.target.free_bytes / GIB
    if 0.5 * lowest <= free <= 1.5 * highest:
        lowest, highest = min(lowest, free), max(highest, free)
    return lowest, max(highest, lowest + 0.5)


def _line_of(gib: float, lowest: float, highest: float) -> int:
    share = (gib - lowest) / (highest - lowest)
    return min(HEIGHT - 1, max(0, round((1 - share) * (HEIGHT - 1))))


def write_image(question: Question, path: Path, kind: str) -> None:
    """The chart as `kind` (svg or png).

    Raises:
        Glm4RunError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        figure_module: Any = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise Glm4RunError(
            f"a chart as {kind.upper()} needs matplotlib", hint="pip install 'glm4run[plot]', or use --plot"
        ) from None
    limit = max(question.contexts)
    contexts = [max(1, limit * (i + 1) // POINTS) for i in range(POINTS)]
    figure = figure_module.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for index, choice in enumerate(question.choices):
        axes.plot(contexts, _curve(question, index, contexts), label=choice_text(choice, question.choices))
    top = axes.get_ylim()[1]
    for size in CARD_SIZES_GIB:
        if size <= top:
            axes.axhline(size, color="0.8", linewidth=0.8, zorder=0)
    axes.axhline(question.target.free_bytes / GIB, color="black", linestyle="--", label=question.target.name)
    axes.set_xlabel("context in tokens")
    axes.set_ylabel("GiB at the peak")
    axes.set_title(question.subject.name)
    axes.legend()
    try:
        figure.savefig(path, format=kind)
    except OSError as error:
        raise Glm4RunError(f"cannot write {path}: {error}") from error
