"""Tools: what a file may declare, what a call may pass, and that an argument is never part of a command."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4run import tool_runner
from glm4run.errors import Glm4RunError, UsageError
from glm4run.tool_calls import ToolCall
from glm4run.tool_runner import EXAMPLES, Tool, check_arguments, load_tools, run_tool, variables

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(command: str, schema: Any = CITY, **more: Any) -> Tool:
    return Tool("t", {"type": "function", "function": {"name": "t", "parameters": schema}}, command, **more)


def write(path: Path, *items: Any) -> str:
    path.write_text(json.dumps(list(items)))
    return str(path)


def test_the_examples_load_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, files = load_tools(EXAMPLES)
    assert (clock.name, files.name) == ("current_time", "list_files")
    assert str(time.gmtime().tm_year) in run_tool(clock, check_arguments(clock, ToolCall("current_time", "{}")))
    shanghai = check_arguments(clock, ToolCall("current_time", '{"timezone": "Asia/Shanghai"}'))
    assert run_tool(clock, shanghai).split()[-1] in ("CST", "Asia")  # without the system's zones: UTC by that name
    with pytest.raises(UsageError, match="do not fit its schema: timezone"):
        check_arguments(clock, ToolCall("current_time", '{"timezone": "; rm -rf /"}'))
    (tmp_path / "-la").write_text("")
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run_tool(files, {"folder": "."}) == "-la\nb/"
    assert "-la" in run_tool(files, {"folder": "-la"})  # no option of ls


@pytest.mark.parametrize(
    ("item", "what"),
    [
        (3, "a tool is 3"),
        ({"type": "function", "function": {"name": "t"}}, "has no command"),
        ({"type": "function", "function": {}, "command": "ls"}, "no function name"),
        ({"type": "function", "function": {"name": "t"}, "command": "ls", "timeout_s": 0}, "timeout_s"),
        ({"type": "function", "function": {"name": "t", "parameters": {"type": 5}}, "command": "ls"}, "no JSON schema"),
    ],
)
def test_files_that_are_none(tmp_path: Path, item: Any, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        load_tools(write(tmp_path / "t.json", item))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read tools"):
        load_tools(str(tmp_path / "nothing.json"))
    with pytest.raises(UsageError, match="is no list"):
        load_tools(write(tmp_path / "t.json"))
    twice = {"function": {"name": "t"}, "command": "ls"}
    with pytest.raises(UsageError, match="declared twice"):
        load_tools(write(tmp_path / "t.json", twice, twice))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ("{", "not JSON"),
        ("[]", "no JSON object"),
        ("{}", "'city' is a required property"),
        ('{"city": 5}', "city: 5 is not of type 'string'"),
    ],
)
def test_arguments_that_do_not_fit(arguments: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        check_arguments(tool("ls"), ToolCall("t", arguments))


def test_a_schema_cannot_reach_the_network() -> None:
    remote = tool("ls", {"$ref": "http://localhost:9/schema.json"})
    with pytest.raises(UsageError, match="leads nowhere: http://localhost:9"):
        check_arguments(remote, ToolCall("t", "{}"))


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=15)
@given(st.one_of(TEXTS, st.sampled_from(["$(touch x)", "`touch x`", "'; touch x; '", '"; touch x; "', "a\nb", "-rf"])))
def test_arguments_reach_a_command_as_they_are_and_are_never_run(text: str) -> None:
    code = "import os, sys, json; print(json.dumps([os.environ['ARG_city'], json.load(sys.stdin)]))"
    asking = tool(f'{sys.executable} -c "{code}"')
    assert json.loads(run_tool(asking, {"city": text})) == [text, {"city": text}]
    assert not Path("x").exists()


def test_values_that_are_no_texts_come_as_json() -> None:
    data = {
        "n": 5,
        "flag": True,
        "list": [1, "a"],
        "none": None,
        "two words": "x",
        "zero": "a\0b",
        "LONG": "x" * 200_000,
    }
    assert variables(data) == {"ARG_n": "5", "ARG_flag": "true", "ARG_list": '[1, "a"]', "ARG_none": "null"}
    assert run_tool(tool("wc -c"), {"LONG": "x" * 200_000}).strip() == "200012"  # on stdin all the same


def test_variables_cannot_replace_the_system_s_own() -> None:
    assert run_tool(tool('echo "$PATH"'), {"PATH": "/evil"}) == os.environ["PATH"]


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("true", "(no output)"),
        ("false", "(exit code 1)"),
        ("echo out; echo err >&2; exit 3", "out\nerr\n(exit code 3)"),
        (r"printf 'a\033[2Jb\000c\tD'", "a[2Jbc\tD"),
        (r"printf '\377'", "�"),
        ("nothing-is-called-so 2>/dev/null", "(exit code 127)"),
    ],
)
def test_what_the_model_is_told(command: str, output: str) -> None:
    assert run_tool(tool(command), {}) == output


def test_too_much_and_too_long_are_cut(tmp_path: Path) -> None:
    told = run_tool(tool("yes"), {})
    assert told.endswith("(cut after 16384 bytes)") and len(told) < 17_000
    assert run_tool(tool("echo a; sleep 600", timeout_s=0.3), {}) == "a\n(ended after 0.3 s: it took too long)"
    started = run_tool(tool(f"(sleep 600; touch {tmp_path}/late) & echo b; wait", timeout_s=0.3), {})
    assert started.startswith("b")


def test_ctrl_c_ends_a_command_with_all_that_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    processes: list[Any] = []

    def interrupted(process: Any, timeout_s: float) -> Any:
        processes.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(tool_runner, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_tool(tool("sleep 600"), {})
    assert processes[0].returncode == -9


def test_without_jsonschema_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(Glm4RunError, match="needs the package jsonschema") as caught:
        load_tools(EXAMPLES)
    assert "glm4run[tools]" in str(caught.value.hint)
