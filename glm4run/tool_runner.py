"""Tools that a user declares in a JSON file: OpenAI's schema, and a shell command for each.

Arguments that a model wrote never become part of a command's text. They reach it as environment variables `ARG_<name>`
and as the JSON object on stdin. They are checked against the schema first. Nothing here asks the user or prints.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4run.errors import UsageError
from glm4run.schemas import check_schema, problems
from glm4run.tool_calls import ToolCall, tool_names

EXTRA = "tools"  # of the package: what checking arguments needs
EXAMPLES = "examples"  # instead of a file: the tools that come with the package
DEFAULT_TIMEOUT_S = 60.0
OUTPUT_LIMIT_BYTES = 16 << 10  # of what a command prints; the rest is cut, and the model is told
VARIABLE_LIMIT_BYTES = 100 << 10  # Linux refuses a variable of 128 KiB; a longer argument is on stdin only
VARIABLE_PREFIX = "ARG_"
_HINT = 'a list of {"type": "function", "function": {"name", "description", "parameters"}, "command": "..."}'
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True)
class Tool:
    """One tool: what the model is told, and what is run."""

    name: str
    declaration: Mapping[str, Any]
    command: str
    timeout_s: float = DEFAULT_TIMEOUT_S

    @property
    def schema(self) -> Mapping[str, Any]:
        """JSON schema of the arguments."""
        function = self.declaration.get("function") or self.declaration
        schema: Mapping[str, Any] = function.get("parameters") or {}
        return schema


def load_tools(source: str) -> list[Tool]:
    """The tools of a JSON file, or those that come with the package where `source` is "examples".

    Raises:
        UsageError: the file is not there or is none, or a schema is no JSON schema; with the tool's name.
    """
    path = Path(__file__).with_name("example_tools.json") if source == EXAMPLES else Path(source).expanduser()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read tools from {path}: {error}", hint=_HINT) from error
    if not isinstance(data, list) or not data:
        raise UsageError(f"{path} is no list of tools", hint=_HINT)
    tools = [_parse(item, path) for item in data]
    names = [tool.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{path}: tool {twice!r} is declared twice")
    return tools


def _parse(item: Any, path: Path) -> Tool:
    if not isinstance(item, Mapping):
        raise UsageError(f"{path}: a tool is {item!r:.80}", hint=_HINT)
    declaration = {key: value for key, value in item.items() if key not in ("command", "timeout_s")}
    (name,) = tool_names([declaration])
    command, timeout_s = item.get("command"), item.get("timeout_s", DEFAULT_TIMEOUT_S)
    if not isinstance(command, str) or not command.strip():
        raise UsageError(f"{path}: tool {name!r} has no command", hint=_HINT)
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or timeout_s <= 0:
        raise UsageError(f"{path}: timeout_s of tool {name!r} is {timeout_s!r}, expected a number of seconds")
    tool = Tool(name, declaration, command, float(timeout_s))
    try:
        check_schema(tool.schema, extra=EXTRA)
    except UsageError as error:
        raise UsageError(f"{path}: parameters of tool {name!r} are no JSON schema: {error.message}") from error
    return tool


def check_arguments(tool: Tool, call: ToolCall) -> dict[str, Any]:
    """The arguments of a call.

    Raises:
        UsageError: they are no JSON object, or not what the schema asks for; in words that the model can use.
    """
    try:
        arguments = json.loads(call.arguments)
    except ValueError as error:
        raise UsageError(f"the arguments of {tool.name} are not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise UsageError(f"the arguments of {tool.name} are no JSON object")
    found = problems(tool.schema, arguments, extra=EXTRA)
    if found:
        raise UsageError(f"the arguments of {tool.name} do not fit its schema: {'; '.join(found)}")
    return arguments


def run_tool(tool: Tool, arguments: Mapping[str, Any]) -> str:
    """Runs a tool's command and returns what the model is told: its output, cut to a bound, and how it ended if badly.

    An exception while it runs (Ctrl-C) ends the command and everything that it started.
    """
    with tempfile.TemporaryFile() as stdin:
        stdin.write(json.dumps(arguments, ensure_ascii=False).encode("utf-8", errors="replace"))
        stdin.seek(0)
        process = subprocess.Popen(
            ["/bin/sh", "-c", tool.command],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables(arguments)},
            start_new_session=True,
        )
    try:
        output, note = _read(process, tool.timeout_s)
    finally:
        _end(process)
    text = _NOT_TEXT.sub("", output.decode("utf-8", errors="replace")).rstrip("\n")
    if not note and process.returncode:
        note = f"(exit code {process.returncode})"
    return "\n".join(part for part in (text, note) if part) or "(no output)"


def variables(arguments: Mapping[str, Any]) -> dict[str, str]:
    """The environment variables of a call: texts as they are, everything else as JSON."""
    found = {}
    for name, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        fits = "\0" not in text and len(text.encode("utf-8", errors="replace")) <= VARIABLE_LIMIT_BYTES
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) and fits:
            found[VARIABLE_PREFIX + name] = text.encode("utf-8", errors="replace").decode()
    return found


def _read(process: subprocess.Popen[bytes], timeout_s: float) -> tuple[bytes, str]:
    """The output, and why it is not all if so."""
    assert process.stdout is not None
    deadline = time.monotonic() + timeout_s
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                return output, f"(ended after {timeout_s:g} s: it took too long)"
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                break
            output += part
            if len(output) > OUTPUT_LIMIT_BYTES:
                return output[:OUTPUT_LIMIT_BYTES], f"(cut after {OUTPUT_LIMIT_BYTES} bytes)"
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return output, f"(ended after {timeout_s:g} s: it took too long)"
    return output, ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a command that still runs, with all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def declarations(tools: Sequence[Tool]) -> list[Mapping[str, Any]]:
    """What the prompt says about the tools."""
    return [tool.declaration for tool in tools]
