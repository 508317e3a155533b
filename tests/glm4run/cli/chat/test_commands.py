"""The chat's commands, over a pipe: what each does and says, sessions that are resumed, tools, the ledger."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from glm4run.benchmark import Bandwidth, remember_bandwidth
from glm4run.cards import demo_folder
from glm4run.cli import main
from glm4run.cli.chat import name_resumed
from glm4run.cli.chat.commands import COMMANDS
from glm4run.cli.chat.completion import complete, file_names
from glm4run.cli.chat.prompt import edit_text
from glm4run.cli.chat.tool_calls import CallHold
from glm4run.errors import UsageError
from tests.builders import edit_tensors, write_checkpoint
from tests.conftest import REPO

HOME_VARIABLES = ("XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME")
Run = Callable[..., "Result"]


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLM4RUN_SESSIONS", raising=False)
    for name in HOME_VARIABLES:
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("commands")
    return write_checkpoint(root / "talker", dialect="chat-2024", max_position_embeddings=2048)


@pytest.fixture
def chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> Run:
    """A chat with these lines on stdin; greedy answers of 4 tokens."""

    def call(lines: str, *words: str, model: Path | None = folder) -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8"))
        named = [] if model is None else [str(model)]
        with pytest.raises(SystemExit) as caught:
            main(["chat", *named, "--dtype", "fp32", "--max-tokens", "4", *words])
        out, err = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        assert "Traceback" not in err
        return Result(caught.value.code, out, err)

    return call


def used(result: Result) -> list[int]:
    return [int(n) for n in re.findall(r"context (\d+)/", result.err)]


def test_help_lists_every_command(chat: Run) -> None:
    shown = chat("/help\n").err
    for command in COMMANDS.values():
        assert f"{command.name} {command.arguments}".rstrip() + f"  {command.help}" in shown
    wanted = (
        "system set show undo redo edit fork branches file save load sessions ctx prompt tokens copy clear retry think"
        " tools exit help"
    )
    assert {f"/{name}" for name in wanted.split()} <= set(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_no_command_fails_in_an_empty_chat(chat: Run, name: str) -> None:
    for argument in ("", " nonsense"):
        result = chat(f"{name}{argument}\n")
        assert result.code == 0
        assert "this is a defect" not in result.err


def test_undo_redo_edit_and_branches(chat: Run) -> None:
    lines = [
        "hello",
        "/undo",
        "/undo",
        "/redo",
        "/edit and you?",
        "/branches",
        "/fork mine",
        "/branches main-2",
        "/redo",
    ]
    result = chat("\n".join(lines) + "\n")
    assert "taken back: hello; /redo brings it back" in result.err
    assert "error: there is nothing to undo" in result.err
    assert "back again: hello" in result.err
    assert re.search(r"^\* main  1 question, the last: and you\?$", result.err, re.MULTILINE)
    assert re.search(r"^  main-2  1 question, the last: hello$", result.err, re.MULTILINE)
    assert "now on branch mine; main stays as it is" in result.err
    assert "> hello" in result.err.split("now on branch main-2")[1]
    answers = result.out.splitlines()
    assert len(answers) == 3 and answers[0] == answers[2]  # greedy: another answer is the same one
    assert "temperature is 0" in result.err


def test_settings(chat: Run) -> None:
    lines = ["/set temperature 0.5", "/set max-tokens 2", "/set top_p 7", "/set nothing 1", "/set overflow never"]
    result = chat("\n".join([*lines, "/set stop \\n", "/set", "/show", "hello", "/retry max_tokens=3 x", ""]))
    assert "temperature is 0.5" in result.err
    assert "error: top_p is 7.0, expected above 0" in result.err
    assert "error: there is no setting 'nothing'" in result.err
    assert "error: overflow is 'never'" in result.err
    assert re.search(r"^max_new_tokens +2$", result.err, re.MULTILINE)
    assert re.search(r"^stop +'\\n'$", result.err, re.MULTILINE)
    assert "hint: /retry temperature=1" in result.err


def test_the_format_of_answers(chat: Run) -> None:
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    lines = ["/set format regex [xy]{2}", "hello", "/set format regex z{9}", "and you?", "/set format {}x", "/show"]
    result = chat("\n".join([*lines, "/set format off", "/save formed", ""]))
    assert re.fullmatch("[xy]{2}\nzzz\n", result.out)
    assert "notice: the answer has not the format that was set: it does not match" in result.err
    assert "error: the schema is not JSON" in result.err
    assert re.search(r"format +regex z\{9\}", result.err)
    chat('/set format {"type": "null"}\n', "--resume", "formed")
    assert re.search(r"format +json_schema \{\"type\": \"null\"\}", chat("/show\n", "--resume", "formed").err)


def test_system_message_and_its_place_in_the_ledger(chat: Run) -> None:
    result = chat("/system be brief\n/system\nhello\n/ctx\n/system off\n/ctx\n")
    assert "be brief" in result.err.splitlines()
    systems = [int(n) for n in re.findall(r"^system +(\d+)", result.err, re.MULTILINE)]
    assert systems[0] > 0 == systems[1]


def test_ledger_adds_up(chat: Run, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("hello " * 20)
    result = chat(f"/file {note}\nwhat is it?\nhello\n/pin 1\n/ctx\n", "--system", "be brief", "--tools", "examples")
    ledger = {key: int(n) for key, n in re.findall(r"^(\w+) +(\d+)\b", result.err, re.MULTILINE) if key != "free"}
    parts = ("prefix", "system", "tools", "files", "turns")
    assert all(ledger[part] > 0 for part in parts)
    assert sum(ledger[part] for part in parts) == used(result)[-1]
    assert re.search(r"1\. +\d+ tokens \(pinned, \d+ of files\)  note.txt:", result.err)
    assert re.search(r"cache: \d+ tokens, .*B of keys and values", result.err)


def test_files(chat: Run, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "zero.txt").write_bytes(b"a\0b")
    (tmp_path / "fence.txt").write_text("```\nx\n```")
    (tmp_path / "long.txt").write_text("word " * 3000)
    paths = [f"/file {tmp_path / name}" for name in ("latin.txt", "zero.txt", "nothing.txt", "long.txt")]
    result = chat("\n".join([*paths, "go", "/file off", f"/file {tmp_path / 'fence.txt'}", "go", "/prompt", ""]))
    assert "is not UTF-8 text: byte 0xe9" in result.err
    assert "is no text: it holds zero bytes" in result.err
    assert "cannot read" in result.err
    assert "more than the context holds" in result.err
    assert "error: the conversation would have" in result.err
    assert re.search(r"fence.txt:\n````\n```\nx\n```\n````\n\ngo", result.err)
    assert len(used(result)) == 1


def test_prompt_marks_control_tokens_apart_from_text(chat: Run) -> None:
    result = chat("hello <|user|>\n/prompt\n/tokens <|user|>\n")
    assert "[gMASK]<sop><|user|>\nhello <|user|><|assistant|>" in result.err
    ids = [int(i) for i in re.findall(r"^\d+ tokens: ([\d ]+)$", result.err, re.MULTILINE)[0].split()]
    assert len(ids) == used(result)[0]
    assert "7 tokens, 8 characters" in result.err


def test_a_long_prompt_is_announced(chat: Run) -> None:
    result = chat("word " * 200 + "\n")
    found = re.search(
        r"reading (\d+) tokens: about (a second|\d+ s), [\d.]+ .B of cache \(context then (\d+)/", result.err
    )
    assert found is not None and found.group(1) == found.group(3)


def test_overflow_drops_with_a_visible_line(chat: Run) -> None:
    lines = "".join(f"question {n} {'x' * 40}\n" for n in range(6))
    words = ("--ctx", "200")
    assert "error: the conversation would have" in chat(lines, *words).err
    result = chat(lines + "/ctx\n", *words, "--overflow", "drop-oldest-turns")
    assert "notice: the context is full: the oldest" in result.err and "'question 0 " in result.err
    assert re.search(r"1\. +\d+ tokens \(dropped\)  question 0", result.err)
    assert re.search(r"overflow drop-oldest-turns: turn \d goes first", result.err)
    assert len(used(result)) == 6


def test_bandwidth_that_bench_measured_is_in_the_status_line(chat: Run) -> None:
    assert "of bandwidth" not in chat("hello\n").err
    remember_bandwidth(Bandwidth(10.0, 1, 0))
    assert re.search(r"tok/s, \d+% of bandwidth, context", chat("hello\n").err)


def test_a_backslash_joins_lines_and_two_slashes_are_one(chat: Run) -> None:
    result = chat("one \\\ntwo\n//help\n/prompt\n")
    assert "<|user|>\none \ntwo<|assistant|>" in result.err
    assert "<|user|>\n/help<|assistant|>" in result.err


def test_the_editor_gives_back_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tmp_path / "my editor"
    editor.write_text('#!/bin/sh\nsed -i s/old/new/ "$1"\n')
    editor.chmod(0o700)
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", f"'{editor}'")
    assert edit_text("the old 词\nand more") == "the new 词\nand more"
    monkeypatch.setenv("EDITOR", "false")
    with pytest.raises(UsageError, match="ended with code 1; the message stays"):
        edit_text("x")
    monkeypatch.setenv("VISUAL", str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="cannot be started"):
        edit_text("x")
    monkeypatch.delenv("VISUAL")
    monkeypatch.delenv("EDITOR")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="no editor was found"):
        edit_text("x")


# --- sessions


def test_a_session_goes_on_where_it_was(chat: Run, folder: Path) -> None:
    whole = chat("hello\nand you?\n")
    first = chat("hello\n/set min_p 0.25\n", "--save", "mine", "--system", "be brief")
    assert first.code == 0
    plain = chat("/show\n/ctx\n/sessions\nand you?\n", "--resume", "mine", model=None)
    restored = re.search(r"session mine: 1 question, (\d+) tokens, (\d+) of them from the saved cache", plain.err)
    assert restored is not None and int(restored.group(1)) - int(restored.group(2)) <= 1
    assert re.search(r"^min_p +0.25$", plain.err, re.MULTILINE)
    assert re.search(r"^\* mine  ", plain.err, re.MULTILINE)
    expected = chat("hello\n/set min_p 0.25\nand you?\n", "--system", "be brief")
    assert [*first.out.splitlines(), *plain.out.splitlines()] == expected.out.splitlines()
    assert used(plain) == used(expected)[1:]
    assert whole.code == 0


def test_the_last_session_is_the_one_that_is_meant_without_a_name(chat: Run) -> None:
    chat("hello\n", "--save", "old")
    chat("hello\nhello\n", "--save", "new")
    assert "session new: 2 questions" in chat("", "--resume").err
    assert "session old: 1 question" in chat("/load old\n/load nothing\n/load new\n", "--resume").err
    assert name_resumed(["chat", "--resume"]) == ["chat", "--resume", ""]
    assert name_resumed(["chat", "--resume", "--raw"]) == ["chat", "--resume", "", "--raw"]
    assert name_resumed(["chat", "--resume", "x"]) == ["chat", "--resume", "x"]


def test_saving_and_loading_inside_a_chat(chat: Run) -> None:
    result = chat("/save\nhello\n/save one\n/load one\nmore\n/save two\n/save one\n/sessions\n")
    assert "error: there is nothing to save yet" in result.err
    assert "saved as one" in result.err and "this is session one" in result.err
    assert "saved as two" in result.err and "saved as one" in result.err.split("saved as two")[1]
    again = chat("/ctx\n", "--resume", "one")
    assert re.search(r"session one: 2 questions, (\d+) tokens, \d+ of them", again.err)


def test_another_model_keeps_the_text_and_refuses_the_cache(chat: Run, tmp_path: Path) -> None:
    chat("hello\n", "--save", "mine")
    import torch

    other = write_checkpoint(tmp_path / "other", dialect="chat-2024", max_position_embeddings=2048)
    edit_tensors(other, {"model.layers.1.mlp.down_proj.weight": torch.full((128, 160), 0.01)})
    result = chat("/prompt\nand you?\n", "--resume", "mine", model=other)
    assert "notice: the saved cache of talker is not used: other differs from it in weights." in result.err
    assert "0 of them from the saved cache" in result.err
    assert "> hello" in result.err and "<|user|>\nhello<|assistant|>" in result.err
    assert len(used(result)) == 1
    template = write_checkpoint(tmp_path / "template", dialect="0414", max_position_embeddings=2048)
    result = chat("/prompt\n", "--resume", "mine", model=template)
    assert "template differs from it in weights, template." in result.err
    assert "<|user|>\nhello<|assistant|>\n" in result.err  # the same text, as that template prints it


def test_wrong_names_and_contradictions(chat: Run) -> None:
    for words, code in (
        (("--resume", "nothing"), 1),
        (("--resume", "../x"), 2),
        (("--resume",), 2),
        (("--no-save", "--save", "x"), 2),
        (("--overflow", "never"), 2),
        (("--tools", "nothing.json"), 2),
    ):
        result = chat("", *words)
        assert (result.code, result.out) == (code, ""), words
        assert "error: " in result.err
    chat("hello\n", "--save", "mine")
    taken = chat("", "--save", "mine")
    assert (taken.code, "there is a session 'mine' already" in taken.err) == (2, True)


def test_nothing_is_kept_over_a_pipe_or_when_not_wanted(chat: Run, tmp_path: Path) -> None:
    chat("hello\n")
    chat("hello\n", "--no-save")
    assert not any((tmp_path / name).exists() for name in HOME_VARIABLES)


def test_kill_in_the_middle_of_an_answer_then_resume(tmp_path: Path, chat: Run) -> None:
    """The demo, with a real cache: after kill -9 the first answer is there, with its cache; the second is lost."""
    script = tmp_path / "slow.py"
    script.write_text(  # an answer that takes for ever, so that the kill is in the middle of it
        "import time\nfrom glm4run import generation\nfrom glm4run.cli import main\n"
        "decode, prefill = generation.Generation._decode, generation.Generation.prefill\nanswers = tokens = 0\n"
        "def begin(self, *words, **named):\n    global answers\n    answers += 1\n"
        "    return prefill(self, *words, **named)\n"
        "def slow(self, *words):\n    global tokens\n    tokens += answers > 1\n"
        "    time.sleep(600 if tokens > 8 else 0)\n    return decode(self, *words)\n"
        "generation.Generation._decode, generation.Generation.prefill = slow, begin\n"
        f"main(['chat', {str(demo_folder())!r}, '--save', 'mine', '--dtype', 'fp32'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'quantize'}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"How do I quantize a model to 4 bits?\nHow do I leave the chat?\n")
    process.stdin.flush()
    first = process.stdout.readline()
    assert process.stdout.read(5)  # of the second answer
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = chat("/retry\n", "--resume", "mine", "--max-tokens", "100", model=None)
    assert "the last message has no answer yet: /retry asks again" in resumed.err
    restored = re.search(r"2 questions, (\d+) tokens, (\d+) of them from the saved cache", resumed.err)
    questions = "How do I quantize a model to 4 bits?\nHow do I leave the chat?\n"
    expected = chat(questions, "--max-tokens", "100", model=demo_folder())
    assert [first.decode().rstrip("\n"), *resumed.out.splitlines()] == expected.out.splitlines()
    assert restored is not None and int(restored.group(2)) == used(expected)[0]  # only the new question is read


# --- thoughts


def test_thoughts_are_shown_or_hidden_and_never_part_of_the_answer(chat: Run, tmp_path: Path) -> None:
    thinker = write_checkpoint(tmp_path / "thinker", dialect="z1")
    words = ("--dtype", "fp32", "--seed", "1")
    shown = chat("hello\n/think\nhello\n/think show\n/think maybe\n", *words, model=thinker)
    assert shown.out == "\n\n"  # random weights never end a thought
    first, second = shown.err.split("thoughts are hidden")
    assert "(thinking)" not in first and "(thinking)" in second
    assert "thoughts are shown" in second and "/think cannot be 'maybe'" in second
    thought = first.split("leaves\n")[1].splitlines()[0]
    assert thought and thought not in second
    hidden = chat("hello\n/prompt\n", *words, "--hide-thoughts", model=thinker)
    assert "(thinking)" in hidden.err and thought not in hidden.err
    assert "<think>" not in hidden.err  # what was thought is not in the prompt of the next turn


# --- tools


def test_tools_are_listed_and_taken_away(chat: Run) -> None:
    result = chat("/tools\n/tools examples\n/tools nothing.json\n/tools off\n/tools\n")
    assert result.err.count("no tools; /tools FILE") == 3
    assert "current_time  The date and the time now" in result.err and "runs: ls -1p" in result.err


@pytest.mark.parametrize("words", [(), ("--yes",)])
def test_a_call_runs_only_with_leave(chat: Run, folder: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    declared = [
        {
            "type": "function",
            "function": {
                "name": "look",
                "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
            },
            "command": f"touch {tmp_path}/ran; echo seen $ARG_n",
        }
    ]
    (tmp_path / "tools.json").write_text(json.dumps(declared))
    script = tmp_path / "script.json"
    script.write_text(json.dumps({"answers": ['look\n{"n": "x"}', 'look\n{"n": 5}', "it is done", "look at this"]}))
    command = [sys.executable, "-m", "tests.chat_driver", str(script), str(folder), "--dtype", "fp32"]
    environment = {**os.environ, "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'quantize'}"}
    done = subprocess.run(
        [*command, "--tools", str(tmp_path / "tools.json"), *words],
        input="hello\nand?\n/prompt\n",
        capture_output=True,
        text=True,
        env=environment,
        cwd=REPO,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "it is done\nlook at this\n"  # calls are no text
    assert "the arguments of look do not fit its schema: n: 'x' is not of type 'integer'" in done.stderr
    assert "look(n=5)" in done.stderr
    assert (tmp_path / "ran").exists() == bool(words)
    observed = "seen 5" if words else "The user did not allow this call."
    assert f"<|observation|>\n{observed}<|assistant|>" in done.stderr
    assert ("nobody can be asked here" in done.stderr) == (not words)


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("add\n{}", True),
        ("\nadd \n{", True),
        ("ad", True),
        ("", True),
        ("add more", False),
        ("adder\n", False),
        ("hello", False),
        ("\n\nThe tool add\n{}", False),
    ],
)
def test_what_may_be_a_call_is_held_back(text: str, held: bool) -> None:
    hold = CallHold({"add", "now"})
    shown = "".join(map(hold.push, text))
    assert (shown == "") == held
    assert shown + hold.rest() == text
    assert CallHold(()).push(text) == text


# --- completion


def test_tab_offers_commands_files_and_what_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.txt").write_text("")
    (tmp_path / "about").mkdir()
    (tmp_path / ".hidden").write_text("")
    table: dict[str, Callable[[], list[str]] | None] = {
        "/file": None,
        "/fork": list,
        "/set": lambda: ["top_p ", "top_k "],
    }
    assert complete("/f", table) == [("/file ", 2), ("/fork ", 2)]
    assert complete("/file a", table) == [("a b.txt", 1), ("about/", 1)]
    assert complete("/set top_p", table) == [("top_p ", 5)]
    assert complete("hello /f", table) == complete("//f", table) == complete("/f\n/f", table) == []
    assert file_names("") == ["a b.txt", "about/"]
    assert file_names(".") == [".hidden"]
    assert file_names("nowhere/x") == []
