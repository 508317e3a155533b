"""Kept prompts: the same answer to the bit, nothing read twice, nothing half-written, never more than allowed."""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4run import LoadedModel, SamplingParams, load_model, prompt_cache, prompt_store
from glm4run.answer import collect
from glm4run.cards import demo_folder
from glm4run.errors import UsageError
from glm4run.prompt_cache import PIECE_TOKENS, PromptCache
from glm4run.session import Session
from glm4run.steps import Context, Timings
from tests.builders import write_checkpoint, write_packed

GREEDY = SamplingParams(max_new_tokens=6)
PROMPT = [40 + n * n % 211 for n in range(700)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_checkpoint(tmp_path_factory.mktemp("prompts") / "tiny", max_position_embeddings=4096)
    return load_model(folder, dtype="fp32", context_len=1600)


class Kept:
    """A model with kept prompts, and what was said of them."""

    def __init__(self, model: LoadedModel, root: Path, **options: Any) -> None:
        self.recalled: list[tuple[int, int]] = []
        self.problems: list[str] = []
        self.cache = PromptCache(
            model,
            root=root,
            on_recall=lambda *counts: self.recalled.append(counts),
            on_problem=self.problems.append,
            **options,
        )
        self.cache.unit = min(self.cache.unit, 64)  # tiny models are cut into chunks of 512
        self.model = dataclasses.replace(model, kept_prompts=self.cache)

    def ask(self, ids: list[int]) -> tuple[list[int], int]:
        """The answer's tokens, and how many were recalled; then keeps what was offered."""
        answer = collect(self.model, ids, GREEDY)
        self.cache.keep()
        return answer.token_ids, answer.as_json()["cached_tokens"]

    def read(self, ids: list[int]) -> int:
        """Reads a prompt and keeps it; returns how many of its tokens were recalled."""
        context = self.model.new_context()
        found = self.cache.recall(context, ids)
        start = len(context.ids)
        self.model.prefill(ids, context)
        self.cache.offer(context, ids, start)
        self.cache.keep()
        return found


def files(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.safetensors"))


def test_second_run_recalls_what_the_first_read_and_says_the_same(tiny: LoadedModel, tmp_path: Path) -> None:
    plain = collect(tiny, PROMPT, GREEDY)
    assert plain.as_json()["cached_tokens"] == 0
    first = Kept(tiny, tmp_path)
    assert first.ask(PROMPT) == (plain.token_ids, 0)
    again = Kept(tiny, tmp_path)
    assert again.ask(PROMPT) == (plain.token_ids, 640)  # whole units of 64, of the 699 that may be recalled
    assert again.recalled == [(640, 700)] and not again.problems
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize("which", ["glm-heads", "demo"])
def test_logits_with_and_without_are_the_same_to_the_bit(tmp_path: Path, which: str) -> None:
    """With GLM-4's heads a prefill runs in native attention, which no cut of the prompt shows in: every token is taken.
    In the demo model's a cut shows in the last bits, so whole chunks are taken and the rest is cut as it would be."""
    if which == "demo":
        folder, expected_tokens = demo_folder(), 512
    else:
        heads = {"num_attention_heads": 16, "head_dim": 16, "max_position_embeddings": 4096}
        folder, expected_tokens = write_packed(tmp_path / "m", source=heads, bits=4), 901
    model = load_model(folder, context_len=1400)
    if model.backend != "native":
        pytest.skip("no native library")
    ids = [40 + n * n % 199 for n in range(1111)]

    def logits(context: Context) -> torch.Tensor:
        model.prefill(ids[:-1], context)
        with torch.inference_mode():
            last: torch.Tensor = model.model(torch.tensor(ids[-1:]), context.cache)[-1].clone()
            return last

    cache = PromptCache(model, root=tmp_path / "prompts")
    other = model.new_context()
    model.prefill([*ids[:901], 45, 46], other)
    cache.offer(other, other.ids, 0)
    cache.keep()
    again = model.new_context()
    assert PromptCache(model, root=tmp_path / "prompts").recall(again, ids) == expected_tokens
    assert torch.equal(logits(again), logits(model.new_context()))


def test_documents_share_their_beginning_and_questions_the_document(tiny: LoadedModel, tmp_path: Path) -> None:
    kept = Kept(tiny, tmp_path)
    kept.read(PROMPT)
    other_question = [*PROMPT[:650], *range(60, 100)]
    assert kept.read(other_question) == 640
    assert len(files(tmp_path)) == 3  # 40 new tokens are not worth a file
    longer = [*PROMPT[:650], *(50 + n % 199 for n in range(600))]
    assert kept.read(longer) == 640
    assert len(files(tmp_path)) == 6  # the two whole pieces are shared
    assert Kept(tiny, tmp_path).read(longer) == 1216
    assert Kept(tiny, tmp_path).read([41, *PROMPT[1:]]) == 0
    assert {entry.tokens for entry in prompt_store.entries(tmp_path)} >= {700, 1250}


def test_short_prompts_never_touch_the_disk(tiny: LoadedModel, tmp_path: Path) -> None:
    kept = Kept(tiny, tmp_path / "none")
    kept.read(PROMPT[: prompt_cache.MIN_TOKENS - 1])
    kept.ask(PROMPT[:100])
    assert not (tmp_path / "none").exists()


def test_nothing_is_written_before_keep(tiny: LoadedModel, tmp_path: Path) -> None:
    kept = Kept(tiny, tmp_path)
    steps = kept.model.stream(PROMPT, GREEDY)
    next(steps)
    assert files(tmp_path) == []
    del steps  # an answer that nobody hears to its end
    kept.cache.keep()
    assert len(files(tmp_path)) == 3


def test_an_interrupted_prefill_is_not_lost(tiny: LoadedModel, tmp_path: Path) -> None:
    kept = Kept(tiny, tmp_path)
    long = [*PROMPT, *PROMPT[::-1]]

    def interrupt(done: int, total: int) -> None:
        if done >= 1024:
            raise KeyboardInterrupt

    answer = collect(kept.model, long, GREEDY, on_prefill=interrupt)
    assert answer.finish_reason == "interrupted"
    kept.cache.keep()
    calls: list[tuple[int, int]] = []
    again = Kept(tiny, tmp_path)
    resumed = collect(again.model, long, GREEDY, on_prefill=lambda *counts: calls.append(counts))
    rest = len(long) - 1024
    assert resumed.timings.recalled_tokens == 1024 and resumed.timings.prefill_tokens == rest
    # Progress counts what is read now. What fits one chunk has no bar: it begins at its end.
    assert [done for done, _ in calls] == [rest] and {total for _, total in calls} == {rest}
    assert resumed.token_ids == collect(tiny, long, GREEDY).token_ids


def test_progress_of_a_resumed_prompt_is_of_what_is_left(tiny: LoadedModel) -> None:
    model = dataclasses.replace(tiny, plan=dataclasses.replace(tiny.plan, chunk=100))
    context, calls = model.new_context(), list[tuple[int, int]]()

    def struck(done: int, total: int) -> None:
        calls.append((done, total))
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.prefill(PROMPT, context, on_prefill=struck)
    assert calls == [(0, 700), (100, 700), (200, 700), (300, 700)]
    assert len(context.ids) == context.cache.position == 300
    calls.clear()
    model.prefill(PROMPT, context, on_prefill=lambda *counts: calls.append(counts))
    assert calls == [(0, 400), (100, 400), (200, 400), (300, 400), (400, 400)]
    whole = model.new_context()
    model.prefill(PROMPT, whole)
    for layer in range(model.config.num_hidden_layers):
        for name, rows in whole.cache.rows(layer, 0, 700).items():
            assert torch.equal(rows, context.cache.rows(layer, 0, 700)[name])


def test_other_weights_rope_or_dtype_have_prompts_of_their_own(tiny: LoadedModel, tmp_path: Path) -> None:
    kept = Kept(tiny, tmp_path)
    kept.read(PROMPT)
    others = [
        load_model(tiny.folder, dtype="fp32", context_len=1600, rope_theta=5e5),
        load_model(tiny.folder, dtype="bf16", context_len=1600),
        load_model(
            write_checkpoint(tmp_path / "m", seed=1, max_position_embeddings=4096), dtype="fp32", context_len=1600
        ),
    ]
    folders = {kept.cache.folder}
    for model in others:
        other = Kept(model, tmp_path)
        assert other.cache.recall(model.new_context(), PROMPT) == 0
        folders.add(other.cache.folder)
    assert len(folders) == 4
    template = dataclasses.replace(tiny, dialect=None, name="renamed")  # token ids are the key, not how they came about
    assert Kept(template, tmp_path).cache.recall(template.new_context(), PROMPT) == 640


@pytest.mark.parametrize("damage", ["cut", "flipped", "rubbish"])
def test_damaged_pieces_are_said_removed_and_read_again(tiny: LoadedModel, tmp_path: Path, damage: str) -> None:
    kept = Kept(tiny, tmp_path)
    expected, _ = kept.ask(PROMPT)
    path = files(tmp_path)[1]
    raw = bytearray(path.read_bytes())
    if damage == "flipped":
        raw[-5000] ^= 1
    path.write_bytes(raw[: len(raw) // 2] if damage == "cut" else b"rubbish" if damage == "rubbish" else raw)
    again = Kept(tiny, tmp_path)
    tokens, recalled = again.ask(PROMPT)
    assert tokens == expected
    assert recalled < 640
    assert len(again.problems) == 1 and path.name in again.problems[0]
    fine = Kept(tiny, tmp_path)
    assert fine.ask(PROMPT) == (expected, 640)
    assert not fine.problems


def test_a_piece_that_another_process_removes_meanwhile_is_no_problem(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept(tiny, tmp_path)
    expected, _ = kept.ask(PROMPT)
    from glm4run.kv_files import load_piece as load

    def remove_first(piece: Any, *rest: Any) -> None:
        if piece.start == PIECE_TOKENS:
            piece.path.unlink()
        load(piece, *rest)

    monkeypatch.setattr(prompt_cache, "load_piece", remove_first)
    again = Kept(tiny, tmp_path)
    assert again.ask(PROMPT) == (expected, 0)  # 256 are left, which are not worth it
    assert not again.problems


def test_least_recently_used_goes_first_and_the_bound_holds(tiny: LoadedModel, tmp_path: Path) -> None:
    kept = Kept(tiny, tmp_path)
    prompts = [[40 + seed, *PROMPT[1:600]] for seed in range(3)]
    kept.read(prompts[0])
    one = prompt_store.total_bytes(tmp_path)
    kept.cache.most_bytes = 2 * one + one // 2
    kept.read(prompts[1])
    for path in files(tmp_path):  # times of a file system may be coarse
        os.utime(path, (path.stat().st_mtime - 100,) * 2)
    assert kept.read(prompts[0]) == 576  # used again: now the second is the oldest
    kept.read(prompts[2])
    assert prompt_store.total_bytes(tmp_path) <= kept.cache.most_bytes
    assert [Kept(tiny, tmp_path).cache.recall(tiny.new_context(), ids) for ids in prompts] == [576, 0, 576]


def test_a_prompt_larger_than_the_bound_is_kept_as_far_as_it_goes(tiny: LoadedModel, tmp_path: Path) -> None:
    kept = Kept(tiny, tmp_path)
    kept.read(PROMPT)
    whole = prompt_store.total_bytes(tmp_path)
    kept.cache.most_bytes = int(whole * 0.8)
    other = [41, *PROMPT[1:]]
    kept.read(other)
    assert prompt_store.total_bytes(tmp_path) <= kept.cache.most_bytes
    assert "the first 512 of 700 prompt tokens are kept" in kept.problems[0]
    assert Kept(tiny, tmp_path).cache.recall(tiny.new_context(), other) == 512


def test_the_bound_is_a_share_of_the_free_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glm4run.prompt_store.shutil.disk_usage", lambda _: type("U", (), {"free": 1000})())
    assert prompt_store.Room(1 << 40, tmp_path).bound == 200
    assert prompt_store.Room(50, tmp_path).bound == 50


def test_a_full_disk_is_said_once_and_leaves_nothing_half_written(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("glm4run.kv_files.save_file", refuse)
    kept = Kept(tiny, tmp_path)
    kept.ask(PROMPT)
    kept.ask([41, *PROMPT[1:]])
    assert len(kept.problems) == 1 and "No space left" in kept.problems[0]
    assert files(tmp_path) == [] and not list(tmp_path.glob("*/*.partial"))


def test_what_is_not_finite_is_not_kept(tiny: LoadedModel, tmp_path: Path) -> None:
    kept = Kept(tiny, tmp_path)
    context = tiny.new_context()
    tiny.prefill(PROMPT, context)
    context.cache.rows(1, 300, 301)["keys"].fill_(float("nan"))
    kept.cache.offer(context, PROMPT, 0)
    kept.cache.keep()
    assert len(files(tmp_path)) == 1


def test_stale_partial_files_are_swept_and_fresh_ones_are_not(tiny: LoadedModel, tmp_path: Path) -> None:
    kept = Kept(tiny, tmp_path)
    kept.cache.folder.mkdir(parents=True)
    stale, fresh = (kept.cache.folder / f"{name}.partial" for name in ("stale", "fresh"))
    for path in (stale, fresh):
        path.write_bytes(b"half")
    old = time.time() - 2 * prompt_store.STALE_PARTIAL_S
    os.utime(stale, (old, old))
    kept.read(PROMPT)
    assert not stale.exists() and fresh.exists()


def test_two_writers_of_one_prompt_leave_one_whole_copy(tiny: LoadedModel, tmp_path: Path) -> None:
    one, other = Kept(tiny, tmp_path), Kept(tiny, tmp_path)
    for kept in (one, other):
        context = tiny.new_context()
        tiny.prefill(PROMPT, context)
        kept.cache.offer(context, PROMPT, 0)
    one.cache.keep()
    other.cache.keep()
    assert len(files(tmp_path)) == 3
    assert Kept(tiny, tmp_path).cache.recall(tiny.new_context(), PROMPT) == 640


def test_entries_say_what_is_there_and_removing_keeps_what_others_need(tiny: LoadedModel, tmp_path: Path) -> None:
    kept = Kept(tiny, tmp_path)
    words = tiny.tokenizer.encode("the hello " * 200)
    kept.read([*words[:600], *tiny.tokenizer.encode(" first question")])
    kept.read([*words[:600], *(50 + n % 150 for n in range(580))])
    found = {entry.tokens: entry for entry in prompt_store.entries(tmp_path)}
    assert len(found) == 2
    short, long = (found[tokens] for tokens in sorted(found))
    assert short.model == "tiny" and short.what.startswith("the hello the hello") and "question" in short.what
    assert short.own_bytes < short.nbytes
    assert prompt_store.total_bytes(tmp_path) == short.own_bytes + long.nbytes
    with pytest.raises(UsageError, match="no kept prompt"):
        prompt_store.require_entries(["zz"], list(found.values()))
    (chosen,) = prompt_store.require_entries([short.name[:6]], list(found.values()))
    assert prompt_store.remove([chosen]) == short.own_bytes
    assert [entry.tokens for entry in prompt_store.entries(tmp_path)] == [long.tokens]
    prompt_store.remove(prompt_store.entries(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_session_finds_a_document_of_another_run(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "chat", dialect="chat-2024", max_position_embeddings=4096)
    model = load_model(folder, dtype="fp32", context_len=2000)
    document = ("notes.txt", "the hello in the there " * 100)

    def say(kept: Kept | None, question: str) -> tuple[list[int | None], Timings, int]:
        session = Session(model if kept is None else kept.model, GREEDY)
        timings = Timings()
        reading = session.read_first(question, [document])
        left = session.recall(reading).new_tokens
        return [step.token_id for step in session.say(question, [document], timings=timings)], timings, left

    expected, timings, left = say(None, "and?")
    assert left == timings.prefill_tokens
    say(Kept(model, tmp_path / "p"), "why?")
    again = Kept(model, tmp_path / "p")
    tokens, timings, left = say(again, "and?")
    assert tokens == expected
    assert timings.prefill_tokens == left < 200
    assert len(again.recalled) == 1


@pytest.mark.parametrize("kv_bits", ["8", "4", "8:4"])
def test_quantized_caches_come_back_as_they_were(tiny: LoadedModel, tmp_path: Path, kv_bits: str) -> None:
    model = load_model(tiny.folder, dtype="fp32", context_len=1600, kv_bits=kv_bits)
    context = model.new_context()
    model.prefill(PROMPT, context)
    kept = Kept(model, tmp_path)
    kept.cache.offer(context, PROMPT, 0)
    kept.cache.keep()
    again = model.new_context()
    assert Kept(model, tmp_path).cache.recall(again, PROMPT) == 640
    for layer in range(2):
        for name, rows in again.cache.rows(layer, 0, 640).items():
            assert torch.equal(rows, context.cache.rows(layer, 0, 640)[name]), name
    assert Kept(tiny, tmp_path).cache.recall(tiny.new_context(), PROMPT) == 0  # 16 bits are another cache
