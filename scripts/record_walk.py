#!/usr/bin/env python3
"""Records a first-time user's walk through the chat as `docs/images/chat.svg`, with the embedded demo model.

    python scripts/record_walk.py

A real `glm4run chat` runs in a pseudo-terminal; what its screen shows in the end, scrollback included, rich draws.
"""

from __future__ import annotations

import re
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from tests.terminal import CTRL_D, ENTER, Terminal  # noqa: E402

ROWS, COLUMNS = 30, 88
TARGET = REPO / "docs" / "images" / "chat.svg"
STATUS = r"(?s)tok/s.{0,80}?context\s+\d+/\d+"
DIM = "8a8a8a"
WALK = (
    ("How do I quantize a model to 4 bits?", STATUS),
    ("你好", STATUS),
    ("/undo", "brings it back"),
    ("/ctx", "nothing is dropped"),
    ("/save first", "saved as first"),
    ("/help", "//like"),
)


class DimScreen(pyte.HistoryScreen):  # type: ignore[misc]  # the package has no types
    """pyte knows no dim text; it is shown grey."""

    def select_graphic_rendition(self, *attributes: int, **more: Any) -> None:
        super().select_graphic_rendition(*[90 if value == 2 else value for value in attributes], **more)


def style_of(cell: Any) -> Style:
    """How a cell of the emulator's screen looks."""
    colour = None if cell.fg == "default" else f"#{DIM}" if cell.fg.startswith("bright") else cell.fg
    if colour is not None and re.fullmatch("[0-9a-f]{6}", colour):
        colour = f"#{colour}"
    return Style(color={"brown": "yellow"}.get(str(colour), colour), bold=cell.bold, italic=cell.italics)


def as_text(line: Any) -> Text:
    """One line of the emulator's screen, in runs of one style."""
    text = Text()
    for style, cells in groupby((line[column] for column in range(COLUMNS)), key=style_of):
        text.append("".join(cell.data for cell in cells), style)
    text.rstrip()
    return text


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        places = {f"XDG_{name}_HOME": str(Path(home) / name) for name in ("STATE", "CACHE", "DATA")}
        terminal = Terminal(["glm4run", "chat", "demo"], places, rows=ROWS, columns=COLUMNS)
        terminal.screen = DimScreen(COLUMNS, ROWS, history=1000, ratio=0.01)
        terminal.screen.write_process_input = lambda data: terminal.child.send(data)
        terminal._stream = pyte.ByteStream(terminal.screen)
        with terminal:
            terminal.wait_for_prompt()
            for line, answer in WALK:
                terminal.type(line + ENTER)
                terminal.wait_for(answer)
                terminal.wait_for_prompt()
            terminal.type(CTRL_D)
            terminal.end()
        screen = terminal.screen
        lines = [*screen.history.top, *(screen.buffer[row] for row in range(ROWS))]
    console = Console(record=True, width=COLUMNS, file=sys.stderr)
    console.print(Text("$ glm4run chat demo", style="bold"))
    shown = [as_text(line) for line in lines]
    while shown and not shown[-1].plain:
        shown.pop()
    for text in shown:
        console.print(text, no_wrap=True, crop=True)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    svg = console.export_svg(title="glm4run", unique_id="glm4run-chat")
    # The picture must not load fonts from elsewhere: every reader has a monospaced one.
    svg = re.sub(r"<!--.*?-->", "", re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL), flags=re.DOTALL)
    TARGET.write_text("\n".join(line.rstrip() for line in svg.splitlines() if line.strip()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
