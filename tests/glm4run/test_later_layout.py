"""A model that begins in its files and moves into memory while it is used: the same bits, and nothing left behind."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4run import LoadedModel, load_model
from glm4run.kernels.cpu.backend import NativeWeight
from glm4run.later_layout import LaterLayout
from glm4run.layers import QuantizedLinear
from tests.builders import VOCAB, edit_json, edit_tensors, write_packed
from tests.native_library import needs_library

pytestmark = needs_library
IDS = torch.randint(0, VOCAB, (30,), generator=torch.Generator().manual_seed(5)).tolist()
is_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("later") / "packed", source={"dtype": torch.bfloat16})


@pytest.fixture
def small_ones_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of any size move, but only once they are told to."""
    monkeypatch.setattr("glm4run.loading.SMALLEST_BYTES", 0)
    monkeypatch.setattr("glm4run.later_layout.FIRST_REST_SECONDS", 60.0)


def weights_of(model: LoadedModel) -> list[NativeWeight]:
    linears = [module for module in model.model.modules() if isinstance(module, QuantizedLinear)]
    weights = [linear.prepacked for linear in linears if isinstance(linear.prepacked, NativeWeight)]
    assert len(weights) == len(linears) > 0
    return weights


def is_in_file(folder: Path) -> bool:
    return str(folder) in Path("/proc/self/maps").read_text()


def layout_of(model: LoadedModel) -> LaterLayout:
    assert model.layout is not None
    return model.layout


def decoded(model: LoadedModel) -> list[int]:
    return [step.token_id for step in model.stream(IDS[:4]) if step.token_id is not None][:8]


@is_linux
@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"group_size": 32}], ids=["int4", "int8", "g32"])
def test_it_answers_the_same_before_and_after(tmp_path: Path, options: dict[str, Any], small_ones_move: None) -> None:
    folder = write_packed(tmp_path / "packed", source={"dtype": torch.bfloat16}, **options)
    read = load_model(folder, backend="native", mmap=True)
    expected = read.logits(IDS)
    del read
    gc.collect()
    model = load_model(folder, backend="native")
    assert all(weight.is_mapped for weight in weights_of(model))
    assert is_in_file(folder)
    assert torch.equal(model.logits(IDS), expected)
    embedding = model.model.model.embed_tokens.weight.clone()
    before = [weight.nbytes for weight in weights_of(model)]
    assert model.settle()
    assert layout_of(model).is_done
    assert not any(weight.is_mapped for weight in weights_of(model))
    assert all(now >= then for then, now in zip(before, [w.nbytes for w in weights_of(model)], strict=True))
    assert torch.equal(model.model.model.embed_tokens.weight, embedding)
    gc.collect()
    assert not is_in_file(folder)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"")  # cut short in place: nobody reads it any more
    assert torch.equal(model.logits(IDS), expected)
    assert model.settle()


def test_the_plan_is_that_of_a_model_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = 1 << 28
    monkeypatch.setattr("glm4run.generate.resident_bytes", lambda: held)
    expected = load_model(folder, backend="native", context_len=64)
    monkeypatch.setattr("glm4run.loading.SMALLEST_BYTES", 0)
    model = load_model(folder, backend="native", context_len=64)
    assert expected.layout is None and model.layout is not None
    assert model.plan == expected.plan
    assert model.settle()
    assert [w.nbytes for w in weights_of(model)] == [w.nbytes for w in weights_of(expected)]


@pytest.mark.parametrize("tokens", [1, 30])
def test_forwards_meanwhile_give_the_same_bits(folder: Path, tokens: int, small_ones_move: None) -> None:
    """Slices of one panel, each beside a forward."""
    expected = load_model(folder, backend="native", mmap=True).logits(IDS[:tokens])
    model = load_model(folder, backend="native")
    layout = layout_of(model)
    slices = layout._slices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glm4run.kernels.cpu.backend.SLICE_BYTES", 1)
        count = 0
        for count, _ in enumerate(slices, 1):
            if count % 7 == 0:
                assert torch.equal(model.logits(IDS[:tokens]), expected), count
    assert count > len(weights_of(model))
    assert layout.is_done
    assert torch.equal(model.logits(IDS[:tokens]), expected)


def test_a_thread_moves_it_beside_forwards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here with no rest at all, in slices of one panel."""
    monkeypatch.setattr("glm4run.loading.SMALLEST_BYTES", 0)
    monkeypatch.setattr("glm4run.later_layout.FIRST_REST_SECONDS", 0.0)
    monkeypatch.setattr("glm4run.later_layout.SHARE_BESIDE", 1.0)
    monkeypatch.setattr("glm4run.kernels.cpu.backend.SLICE_BYTES", 1)
    expected = load_model(folder, backend="native", mmap=True).logits(IDS)
    model = load_model(folder, backend="native")
    deadline = time.monotonic() + 60
    while not layout_of(model).is_done and time.monotonic() < deadline:
        assert torch.equal(model.logits(IDS), expected)
    assert layout_of(model).is_done
    assert torch.equal(model.logits(IDS), expected)


def test_a_model_that_goes_ends_its_thread(folder: Path, small_ones_move: None) -> None:
    model = load_model(folder, backend="native")
    thread = layout_of(model)._thread
    assert thread.is_alive()
    del model
    gc.collect()
    assert not thread.is_alive()
    assert sys.platform != "linux" or not is_in_file(folder)


def test_what_is_cut_off_gives_its_memory_back(folder: Path, small_ones_move: None) -> None:
    model = load_model(folder, backend="native")
    (weight, *_) = weights_of(model)
    pieces = list(weight._memory.pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glm4run.kernels.cpu.backend.SLICE_BYTES", 1)
        moving = weight.move()
        next(moving)
        assert len(weight._memory.pieces) == len(pieces) + 1
        moving.close()
    assert weight._memory.pieces == pieces and weight.is_mapped
    assert model.settle()
    assert list(weight.move()) == []  # it has moved


def test_without_room_it_goes_on_from_its_files(folder: Path, small_ones_move: None) -> None:
    model = load_model(folder, backend="native")
    expected = model.logits(IDS)

    def refuse(self: object, nbytes: int) -> int:
        raise MemoryError(nbytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glm4run.kernels.cpu.backend._Memory.allocate", refuse)
        assert not model.settle()
    assert not model.settle()  # nothing is tried twice
    assert all(weight.is_mapped for weight in weights_of(model))
    assert torch.equal(model.logits(IDS), expected)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_another_failure_is_raised_where_it_is_waited_for(folder: Path, small_ones_move: None) -> None:
    model = load_model(folder, backend="native")

    def fail(self: object) -> None:
        raise ValueError("of the test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glm4run.kernels.cpu.backend.NativeWeight.move", fail)
        with pytest.raises(ValueError, match="of the test"):
            model.settle()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_moves_its_own(folder: Path, small_ones_move: None) -> None:
    expected = load_model(folder, backend="native", mmap=True).logits(IDS)
    model = load_model(folder, backend="native")
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # torch's own do not live on
        same = model.settle() and layout_of(model).is_done and torch.equal(model.logits(IDS), expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert all(weight.is_mapped for weight in weights_of(model))
    assert model.settle()


def test_a_process_that_ends_early_ends_its_thread(folder: Path) -> None:
    import subprocess

    code = (
        "import sys, glm4run.loading, glm4run.later_layout, glm4run.kernels.cpu.backend as b\n"
        "glm4run.loading.SMALLEST_BYTES, b.SLICE_BYTES, glm4run.later_layout.FIRST_REST_SECONDS = 0, 1, 0.0\n"
        "model = glm4run.load_model(sys.argv[1], backend='native')\n"
        "print(len(model.logits([5, 6])))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "2", "")


def test_an_embedding_smaller_than_a_weight_has_no_room_for_it(folder: Path, small_ones_move: None) -> None:
    """The head is int8 and half as large; a vocabulary of a few tokens makes another linear the largest."""
    assert load_model(folder, backend="native").layout is not None
    model = load_model(folder, backend="native", mmap=True)
    run = model.memory_run
    from glm4run.loading import _moves

    assert _moves(run)
    small = [item for item in run.weights.kept if item.name != "model.embed_tokens"]
    import dataclasses

    weights = dataclasses.replace(run.weights, kept=tuple(small))
    assert not _moves(dataclasses.replace(run, weights=weights))


def test_a_tied_embedding_is_the_head_and_stays(tmp_path: Path, small_ones_move: None) -> None:
    folder = write_packed(tmp_path / "packed", head_bits=16)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    edit_tensors(folder, {"lm_head.weight": None})
    assert load_model(folder, backend="native").layout is None


def test_other_backends_and_mapped_ones_do_not_move(folder: Path, small_ones_move: None) -> None:
    before = threading.active_count()
    assert load_model(folder, backend="torch").layout is None
    assert load_model(folder, backend="native", mmap=True).layout is None
    assert threading.active_count() == before
