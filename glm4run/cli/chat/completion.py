"""What Tab offers in a chat: commands, and after a command what it takes. Knows no terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

Words = Callable[[], Iterable[str]]


def complete(text: str, commands: Mapping[str, Words | None]) -> list[tuple[str, int]]:
    """(replacement, how many characters before the cursor it replaces) for the text before the cursor.

    `commands`: each name with its slash, and what may follow; None stands for the names of files.
    """
    if not text.startswith("/") or text.startswith("//") or "\n" in text:
        return []
    name, space, rest = text.partition(" ")
    if not space:
        return [(f"{command} ", len(name)) for command in commands if command.startswith(name)]
    if name not in commands:
        return []
    words = commands[name]
    if words is None:
        return [(path, len(rest)) for path in file_names(rest)]
    return [(word, len(rest)) for word in words() if word.startswith(rest)]


def file_names(start: str) -> list[str]:
    """Paths that begin so; folders end in a slash. Hidden ones only where asked for."""
    folder, name = os.path.split(start)
    try:
        found = sorted(Path(folder or ".").expanduser().iterdir())
    except OSError:
        return []
    return [
        str(Path(folder) / path.name) + ("/" if path.is_dir() else "")
        for path in found
        if path.name.startswith(name) and (name.startswith(".") or not path.name.startswith("."))
    ]
