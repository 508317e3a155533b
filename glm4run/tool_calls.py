"""Tools as the family writes them: the list in the prompt, and the call in the answer.

Knows JSON and the published texts; must not know tokens, roles or control marks.
Source: the tool branches of the published chat templates (see `chat_texts`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from glm4run.chat_texts import BUILT_IN_TOOLS, CALL_IN_JSON
from glm4run.errors import UsageError

_TOOL_HINT = 'declare it as {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'
NO_ARGUMENTS = "{}"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a declared tool; `arguments` is the text of a JSON object."""

    name: str
    arguments: str = NO_ARGUMENTS

    @classmethod
    def from_dict(cls, data: Any) -> ToolCall:
        """From an OpenAI-style call `{"function": {"name": ..., "arguments": text or object}}`.

        Raises: UsageError if the name or the arguments are missing or of the wrong type.
        """
        function = data.get("function") if isinstance(data, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name.strip():
            raise UsageError(
                f"a tool call is {data!r:.120}; expected an object with function.name",
                hint='write it as {"type": "function", "function": {"name": ..., "arguments": "{...}"}}',
            )
        arguments = function.get("arguments")
        if isinstance(arguments, Mapping):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif arguments is not None and not isinstance(arguments, str):
            raise UsageError(
                f"the arguments of tool call {name!r} are {type(arguments).__name__}; expected JSON text or an object",
                hint="encode the arguments as a JSON object",
            )
        return cls(name.strip(), arguments if arguments and arguments.strip() else NO_ARGUMENTS)


def parse_tool_call(text: str, declared: Collection[str]) -> ToolCall | None:
    """The call that `text` (an answer, leading newline removed or not) is, or None if it is ordinary text.

    A call is one only if the first line, stripped, is a declared name and nothing but one whole JSON object follows,
    or nothing at all (a call without arguments; the line must be ended). Without declared tools there are no calls.
    """
    calls = parse_tool_calls(text, declared)
    return calls[0] if len(calls) == 1 else None


def parse_tool_calls(text: str, declared: Collection[str]) -> list[ToolCall]:
    """As `parse_tool_call`, for an answer of several calls one after the other; [] if any part is no call."""
    calls = []
    rest = text.lstrip()
    while rest and declared:
        line, newline, after = rest.partition("\n")
        name, body = line.strip(), after.lstrip()
        if name not in declared or not newline:
            return []
        arguments = NO_ARGUMENTS
        if body.startswith("{"):
            end = _json_object_end(body)
            if end is None:
                return []
            arguments, body = body[:end], body[end:].lstrip()
        calls.append(ToolCall(name, arguments))
        rest = body
    return calls


def tool_names(tools: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """The names that a call of one of `tools` may carry.

    Raises: UsageError if a tool has no name or is no object.
    """
    return frozenset(kind if (kind := _kind(tool)) in BUILT_IN_TOOLS else _function(tool)["name"] for tool in tools)


def argument_schemas(tools: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """JSON schema of the arguments by name, of the tools that are functions.

    Raises: UsageError if a tool has no name or is no object.
    """
    functions = [_function(tool) for tool in tools if _kind(tool) not in BUILT_IN_TOOLS]
    return {function["name"]: function.get("parameters") or {} for function in functions}


def render_tool(tool: Mapping[str, Any], *, built_in: bool) -> str:
    """The section of the prompt's tool list for `tool`, starting with a newline and ending without one.

    With `built_in`, a tool whose type is `python`, `simple_browser` or `cogview` gets its published text.

    Raises: UsageError if the tool is of an unknown type, has no name, or is no JSON.
    """
    kind = _kind(tool)
    if built_in and kind in BUILT_IN_TOOLS:
        return BUILT_IN_TOOLS[kind]
    # The published template prints nothing for such a tool; the user would never learn why it is not called.
    if built_in and kind != "function":
        _refuse(tool, f"has type {kind!r}; expected function, {', '.join(BUILT_IN_TOOLS)}")
    function = _function(tool)
    try:
        schema = json.dumps(function, indent=4, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        _refuse(tool, f"is not expressible as JSON ({error})")
    return f"\n## {function['name']}\n\n{schema}\n{CALL_IN_JSON}"


def _kind(tool: Any) -> str:
    kind = tool.get("type", "function") if isinstance(tool, Mapping) else None
    if not isinstance(kind, str):
        _refuse(tool, "is no object with a type")
    return kind


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The declaration itself: callers give it bare, or wrapped as OpenAI does."""
    function = tool.get("function") or tool
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        _refuse(tool, "has no function name")
    return function


def _refuse(tool: Mapping[str, Any], what: str) -> NoReturn:
    raise UsageError(f"tool {tool!r:.120} {what}", hint=_TOOL_HINT)


def _json_object_end(text: str) -> int | None:
    """Where the JSON object that `text` starts with ends, or None if it is not a whole valid one."""

    def refuse_constant(name: str) -> NoReturn:  # NaN and Infinity are Python's own, no JSON
        raise ValueError(name)

    try:
        return json.JSONDecoder(parse_constant=refuse_constant).raw_decode(text)[1]
    except (ValueError, RecursionError):
        return None
