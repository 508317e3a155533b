"""When an answer ends before the model says so: stop strings, and loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LOOP_LONGEST_PERIOD = 64  # tokens
LOOP_REPEATS = 6
LOOP_TOKENS = 96  # a loop is at least this long, so that short runs ("-----", "1 1 1 1") are not taken for one


class StopStrings:
    """Holds text back while it may still become a stop string; a stop string is never shown."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may be shown, the stop string that was found or None). After a find, nothing more is shown."""
        if not self.stops:
            return text, None
        self.held += text
        found = [(self.held.find(stop), stop) for stop in self.stops if stop in self.held]
        if found:
            position, stop = min(found)
            shown, self.held = self.held[:position], ""
            return shown, stop
        kept = max(self._overlap(stop) for stop in self.stops)
        shown, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        return shown, None

    def flush(self) -> str:
        """What is still held back, once no more text will come."""
        held, self.held = self.held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the held text are a beginning of `stop`."""
        longest = min(len(self.held), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class Loop:
    """A tail that is one n-gram over and over: `period` tokens, first seen at `start`."""

    start: int
    period: int


def find_loop(tokens: Sequence[int]) -> Loop | None:
    """The loop that the tail is: one n-gram (up to `LOOP_LONGEST_PERIOD` tokens) at least `LOOP_REPEATS` times over."""
    if len(tokens) < LOOP_TOKENS:
        return None
    for period in range(1, LOOP_LONGEST_PERIOD + 1):
        span = max(LOOP_TOKENS, LOOP_REPEATS * period)
        if span > len(tokens):
            return None
        tail = tokens[-span:]
        if tail[period:] == tail[:-period]:
            start = len(tokens) - span
            while start > 0 and tokens[start - 1] == tokens[start - 1 + period]:
                start -= 1
            return Loop(start, period)
    return None


def is_looping(tokens: Sequence[int]) -> bool:
    """Whether the tail is a loop."""
    return find_loop(tokens) is not None
