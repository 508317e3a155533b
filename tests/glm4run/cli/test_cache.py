"""`cache ls` and `cache rm`, and that `generate` and batches find what an earlier process kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from glm4run.model import Glm4Model
from tests.builders import write_checkpoint
from tests.glm4run.cli.test_cli import Result, Run, run

__all__ = ["run"]
DOCUMENT = "the hello in the there at the hell " * 90


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cache") / "long", max_position_embeddings=4096)


@pytest.fixture
def ask(run: Run, model: Path) -> Any:
    def call(question: str, *words: str) -> Result:
        common = ("--json", "--max-tokens", "4", "--temperature", "0", "--ctx", "2k")
        return run("generate", "-m", model, *common, *words, DOCUMENT + question)

    return call


def test_generate_finds_the_document_of_an_earlier_process(run: Run, ask: Any) -> None:
    first = ask("one")
    assert first.json()["cached_tokens"] == 0 and "prompt cache" not in first.err
    again = ask("other")
    kept, prompt = again.json()["cached_tokens"], again.json()["prompt_tokens"]
    assert kept >= 512
    assert f"{kept} of {prompt} prompt tokens came from the prompt cache" in again.err
    off = ask("other", "--prompt-cache", "off")
    assert off.json()["cached_tokens"] == 0
    assert off.json()["token_ids"] == again.json()["token_ids"]


def test_generate_goes_on_where_ctrl_c_stopped_it(run: Run, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ask("one", "--prompt-cache", "off").json()["token_ids"]
    forward, fed = Glm4Model.hidden_states, list[int]()

    def struck(self: Glm4Model, ids: Tensor, cache: Any = None) -> Tensor:
        fed.append(len(ids))
        if len(fed) == 2:
            raise KeyboardInterrupt  # inside the second chunk
        return forward(self, ids, cache)

    monkeypatch.setattr(Glm4Model, "hidden_states", struck)
    first = ask("one")
    assert first.code == 130 and first.json()["finish_reason"] == "interrupted"
    assert fed[0] == 512
    again = ask("one")
    assert again.json()["token_ids"] == expected
    assert again.json()["cached_tokens"] == 512
    assert sum(fed[2:]) == again.json()["prompt_tokens"] - 512 + 3  # the rest, and the answer's tokens but the last


def test_off_and_sizes_of_the_option_and_of_the_environment(
    run: Run, ask: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLM4RUN_PROMPTS", str(tmp_path / "here"))
    monkeypatch.setenv("GLM4RUN_PROMPT_CACHE", "off")
    assert ask("one").code == 0
    assert not (tmp_path / "here").exists()
    assert "prompt tokens are kept" in ask("one", "--prompt-cache", "0.25MiB").err  # the option wins
    assert sum(path.stat().st_size for path in (tmp_path / "here").glob("*/*")) <= (1 << 18) + 4096
    for words, name in ((("--prompt-cache", "much"), "--prompt-cache"), ((), "$GLM4RUN_PROMPT_CACHE")):
        monkeypatch.setenv("GLM4RUN_PROMPT_CACHE", "much")
        got = ask("one", *words)
        assert got.code == 2 and f"{name} 'much' is not a size" in got.err


def test_batches_share_a_document(run: Run, model: Path, tmp_path: Path) -> None:
    lines = [{"prompt": DOCUMENT + question} for question in ("one", "two", "three")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    options = ("--max-tokens", "3", "--temperature", "0", "--ctx", "2k")
    texts = []
    for name, more in (("with", ()), ("without", ("--prompt-cache", "off"))):
        target = tmp_path / name
        got = run("generate", "-m", model, "--input", tmp_path / "in.jsonl", "--output", target, *options, *more)
        assert got.code == 0
        answers = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
        # Without a disk, what one request has read is still there for the next.
        assert [answer["cached_tokens"] for answer in answers] == [0, 1024, 1024]
        asked = sum(answer["prompt_tokens"] for answer in answers)
        assert f"2048 of {asked} prompt tokens had been read for another request" in got.err
        texts.append([answer["token_ids"] for answer in answers])
    assert texts[0] == texts[1]


def test_listing_and_removing(run: Run, ask: Any) -> None:
    empty = run("cache", "ls")
    assert (empty.code, empty.out) == (0, "") and "0 kept prompts" in empty.err
    ask("one")
    listed = run("cache", "--json").json()
    (prompt,) = listed["prompts"]
    assert list(prompt) == ["name", "model", "what", "tokens", "bytes", "own_bytes", "last_used"]
    assert prompt["model"] == "long" and prompt["what"].startswith("the hello in the there")
    assert listed["bytes"] == prompt["bytes"] == prompt["own_bytes"] > 0
    shown = run("cache", "ls").out
    assert prompt["name"] in shown and "just now" in shown
    assert run("cache", "ls", "--model", "other", "--json").json()["prompts"] == []
    assert run("cache", "rm", "--model", "other", "--json").json() == {"removed": [], "bytes": 0}
    assert run("cache", "rm", prompt["name"][:5], "--json").json() == {
        "removed": [prompt["name"]],
        "bytes": prompt["bytes"],
    }
    assert run("cache", "ls", "--json").json()["prompts"] == []
    ask("one")
    assert "1 prompt removed" in run("cache", "rm", "--all").err
    assert ask("one").json()["cached_tokens"] == 0


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("cache", "rm"), "nothing to remove was named"),
        (("cache", "rm", "zz"), "no kept prompt begins with 'zz'"),
        (("cache", "rm", "zz", "--all"), "names and --all"),
        (("cache", "ls", "zz"), "takes no names"),
        (("cache", "list"), "'list' is nothing that can be done"),
    ],
)
def test_wrong_usage_is_named(run: Run, words: tuple[str, ...], what: str) -> None:
    got = run(*words)
    assert got.code == 2 and what in got.err and "hint:" in got.err
