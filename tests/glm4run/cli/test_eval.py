"""`eval`: the contract's JSON, one reference at a time, and what `chat` and `info` say of a measured model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glm4run.cli import main
from tests.builders import edit_json, write_checkpoint, write_packed
from tests.glm4run.test_model_folders import REPORT

CONTRACT = ["tokens", "perplexity", "reference_perplexity", "kld_mean", "kld_p99", "same_top1", "context", "stride"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return call


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`packed`, `packed-source` (what it was made of) and a text."""
    root = tmp_path_factory.mktemp("eval")
    write_packed(root / "packed", source={"dialect": "chat-2024"})
    (root / "text.txt").write_text("hello the thin in there, on the heron 你好 at the hell. " * 12, encoding="utf-8")
    return root


def evaluated(run: Run, root: Path, *words: str | Path) -> Any:
    code, out, err = run("eval", root / "packed", "--text", root / "text.txt", "--ctx", "48", "--json", *words)
    assert code == 0, err
    return json.loads(out)


def test_without_a_reference(run: Run, root: Path) -> None:
    result = evaluated(run, root, "--windows", "3")
    assert list(result)[: len(CONTRACT)] == CONTRACT
    assert result["tokens"] == 3 * 23
    assert result["perplexity"] > 1
    assert [result[key] for key in ("reference_perplexity", "kld_mean", "kld_p99", "same_top1", "divergence")] == [
        None
    ] * 5
    assert (result["context"], result["stride"], result["windows"], result["prefix_tokens"]) == (48, 46, 3, 2)
    assert result["scored"] == "second half"


def test_a_reference_or_its_saved_logits(run: Run, root: Path, tmp_path: Path) -> None:
    source, text, logits = root / "packed-source", root / "text.txt", tmp_path / "logits"
    fp32 = ("--dtype", "fp32")
    direct = evaluated(run, root, *fp32, "--reference", source)
    code, out, err = run("eval", source, "--text", text, "--ctx", "48", *fp32, "--save-logits", logits, "--json")
    assert code == 0, err
    assert "logits saved" in err
    stored = evaluated(run, root, *fp32, "--reference-logits", logits)
    assert direct["reference"] == stored["reference"] == "packed-source"
    assert direct["kld_mean"] > 0
    assert stored["kld_mean"] == pytest.approx(direct["kld_mean"], rel=5e-3)
    assert stored["reference_perplexity"] == pytest.approx(json.loads(out)["perplexity"], rel=1e-9)
    assert sum(bucket["tokens"] for bucket in direct["divergence"]["by_position"]) == direct["tokens"]


def test_every_option_does_something(run: Run, root: Path) -> None:
    whole = evaluated(run, root)
    assert evaluated(run, root, "--max-tokens", "100")["windows"] == 2 < whole["windows"]
    strided = evaluated(run, root, "--stride", "10", "--max-tokens", "100")
    assert (strided["tokens"], strided["stride"], strided["scored"]) == (100, 10, "new tokens")
    assert evaluated(run, root, "--backend", "reference")["backend"] == "reference"
    assert evaluated(run, root, "--rope-theta", "50")["perplexity"] != whole["perplexity"]
    assert evaluated(run, root, "--dtype", "fp32")["perplexity"] != whole["perplexity"]


def test_for_people(run: Run, root: Path) -> None:
    words = ("--text", root / "text.txt", "--ctx", "48", "--reference", root / "packed-source")
    code, out, _ = run("eval", root / "packed", *words)
    assert code == 0
    for name in ("perplexity", "KL divergence", "same top-1", "change of perplexity", "KL by position", "p99"):
        assert name in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--reference", "a", "--reference-logits", "b"), "two references"),
        (("--ctx", "many"), "not a size"),
        (("--ctx", "3"), "too small"),
        (("--ctx", "100k"), "100k"),
        (("--stride", "511"), "stride of 511"),
        (("--reference-logits", "missing"), "cannot be read"),
        (("--windows", "0"), "--windows"),
    ],
)
def test_wrong_usage(run: Run, root: Path, words: tuple[str, ...], message: str) -> None:
    code, out, err = run("eval", root / "packed", "--text", root / "text.txt", *words)
    assert (code, out) == (2, "")
    assert message in err or message.replace("100k", "102400") in err


def test_a_text_is_required(run: Run) -> None:
    code, _, err = run("eval", "demo")
    assert code == 2
    assert "--text" in err


def test_a_measured_model_says_so_where_it_is_loaded_and_described(run: Run, tmp_path: Path, root: Path) -> None:
    folder = write_checkpoint(tmp_path / "measured", dialect="chat-2024")
    _, out, _ = run("info", folder, "--json")
    assert json.loads(out)["quality"] is None
    edit_json(folder / "glm4run.json", report=REPORT, bits_per_weight=4.25)
    _, out, _ = run("info", folder, "--json")
    line = json.loads(out)["quality"]
    assert line.startswith("4.25 bits per weight, KL divergence 0.0812")
    assert line in run("info", folder)[1]
    code, _, err = run("generate", "hello", "-m", folder, "--max-tokens", "1", "--dtype", "fp32")
    assert code == 0
    assert line in err.replace("\n", " ")
