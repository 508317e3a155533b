"""A scan reads headers only, and names whatever is wrong with the files of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from glm4run.checkpoint.safetensors_index import Problem, as_error, read_index, scan_folder
from glm4run.errors import CheckpointError
from tests.builders import edit_json, write_checkpoint, write_shards

TENSORS = {"a": torch.arange(6).reshape(2, 3).float(), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(7)}
INDEX = "model.safetensors.index.json"


def write_raw(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def only_problem(folder: Path) -> Problem:
    _, problems = scan_folder(folder)
    assert len(problems) == 1, problems
    assert problems[0].hint
    return problems[0]


def test_entries_are_where_the_bytes_are(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt", "who": "me"})
    entries = read_index(tmp_path)
    assert entries.keys() == TENSORS.keys()
    raw = (tmp_path / "model.safetensors").read_bytes()
    for name, tensor in TENSORS.items():
        entry = entries[name]
        assert entry.shape == tuple(tensor.shape)
        assert entry.nbytes == tensor.numel() * tensor.element_size()
        stored = bytes(tensor.reshape(-1).view(torch.uint8).numpy())
        assert raw[entry.offset : entry.offset + entry.nbytes] == stored


def test_shards_and_single_file_hold_the_same(tmp_path: Path) -> None:
    for shards in (1, 3):
        (tmp_path / str(shards)).mkdir()
        write_shards(tmp_path / str(shards), TENSORS, shards)
    one, three = (read_index(tmp_path / str(shards)) for shards in (1, 3))
    assert {n: (e.dtype, e.shape) for n, e in one.items()} == {n: (e.dtype, e.shape) for n, e in three.items()}
    assert len({entry.file for entry in three.values()}) == 3


def test_shards_without_an_index_are_all_read(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS, 3)
    (tmp_path / INDEX).unlink()
    assert read_index(tmp_path).keys() == TENSORS.keys()


def test_a_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    save_file({"a": TENSORS["a"]}, tmp_path / "y.safetensors")
    problem = only_problem(tmp_path)
    assert (problem.file, problem.tensor, problem.what) == ("y.safetensors", "a", "also in x.safetensors")


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    problem = only_problem(tmp_path)
    assert "pytorch_model.bin" in problem.what
    assert "never loaded" in problem.hint


def test_no_folder_and_no_weights(tmp_path: Path) -> None:
    assert only_problem(tmp_path / "nowhere").what == "no such folder"
    assert only_problem(tmp_path).what == "no safetensors files"


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 50, -1])
def test_truncated_file_is_named_wherever_it_is_cut(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:cut])
    problem = only_problem(tmp_path)
    assert problem.file == path.name
    assert "truncated" in problem.what


@given(position=st.integers(0, 200), value=st.integers(0, 255))
@settings(max_examples=150)
def test_a_damaged_byte_never_crashes_the_scan(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "model.safetensors"
    save_file(TENSORS, path)
    raw = bytearray(path.read_bytes())
    raw[position] = value
    path.write_bytes(raw)
    entries, problems = scan_folder(folder)
    assert problems or len(entries) >= len(TENSORS) - 1  # a name or a dtype may have become another valid one


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe",
        [],
        "text",
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 6]}},
        {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"a": 5},
        {"a": None},
    ],
    ids=repr,
)
def test_nonsense_in_a_header_is_named(tmp_path: Path, header: Any) -> None:
    write_raw(tmp_path / "model.safetensors", header, b"\0" * 8)
    assert only_problem(tmp_path).file == "model.safetensors"


def test_huge_header_length_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    assert "truncated" in only_problem(tmp_path).what


@pytest.mark.parametrize("target", ["../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_index_that_points_outside_is_refused_unread(tmp_path: Path, target: str) -> None:
    folder = write_checkpoint(tmp_path / "model", shards=2)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=weight_map | {"lm_head.weight": target})
    _, problems = scan_folder(folder)
    assert any("outside" in problem.what for problem in problems)


@pytest.mark.parametrize("target", ["..", "", "\0", "nowhere.safetensors"])
def test_index_that_points_at_no_file_is_named(tmp_path: Path, target: str) -> None:
    folder = write_checkpoint(tmp_path / "model", shards=2)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=weight_map | {"lm_head.weight": target})
    _, problems = scan_folder(folder)
    assert (target, "the shard is missing") in [(problem.file, problem.what) for problem in problems]


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    problem = only_problem(tmp_path)
    assert (problem.file, problem.what) == ("model-00002-of-00003.safetensors", "the shard is missing")


def test_index_and_shard_must_agree(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS, 3)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    edit_json(tmp_path / INDEX, weight_map={**weight_map, "b": weight_map["a"]})
    _, problems = scan_folder(tmp_path)
    assert {(p.tensor, p.what.split(",")[0]) for p in problems} == {("b", "the index places it here")}


def test_tensor_that_the_index_does_not_know_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS, 2)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    edit_json(tmp_path / INDEX, weight_map={name: file for name, file in weight_map.items() if name != "c"})
    problem = only_problem(tmp_path)
    assert (problem.tensor, problem.what) == ("c", "is here, but the index does not know it")


def test_shard_with_no_tensor_of_the_index_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS, 2)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    write_raw(shard, {})
    _, problems = scan_folder(tmp_path)
    assert {p.tensor for p in problems} == {"a", "c"}


@pytest.mark.parametrize("index", [{}, [], "x", {"weight_map": []}, {"weight_map": {"a": 5}}], ids=repr)
def test_index_without_a_map_is_named(tmp_path: Path, index: Any) -> None:
    write_shards(tmp_path, TENSORS, 2)
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert only_problem(tmp_path).file == INDEX


def test_error_holds_every_problem_up_to_ten(tmp_path: Path) -> None:
    one = as_error(tmp_path, [Problem("cut", "again", "x.safetensors", "a")])
    assert one.message == f"{tmp_path}: x.safetensors: a: cut"
    assert one.hint == "again"
    many = as_error(tmp_path, [Problem("cut", "again", f"{i}.safetensors") for i in range(13)])
    assert "9.safetensors" in many.message and "10.safetensors" not in many.message
    assert "3 more" in many.message
    with pytest.raises(CheckpointError):
        read_index(tmp_path)
