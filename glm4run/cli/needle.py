"""How `glm4run eval --needle` asks, and its grid as a chart and as JSON."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4run.cli.console import note, talk, token_progress, write_json, write_text
from glm4run.memory import tokens_text
from glm4run.text_windows import Text, read_text

if TYPE_CHECKING:
    from glm4run.generate import LoadedModel
    from glm4run.needle import Grid, Score

COLOURS = ((0.9, "green"), (0.6, "yellow"), (0.3, "dark_orange"), (0.0, "red"))


def haystack(path: Path | None) -> Text:
    """The user's text, or the calibration text of `quantize`, which was written for this project."""
    if path is not None:
        return read_text(path)
    from glm4run_quantize.calibration import built_in_text

    return built_in_text()


def run(
    loaded: LoadedModel,
    text: Text,
    *,
    lengths: tuple[int, ...],
    depths: tuple[int, ...],
    count: int,
    seed: int,
    score: Score,
    as_json: bool,
) -> None:
    """Searches and prints."""
    from glm4run.needle import search

    started = time.perf_counter()
    with token_progress("searching", "prompts") as progress:
        grid = search(loaded, text, lengths=lengths, depths=depths, count=count, seed=seed, progress=progress)
    seconds = time.perf_counter() - started
    if grid.repeats:
        note(f"{text.name} has {grid.haystack_tokens} tokens and is repeated to {grid.lengths[-1]}")
    if as_json:
        write_json(_as_json(grid, loaded, text, count, seed, score, seconds))
    else:
        _print(grid, loaded, count, score)
    share = grid.computed_tokens / grid.prompt_tokens
    note(f"{grid.prompt_tokens} prompt tokens, {grid.computed_tokens} of them computed ({share:.0%}), {seconds:.0f} s")
    if not grid.retrieves(score):
        talk(
            f"notice: {loaded.name} does not find a needle even without a haystack, so the grid says nothing about its "
            "context" + ("; --score logprob shows weaker signs" if score == "answer" else ""),
            style="yellow",
            only="notice:",
        )


def _as_json(
    grid: Grid, loaded: LoadedModel, text: Text, count: int, seed: int, score: Score, seconds: float
) -> dict[str, Any]:
    from glm4run.needle import summarize

    return {
        "model": loaded.name,
        "backend": loaded.backend_detail,
        "kv_bits": str(loaded.memory_run.kv_format),
        "context": loaded.plan.context_len,
        "score": score,
        "retrieves": grid.retrieves(score),
        "lengths": list(grid.lengths),
        "depths": list(grid.depths),
        "needles": count,
        "seed": seed,
        "cells": [{**cell.as_json(), "score": round(cell.share(score), 4)} for cell in grid.cells],
        "without_haystack": summarize(grid.bare),
        "without_needle": summarize(grid.absent),
        "haystack": {
            "name": text.name,
            "sha256": text.sha256,
            "tokens": grid.haystack_tokens,
            "repeated": grid.repeats,
        },
        "prompt_tokens": grid.prompt_tokens,
        "computed_tokens": grid.computed_tokens,
        "seconds": round(seconds, 2),
    }


def _print(grid: Grid, loaded: LoadedModel, count: int, score: Score) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text as Words

    from glm4run.needle import share

    what = "answers with the code" if score == "answer" else "of the code's tokens the likeliest"
    table = Table()
    table.add_column("depth", justify="right")
    for length in grid.lengths:
        table.add_column(tokens_text(length), justify="right")
    cells = {(cell.length, cell.depth): cell.share(score) for cell in grid.cells}
    for depth in grid.depths:
        row = [Words(f"{depth} %")]
        for length in grid.lengths:
            value = cells[length, depth]
            colour = next(colour for least, colour in COLOURS if value >= least)
            row.append(Words(f"{value:.0%}", style=f"bold {colour}"))
        table.add_row(*row)
    Console(file=sys.stdout, highlight=False).print(table)
    write_text(
        f"{loaded.name}: {what}, {count} needle{'s' if count > 1 else ''} a cell; without a haystack "
        f"{share(grid.bare, score):.0%}, without the needle {share(grid.absent, score):.0%}\n"
    )
