"""`glm4run cache`: which prompts are kept on disk, and removing them. Needs no model and no torch."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glm4run.cli.console import note, write_json
from glm4run.errors import UsageError

if TYPE_CHECKING:
    from glm4run.prompt_store import Entry

ACTIONS = ("ls", "rm")


def cache(
    action: Annotated[str, typer.Argument(help="ls lists them, rm removes them")] = "ls",
    names: Annotated[list[str] | None, typer.Argument(help="With rm: names that ls shows, or their beginnings")] = None,
    model: Annotated[str | None, typer.Option("-m", "--model", help="Only those of a model of this name")] = None,
    everything: Annotated[bool, typer.Option("--all", help="With rm: all of them")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document")] = False,
) -> None:
    """List or remove the prompts that are kept on disk so that they are not read twice."""
    from glm4run.prompt_store import entries, prompts_folder, remove, require_entries, total_bytes

    if action not in ACTIONS:
        raise UsageError(f"cache {action!r} is nothing that can be done", hint=f"one of: {', '.join(ACTIONS)}")
    known = [entry for entry in entries() if model is None or entry.model == model]
    if action == "ls":
        if names or everything:
            raise UsageError("`cache ls` takes no names and no --all", hint="`glm4run cache rm NAME` removes")
        _list(known, total_bytes(), str(prompts_folder()), as_json=as_json)
        return
    if not names and not everything and model is None:
        raise UsageError(
            "nothing to remove was named", hint="give names that `glm4run cache ls` shows, --model or --all"
        )
    if names and everything:
        raise UsageError("names and --all were given", hint="leave one of the two out")
    chosen = require_entries(names, known) if names else known
    freed = remove(chosen)
    if as_json:
        write_json({"removed": [entry.name for entry in chosen], "bytes": freed})
    else:
        note(f"{len(chosen)} prompt{'s' if len(chosen) != 1 else ''} removed, {_size(freed)} freed")


def _list(known: list[Entry], total: int, folder: str, *, as_json: bool) -> None:
    if as_json:
        write_json({"folder": folder, "bytes": total, "prompts": [entry.as_json() for entry in known]})
        return
    if known:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table()
        for column in ("name", "model", "tokens", "size", "used", "prompt"):
            table.add_column(column, justify="right" if column in ("tokens", "size") else "left")
        for entry in known:
            shown: list[Any] = [entry.name, escape(entry.model), f"{entry.tokens:,}", _size(entry.nbytes)]
            table.add_row(*shown, _ago(time.time() - entry.used), escape(entry.what))
        Console(file=sys.stdout, highlight=False).print(table)
    note(f"{len(known)} kept prompt{'s' if len(known) != 1 else ''}, {_size(total)} in {folder}")


def _size(nbytes: int) -> str:
    from rich.filesize import decimal

    return decimal(nbytes)


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"
