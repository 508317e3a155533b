"""The reader gives the same numbers under the same names, however they are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glm4run.checkpoint.reader import CheckpointReader
from glm4run.config import read_config
from glm4run.errors import CheckpointError
from tests.builders import LAYOUTS, SAME_MODEL, Layout, edit_json, hf_weights, raw_config, write_checkpoint


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_weights_it_was_written_from(tmp_path: Path, layout: Layout, shards: int) -> None:
    folder = write_checkpoint(tmp_path, layout, shards=shards)
    expected = hf_weights(raw_config(layout))
    with CheckpointReader(folder, read_config(folder)) as reader:
        assert reader.sources.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(reader.read(name), tensor), name


def test_original_fused_and_split_layouts_are_the_same_model(tmp_path: Path) -> None:
    read = []
    for layout in SAME_MODEL:
        folder = write_checkpoint(tmp_path / layout, layout)
        with CheckpointReader(folder, read_config(folder)) as reader:
            read.append({name: reader.read(name) for name in reader.sources})
    for other in read[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in read[0].items())


@pytest.mark.parametrize("layout", SAME_MODEL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_those_of_the_whole(tmp_path: Path, layout: Layout, dtype: torch.dtype) -> None:
    folder = write_checkpoint(tmp_path, layout, dtype=dtype)
    with CheckpointReader(folder, read_config(folder)) as reader:
        for name in reader.sources:
            whole = reader.read(name)
            assert whole.dtype == dtype
            assert torch.equal(reader.read_rows(name, 3, 17), whole[3:17])
            assert reader.read_rows(name, 5, 5).shape == (0, *whole.shape[1:])


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    with CheckpointReader(folder, read_config(folder)) as reader:
        reader.read("model.norm.weight").zero_()
        assert float(reader.read("model.norm.weight").abs().sum()) > 0


def test_mapped_tensors_are_those_that_are_read_and_outlive_the_reader(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, shards=2)
    with CheckpointReader(folder, read_config(folder)) as reader:
        mapped = {name: reader.mapped(name) for name in reader.sources}
        expected = {name: reader.read(name) for name in reader.sources}
        assert reader.mapping("lm_head.weight") is reader.mapping("lm_head.weight")
    for name, tensor in mapped.items():
        assert tensor is not None
        assert torch.equal(tensor, expected[name]), name


def test_files_that_cannot_be_mapped_are_left_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no such device")

    folder = write_checkpoint(tmp_path)
    monkeypatch.setattr("glm4run.checkpoint.reader.mmap.mmap", refuse)
    with CheckpointReader(folder, read_config(folder)) as reader:
        assert reader.mapped("lm_head.weight") is None
        assert reader.mapping("lm_head.weight") is None


def test_opening_fails_with_all_problems_at_once(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    edit_json(folder / "config.json", intermediate_size=96)
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(folder, read_config(folder))
    assert caught.value.message.count("config.json says") == 4


def test_file_that_shrinks_after_opening_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    with CheckpointReader(folder, read_config(folder)) as reader:
        path = folder / "model.safetensors"
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(CheckpointError, match="ends inside"):
            for name in reader.sources:
                reader.read(name)
