"""Tool calls in a chat: what may be one is not shown as text, and nothing runs that the user has not allowed."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from glm4run.cli.chat.state import Chat, warn
from glm4run.cli.chat.view import inert
from glm4run.cli.console import note, talk
from glm4run.errors import UsageError
from glm4run.tool_runner import Tool, check_arguments, run_tool

if TYPE_CHECKING:
    from glm4run.tool_calls import ToolCall

DECLINED = "The user did not allow this call."
SHOWN_LINES = 8  # of a tool's output
SHOWN_COLUMNS = 200


class CallHold:
    """Holds an answer back while it may be a call: its first line is, or may become, the name of a declared tool."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._is_open = bool(names)

    def push(self, text: str) -> str:
        """What may be shown."""
        if not self._is_open:
            return text
        self._held += text
        line, newline, _ = self._held.lstrip().partition("\n")
        name = line.strip()
        if name in self._names if newline else any(known.startswith(name) for known in self._names):
            return ""
        return self.rest()

    def rest(self) -> str:
        """What is held back, when it is clear that it is no call."""
        self._is_open = False
        held, self._held = self._held, ""
        return held


def run_calls(chat: Chat, calls: tuple[ToolCall, ...]) -> list[str] | None:
    """Runs calls one after the other, with the user's leave; None if stopped by Ctrl-C or the end of the input."""
    results = []
    try:
        for call in calls:
            results.append(_run_call(chat, call))
    except (KeyboardInterrupt, EOFError):
        note("stopped: the calls were not answered; /retry asks again, a new message goes on without")
        return None
    return results


def _run_call(chat: Chat, call: ToolCall) -> str:
    tool = chat.tools[call.name]
    try:
        arguments = check_arguments(tool, call)
    except UsageError as error:
        warn(f"{error.message}; the model is told so")
        return f"error: {error.message}"
    talk(f"{call.name}({describe(arguments)})", style="cyan", only=call.name)
    if not _is_allowed(chat, tool):
        note("not run; the model is told so")
        return DECLINED
    output = run_tool(tool, arguments)
    lines = inert(output).splitlines()
    for line in lines[:SHOWN_LINES]:
        note(f"  {line[:SHOWN_COLUMNS]}")
    if len(lines) > SHOWN_LINES:
        note(f"  ... {len(lines) - SHOWN_LINES} more lines")
    return output


def _is_allowed(chat: Chat, tool: Tool) -> bool:
    if chat.runs_without_asking or tool.name in chat.trusted:
        return True
    if not chat.reader.is_interactive:
        warn("nobody can be asked here; --yes runs tools without asking")
        return False
    note(f"  runs: {inert(tool.command)}")
    answer = chat.reader.ask("run it? [y]es, [N]o, [a]lways for this tool: ").lower()
    if answer in ("a", "always"):
        chat.trusted.add(tool.name)
    return answer in ("y", "yes", "a", "always")


def describe(arguments: dict[str, Any]) -> str:
    """Arguments on one line, safe to show."""
    return ", ".join(f"{inert(name)}={inert(json.dumps(v, ensure_ascii=False))}" for name, v in arguments.items())
