"""A saved reference gives back what was saved, costs what it says, and is refused where it does not fit."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glm4run import reference_logits
from glm4run.errors import CheckpointError, DoesNotFitError, UsageError
from glm4run.fidelity import ReferenceRows, kl_divergence, reference_rows
from glm4run.reference_logits import Provenance, ReferenceWriter, SavedReference

PROVENANCE = Provenance("m", "t.txt", "abc", "512", "none", "1 2", "def")
IDS = list(range(30))
ROWS, COLUMNS = 20, 1001


def rows(seed: int = 0, spread: float = 4.0) -> ReferenceRows:
    generator = torch.Generator().manual_seed(seed)
    log_probs = (spread * torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)).log_softmax(-1)
    return reference_rows(log_probs, torch.randint(COLUMNS, (ROWS,), generator=generator))


def part(whole: ReferenceRows, first: int, last: int) -> ReferenceRows:
    return ReferenceRows(whole.log_probs[first:last], whole.losses[first:last], whole.top1[first:last])


def write(path: Path, whole: ReferenceRows) -> Path:
    with ReferenceWriter(path, PROVENANCE, IDS, ROWS, COLUMNS) as writer:
        for first in range(0, ROWS, 7):
            writer.write(part(whole, first, min(ROWS, first + 7)))
    return path


@pytest.mark.parametrize("spread", [0.1, 4.0, 60.0])
def test_what_comes_back(tmp_path: Path, spread: float) -> None:
    whole = rows(spread=spread)
    saved = SavedReference(write(tmp_path / "logits", whole))
    assert saved.provenance == PROVENANCE
    assert (saved.rows, saved.columns) == (ROWS, COLUMNS)
    got = saved.read(3, 20)
    assert torch.equal(got.losses, whole.losses[3:]) and torch.equal(got.top1.long(), whole.top1[3:])
    exact: Tensor = whole.log_probs[3:]
    assert float(got.log_probs.exp().sum(-1).sub(1).abs().max()) < 1e-12
    assert 0 <= float(kl_divergence(got.log_probs, exact).max()) < 2e-6
    assert float(kl_divergence(got.log_probs, exact).mean()) < 1e-6
    assert [path.name for path in tmp_path.iterdir()] == ["logits"]


def test_the_file_is_a_safetensors_file(tmp_path: Path) -> None:
    tensors = load_file(write(tmp_path / "logits", rows()))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "log_probs": (torch.float16, (ROWS, COLUMNS)),
        "losses": (torch.float64, (ROWS,)),
        "top1": (torch.int32, (ROWS,)),
        "ids": (torch.int32, (len(IDS),)),
    }


@pytest.mark.parametrize("field", ["text_sha256", "context", "stride", "prefix", "vocabulary_sha256"])
def test_another_text_size_or_vocabulary_is_refused(tmp_path: Path, field: str) -> None:
    saved = SavedReference(write(tmp_path / "logits", rows()))
    wanted = dataclasses.replace(PROVENANCE, **{field: "other"})
    with pytest.raises(UsageError, match=rf"another {field.replace('_', ' ')}.*{getattr(PROVENANCE, field)}.*other"):
        saved.require(wanted, IDS)
    saved.require(dataclasses.replace(PROVENANCE, model="quantized", text="renamed.txt"), IDS)


def test_fewer_windows_are_fine_more_are_not(tmp_path: Path) -> None:
    saved = SavedReference(write(tmp_path / "logits", rows()))
    saved.require(PROVENANCE, IDS[:10])
    with pytest.raises(UsageError, match="30 tokens in all, 31"):
        saved.require(PROVENANCE, [*IDS, 30])
    with pytest.raises(UsageError, match="other windows"):
        saved.require(PROVENANCE, IDS[::-1])


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    path = tmp_path / "logits"
    path.write_text("what was there")

    def interrupted() -> None:
        with ReferenceWriter(path, PROVENANCE, IDS, ROWS, COLUMNS) as writer:
            writer.write(part(rows(), 0, 5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["logits"]
    assert path.read_text() == "what was there"


def test_a_full_disk_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("U", (), {"free": 1000}))
    with pytest.raises(DoesNotFitError, match="free in"):
        ReferenceWriter(tmp_path / "logits", PROVENANCE, IDS, ROWS, COLUMNS)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="no folder"):
        ReferenceWriter(tmp_path / "missing" / "logits", PROVENANCE, IDS, ROWS, COLUMNS)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        SavedReference(tmp_path / "missing")
    (tmp_path / "text").write_text("hello, this is no safetensors file")
    with pytest.raises(UsageError, match="cannot be read"):
        SavedReference(tmp_path / "text")
    save_file({"weight": torch.zeros(3)}, tmp_path / "model")
    with pytest.raises(UsageError, match="no reference logits"):
        SavedReference(tmp_path / "model")


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "logits", rows())
    monkeypatch.setattr(reference_logits, "VERSION", "2")
    with pytest.raises(UsageError, match="version 1, expected 2"):
        SavedReference(path)


def test_damage_is_seen(tmp_path: Path) -> None:
    path = write(tmp_path / "logits", rows())
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start : start + 2] = b"\x00\x7e"  # NaN
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="NaN"):
        SavedReference(path).read(0, 1)
    path.write_bytes(raw[:-10])
    with pytest.raises(UsageError, match="cannot be read"):
        SavedReference(path)
