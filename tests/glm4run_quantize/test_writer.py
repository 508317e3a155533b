"""A folder appears whole or not at all; its shards are what the safetensors library reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from glm4run.checkpoint.safetensors_index import read_index
from glm4run.errors import UsageError
from glm4run_quantize import writer
from glm4run_quantize.writer import FolderWriter, TensorSpec, replacing_folder

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(4, 3),
    "b": torch.arange(5, dtype=torch.int64),
    "c": torch.ones(3, 2, dtype=torch.bfloat16),
    "d": torch.arange(6, dtype=torch.int32).reshape(3, 2),
}
SPECS = [
    TensorSpec("a", "F32", (4, 3)),
    TensorSpec("b", "I64", (5,)),
    TensorSpec("c", "BF16", (3, 2)),
    TensorSpec("d", "I32", (3, 2)),
]


def write(folder: Path) -> None:
    with FolderWriter(folder, SPECS, {"recipe": "int4"}) as out:
        for spec in SPECS:
            for row in TENSORS[spec.name]:  # row by row
                out.add(spec.name, row[None])


def test_single_file_is_what_the_library_reads(tmp_path: Path) -> None:
    write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "recipe": "int4"}
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0  # the data is aligned


@pytest.mark.parametrize("limit", [1, 48, 60, 90, 100])
def test_shards_stay_below_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", limit)
    write(tmp_path)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in SPECS)
    assert list(index["weight_map"]) == list(TENSORS)
    assert read_index(tmp_path).keys() == TENSORS.keys()
    for shard in shards:
        read = load_file(tmp_path / shard)
        assert all(torch.equal(read[name], TENSORS[name]) for name in read)
        assert len(read) == 1 or sum(t.numel() * t.element_size() for t in read.values()) <= limit


def test_mistakes_of_ours_are_caught(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a was announced"), FolderWriter(tmp_path, SPECS, {}) as out:
        out.add("b", TENSORS["b"])
    with pytest.raises(AssertionError, match="larger than announced"), FolderWriter(tmp_path, SPECS, {}) as out:
        out.add("a", torch.zeros(5, 3))
    with pytest.raises(AssertionError, match="not written"), FolderWriter(tmp_path, SPECS, {}) as out:
        out.add("a", TENSORS["a"])


# --- the folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(target: Path, content: str, *, overwrite: bool = False) -> None:
    with replacing_folder(target, overwrite=overwrite) as working:
        (working / "file").write_text(content)


def test_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with replacing_folder(target, overwrite=False) as working:
        assert not target.exists()
        assert working.parent == target.parent  # the same disk: a rename is enough
        (working / "file").write_text("x")
    assert names(target.parent) == ["target"]
    assert (target / "file").read_text() == "x"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), replacing_folder(tmp_path / "target", overwrite=False) as working:
        (working / "file").write_text("x")
        raise error
    assert names(tmp_path) == []


def test_existing_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    make(tmp_path / "target", "old")
    with pytest.raises(UsageError, match="exists already") as caught:
        make(tmp_path / "target", "new")
    assert caught.value.hint is not None and "--overwrite" in caught.value.hint
    assert names(tmp_path) == ["target"]
    assert (tmp_path / "target" / "file").read_text() == "old"


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    make(tmp_path / "target", "new")
    assert names(tmp_path) == ["target"]


def test_file_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    with pytest.raises(UsageError, match="is no folder"):
        make(tmp_path / "target", "new", overwrite=True)
    assert (tmp_path / "target").read_text() == "mine"


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    make(tmp_path / "target", "old")
    (tmp_path / "target" / "stray").write_text("x")
    make(tmp_path / "target", "new", overwrite=True)
    assert names(tmp_path) == ["target"]
    assert names(tmp_path / "target") == ["file"]
    assert (tmp_path / "target" / "file").read_text() == "new"


def test_error_while_overwriting_keeps_the_old(tmp_path: Path) -> None:
    make(tmp_path / "target", "old")
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "target", overwrite=True):
        raise RuntimeError
    assert names(tmp_path) == ["target"]
    assert (tmp_path / "target" / "file").read_text() == "old"


def test_rename_that_fails_puts_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "target", "old")
    rename = Path.rename

    def fail(self: Path, new: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError("no")
        return rename(self, new)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        make(tmp_path / "target", "new", overwrite=True)
    assert names(tmp_path) == ["target"]
    assert (tmp_path / "target" / "file").read_text() == "old"


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_dead_runs_are_removed_and_of_living_ones_kept(tmp_path: Path) -> None:
    dead, living = dead_pid(), os.getppid()
    make(tmp_path / "[target]", "x")
    (tmp_path / f".[target].partial-{dead}").mkdir()
    make(tmp_path / "[target]", "y", overwrite=True)
    assert names(tmp_path) == ["[target]"]
    shutil.rmtree(tmp_path / "[target]")
    for name in (f".target.partial-{dead}", f".target.partial-{living}", f".target2.partial-{dead}", ".target.x-1"):
        (tmp_path / name).mkdir()
    make(tmp_path / "target", "new")
    assert names(tmp_path) == sorted([f".target.partial-{living}", f".target2.partial-{dead}", ".target.x-1", "target"])


def test_leftover_of_this_process_id_is_removed(tmp_path: Path) -> None:
    (tmp_path / f".target.partial-{os.getpid()}").mkdir()
    make(tmp_path / "target", "new")
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_of_a_run_killed_between_its_renames_comes_back(tmp_path: Path, overwrite: bool) -> None:
    old = tmp_path / f".target.old-{dead_pid()}"
    old.mkdir()
    (old / "file").write_text("old")
    if not overwrite:
        with pytest.raises(UsageError, match="exists already"):
            make(tmp_path / "target", "new")
        assert (tmp_path / "target" / "file").read_text() == "old"
        return
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "target", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "target" / "file").read_text() == "old"
    assert names(tmp_path) == ["target"]
