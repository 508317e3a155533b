"""The commands: what goes to stdout and what to stderr, exit codes, and that every option does something."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4run import __version__
from glm4run.cards import load_cards
from glm4run.cli import main
from glm4run.cli.lazy import COMMANDS, load_command
from tests.builders import PREFIX, SPECIAL_IDS, edit_json, edit_tensors, write_checkpoint, write_json, write_packed

REPO = Path(__file__).resolve().parents[3]
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]

GENERATE_KEYS = [
    *("text", "token_ids", "prompt_tokens", "completion_tokens", "finish_reason", "stopped_by", "tool_calls"),
    *("timings", "speculation", "model", "backend", "cached_tokens"),
]
TIMING_KEYS = ["load_s", "prefill_s", "prefill_tok_per_s", "decode_s", "decode_tok_per_s"]


class Result:
    """What one run of a command gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in this process; `stdin` is a pipe with these bytes."""

    def call(*words: str | Path, stdin: str | bytes = b"") -> Result:
        raw = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Result(caught.value.code, out, err)

    return call


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with `base`, `talker` (a chat model) and `small` (the same, packed)."""
    root = tmp_path_factory.mktemp("models")
    write_checkpoint(root / "base")
    write_checkpoint(root / "talker", dialect="chat-2024", dtype=torch.bfloat16)
    write_packed(root / "small", source={"dialect": "chat-2024"})
    (root / "small-source").rename(root / "unpacked")
    return root


@pytest.fixture(autouse=True)
def models_variable(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM4RUN_MODELS", str(models))


@pytest.fixture
def ask(run: Run) -> Run:
    """`generate` with a chat model, in float32 (bf16 has no fast path on every machine)."""

    def call(*words: str | Path, prompt: str = "hello", model: str = "talker", stdin: str | bytes = b"") -> Result:
        return run("generate", prompt, "-m", model, "--dtype", "fp32", "--max-tokens", "8", *words, stdin=stdin)

    return call


# --- starting


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'quantize'}"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_light_commands_start_without_torch(models: Path) -> None:
    """One process for all of them, as each start costs a second; help of every command included."""
    lines = [
        *(["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)),
        *(["check", str(models / "small")], ["info", str(models / "small")], ["info", "--json"], ["models"]),
        *(["models", "--json"], ["tokenize", "hello", "-m", "base"]),
        ["tokenize", json.dumps(MESSAGES), "--chat", "-m", "talker"],
        *(["vram"], ["vram", "small", "--json"], ["vram", "--gpu", "4090", "--explain"], ["vram", "--gpu", "all"]),
        *(["vram", "--gpu", "8GB", "--plot"], ["vram", "--runtime", "hf-remote", "--ctx", "1k"]),
        *(["info", "nothing"], ["generate", "x", "-m", "nothing"], ["chat", "base"], ["generate", "--wrong"]),
    ]
    code = (
        f"import sys\nfrom glm4run.cli import main\n"
        f"for words in {lines!r}:\n"
        "    try:\n        main(words)\n    except SystemExit:\n        pass\n"
        "    heavy = [name for name in ('torch', 'transformers', 'prompt_toolkit') if name in sys.modules]\n"
        "    assert not heavy, (words, heavy)\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        *(["vram", "--gpu", "12GB"], ["vram", "--gpu", "4090", "--explain", "--bits", "4"], ["--version"]),
        *(["info", "talker", "--json"], ["vram", "small", "--gpu", "12GB", "--json"]),
    ],
)
def test_a_light_command_imports_only_what_it_needs(words: list[str]) -> None:
    """Modules are counted and not milliseconds: what a start takes is what it imports."""
    code = (
        f"import sys\nfrom glm4run.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "loaded = set(sys.modules)\n"
        "sys.stderr.write(' '.join(sorted(loaded)))\n"
    )
    loaded = set(python(code).stderr.split())
    assert "glm4run.cli.lazy" in loaded
    tops = {name.partition(".")[0] for name in loaded}
    assert not tops & {"torch", "numpy", "tokenizers", "safetensors", "pydantic", "rich", "prompt_toolkit", "email"}
    commands = {f"glm4run.cli.{module}" for module, _ in COMMANDS.values()}
    assert loaded & commands <= {f"glm4run.cli.{words[0]}"}
    assert len(loaded) < 330, len(loaded)


def test_the_table_of_commands_says_what_each_command_says_of_itself(run: Run) -> None:
    overview = run("--help").out
    for name, (_, line) in COMMANDS.items():
        assert load_command(name).help.splitlines()[0] == line
        assert line[:30] in overview


def test_import_of_the_package_is_light() -> None:
    assert python("import sys, glm4run, glm4run_quantize; assert 'torch' not in sys.modules").returncode == 0


def test_module_and_script_are_the_same_program(models: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'quantize'}"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "glm4run",
            "generate",
            "hello",
            "-m",
            str(models / "talker"),
            "--dtype",
            "fp32",
            "--json",
            "--max-tokens",
            "4",
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)) == GENERATE_KEYS
    assert "Traceback" not in done.stderr


def test_version_and_help(run: Run) -> None:
    assert run("--version").out == f"glm4run {__version__}\n"
    overview = run("--help")
    assert overview.code == 0
    assert all(command in overview.out for command in COMMANDS)
    assert run("-h").out == overview.out


def parameters_of(command: str) -> Any:
    """What the parser knows of a command; typer carries a click of its own, so the types have no name here."""
    return load_command(command).params


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_the_help_with_an_explanation(run: Run, name: str) -> None:
    text = run(name, "--help").out
    assert len(parameters_of(name)) >= 1
    for parameter in parameters_of(name):
        assert parameter.help, parameter.name
        if parameter.param_type_name == "option":
            assert max(parameter.opts, key=len) in text


# --- usage errors


@pytest.mark.parametrize(
    "words",
    [
        ("nonsense",),
        ("generate", "x", "--nonsense"),
        ("generate", "x", "y"),
        ("generate", "x", "--max-tokens", "many"),
        ("generate", "x", "--max-tokens", "0"),
        ("generate", "x", "--temperature", "-1"),
        ("generate", "x", "--temperature", "nan"),
        ("generate", "x", "--top-p", "2"),
        ("generate", "x", "--top-k", "-1"),
        ("generate", "x", "--min-p", "1"),
        ("generate", "x", "--repetition-penalty", "0"),
        ("generate", "x", "--stop", ""),
        ("generate", "x", "--logprobs", "3"),
        ("generate", "x", "--json", "--logprobs", "21"),
        ("generate", "x", "--json-schema", "nowhere.json"),
        ("generate", "x", "--json-schema", '{"uniqueItems": true}'),
        ("generate", "x", "--json-schema", "{"),
        ("generate", "x", "--regex", "(a"),
        ("generate", "x", "--regex", "a", "--json-schema", "{}"),
        ("generate", "x", "--dtype", "int3"),
        ("generate", "x", "--device", "tpu"),
        ("generate", "x", "--backend", "magic", "-m", "small"),
        ("generate", "x", "--backend", "torch"),
        ("generate", "x", "--ctx", "big"),
        ("generate", "x", "--ctx", "0"),
        ("generate", "x", "--ctx", "-5"),
        ("generate", "x", "--ctx", "9m"),
        ("generate", "x", "--threads", "0"),
        ("generate", "x", "--yarn", "on"),
        ("generate", "x", "--yarn", "perhaps"),
        ("generate", "x", "--rope-theta", "0"),
        ("generate", "x", "--rope-theta", "-3"),
        ("generate", "x", "--input", "a.jsonl"),
        ("generate", "--output", "a.jsonl"),
        ("generate", "x", "--input", "a.jsonl", "--output", "b.jsonl"),
        ("generate", "x", "--raw", "--system", "s"),
        ("generate", ""),
        ("generate", "  \n"),
        ("tokenize", "x", "--chat"),
        ("quantize",),
        ("quantize", "nowhere"),
        ("quantize", "nowhere", "--bits", "four"),
        ("check",),
        ("info", "a", "b"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_says_why(run: Run, words: tuple[str, ...]) -> None:
    more = ("-m", "talker") if words[0] in ("generate", "tokenize") and "-m" not in words else ()
    result = run(*words, *more)
    assert result.code == 2
    assert result.out == ""
    assert re.search("^error: .", result.err, re.MULTILINE)
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    "words", [("info", "nothing"), ("generate", "x", "-m", "zai-org/glm-4-9b-chat"), ("check", "nowhere")], ids=" ".join
)
def test_what_is_not_there_exits_with_1(run: Run, words: tuple[str, ...]) -> None:
    result = run(*words)
    assert (result.code, result.out) == (1, "")
    assert "hint: " in result.err


@pytest.mark.parametrize("words", [("--debug", "info", "nothing"), ("info", "nothing", "--debug")], ids=" ".join)
def test_debug_shows_the_traceback(words: tuple[str, ...]) -> None:
    from glm4run.errors import Glm4RunError

    with pytest.raises(Glm4RunError, match="no model 'nothing'"):
        main(list(words))


def test_defects_are_one_line_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: str | None) -> None:
        raise RuntimeError("oops")

    monkeypatch.setattr("glm4run.cli.info.find_model", fail)
    result = run("info", "base")
    assert result.code == 1
    assert result.err.startswith("error: RuntimeError: oops\nhint: this is a defect")


def test_interrupt_exits_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(model: str | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("glm4run.cli.info.find_model", interrupt)
    assert run("info", "base").code == 130


def test_no_colour_where_none_is_wanted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in run("info", "nothing").err
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in run("info", "nothing").err
    monkeypatch.delenv("FORCE_COLOR")
    assert "\x1b" not in run("info", "nothing").err  # not a terminal


def test_square_brackets_are_no_markup(run: Run) -> None:
    assert "no model '[bold]x[/bold]'" in run("info", "[bold]x[/bold]").err


# --- generate


def test_text_goes_to_stdout_and_the_rest_to_stderr(ask: Run) -> None:
    result = ask()
    assert result.code == 0
    answer = ask("--json").json()
    assert result.out == answer["text"] + "\n"
    assert re.search(r"^talker: .+ of weights, backend dense", result.err)
    assert f"{answer['prompt_tokens']} + {answer['completion_tokens']} tokens" in result.err
    assert f"ended by {answer['finish_reason']}" in result.err


def test_json_has_exactly_these_keys(ask: Run) -> None:
    answer = ask("--json").json()
    assert list(answer) == GENERATE_KEYS
    assert list(answer["timings"]) == TIMING_KEYS
    assert answer["completion_tokens"] == len(answer["token_ids"])
    assert (answer["model"], answer["backend"], answer["tool_calls"]) == ("talker", "dense", [])
    assert answer["finish_reason"] in ("stop", "max_tokens")


def test_without_a_model_the_packed_one_is_taken_and_named(run: Run) -> None:
    result = run("generate", "hello", "--json", "--max-tokens", "2")
    assert result.json()["model"] == "small"
    assert "model: small (the only packed model here" in result.err


def test_prompt_from_stdin(ask: Run, run: Run) -> None:
    expected = ask("--json", prompt="你好").json()["token_ids"]
    assert ask("--json", prompt="-", stdin="你好").json()["token_ids"] == expected
    piped = run("generate", "-m", "talker", "--dtype", "fp32", "--max-tokens", "8", "--json", stdin="你好")
    assert piped.json()["token_ids"] == expected


@pytest.mark.parametrize("command", [("generate", "-m", "talker"), ("tokenize", "-m", "talker"), ("chat", "talker")])
def test_stdin_that_is_not_utf8_is_named(run: Run, command: tuple[str, ...]) -> None:
    result = run(*command, stdin=b"caf\xe9 au lait\n")
    assert (result.code, result.out) == (2, "")
    assert "error: the input is not UTF-8: byte 0xe9 at position 3\nhint: " in result.err


def test_argument_that_is_not_utf8_is_named(run: Run) -> None:
    result = run("generate", "caf\udce9", "-m", "talker")
    assert (result.code, result.out) == (2, "")
    assert "lone surrogate" in result.err


def prompt_tokens(result: Result) -> int:
    assert result.code == 0, result.err
    return int(result.json()["prompt_tokens"])


def test_chat_raw_and_system_change_the_prompt(ask: Run) -> None:
    text = 1  # hello is one token
    assert prompt_tokens(ask("--json")) == prompt_tokens(ask("--json", "--chat")) == 2 + 2 + text + 1
    assert prompt_tokens(ask("--json", "--raw")) == text
    assert prompt_tokens(ask("--json", "--system", "hello")) == 2 + 2 * (2 + text) + 1
    assert prompt_tokens(ask("--json", model="base")) == 2 + text
    assert "no [gMASK]<sop> prefix" in ask("--raw").err


def test_sampling_options_reach_the_sampler(ask: Run) -> None:
    def ids(*words: str) -> list[int]:
        result = ask("--json", *words)
        assert result.code == 0, result.err
        found: list[int] = result.json()["token_ids"]
        return found

    greedy = ids("--temperature", "0")
    hot = ("--temperature", "50", "--seed", "1")
    assert ids(*hot) != greedy
    assert ids(*hot) == ids(*hot) != ids("--temperature", "50", "--seed", "2")
    assert ids(*hot, "--top-k", "1") == ids(*hot, "--top-p", "0.0001") == ids(*hot, "--min-p", "0.9999") == greedy
    assert ids("--repetition-penalty", "1000") != greedy
    assert len(set(ids("--repetition-penalty", "1000"))) == 8
    assert len(ids("--max-tokens", "3")) == 3


def test_default_sampling_is_the_folder_s_own(ask: Run, models: Path) -> None:
    greedy = ask("--json", "--temperature", "0").json()["token_ids"]
    write_json(models / "talker" / "generation_config.json", {"do_sample": True, "temperature": 50.0})
    try:
        hot = ask("--json", "--seed", "1").json()["token_ids"]
        assert hot != greedy
        assert ask("--json", "--seed", "1", "--temperature", "0").json()["token_ids"] == greedy
    finally:
        (models / "talker" / "generation_config.json").unlink()


def test_stop_strings_end_the_text(ask: Run) -> None:
    whole = ask("--json").json()["text"]
    stop = whole[3:5]
    answer = ask("--json", "--stop", "never seen", "--stop", stop).json()
    assert (answer["text"], answer["finish_reason"], answer["stopped_by"]) == (whole[: whole.index(stop)], "stop", stop)


def test_model_options_reach_the_model(ask: Run, models: Path) -> None:
    assert "context 100 tokens" in ask("--ctx", "100").err
    assert "context 512 tokens" in ask().err
    assert "torch.bfloat16" not in ask().err and "float32 on cpu" in ask().err
    assert "bfloat16 on cpu" in ask("--dtype", "bf16", "--max-tokens", "1").err
    assert "backend reference (asked for)" in ask("--backend", "reference", model="small").err
    assert f"backend torch {torch.__version__} (asked for)" in ask("--backend", "torch", model="small").err
    assert "backend native (" in ask("--backend", "native", "--activations", "bf16", model="small").err
    assert ask("--activations", "int3", model="small").code == 2
    assert ask("--device", "cpu", "--yarn", "off").code == 0
    assert ask("--rope-theta", "2", "--json").json()["token_ids"] != ask("--json").json()["token_ids"]
    before = torch.get_num_threads()
    try:
        assert ask("--threads", "2").code == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_batch_goes_on_where_it_stopped(run: Run, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"id": "a", "prompt": "hello"}, {"id": "b", "messages": MESSAGES}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("generate", "-m", "talker", "--input", source, "--output", target, "--max-tokens", "4", "--dtype", "fp32")
    first = run(*words)
    assert (first.code, first.out) == (0, "")
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["a", "b"]
    assert [list(answer) for answer in answers] == [["id", *GENERATE_KEYS]] * 2
    before = target.read_bytes()
    again = run(*words)
    assert (again.code, target.read_bytes()) == (0, before)
    assert "2 answers are in" in again.err


def test_answers_have_the_form_that_was_asked_for(ask: Run, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": [1, "b"]}, "minItems": 1, "maxItems": 2}')
    words = ("--temperature", "1", "--seed", "3", "--max-tokens", "300")
    answer = ask("--json-schema", schema, *words, "--json").json()
    assert list(answer) == [*GENERATE_KEYS, "valid"]
    assert answer["valid"] is True and set(json.loads(answer["text"])) <= {1, "b"}
    text = ask("--json-schema", schema.read_text(), *words)
    assert (text.code, json.loads(text.out)) == (0, json.loads(answer["text"]))
    assert "as it is whole" in text.err
    assert re.fullmatch(r"[xy]{5}\n", ask("--regex", "[xy]{5}").out)


def test_an_answer_that_was_cut_short_is_not_printed_as_valid(ask: Run) -> None:
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    words = ("--regex", "[ab]{20}", "--max-tokens", "5")
    cut = ask(*words)
    assert (cut.code, cut.out) == (1, "")
    assert re.search("not printed, because it is not what was asked for: [ab]{4}$", cut.err, re.MULTILINE)
    assert "error: the answer ended by max_tokens and is not valid: it does not match" in cut.err
    assert "hint: a larger --max-tokens" in cut.err
    cut = ask(*words, "--json")
    assert cut.code == 1
    assert (cut.json()["valid"], cut.json()["finish_reason"]) == (False, "max_tokens")


def test_each_line_of_a_batch_may_have_a_form_of_its_own(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines: list[dict[str, Any]] = [
        {"prompt": "a", "json_schema": {"enum": [7]}},
        {"prompt": "b", "regex": "[xy]{3}"},
        {"prompt": "c"},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("generate", "-m", "talker", "--input", source, "--output", target, "--dtype", "fp32")
    assert run(*words, "--regex", "z{9}", "--max-tokens", "6").code == 0
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert answers[0]["text"] == "7" and re.fullmatch("[xy]{3}", answers[1]["text"])
    assert [answer["valid"] for answer in answers] == [True, True, False]
    assert answers[2]["text"] == "z" * 5  # the command line's, cut short
    source.write_text(json.dumps({"prompt": "a", "json_schema": {"uniqueItems": True}}) + "\n")
    refused = run(*words)
    assert refused.code == 2
    assert "in.jsonl, line 1: the schema has the keyword 'uniqueItems'" in refused.err


def test_broken_weights_end_with_an_error_in_json_too(run: Run, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "broken")
    edit_tensors(folder, {"lm_head.weight": torch.full((320, 128), float("nan"))})
    result = run("generate", "hello", "-m", folder, "--json")
    assert result.code == 1
    assert result.json()["finish_reason"] == "error"
    assert "not finite" in result.json()["error"]


# --- chat


def chat(run: Run, text: str, *words: str, model: str = "talker") -> Result:
    return run("chat", model, "--dtype", "fp32", "--max-tokens", "4", *words, stdin=text)


def test_chat_answers_each_line(run: Run) -> None:
    result = chat(run, "hello\nand?\n")
    assert result.code == 0
    assert len(re.findall(r"tok/s, context \d+/512", result.err)) == 2
    assert "error" not in result.err


def test_chat_commands(run: Run) -> None:
    result = chat(run, "/help\n\n/what\nhello\n/clear\n//hello\n/exit\nnot read\n")
    assert result.code == 0
    assert "/clear  start anew" in result.err
    assert "unknown command /what" in result.err
    assert "the conversation is forgotten" in result.err
    used = [int(n) for n in re.findall(r"context (\d+)/512", result.err)]
    assert len(used) == 2
    assert used[1] - used[0] == len(PREFIX) * 0 + 1  # the slash is a token more; nothing of the first turn is left


def test_chat_system_and_seed(run: Run) -> None:
    plain, system = (chat(run, "hello\n", *words).err for words in ((), ("--system", "hello")))
    used = [int(re.findall(r"context (\d+)/512", err)[0]) for err in (plain, system)]
    assert used[1] == used[0] + 3  # role, newline, hello
    hot = ("--temperature", "50", "--seed")
    assert (
        chat(run, "hello\n", *hot, "1").out
        == chat(run, "hello\n", *hot, "1").out
        != chat(run, "hello\n", *hot, "2").out
    )


def test_message_that_does_not_fit_does_not_end_the_chat(run: Run) -> None:
    result = chat(run, "hello\n" + "x" * 600 + "\nhello\n")
    assert result.code == 0
    assert "error: the conversation would have" in result.err
    assert len(re.findall(r"context \d+/512", result.err)) == 2


def test_base_model_chats_only_by_force(run: Run) -> None:
    assert chat(run, "hello\n", model="base").code == 1
    forced = chat(run, "hello\n", "--force", model="base")
    assert forced.code == 0
    assert "notice: a base model, asked in the chat-2024 dialect" in forced.err


# --- quantize


def test_quantize_writes_a_folder_and_says_what_it_cost(run: Run, models: Path, tmp_path: Path) -> None:
    result = run("quantize", models / "talker", "-o", tmp_path / "out")
    assert (result.code, result.out) == (0, "")
    assert "SQNR dB" in result.err and "down_proj" in result.err and "int4 g32" in result.err
    assert f"next: glm4run chat {tmp_path / 'out'}" in result.err
    assert run("check", tmp_path / "out").code == 0
    assert run("generate", "hello", "-m", tmp_path / "out", "--max-tokens", "2").code == 0


def test_quantize_options(run: Run, models: Path, tmp_path: Path) -> None:
    def schemes(*words: str) -> Any:
        assert run("quantize", models / "unpacked", "-o", tmp_path / "out", "--overwrite", *words).code == 0
        return run("info", tmp_path / "out", "--json").json()["quantization"]

    assert schemes() == ["int4 g128", "int4 g32", "int8 g128"]
    assert schemes("--bits", "8") == ["int8 g128", "int8 g32"]
    assert schemes("--bits", "4", "--group-size", "32") == ["int4 g32", "int8 g32"]
    assert schemes("--lm-head-bits", "16", "--method", "rtn") == ["int4 g128", "int4 g32"]
    assert run("quantize", models / "unpacked", "-o", tmp_path / "out").code == 2
    assert run("quantize", models / "unpacked", "-o", tmp_path / "new", "--method", "magic").code == 2


def test_quantize_calibrates_and_reports(run: Run, models: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("hello the 你好, on the tin in hell. " * 500, encoding="utf-8")
    words = ("--method", "gptq", "--group-size", "32", "--calibration", str(text), "--calibration-tokens", "1024")
    out = tmp_path / "out"
    result = run("quantize", models / "unpacked", "-o", out, *words, "--report", str(text), "--report-windows", "2")
    assert result.code == 0
    for part in ("lost most: model.layers", "held-out text: KL divergence", "KL divergence", "over 2 windows of 512"):
        assert part in result.err
    record = json.loads((out / "glm4run.json").read_text())
    assert record["method"] == "gptq"
    assert record["report"]["text"]["name"] == "text.txt"
    assert 0 < record["report"]["kl_mean"] < 5
    assert len(record["report"]["worst"]) == 5
    assert "over 2 windows of 512 tokens of text.txt" in run("info", str(out)).out


def test_quantize_recipes_and_targets(run: Run, models: Path, tmp_path: Path) -> None:
    def bits(*words: str) -> dict[str, list[int]]:
        result = run("quantize", models / "unpacked", "-o", tmp_path / "out", "--overwrite", *words)
        assert result.code == 0, result.err
        found: dict[str, list[int]] = {}
        for tensor in json.loads((tmp_path / "out" / "glm4run.json").read_text())["tensors"]:
            found.setdefault(tensor["name"].rpartition(".")[2], []).append(tensor["bits"])
        return found

    assert bits("--recipe", "int4-careful")["down_proj"] == [8, 8]
    assert bits("--recipe", "int4-careful")["gate_up_proj"] == [4, 4]
    (tmp_path / "mine.toml").write_text(
        'ignore = ["lm_head", "model.layers.0.*"]\n[[rules]]\nlinears = "*"\nbits = 8\ngroup_size = [128, 32]\n'
    )
    assert bits("--recipe", str(tmp_path / "mine.toml")) == {
        name: [8] for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
    }
    assert {4, 8} <= {b for found in bits("--target-bpw", "5.8").values() for b in found}
    for words in (("--recipe", "none"), ("--target-bpw", "2"), ("--recipe", "int4-g32", "--target-bpw", "5")):
        assert run("quantize", models / "unpacked", "-o", tmp_path / "no", *words).code == 2
    (tmp_path / "bad.toml").write_text("[[rules]]\nlinears = 'x'\nbits = 5\ngroup_size = 32\n")
    assert run("quantize", models / "unpacked", "-o", tmp_path / "no", "--recipe", str(tmp_path / "bad.toml")).code == 2
    assert not (tmp_path / "no").exists()


def test_quantize_default_output_is_beside_the_source(run: Run, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "mine")
    assert run("quantize", source, "--bits", "8").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine-int8"]


def test_quantize_says_what_it_adapted(run: Run, models: Path, tmp_path: Path) -> None:
    result = run("quantize", models / "base", "-o", tmp_path / "out", "--bits", "8")
    assert "notice: down_proj: group size 32, as 128 does not divide 160" in result.err


# --- tokenize, check, info, models


def test_tokenize_marks_control_tokens(run: Run) -> None:
    result = run("tokenize", json.dumps(MESSAGES), "--chat", "-m", "talker", "--json")
    data = result.json()
    assert list(data) == ["ids", "pieces", "special"]
    assert data["ids"][:3] == [*PREFIX, SPECIAL_IDS["<|system|>"]]
    assert data["ids"][-1] == SPECIAL_IDS["<|assistant|>"]
    assert [p for p, special in zip(data["pieces"], data["special"], strict=True) if special] == [
        *("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>")
    ]
    lines = run("tokenize", json.dumps(MESSAGES), "--chat", "-m", "talker").out.splitlines()
    assert len(lines) == len(data["ids"])
    assert lines[0].split() == [str(PREFIX[0]), "[gMASK]", "control"]


def test_tokenize_text_is_text(run: Run) -> None:
    data = run("tokenize", "hello<|user|>", "-m", "base", "--json").json()
    assert "".join(data["pieces"]) == "hello<|user|>"
    assert not any(data["special"])
    assert run("tokenize", "-m", "base", "--json", stdin="hello<|user|>").json() == data
    assert run("tokenize", "-", "-m", "base", "--json", stdin="hello<|user|>").json() == data


def test_tokenize_takes_an_object_with_tools(run: Run) -> None:
    tool = {"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}
    words = ("--chat", "-m", "talker", "--json")
    plain = run("tokenize", json.dumps({"messages": MESSAGES}), *words).json()["ids"]
    assert plain == run("tokenize", json.dumps(MESSAGES), *words).json()["ids"]
    without = {"messages": MESSAGES, "add_generation_prompt": False}
    assert run("tokenize", json.dumps(without), *words).json()["ids"] == plain[:-1]
    tools = run("tokenize", json.dumps({"messages": MESSAGES, "tools": [tool]}), *words).json()
    assert len(tools["ids"]) > len(plain)
    assert run("tokenize", json.dumps({"messages": MESSAGES, "x": 1}), *words).code == 2


def test_check_json(run: Run, models: Path, tmp_path: Path) -> None:
    assert run("check", models / "small", "--json").json() == {"ok": True, "problems": []}
    good = run("check", models / "small")
    assert (good.code, good.out) == (0, "")
    assert "whole and consistent" in good.err
    folder = write_checkpoint(tmp_path / "bad")
    edit_tensors(folder, {"more": torch.zeros(1)})
    bad = run("check", folder, "--json")
    assert bad.code == 1
    assert [list(problem) for problem in bad.json()["problems"]] == [["file", "tensor", "what", "hint"]]
    assert bad.json()["ok"] is False


def test_info(run: Run, models: Path) -> None:
    data = run("info", "small", "--json").json()
    assert (data["name"], data["folder"]) == ("small", str(models / "small"))
    assert data["quantization"] == ["int4 g128", "int4 g32", "int8 g128"]
    assert (data["source"], data["recipe"], data["chat_dialect"]) == ("small-source", "int4", "chat-2024")
    assert data["context_tokens"] == 512
    text = run("info", "small").out
    assert all(key.replace("_", " ") in text for key in data if key not in ("name", "folder", "is_demo"))
    assert run("info", "base", "--json").json()["quantization"] is None


def test_info_says_notices_and_problems(run: Run, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "odd")
    edit_json(folder / "config.json", rope_parameters={"rope_theta": 5.0})
    assert "notice: the config spells the RoPE base in contradictory ways" in run("info", folder).err
    (folder / "model.safetensors").write_bytes(b"")
    assert "1 problems; `glm4run check" in run("info", folder).err


def test_models(run: Run, models: Path) -> None:
    data = run("models", "--json").json()
    here = {model["name"]: model for model in data["models"]}
    assert {"base", "talker", "small", "unpacked"} <= here.keys()
    assert [name for name, model in here.items() if model["packed"] and not model["is_demo"]] == ["small"]
    assert here["small"]["bytes"] == (models / "small" / "model.safetensors").stat().st_size
    assert {member["name"] for member in data["family"]} == set(load_cards())
    assert data["folders"][0] == str(models)
    listed = run("models")
    assert re.search(r"^small +packed ", listed.out, re.MULTILINE)
    assert re.search(r"^base +unpacked ", listed.out, re.MULTILINE)
    assert "GLM-Z1-9B-0414" in listed.err


def test_models_skips_what_it_cannot_read_and_says_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLM4RUN_MODELS", str(tmp_path))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    result = run("models")
    assert result.code == 0
    assert "notice: " in result.err and "broken" in result.err
    assert "broken" not in result.out
