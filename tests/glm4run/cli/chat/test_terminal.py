"""The chat in a real terminal: editing, paste, small and changing windows, Ctrl-C and Ctrl-D, dumb ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.builders import write_checkpoint
from tests.terminal import ALT_ENTER, BACKSPACE, CTRL_C, CTRL_D, ENTER, Terminal, plain

STATUS = r"(?s)tok/s.{0,80}?context\s+\d+/\d+"
Start = Callable[..., Terminal]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("terminal") / "talker", dialect="chat-2024", max_position_embeddings=8192
    )


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Start:
    """Starts a chat with a scripted model; waits for its prompt."""

    def call(
        answers: list[str], *words: str, environment: dict[str, str] | None = None, size: Any = (24, 80), **more: Any
    ) -> Terminal:
        term = more.pop("term", "xterm")
        script = tmp_path / "script.json"
        script.write_text(json.dumps({"answers": answers, **more}))
        homes = {
            "GLM4RUN_SESSIONS": str(tmp_path / "sessions"),
            **{f"XDG_{name}_HOME": str(tmp_path / name) for name in ("STATE", "CACHE", "DATA")},
        }
        rows, columns = size
        command = ["tests.chat_driver", str(script), str(folder), "--dtype", "fp32", *words]
        terminal = Terminal(command, {**homes, **(environment or {})}, rows=rows, columns=columns, term=term)
        terminal.wait_for_prompt()
        return terminal

    return call


def test_editing_keys_paste_and_leaving(start: Start) -> None:
    """One process for all of them, as each start costs seconds."""
    with start(["fine", "good"], environment={"VISUAL": "true"}) as terminal:
        # A Chinese character, taken back whole.
        terminal.type(f"/tokens a你{BACKSPACE}b{ENTER}")
        terminal.wait_for("2 tokens, 2 characters")
        terminal.wait_for_prompt()
        # New lines by Alt-Enter and by a backslash.
        terminal.type(f"one{ALT_ENTER}two\\{ENTER}three{ENTER}")
        terminal.wait_for(STATUS)
        terminal.wait_for_prompt()
        terminal.type(f"/ctx{ENTER}")
        assert "one two three" in terminal.wait_for(r"1\. +\d+ tokens  .*\n")
        terminal.wait_for_prompt()
        # A paste of 200 lines is one message, whatever its lines begin with.
        terminal.paste("".join(f"/row {n}\n" for n in range(200)))
        terminal.type(BACKSPACE + f"x{ENTER}")
        terminal.wait_for(r"unknown command /row")
        terminal.wait_for_prompt()
        terminal.paste("".join(f"row {n}\n" for n in range(200)))
        terminal.type(ENTER)
        terminal.wait_for("good")
        terminal.wait_for(STATUS)
        terminal.wait_for_prompt()
        terminal.type(f"/ctx{ENTER}")
        assert "row 0 row 1 row 2" in terminal.wait_for(r"2\. +\d+ tokens  .*\n")
        terminal.wait_for_prompt()
        # Tab, and history.
        terminal.type(f"/bra\tma\t{ENTER}")
        terminal.wait_for("now on branch main")
        terminal.wait_for_prompt()
        # The clipboard is the terminal's.
        terminal.type(f"/copy{ENTER}")
        terminal.wait_for("clipboard")
        terminal.wait_for_prompt()
        assert b"\x1b]52;c;Z29vZA==\x07" in terminal.raw  # "good"
        # The editor: `/edit` asks what it leaves.
        terminal.type(f"/edit{ENTER}")
        terminal.wait_for("the message is as it was")
        terminal.wait_for_prompt()
        # Ctrl-C at the prompt drops the line and stays; Ctrl-D leaves.
        terminal.type("half a line" + CTRL_C)
        terminal.wait_for("/exit or Ctrl-D leaves")
        terminal.wait_for_prompt()
        terminal.type(CTRL_D)
        assert terminal.end() == 0
        assert "kept as session" in terminal.text()
        assert "Traceback" not in terminal.text()


def numbered(count: int) -> str:
    return "\n".join(f"**line** `{n}` of the 答案, which has a few words more in it" for n in range(count))


def test_every_line_is_in_the_scrollback_once_in_ten_rows(start: Start) -> None:
    table = "| nr | 名字 | what it is |\n|--:|---|---|\n"
    table += "".join(f"| {n} | 名{n} | **row** {n} of a table |\n" for n in range(1, 31))
    nested = "\n".join(f"{'  ' * (n % 4)}- item {n} of a list that is nested" for n in range(12))
    with start([numbered(20), f"{table}\n{nested}\n```\nx = {{}}\n```\nend"], size=(10, 40)) as terminal:
        terminal.type(f"go{ENTER}")
        terminal.wait_for(STATUS)
        terminal.wait_for_prompt()
        lines = re.findall(r"line (\d+) of the 答\s?案\s?,", terminal.text())
        assert lines == [str(n) for n in range(20)]
        assert "**" not in terminal.text() and "`" not in terminal.text().split("> go")[1]
        for line in terminal.text().splitlines():
            assert not re.search(r"\b(whic|wor|fe)$", line)  # no word is cut
        terminal.type(f"table{ENTER}")
        terminal.wait_for(r"\nend\n")
        terminal.wait_for(STATUS)
        terminal.wait_for_prompt()
        shown = terminal.text().split("> table")[1]
        rows = re.findall(r"^ *(\d+) │ 名\s?(\d+) +│ row (\d+) of a", shown, re.MULTILINE)
        assert rows == [(str(n),) * 3 for n in range(1, 31)]
        assert re.search(r"^nr │ 名\s?字\s+│ what it is", shown, re.MULTILINE)
        assert re.findall(r"^( *)• item (\d+) of", shown, re.MULTILINE) == [("  " * (n % 4), str(n)) for n in range(12)]
        assert shown.count("x = {}") == 1
        terminal.type(f"/help{ENTER}")
        terminal.wait_for("//like")
        terminal.type(CTRL_D)
        assert terminal.end() == 0


def test_window_that_changes_while_an_answer_streams(start: Start) -> None:
    words = " ".join(f"w{n:03}" for n in range(160))
    with start([words], size=(12, 80), token_s=0.002) as terminal:
        terminal.type(f"go{ENTER}")
        terminal.wait_for("w010")
        terminal.resize(10, 40)
        terminal.wait_for("w050")
        terminal.resize(30, 100)
        terminal.wait_for(STATUS)
        answer = plain(terminal.raw).split("> go")[-1]
        assert re.findall(r"w\d{3}", answer) == words.split()
        assert not re.search(rb"\x1b\[\d*[AFJK]", terminal.raw.split(b"w000")[1].split(b"w159")[0])  # nothing redrawn
        widths = [len(line) for line in answer.splitlines() if re.fullmatch(r"(w\d{3} ?)+", line)]
        assert 40 < max(widths) <= 100
        assert any(width <= 40 for width in widths)
        terminal.wait_for_prompt()


def test_ctrl_c_while_decoding_and_while_reading(start: Start) -> None:
    long_answer = "a b c d e f g h " * 50
    with start([long_answer, "whole"], token_s=0.01, prefill_s=0.1, chunk=64) as terminal:
        terminal.type(f"go{ENTER}")
        terminal.wait_for("a b c")
        terminal.type(CTRL_C)
        terminal.wait_for("ended by interrupted")
        terminal.wait_for_prompt()
        # 20 chunks: the bar is there, and what was read until Ctrl-C is kept.
        terminal.paste("long " * 260)
        terminal.type(ENTER)
        announced = terminal.wait_for(r"reading \d+ tokens: about .*B of\s+cache")
        tokens = int(re.findall(r"reading (\d+) tokens", announced)[-1])
        terminal.wait_for(r"reading .*\d+/\d+ tokens")
        terminal.wait_for(r"reading .*1\d\d/\d+ tokens")
        terminal.type(CTRL_C)
        kept = int(re.findall(r"(\d+) tokens are in the cache", terminal.wait_for("/retry goes on"))[-1])
        assert kept >= 128
        terminal.wait_for_prompt()
        terminal.type(f"/retry{ENTER}")
        left = int(re.findall(r"/(\d+) tokens", terminal.wait_for("whole"))[-1])
        assert left < tokens - 64  # only what had not been read
        terminal.wait_for(STATUS)
        terminal.wait_for_prompt()
        terminal.type(CTRL_D)
        assert terminal.end() == 0


def test_dumb_terminal_has_no_escapes(start: Start) -> None:
    with start(["**fine**"], term="dumb") as terminal:
        terminal.type(f"/tokens a你{BACKSPACE}b\n")
        terminal.wait_for("2 tokens, 2 characters")
        terminal.wait_for_prompt()
        terminal.type("go \\\n")
        terminal.wait_for(r"\. ")
        terminal.type("on\n")
        terminal.wait_for(r"\*\*fine\*\*")
        terminal.wait_for(STATUS)
        terminal.wait_for_prompt()
        terminal.type(CTRL_D)
        assert terminal.end() == 0
        assert b"\x1b" not in terminal.raw


def test_no_color_shows_markdown_as_it_is(start: Start) -> None:
    with start(["**fine** \x1b[2Jx"], environment={"NO_COLOR": "1"}) as terminal:
        terminal.type(f"go{ENTER}")
        terminal.wait_for(r"\*\*fine\*\* \[2Jx")  # and an answer cannot control the terminal
        terminal.wait_for(STATUS)
        terminal.wait_for_prompt()
        assert not re.search(rb"\x1b\[[0-9;]*[34][0-7]m", terminal.raw)


def test_tools_run_when_the_user_says_so(start: Start) -> None:
    answers = ['list_files\n{"folder": "."}', "there they are", 'list_files\n{"folder": ".."}', "then not"]
    with start(answers, "--tools", "examples") as terminal:
        terminal.type(f"which files?{ENTER}")
        terminal.wait_for(r'list_files\(folder="\."\)')
        terminal.wait_for("run it")
        terminal.type(f"y{ENTER}")
        terminal.wait_for("CHANGELOG.md")
        terminal.wait_for("there they are")
        terminal.wait_for_prompt()
        terminal.type(f"and above?{ENTER}")
        terminal.wait_for("run it")
        terminal.type(ENTER)
        terminal.wait_for("not run; the model is told so")
        terminal.wait_for("then not")
        terminal.wait_for_prompt()
        terminal.type(CTRL_D)
        assert terminal.end() == 0
