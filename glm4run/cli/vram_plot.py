"""Memory against context: a chart in the terminal, and the same as SVG or PNG where matplotlib is installed."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from glm4run.cli.vram_text import choice_text, wrap
from glm4run.errors import Glm4RunError
from glm4run.memory import GIB, tokens_text
from glm4run.user_files import replace_file
from glm4run.vram.answers import Question

CARD_SIZES_GIB = (8, 12, 16, 24, 32, 48, 80)
HEIGHT = 18  # lines of the chart
POINTS = 128  # contexts of an image
LABEL_GAP = 0.045  # of an image's height, between the labels beside its curves
KV_LINES = {16: "-", 8: "--", 4: ":"}
MARGIN = 8  # columns of the scale on the left
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def chart(question: Question, width: int) -> Iterator[str]:
    """A line of letters for each choice, dashes at the common card sizes and at what is free of the device."""
    columns = max(16, min(width, 120) - MARGIN)
    limit = max(question.contexts)
    contexts = [max(1, limit * (i + 1) // columns) for i in range(columns)]
    curves = [_curve(question, i, contexts) for i in range(len(question.choices))]
    lowest, highest = _bounds(question, curves)
    free = question.free_bytes / GIB
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
    free = question.free_bytes / GIB
    if 0.5 * lowest <= free <= 1.5 * highest:
        lowest, highest = min(lowest, free), max(highest, free)
    return lowest, max(highest, 1.1 * lowest)


def _line_of(gib: float, lowest: float, highest: float) -> int:
    share = (gib - lowest) / (highest - lowest)
    return min(HEIGHT - 1, max(0, round((1 - share) * (HEIGHT - 1))))


def write_image(question: Question, path: Path, kind: str) -> None:
    """The chart as `kind` (svg or png); whatever was at `path` is replaced once the new one is complete.

    Raises:
        Glm4RunError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
        figure_module: Any = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise Glm4RunError(
            f"a chart as {kind.upper()} needs matplotlib", hint="pip install 'glm4run[plot]', or use --plot"
        ) from None
    image = io.BytesIO()
    # The same question gives the same file: no date, no random names inside.
    with matplotlib.rc_context({"svg.hashsalt": "glm4run", "svg.fonttype": "none"}):
        figure = figure_module.Figure(figsize=(9, 5.4), dpi=130, layout="constrained")
        _draw(question, figure.add_subplot())
        figure.savefig(image, format=kind, metadata={"Date": None} if kind == "svg" else None)
    try:
        replace_file(path, image.getvalue())
    except OSError as error:
        raise Glm4RunError(f"cannot write {path}: {error.strerror or error}", hint="another folder?") from error


def _draw(question: Question, axes: Any) -> None:
    """The curves with their names at their ends, ticks and thin lines at the card sizes, what is free of the device."""
    limit, target = max(question.contexts), question.target
    contexts = sorted({1, *(max(1, limit * (i + 1) // POINTS) for i in range(POINTS))})
    curves = [_curve(question, index, contexts) for index in range(len(question.choices))]
    lowest, highest = _bounds(question, curves)
    margin = 0.06 * (highest - lowest)
    bottom, top = max(0.0, lowest - margin), highest + margin
    weights = list(dict.fromkeys((choice.label, choice.head_bits) for choice in question.choices))
    labels = []
    for choice, curve in zip(question.choices, curves, strict=True):
        color = f"C{weights.index((choice.label, choice.head_bits)) % 10}"
        axes.plot(contexts, curve, color=color, linestyle=KV_LINES[choice.kv_bits])
        labels.append((curve[-1], choice_text(choice, question.choices), color))
    free = question.free_bytes / GIB
    if bottom <= free <= top:
        axes.axhline(free, color="black", linewidth=1.2, zorder=1)
        labels.append((free, f"{free:.2f} GiB to take", "black"))
    sizes = [size for size in CARD_SIZES_GIB if bottom <= size <= top]
    for size in sizes:
        axes.axhline(size, color="0.85", linewidth=0.8, zorder=0)
    if len(sizes) > 1:
        axes.set_yticks(sizes)
        axes.yaxis.set_minor_locator(importlib.import_module("matplotlib.ticker").MultipleLocator(1))
    axes.set_xlim(0, limit)
    axes.set_ylim(bottom, top)
    step = max(1, limit // 8)
    ticks = [*range(0, limit - step // 2, step), limit]
    axes.set_xticks(ticks, ["0", *(tokens_text(tick) for tick in ticks[1:])])
    for y, (at, text, color) in zip(_apart([label[0] for label in labels], top - bottom), labels, strict=True):
        axes.annotate(
            text,
            xy=(limit, at),
            xytext=(limit * 1.03, y),
            color=color,
            verticalalignment="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 0},
        )
    star = "\n* estimated: this version does not run it yet" if any(c.estimated for c in question.choices) else ""
    axes.set_xlabel(f"context in tokens{star}")
    axes.set_ylabel("GiB at the peak; lines at common card sizes" if sizes else "GiB at the peak")
    axes.set_title(f"{question.subject.name} on {target.name}: {free:.2f} GiB to take", loc="left", fontsize="medium")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _apart(values: Sequence[float], height: float) -> list[float]:
    """Where labels of `values` go so that none covers another: in their order, as near as the gaps allow."""
    gap = LABEL_GAP * height
    placed = list(values)
    order = sorted(range(len(values)), key=lambda index: values[index])
    for _ in range(8 * len(values)):  # neighbours that are too near push each other away
        for lower, upper in pairwise(order):
            missing = gap - (placed[upper] - placed[lower])
            if missing > 1e-9:
                placed[lower] -= missing / 2
                placed[upper] += missing / 2
    return placed
