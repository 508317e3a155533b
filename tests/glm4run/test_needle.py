"""The needle harness, on networks of known sight: what copies from its whole context finds all, what is short-sighted
finds what is near, and what cannot copy is told apart from a model whose context is too short."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal, cast

import pytest
import torch
from torch import Tensor

from glm4run import LoadedModel
from glm4run.cards import demo_folder
from glm4run.cli import main
from glm4run.dialects import DIALECTS
from glm4run.errors import DoesNotFitError, UsageError
from glm4run.kv_cache import KVCache
from glm4run.model import Glm4Model
from glm4run.needle import Grid, default_lengths, needles, search
from glm4run.text_windows import Text
from tests.builders import VOCAB, write_checkpoint
from tests.scripted import END, loaded_model

MATCH = 8  # tokens
TEXT = Text("words", "the thin heron is in the hell. hello there on the inner hatch! " * 8, "-")


class Copier:
    """Continues as it went on when its last tokens stood in its context before; sees the last `sight` tokens only."""

    dtype = torch.float32
    stack = None

    def __init__(self, sight: int) -> None:
        self.sight = sight
        self.seen: list[int] = []
        self.fed = 0

    def hidden_states(self, ids: Tensor, cache: KVCache) -> Tensor:
        self.seen[cache.position :] = ids.tolist()
        self.fed += len(ids)
        cache.advance(len(ids))
        return torch.zeros(len(ids), 1)

    def __call__(self, ids: Tensor, cache: KVCache, *, logits: Literal["last", "all"] = "last") -> Tensor:
        self.hidden_states(ids, cache)
        count = len(ids) if logits == "all" else 1
        return torch.stack([self._logits(self.seen[: len(self.seen) - n]) for n in reversed(range(count))])

    def _logits(self, seen: list[int]) -> Tensor:
        logits = torch.zeros(VOCAB)
        logits[END] = 1.0
        seen = seen[-self.sight :]
        for start in range(len(seen) - MATCH - 1, -1, -1):
            if seen[start : start + MATCH] == seen[-MATCH:]:
                logits[seen[start + MATCH]] = 20.0
                break
        return logits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return loaded_model(tmp_path_factory.mktemp("needle") / "tiny", dialect=None, context_len=512)


def seeing(tiny: LoadedModel, sight: int) -> tuple[LoadedModel, Copier]:
    network = Copier(sight)
    return dataclasses.replace(tiny, model=cast(Glm4Model, network)), network


def shares(grid: Grid) -> dict[tuple[int, int], float]:
    for cell in grid.cells:  # what copies is certain, so the two scores agree
        assert cell.share("answer") == cell.share("logprob")
    return {(cell.length, cell.depth): cell.share("answer") for cell in grid.cells}


def test_what_sees_everything_finds_everything(tiny: LoadedModel) -> None:
    model, _ = seeing(tiny, 10_000)
    done: list[tuple[int, int]] = []
    grid = search(model, TEXT, lengths=(256, 512), count=2, progress=lambda *now: done.append(now))
    assert set(shares(grid).values()) == {1.0} and len(grid.cells) == 10
    assert grid.retrieves("answer") and grid.retrieves("logprob")
    assert not any(item.is_found for item in grid.absent)
    assert done[-1] == (24, 24)
    for cell in grid.cells:
        assert all(cell.length - 100 < item.prompt_tokens <= cell.length - 40 for item in cell.found)
    assert grid.repeats is (grid.haystack_tokens < 512)


def test_what_is_short_sighted_finds_what_is_near(tiny: LoadedModel) -> None:
    model, _ = seeing(tiny, 220)
    found = shares(search(model, TEXT, lengths=(256, 512), depths=(0, 50, 100)))
    assert [found[512, depth] for depth in (0, 50, 100)] == [0.0, 0.0, 1.0]
    assert [found[256, depth] for depth in (50, 100)] == [1.0, 1.0]


def test_what_cannot_copy_is_told(tiny: LoadedModel) -> None:
    model, _ = seeing(tiny, 4)
    grid = search(model, TEXT, lengths=(256,), depths=(100,), count=2)
    assert not grid.retrieves("answer") and not grid.retrieves("logprob")


def test_a_haystack_is_computed_once_for_all_depths(tiny: LoadedModel) -> None:
    model, network = seeing(tiny, 10_000)
    grid = search(model, TEXT, lengths=(512,), depths=(0, 50, 100), count=2)
    assert grid.computed_tokens <= network.fed < 0.7 * grid.prompt_tokens


def test_chat_models_are_asked_in_their_dialect(tiny: LoadedModel) -> None:
    model, network = seeing(tiny, 10_000)
    chat = dataclasses.replace(model, dialect=DIALECTS["chat-2024"])
    grid = search(chat, TEXT, lengths=(384,), depths=(50,), count=1)
    (cell,) = grid.cells
    assert cell.share("logprob") == 1.0  # led by its own words it copies
    assert cell.share("answer") == 0.0  # alone it says nothing, as nothing follows the question anywhere
    assert network.seen[:3] == [*chat.encode_prompt("")[:2], chat.tokenizer.special_id("<|user|>")]


def test_real_network_gives_finite_scores_and_the_order_does_not_matter(tiny: LoadedModel) -> None:
    one = search(tiny, TEXT, lengths=(256, 384), depths=(0, 100), count=1)
    alone = search(tiny, TEXT, lengths=(384,), depths=(100,), count=1)
    (cell,) = alone.cells
    (same,) = (c for c in one.cells if (c.length, c.depth) == (384, 100))
    assert same.found[0].ranks == cell.found[0].ranks
    assert same.found[0].logprob == pytest.approx(cell.found[0].logprob, abs=1e-5)


def test_what_does_not_fit_or_makes_no_sense_is_refused_before_any_compute(tiny: LoadedModel) -> None:
    model, network = seeing(tiny, 1)
    with pytest.raises(DoesNotFitError, match="513 tokens does not fit the context of 512"):
        search(model, TEXT, lengths=(513,))
    for bad in ({"lengths": (64,)}, {"depths": (-1,)}, {"depths": (101,)}, {"count": 0}, {"count": 99}):
        with pytest.raises(UsageError):
            search(model, TEXT, **bad)
    with pytest.raises(UsageError, match="too few for a haystack"):
        search(model, Text("short", "hello.", "-"), lengths=(256,))
    assert network.fed == 0


def test_lengths_that_are_not_given_are_those_that_fit() -> None:
    assert default_lengths(8192) == (512, 1024, 2048, 4096, 8192)
    assert default_lengths(1000) == (256, 512)
    assert default_lengths(200) == (200,)
    assert default_lengths(1 << 20)[-1] == 1 << 20
    assert needles(3, 1) == needles(3, 1) != needles(3, 2)


def test_command_prints_a_grid_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "m")
    words = ["eval", str(folder), "--needle", "--lengths", "256,384", "--depths", "0,100", "--needles", "1"]

    def run(*more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([*words, *more])
        out, err = capsys.readouterr()
        return int(str(ended.value.code)), out, err

    code, out, err = run()
    assert code == 0, err
    assert "256" in out and "100 %" in out and "0%" in out and "\x1b[" not in out
    assert "says nothing about its context" in err and "computed" in err
    code, out, err = run("--json", "--score", "logprob")
    got = json.loads(out)
    assert [(cell["length"], cell["depth"]) for cell in got["cells"]] == [(256, 0), (256, 100), (384, 0), (384, 100)]
    assert got["score"] == "logprob" and got["context"] == 384 and got["haystack"]["name"].startswith("built-in")
    for more, what in (
        (("--stride", "4"), "--needle does not have"),
        (("--score", "luck"), "score is 'luck'"),
        (("--depths", "x"), "are no numbers"),
        (("--ctx", "512", "--lengths", "1k"), "does not fit the context of 512"),
        (("--lengths", "1k"), "this model has 512"),
    ):
        code, _, err = run(*more)
        assert code == 2 and what in err, err
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(demo_folder()), "--needles", "2"])
    assert ended.value.code == 2 and "without --needle" in capsys.readouterr().err
