"""A checkpoint becomes exactly the packed folder of the format, or nothing changes at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from glm4run import load_model
from glm4run.errors import CheckpointError, DoesNotFitError, UsageError
from glm4run_quantize import job, quantize_checkpoint
from glm4run_quantize.convert import DISK_MARGIN_BYTES
from glm4run_quantize.writer import FolderWriter
from tests.builders import (
    LAYOUTS,
    STOP_IDS,
    VOCAB,
    Layout,
    edit_json,
    edit_tensors,
    hf_weights,
    raw_config,
    write_checkpoint,
    write_json,
    write_packed,
)

REPO = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def independent_rtn(weight: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype) -> tuple[Any, Tensor]:
    """(q int64 [N, K], scale [N, G]) by numpy alone: the largest magnitude of a group on 2^b / 2 - 1/2 steps."""
    wide: NDArray[np.float32] = weight.float().numpy()
    rows, columns = wide.shape
    groups = wide.reshape(rows, columns // group_size, group_size)
    step = np.abs(groups).max(axis=2) / np.float32((2**bits - 1) / 2)
    scale = torch.from_numpy(step).to(scale_dtype)
    stored = scale.float().numpy()[:, :, None]
    q = np.clip(np.rint(groups / stored), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return q.astype(np.int64).reshape(rows, columns), scale


def independent_unpack(packed: Tensor, bits: int, columns: int) -> NDArray[np.int64]:
    """Word j of a row holds elements k = j * 32 / b ..., the lowest k in the lowest bits, as q + 2^(b-1)."""
    words = packed.numpy().view(np.uint32).astype(np.uint64)
    per_word = 32 // bits
    out = np.zeros((words.shape[0], words.shape[1] * per_word), dtype=np.int64)
    for k in range(out.shape[1]):
        out[:, k] = (words[:, k // per_word] >> np.uint64(bits * (k % per_word))) & np.uint64(2**bits - 1)
    values: NDArray[np.int64] = out[:, :columns] - 2 ** (bits - 1)
    return values


def scheme_of(name: str, options: dict[str, Any]) -> tuple[int, int] | None:
    """(bits, group size) of a tensor by the rules of the format, None where it stays dense."""
    if "norm" in name or "embed" in name or name.endswith("bias"):
        return None
    if name.startswith("lm_head"):
        head = options.get("head_bits", 8)
        return None if head == 16 else (head, options.get("group_size", 128))
    bits = options.get("bits", 4)
    default = 32 if "down_proj" in name else 128
    return bits, options.get("group_size", default)


RECIPES: list[dict[str, Any]] = [{}, {"bits": 8}, {"bits": 4, "group_size": 32}, {"head_bits": 16}, {"head_bits": 4}]


@pytest.mark.parametrize("options", RECIPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_is_as_the_format_says(
    tmp_path: Path, layout: Layout, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    folder = write_packed(tmp_path / "packed", layout, source={"dtype": dtype, "shards": 2}, method="rtn", **options)
    stored = load_file(folder / "model.safetensors")
    expected: set[str] = set()
    for name, weight in hf_weights(raw_config(layout), dtype=dtype).items():
        scheme = scheme_of(name, options)
        if scheme is None:
            expected.add(name)
            assert torch.equal(stored[name], weight), name
            continue
        bits, group_size = scheme
        rows, columns = weight.shape
        q, scale = independent_rtn(weight, bits, group_size, dtype)
        packed = stored[f"{name}_packed"]
        assert (packed.dtype, tuple(packed.shape)) == (torch.int32, (rows, columns * bits // 32))
        assert stored[f"{name}_scale"].dtype == dtype
        assert torch.equal(stored[f"{name}_scale"], scale)
        assert stored[f"{name}_shape"].dtype == torch.int64
        assert stored[f"{name}_shape"].tolist() == [rows, columns]
        assert np.array_equal(independent_unpack(packed, bits, columns), q), name
        expected |= {f"{name}_packed", f"{name}_scale", f"{name}_shape"}
    assert stored.keys() == expected


def test_blocks_of_rows_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_packed(tmp_path / "whole", "chatglm")
    monkeypatch.setattr(job, "BLOCK_BYTES", 1000)
    blocks = write_packed(tmp_path / "blocks", "chatglm")
    assert (whole / "model.safetensors").read_bytes() == (blocks / "model.safetensors").read_bytes()


def test_same_source_same_bytes(tmp_path: Path) -> None:
    one, two = write_packed(tmp_path / "one"), write_packed(tmp_path / "two")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_config_is_a_hugging_face_one(tmp_path: Path, layout: Layout) -> None:
    folder = write_packed(tmp_path / "packed", layout, source={"rope_theta": 5e6, "dtype": torch.bfloat16})
    config = json.loads((folder / "config.json").read_text())
    original = raw_config("glm4" if layout == "glm4" else "glm", rope_theta=5e6, dtype=torch.bfloat16)
    assert {key: config[key] for key in original} == original
    assert "auto_map" not in config
    quantization = config["quantization_config"]
    groups = quantization.pop("config_groups")
    assert quantization == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": [],
    }
    targets = [group["targets"] for group in groups.values()]
    assert targets == [["lm_head"], [r"re:.*mlp\.down_proj$"], ["Linear"]]


def test_dense_head_is_in_ignore(tmp_path: Path) -> None:
    folder = write_packed(tmp_path / "packed", head_bits=16)
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert quantization["ignore"] == ["lm_head"]


def test_full_stop_set_is_written(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", eos_token_id=STOP_IDS[0])
    write_json(source / "generation_config.json", {"temperature": 0.7, "eos_token_id": 3})
    quantize_checkpoint(source, tmp_path / "packed")
    expected = sorted([3, *STOP_IDS])
    generation = json.loads((tmp_path / "packed" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["temperature"]) == (expected, 0.7)
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["eos_token_id"] == expected
    assert sorted(load_model(tmp_path / "packed").stop_ids) == expected


def test_wrong_theta_of_the_hf_copies_does_not_travel_on(shared: Path) -> None:
    from glm4run.config import parse_config
    from glm4run_quantize.folder_files import hf_config
    from glm4run_quantize.recipes import choose_recipe

    for name, theta in (("glm-4-9b-chat-hf", 5e6), ("glm-4-9b-chat-1m-hf", 1e8), ("glm-4-9b-chat", 5e6)):
        raw = json.loads((shared / "data" / "configs" / f"{name}.config.json").read_text())
        config = parse_config(raw)
        written = hf_config(raw, config, choose_recipe(config, 4)[0], "BF16")
        assert (written["rope_theta"], written["rms_norm_eps"]) == (theta, 1.5625e-07)
        again = parse_config(written)
        assert (again.rope_theta, again.num_parameters) == (theta, config.num_parameters)


def test_provenance(tmp_path: Path) -> None:
    folder = write_packed(tmp_path / "packed", "chatglm", source={"shards": 2, "dialect": "0414"})
    source = tmp_path / "packed-source"
    record = json.loads((folder / "glm4run.json").read_text())
    assert record["format_version"] == 1
    assert record["source"]["path_or_id"] == "packed-source"
    assert record["source"]["files"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in source.glob("*.safetensors")
    }
    assert (record["recipe"], record["method"]) == ("int4", "mse")
    assert record["stop_token_ids"] == sorted(STOP_IDS)
    assert record["chat_dialect"] == "0414"
    tensors = {tensor["name"]: tensor for tensor in record["tensors"]}
    assert len(tensors) == 13
    down = tensors["model.layers.0.mlp.down_proj"]
    assert (down["bits"], down["group_size"]) == (4, 32)
    assert 15 < down["sqnr_db"] < 25
    assert tensors["lm_head"]["sqnr_db"] > 38
    assert 4.1 < record["bits_per_weight"] < 6
    size = (folder / "model.safetensors").stat().st_size
    assert 0 < size - record["report"]["total_bytes"] < 10_000  # the header


def test_reported_bits_per_weight_are_those_on_disk(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    report = quantize_checkpoint(source, tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    parts = [t for name, t in stored.items() if name.endswith(("_packed", "_scale"))]
    weights = sum(int(t.prod()) for name, t in stored.items() if name.endswith("_shape"))
    assert report.bits_per_weight == pytest.approx(8 * sum(t.numel() * t.element_size() for t in parts) / weights)


def test_report_measures_the_stored_weights(tmp_path: Path) -> None:
    report = quantize_checkpoint(write_checkpoint(tmp_path / "source"), tmp_path / "packed")
    dense = hf_weights(raw_config())
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    for tensor in report.tensors:
        weight, scale = dense[f"{tensor.name}.weight"], stored[f"{tensor.name}.weight_scale"]
        columns = weight.shape[1]
        q = independent_unpack(stored[f"{tensor.name}.weight_packed"], tensor.scheme.bits, columns)
        restored = torch.from_numpy(q).float() * scale.repeat_interleave(columns // scale.shape[1], 1)
        noise = float((restored - weight).double().square().sum())
        assert tensor.sqnr_db == pytest.approx(10 * np.log10(float(weight.double().square().sum()) / noise), abs=0.01)


def test_template_and_licence_and_tokenizer_travel_on(tmp_path: Path, shared: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    template = (shared / "data/templates/glm-4-9b-chat.chat_template.jinja").read_text(encoding="utf-8")
    write_json(
        source / "tokenizer_config.json", {"chat_template": template, "auto_map": {"AutoTokenizer": ["x", None]}}
    )
    (source / "LICENSE").write_text("free")
    (source / "modeling_chatglm.py").write_text("raise SystemExit")
    quantize_checkpoint(source, tmp_path / "packed")
    names = {path.name for path in (tmp_path / "packed").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "glm4run.json", "model.safetensors", "LICENSE"),
        *("tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
    }
    config = json.loads((tmp_path / "packed" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == template
    assert "auto_map" not in config
    loaded, before = load_model(tmp_path / "packed"), load_model(source)
    assert loaded.dialect is not None
    assert loaded.dialect.name == "chat-2024"
    text = "hello 你好 <|user|> the end"
    assert loaded.tokenizer.encode(text) == before.tokenizer.encode(text)
    assert loaded.tokenizer.special_ids == before.tokenizer.special_ids


def test_progress_ends_at_all_bytes(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    source = write_checkpoint(tmp_path / "source", "chatglm")
    quantize_checkpoint(source, tmp_path / "packed", progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1][0] == calls[-1][1]


@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"recipe": "int4-careful"}, {"method": "rtn"}], ids=str)
def test_scales_are_searched_where_no_method_is_named(tmp_path: Path, options: dict[str, Any]) -> None:
    quantize_checkpoint(write_checkpoint(tmp_path / "source"), tmp_path / "packed", **options)
    written = json.loads((tmp_path / "packed" / "glm4run.json").read_text())["method"]
    assert written == options.get("method", "mse")
    scales = [t for n, t in load_file(tmp_path / "packed" / "model.safetensors").items() if n.endswith("_scale")]
    assert any(bool((scale < 0).any()) for scale in scales) == (written == "mse")


def test_tied_head_stays_with_the_embedding(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    edit_json(source / "config.json", tie_word_embeddings=True)
    edit_tensors(source, {"lm_head.weight": None})
    quantize_checkpoint(source, tmp_path / "packed", bits=8)
    ids = list(range(20))
    dense, packed = (load_model(folder, dtype="fp32").logits(ids) for folder in (source, tmp_path / "packed"))
    assert float((packed - dense).norm() / dense.norm()) < 0.1


# --- refused, and then nothing changes


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with `source` and an older packed model `old` in it."""
    write_checkpoint(tmp_path / "source")
    write_checkpoint(tmp_path / "other", seed=9)
    quantize_checkpoint(tmp_path / "other", tmp_path / "old")
    shutil.rmtree(tmp_path / "other")
    return tmp_path


def test_existing_folder_is_refused_and_untouched(workplace: Path) -> None:
    before = snapshot(workplace)
    with pytest.raises(UsageError, match="exists already"):
        quantize_checkpoint(workplace / "source", workplace / "old")
    assert snapshot(workplace) == before


def test_overwrite_replaces_all_of_it(workplace: Path) -> None:
    (workplace / "old" / "stray").write_text("x")
    quantize_checkpoint(workplace / "source", workplace / "old", overwrite=True)
    quantize_checkpoint(workplace / "source", workplace / "new")
    old, new = snapshot(workplace / "old"), snapshot(workplace / "new")
    assert old.keys() == new.keys()
    assert old["model.safetensors"] == new["model.safetensors"]
    assert sorted(path.name for path in workplace.iterdir()) == ["new", "old", "source"]


def test_overwriting_the_source_is_refused(workplace: Path) -> None:
    before = snapshot(workplace)
    for output in (workplace / "source", workplace / "old" / ".." / "source"):
        with pytest.raises(UsageError, match="the output is the source"):
            quantize_checkpoint(workplace / "source", output, overwrite=True)
    assert snapshot(workplace) == before


def test_folder_that_is_no_model_is_never_replaced(workplace: Path) -> None:
    before = snapshot(workplace)
    with pytest.raises(UsageError, match="holds the source"):
        quantize_checkpoint(workplace / "source", workplace, overwrite=True)
    (workplace / "photos").mkdir()
    (workplace / "photos" / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(UsageError, match="is no model folder"):
        quantize_checkpoint(workplace / "source", workplace / "photos", overwrite=True)
    shutil.rmtree(workplace / "photos")
    assert snapshot(workplace) == before


def test_packed_source_is_refused(workplace: Path) -> None:
    with pytest.raises(CheckpointError, match="is packed already"):
        quantize_checkpoint(workplace / "old", workplace / "new")
    assert not (workplace / "new").exists()


REFUSED: dict[str, tuple[Callable[[Path], object], dict[str, Any], type[Exception], str]] = {
    "bits": (lambda source: None, {"bits": 3}, UsageError, "3 bits"),
    "group": (lambda source: None, {"group_size": 64}, UsageError, "does not divide"),
    "method": (lambda source: None, {"method": "magic"}, UsageError, "unknown method"),
    "nan": (
        lambda source: edit_tensors(source, {"lm_head.weight": torch.full((VOCAB, 128), float("nan"))}),
        {},
        CheckpointError,
        "lm_head.weight holds NaN",
    ),
    "tokenizer": (lambda source: (source / "tokenizer.model").unlink(), {}, CheckpointError, "no tokenizer"),
    "template": (
        lambda source: (source / "chat_template.jinja").write_text("{{ x }}"),
        {},
        CheckpointError,
        "chat template",
    ),
    "config": (lambda source: (source / "config.json").unlink(), {}, CheckpointError, "no config.json"),
    "tensor": (lambda source: edit_tensors(source, {"x": torch.zeros(1)}), {}, CheckpointError, "not part of"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("output", ["old", "new"])
def test_whatever_is_refused_changes_nothing(workplace: Path, case: str, output: str) -> None:
    damage, options, kind, message = REFUSED[case]
    damage(workplace / "source")
    before = snapshot(workplace)
    with pytest.raises(kind, match=message):
        quantize_checkpoint(workplace / "source", workplace / output, overwrite=True, **options)
    assert snapshot(workplace) == before


# --- full disks and killed runs


@pytest.mark.parametrize("output", ["old", "new"])
@pytest.mark.parametrize("after", [0, 1, 20])
def test_disk_full_in_the_middle_leaves_all_as_it_was(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, output: str, after: int
) -> None:
    add, calls = FolderWriter.add, 0

    def fill_up(self: FolderWriter, name: str, tensor: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, name, tensor)

    monkeypatch.setattr(FolderWriter, "add", fill_up)
    before = snapshot(workplace)
    with pytest.raises(DoesNotFitError, match="is full; nothing was written") as caught:
        quantize_checkpoint(workplace / "source", workplace / output, overwrite=True)
    assert caught.value.exit_code == 2
    assert snapshot(workplace) == before
    assert not list(workplace.glob(".*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "glm4run.json"])
def test_disk_full_in_any_file_leaves_all_as_it_was(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real_open = Path.open

    def open_full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        full = self.name == name and "w" in mode
        return real_open(Path("/dev/full") if full else self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    before = snapshot(workplace)
    with pytest.raises(DoesNotFitError, match="is full"):
        quantize_checkpoint(workplace / "source", workplace / "old", overwrite=True)
    assert snapshot(workplace) == before


def test_disk_that_is_too_small_is_seen_before_the_work(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    calls: list[int] = []
    with pytest.raises(DoesNotFitError, match=r"the packed model needs .* GB more, the disk of .* has 0\.00 GB"):
        quantize_checkpoint(workplace / "source", workplace / "new", progress=lambda done, total: calls.append(done))
    assert calls == []
    assert sorted(path.name for path in workplace.iterdir()) == ["old", "source"]


KILLED = """
import os, signal, sys
from glm4run_quantize import quantize_checkpoint

def strike(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

quantize_checkpoint(sys.argv[1], sys.argv[2], overwrite=True, progress=strike)
"""


def python(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'quantize'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("output", ["old", "new"])
def test_killed_run_leaves_no_half_folder_and_the_next_cleans_up(workplace: Path, output: str) -> None:
    before = snapshot(workplace / "old")
    killed = python(KILLED, workplace / "source", workplace / output)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert snapshot(workplace / "old") == before
    assert not (workplace / "new").exists()
    left = [path.name for path in workplace.iterdir() if path.name.startswith(".")]
    assert len(left) == 1 and re.fullmatch(rf"\.{output}\.partial-\d+", left[0])
    quantize_checkpoint(workplace / "source", workplace / output, overwrite=True)
    assert not [path for path in workplace.iterdir() if path.name.startswith(".")]
    assert load_model(workplace / output).backend != "dense"


def test_what_a_killed_run_has_written_needs_no_room_again(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = quantize_checkpoint(workplace / "source", workplace / "whole")
    assert python(KILLED, workplace / "source", workplace / "new").returncode == -signal.SIGKILL
    free = report.total_bytes + DISK_MARGIN_BYTES - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    with pytest.raises(DoesNotFitError, match="GB more"):
        quantize_checkpoint(workplace / "source", workplace / "another")
    quantize_checkpoint(workplace / "source", workplace / "new")
    assert snapshot(workplace / "new") == snapshot(workplace / "whole")


MEASURED = """
import re, sys
from pathlib import Path
from glm4run_quantize import quantize_checkpoint

def peak():  # not ru_maxrss, which a child takes over from its parent
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

quantize_checkpoint(sys.argv[1], sys.argv[3])  # everything is imported and warm
before = peak()
quantize_checkpoint(sys.argv[2], sys.argv[4])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="not Linux")
def test_memory_stays_below_the_largest_tensor(tmp_path: Path) -> None:
    small = write_checkpoint(tmp_path / "small", dtype=torch.bfloat16)
    large = write_checkpoint(tmp_path / "large", dtype=torch.bfloat16, vocab_size=1 << 20)
    largest = 256 << 20  # embedding and head, each
    run = python(MEASURED, small, large, tmp_path / "a", tmp_path / "b")
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < largest / 2
