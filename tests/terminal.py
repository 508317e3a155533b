"""A program in a real pseudo-terminal, and what a terminal emulator shows of it, scrollback included."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pexpect
import pyte

REPO = Path(__file__).resolve().parents[1]
PATIENCE_S = 120  # a loaded machine may stop everything for a while; nothing waits this long when it works
PASTE_START, PASTE_END = "\x1b[200~", "\x1b[201~"
CTRL_C, CTRL_D, BACKSPACE, ENTER, ALT_ENTER = "\x03", "\x04", "\x7f", "\r", "\x1b\r"


class Terminal:
    """`python -m MODULE ...` behind a pseudo-terminal. A context manager: the program is ended with it."""

    def __init__(
        self,
        words: list[str],
        environment: Mapping[str, str],
        *,
        rows: int = 24,
        columns: int = 80,
        term: str = "xterm",
    ) -> None:
        variables = {
            **{k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")},
            "TERM": term,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'quantize'}",
            "LANG": "C.UTF-8",
            **environment,
        }
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", *words],
            env=variables,
            cwd=str(REPO),
            dimensions=(rows, columns),
            timeout=PATIENCE_S,
            # A test run in the background of a script ignores Ctrl-C, and its children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        self.child.delaybeforesend = None
        self.screen: Any = pyte.HistoryScreen(columns, rows, history=100_000, ratio=0.01)
        # The emulator answers what programs ask a terminal, such as where the cursor is.
        self.screen.write_process_input = lambda data: self.child.send(data)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self._seen = 0  # of `raw`: what an earlier wait has gone past

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.child.close(force=True)

    def type(self, text: str) -> None:
        """Keys as a terminal sends them."""
        self.child.send(text)

    def paste(self, text: str) -> None:
        """A paste as a terminal sends it: bracketed, line ends as carriage returns."""
        self.child.send(PASTE_START + text.replace("\n", "\r") + PASTE_END)

    def wait_for(self, pattern: str) -> str:
        """Until new output (without escapes) matches; later waits look behind it. Returns what came until then."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            new = plain(self.raw[self._seen :])
            found = re.search(pattern, new)
            if found is not None:
                # Go past the match itself: as many bytes as are needed to show it.
                low, high = self._seen, len(self.raw)
                while low < high:
                    middle = (low + high) // 2
                    if re.search(pattern, plain(self.raw[self._seen : middle])):
                        high = middle
                    else:
                        low = middle + 1
                self._seen = low
                return new[: found.end()]
            if time.monotonic() > deadline:
                raise AssertionError(f"{pattern!r} did not come; there is:\n{self.text()}")
            self._pump(pattern)

    def wait_for_prompt(self) -> None:
        """Until the cursor stands behind an empty prompt."""
        deadline = time.monotonic() + PATIENCE_S
        while self.screen.display[self.screen.cursor.y].rstrip() != ">" or self.screen.cursor.x != 2:
            if time.monotonic() > deadline:
                raise AssertionError(f"no prompt came; there is:\n{self.text()}")
            self._pump("the prompt")
        self._seen = len(self.raw)

    def _pump(self, pattern: str) -> None:
        try:
            part = self.child.read_nonblocking(1 << 16, timeout=1)
        except pexpect.TIMEOUT:
            return
        except pexpect.EOF:
            raise AssertionError(f"the program ended before {pattern!r} came; there is:\n{self.text()}") from None
        self.raw += part
        self._stream.feed(part)

    def end(self) -> int | None:
        """Reads to the end of the program; its exit code, None if a signal ended it."""
        while True:
            try:
                part = self.child.read_nonblocking(1 << 16, timeout=PATIENCE_S)
            except pexpect.EOF:
                break
            self.raw += part
            self._stream.feed(part)
        self.child.wait()
        code: int | None = self.child.exitstatus
        return code

    def kill(self) -> None:
        """As `kill -9` does."""
        self.child.kill(signal.SIGKILL)
        self.child.wait()

    def resize(self, rows: int, columns: int) -> None:
        """Another size of the window; the program gets its signal."""
        lost, line = max(0, self.screen.lines - rows), self.screen.cursor.y
        self.screen.resize(rows, columns)  # lines go at the top, but the cursor stays on a row of the same number
        self.screen.cursor.y = max(0, line - lost)
        self.child.setwinsize(rows, columns)

    def text(self) -> str:
        """All that the terminal has shown: what scrolled away, then the screen."""
        gone = ["".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*gone, *self.screen.display])


def plain(raw: bytes) -> str:
    """Output without escapes and carriage returns."""
    text = raw.decode("utf-8", errors="ignore")
    text = re.sub(r"\x1b\][^\x07\x1b]*(\x07|\x1b\\)|\x1b\[[0-9;?>=]*[ -/]*[@-~]|\x1b[@-Z\\-_=>78c]", "", text)
    return text.replace("\r", "")
