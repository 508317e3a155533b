"""Which tensors a folder holds, and where: from safetensors headers alone, without reading a weight and without torch.

A header is 8 bytes of length, then JSON: name to dtype, shape and byte range. Source: the safetensors format's README.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4run.config import read_json
from glm4run.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100 << 20  # the limit that the safetensors library sets itself
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: its file, dtype by safetensors' name, shape, and where its bytes lie in the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a folder. `file` and `tensor` are None where the fault is not theirs."""

    what: str
    hint: str
    file: str | None = None
    tensor: str | None = None


def read_index(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a folder, sharded or not.

    Raises:
        CheckpointError: with every problem found in the files, not only the first.
    """
    entries, problems = scan_folder(folder)
    if problems:
        raise as_error(folder, problems)
    return entries


def as_error(folder: Path, problems: list[Problem]) -> CheckpointError:
    """All problems in one error; a long list is cut after ten."""
    lines = [
        ": ".join(part for part in (problem.file, problem.tensor, problem.what) if part) for problem in problems[:10]
    ]
    if len(problems) > 10:
        lines.append(f"... and {len(problems) - 10} more (`glm4run check {folder}` lists all)")
    joined = lines[0] if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)
    return CheckpointError(f"{folder}: {joined}", hint=problems[0].hint)


def scan_folder(folder: Path) -> tuple[dict[str, TensorEntry], list[Problem]]:
    """Reads the index (if there is one) and every shard's header; collects what does not agree."""
    if not folder.is_dir():
        return {}, [Problem("no such folder", "give the folder that holds config.json and the safetensors files")]
    index = folder / INDEX_NAME
    if index.exists():
        return _scan_sharded(folder, index)
    single = folder / SINGLE_NAME
    shards = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not shards:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        what = f"no safetensors files (only {', '.join(pickles[:3])})" if pickles else "no safetensors files"
        return {}, [Problem(what, "glm4run reads safetensors only; pickled .bin weights are never loaded")]
    entries: dict[str, TensorEntry] = {}
    problems: list[Problem] = []
    for shard in shards:
        for entry in _scan_shard(shard, problems):
            if entry.name in entries:
                where = entries[entry.name].file.name
                problems.append(Problem(f"also in {where}", "remove the stray file", shard.name, entry.name))
            entries[entry.name] = entry
    return entries, problems


def _scan_sharded(folder: Path, index: Path) -> tuple[dict[str, TensorEntry], list[Problem]]:
    try:
        weight_map = read_json(index).get("weight_map")
    except CheckpointError as error:
        return {}, [Problem(error.message, error.hint or "download the index again", index.name)]
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        return {}, [Problem("no weight_map of tensor names to files", "download the index again", index.name)]
    entries: dict[str, TensorEntry] = {}
    problems: list[Problem] = []
    for shard_name in sorted(set(weight_map.values())):
        if Path(shard_name).name != shard_name:
            problems.append(Problem(f"points outside the folder: {shard_name}", "download the index again", index.name))
            continue
        shard = folder / shard_name
        if not shard.is_file():
            problems.append(Problem("the shard is missing", "download it again", shard_name))
            continue
        before = len(problems)
        found = {entry.name: entry for entry in _scan_shard(shard, problems)}
        expected = {name for name, file in weight_map.items() if file == shard_name}
        if found or len(problems) == before:  # an unreadable shard is one problem, not one for each of its tensors
            for name in sorted(expected - found.keys()):
                problems.append(Problem("the index places it here, but it is not", "download both", shard_name, name))
            for name in sorted(found.keys() - expected):
                problems.append(Problem("is here, but the index does not know it", "download both", shard_name, name))
        entries.update(found)
    return entries, problems


def _scan_shard(path: Path, problems: list[Problem]) -> list[TensorEntry]:
    again = "the file is damaged or its download was cut: download it again"
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                problems.append(Problem(f"truncated: {size} bytes hold no complete header", again, path.name))
                return []
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError(f"its header is a JSON {type(header).__name__}")
    except (OSError, ValueError) as error:
        problems.append(Problem(f"not a safetensors file: {error}", again, path.name))
        return []
    entries, end = [], 0
    for name, item in header.items():
        if name == "__metadata__":
            continue
        entry = _parse_entry(name, item, path, 8 + length)
        if isinstance(entry, str):
            problems.append(Problem(entry, again, path.name, name))
        else:
            entries.append(entry)
            end = max(end, entry.offset + entry.nbytes)
    if end > size:
        problems.append(Problem(f"truncated: {size} bytes, its header promises {end}", again, path.name))
    return entries


def _parse_entry(name: str, item: Any, path: Path, data_start: int) -> TensorEntry | str:
    """A tensor's entry, or what is wrong with it."""
    try:
        dtype, shape, (begin, end) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        if not all(type(size) is int and size >= 0 for size in shape):
            return f"shape {list(shape)}, expected whole numbers"
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        if begin < 0 or end - begin != nbytes:
            return f"{end - begin} bytes for {dtype} {list(shape)}, expected {nbytes}"
    except (KeyError, TypeError, ValueError) as error:
        return f"an unreadable header entry ({error!r})"
    return TensorEntry(name, path, dtype, shape, data_start + begin, nbytes)
