"""A context's last token is usable, and one more is refused in one line, before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glm4run.model import Glm4Model
from tests.builders import write_checkpoint
from tests.glm4run.cli.test_cli import Run, run

__all__ = ["run"]
GREEDY = ("--temperature", "0", "--max-tokens", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("context") / "m")  # 512 tokens


@pytest.fixture
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: Any) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(Glm4Model, "hidden_states", forward)


def lines_of_error(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("kv_bits", ["16", "8", "4", "8:4"])
def test_a_prompt_that_fills_the_context_is_answered(run: Run, model: Path, kv_bits: str) -> None:
    for tokens in (63, 64):
        words = ("--raw", "--ctx", "64", "--kv-bits", kv_bits)
        got = run("generate", "-m", model, *words, *GREEDY, "--json", "x" * tokens)
        assert got.code == 0, got.err
        assert got.json()["prompt_tokens"] == tokens


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize(
    ("words", "what"),
    [
        (
            ("generate", "-m", "MODEL", "--raw", "--ctx", "64", "x" * 65),
            "the prompt has 65 tokens, the context holds 64",
        ),
        (("generate", "-m", "MODEL", "--ctx", "513", "x"), "513 tokens was asked for, this model has 512"),
        (("chat", "MODEL", "--force", "--ctx", "513"), "513 tokens was asked for, this model has 512"),
        (("eval", "MODEL", "--text", "TEXT", "--ctx", "513"), "513 tokens was asked for, this model has 512"),
        (("eval", "MODEL", "--needle", "--lengths", "513"), "513 tokens was asked for, this model has 512"),
        (("bench", "MODEL", "--prompt", "0", "--generate", "8", "--depth", "503"), "this model has 512"),
        (("bench", "MODEL", "--prompt", "513", "--generate", "0"), "this model has 512"),
        (
            ("generate", "-m", "MODEL", "--ctx", "513", "--input", "LINES", "--output", "OUT"),
            "513 tokens was asked for, this model has 512",
        ),
    ],
)
@pytest.mark.parametrize("kv_bits", ["16", "8", "4", "8:4"])
def test_one_token_more_is_refused(
    run: Run, model: Path, tmp_path: Path, words: tuple[str, ...], what: str, kv_bits: str
) -> None:
    (tmp_path / "text").write_text("hello there " * 400, encoding="utf-8")
    (tmp_path / "lines").write_text('{"prompt": "x"}\n', encoding="utf-8")
    places = {"MODEL": model, "TEXT": tmp_path / "text", "LINES": tmp_path / "lines", "OUT": tmp_path / "out"}
    got = run(*(str(places.get(word, word)) for word in words), "--kv-bits", kv_bits)
    assert not (tmp_path / "out").exists()
    assert got.code == 2, got.err
    (line,) = lines_of_error(got.err)
    assert what in line
    assert got.out == ""


@pytest.mark.usefixtures("nothing_computed")
def test_one_request_of_a_batch_that_is_too_long_is_named(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_text(json.dumps({"id": "long", "prompt": "x" * 65}) + "\n", encoding="utf-8")
    files = ("--input", tmp_path / "in", "--output", tmp_path / "out")
    got = run("generate", "-m", model, "--ctx", "64", "--kv-bits", "8:4", *files)
    assert got.code == 0  # the file says it, beside the answers to the others
    (line,) = (json.loads(line) for line in (tmp_path / "out").read_text(encoding="utf-8").splitlines())
    assert (line["id"], line["finish_reason"], line["token_ids"]) == ("long", "error", [])
    assert "request 'long' has" in json.dumps(line["error"]) and "the context holds 64" in got.err
