"""Keys and values on disk: what comes back is what was there, branches share it, another model's never comes back."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

import pytest
import torch

from glm4run import LoadedModel, SamplingParams, load_model
from glm4run.fingerprint import differences, fingerprint
from glm4run.kv_files import PIECE_TOKENS, KVFiles
from glm4run.kv_rows import KVLayer, KVRows
from glm4run.session import Session
from glm4run.steps import Context, Timings
from tests.builders import edit_tensors, write_checkpoint, write_packed
from tests.scripted import loaded_model

GREEDY = SamplingParams(max_new_tokens=12)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return loaded_model(tmp_path_factory.mktemp("kv") / "tiny")


def filled(tiny: LoadedModel, ids: list[int]) -> Context:
    context = tiny.new_context()
    tiny.prefill(ids, context)
    return context


def cache_rows(context: Context, end: int) -> list[torch.Tensor]:
    cache = context.cache
    return [t.clone() for layer in range(len(cache.layers)) for t in cache.rows(layer, 0, end).values()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_was_saved_comes_back_to_the_bit(tiny: LoadedModel, tmp_path: Path) -> None:
    ids = list(range(40, 140))
    context = filled(tiny, ids)
    KVFiles(tmp_path, fingerprint(tiny)).save(context)
    again = tiny.new_context()
    assert KVFiles(tmp_path, fingerprint(tiny)).extend(again, ids) == 100
    assert (again.ids, again.cache.position) == (ids, 100)
    assert same(cache_rows(again, 100), cache_rows(context, 100))


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (8, 4), (16, 4)])
def test_a_quantized_cache_comes_back_with_its_scales(tiny: LoadedModel, tmp_path: Path, bits: tuple[int, int]) -> None:
    run = dataclasses.replace(tiny.memory_run, kv_bits=bits[0], value_bits=bits[1])
    model = dataclasses.replace(tiny, memory_run=run)
    ids = list(range(40, 140))
    context, again = filled(model, ids), model.new_context()
    KVFiles(tmp_path, fingerprint(model)).save(context)
    assert KVFiles(tmp_path, fingerprint(model)).extend(again, ids) == 100
    assert same(cache_rows(again, 100), cache_rows(context, 100))
    assert KVFiles(tmp_path, fingerprint(tiny)).extend(tiny.new_context(), ids) == 0


def test_only_what_is_new_is_written_and_branches_share(tiny: LoadedModel, tmp_path: Path) -> None:
    files = KVFiles(tmp_path, fingerprint(tiny))
    context = filled(tiny, list(range(40, 60)))
    files.save(context)
    files.save(context)
    left, right = [*range(40, 60), 70, 71], [*range(40, 55), 80, 81]
    live = []
    for ids in (left, right):
        tiny.prefill(ids, context)
        files.save(context)
        live.append(cache_rows(context, len(ids)))
    assert [(piece.start, len(piece.ids)) for piece in files.pieces] == [(0, 20), (20, 2), (15, 2)]
    for ids, rows in zip((left, right), live, strict=True):
        again = tiny.new_context()
        assert KVFiles(tmp_path, fingerprint(tiny)).extend(again, [*ids, 90]) == len(ids)
        assert same(cache_rows(again, len(ids)), rows)


def test_long_caches_are_many_files(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "long", dialect="chat-2024", max_position_embeddings=4096)
    model = load_model(folder, dtype="fp32", context_len=2 * PIECE_TOKENS + 200)
    ids = [40 + n % 200 for n in range(2 * PIECE_TOKENS + 100)]
    context = filled(model, ids)
    KVFiles(tmp_path / "kv", fingerprint(model)).save(context)
    assert len(list((tmp_path / "kv").iterdir())) == 3
    again = model.new_context()
    assert KVFiles(tmp_path / "kv", fingerprint(model)).extend(again, ids) == len(ids)
    assert same(cache_rows(again, len(ids)), cache_rows(context, len(ids)))


def test_pieces_of_another_beginning_are_not_taken(tiny: LoadedModel, tmp_path: Path) -> None:
    files = KVFiles(tmp_path, fingerprint(tiny))
    context = filled(tiny, [50, 51, 52])
    files.save(context)
    tiny.prefill([50, 51, 52, 53, 54], context)
    files.save(context)
    again = tiny.new_context()
    assert files.extend(again, [60, 51, 52, 53, 54]) == 0  # the second piece's ids would fit
    assert files.extend(again, [50, 51, 52, 53, 99]) == 4


def test_damaged_pieces_are_said_and_computed_again(tiny: LoadedModel, tmp_path: Path) -> None:
    context = filled(tiny, list(range(40, 60)))
    KVFiles(tmp_path, fingerprint(tiny)).save(context)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    (tmp_path / "0000000-x.partial").write_bytes(b"half")
    said: list[str] = []
    again = tiny.new_context()
    assert KVFiles(tmp_path, fingerprint(tiny), on_problem=said.append).extend(again, list(range(40, 60))) == 0
    assert len(said) == 1 and path.name in said[0]
    assert not list(tmp_path.glob("*.partial"))


def test_full_disk_is_said_once_and_the_conversation_goes_on(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("glm4run.kv_files.save_file", refuse)
    said: list[str] = []
    session = Session(tiny, GREEDY, cache_files=KVFiles(tmp_path, fingerprint(tiny), on_problem=said.append))
    for _ in range(2):
        assert [step for step in session.say("hello") if step.finish_reason]
    assert len(said) == 1 and "No space left" in said[0]
    assert list(tmp_path.iterdir()) == []


def test_a_new_process_goes_on_without_prefill_and_says_the_same(tiny: LoadedModel, tmp_path: Path) -> None:
    def start() -> Session:
        return Session(tiny, GREEDY, cache_files=KVFiles(tmp_path, fingerprint(tiny)))

    def say(session: Session, text: str) -> tuple[list[int | None], int]:
        timings = Timings()
        return [step.token_id for step in session.say(text, timings=timings)], timings.prefill_tokens

    whole = start()
    say(whole, "hello")
    resumed = start()
    for record in whole.conversation.as_records():
        resumed.conversation.apply(record)
    used = resumed.context_used
    assert resumed.restore_cache() >= used - 1  # the last token was said, but never fed
    expected, fed = say(whole, "and you?")
    assert say(resumed, "and you?") == (expected, fed)
    assert fed <= 1 + 1 + len(tiny.tokenizer.encode("\nand you?")) + 1


def test_every_part_that_a_cache_depends_on_changes_the_fingerprint(tmp_path: Path) -> None:
    options = {"dialect": "chat-2024"}
    base = fingerprint(load_model(write_checkpoint(tmp_path / "a", **options), dtype="fp32"))  # type: ignore[arg-type]

    def changed(folder: Path, **more: object) -> list[str]:
        return differences(fingerprint(load_model(folder, **{"dtype": "fp32", **more})), base)  # type: ignore[arg-type]

    same_again = write_checkpoint(tmp_path / "b", dialect="chat-2024")
    assert changed(same_again) == []
    assert changed(same_again, rope_theta=5e5) == ["rope"]
    assert changed(same_again, dtype="bf16") == ["cache"]
    assert changed(same_again, kv_bits=8) == changed(same_again, kv_bits="8:4") == ["cache"]
    for before in ("4", "8:4"):  # what rows of 4 bits were before groups had codes
        kept = fingerprint(load_model(same_again, dtype="fp32", kv_bits=before))
        assert differences(kept, {**base, "cache": f"float32, {before} bits"}) == ["cache"]
    other_values = write_checkpoint(tmp_path / "c", dialect="chat-2024")
    edit_tensors(other_values, {"model.layers.1.mlp.down_proj.weight": torch.full((128, 160), 0.5)})
    assert changed(other_values) == ["weights"]
    assert changed(write_checkpoint(tmp_path / "d", dialect="0414")) == ["template"]
    packed = write_packed(tmp_path / "e", source=options)
    assert changed(packed) == ["weights", "quantization"]


def test_cache_of_another_model_stays_where_it_is(tiny: LoadedModel, tmp_path: Path) -> None:
    context = filled(tiny, list(range(40, 60)))
    KVFiles(tmp_path, fingerprint(tiny)).save(context)
    other = {**fingerprint(tiny), "weights": "x"}
    again = tiny.new_context()
    assert KVFiles(tmp_path, other).extend(again, list(range(40, 60))) == 0
    assert again.cache.position == 0
    assert KVFiles(tmp_path, fingerprint(tiny)).extend(again, list(range(40, 60))) == 20


def test_a_cache_of_another_shape_is_refused_at_the_last_line_too(tiny: LoadedModel, tmp_path: Path) -> None:
    context = filled(tiny, list(range(40, 60)))
    KVFiles(tmp_path, {}).save(context)
    other = dataclasses.replace(tiny)
    again = Context(tiny.new_context().cache)
    again.cache.layers = [KVLayer(KVRows(layer.keys.data.bfloat16()), layer.values) for layer in again.cache.layers]
    said: list[str] = []
    assert other.dialect is not None
    assert KVFiles(tmp_path, {}, on_problem=said.append).extend(again, list(range(40, 60))) == 0
    assert len(said) == 1
