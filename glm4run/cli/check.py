"""`glm4run check`: are these files whole and consistent?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from glm4run.cli.console import talk, write_json
from glm4run.errors import EXIT_ERROR


def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document")] = False,
) -> int:
    """Check headers, config, scales and tokenizer of a model folder; takes seconds and loads no weights."""
    from glm4run.checking import check_folder  # with numpy, which the other commands start without

    problems = check_folder(folder)
    if as_json:
        keys = ("file", "tensor", "what", "hint")
        listed = [{key: asdict(problem)[key] for key in keys} for problem in problems]
        write_json({"ok": not problems, "problems": listed})
        return EXIT_ERROR if problems else 0
    for problem in problems:
        where = ": ".join(part for part in (problem.file, problem.tensor) if part)
        talk(f"problem: {where + ': ' if where else ''}{problem.what}", style="bold red", only="problem:")
        if problem.hint:
            talk(f"hint: {problem.hint}", style="cyan", only="hint:")
    if not problems:
        talk(f"{folder}: whole and consistent", style="green")
    return EXIT_ERROR if problems else 0
