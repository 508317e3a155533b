"""The catalogue, and what a name means."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from glm4run.errors import UsageError
from glm4run.memory import GIB
from glm4run.vram.gpus import CATALOGUE, USABLE_SHARE, find_gpu, load_gpus, match_gpu


def test_every_row_is_complete() -> None:
    gpus = load_gpus()
    assert len(gpus) == 165
    assert len({gpu.name for gpu in gpus}) == len(gpus)
    for gpu in gpus:
        assert 0 < gpu.usable_bytes <= gpu.total_bytes, gpu.name
        assert gpu.bandwidth_gb_per_s > 0 and gpu.source, gpu.name


def test_catalogue_is_the_published_one(shared: Path) -> None:
    def rows(path: Path) -> list[dict[str, str]]:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    assert rows(CATALOGUE) == rows(shared / "data" / "vram" / "gpus.csv")


def test_every_name_finds_itself() -> None:
    for gpu in load_gpus():
        assert find_gpu(gpu.name)[0].total_bytes <= gpu.total_bytes
        assert find_gpu(gpu.name, gpu.total_bytes)[0].name == gpu.name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "GeForce RTX 4090"),
        ("rtx4090", "GeForce RTX 4090"),
        ("NVIDIA GeForce RTX 4070 Ti", "GeForce RTX 4070 Ti"),
        ("rtx 3060 12gb", "GeForce RTX 3060 12GB"),
        ("3060 12 GB", "GeForce RTX 3060 12GB"),
        ("4070", "GeForce RTX 4070"),
        ("4070 laptop", "GeForce RTX 4070 Laptop"),
        ("7900xtx", "Radeon RX 7900 XTX"),
        ("T4", "Tesla T4"),
        ("m2 ultra", "Apple M2 Ultra"),
    ],
)
def test_names_as_people_write_them(text: str, name: str) -> None:
    assert find_gpu(text)[0].name == name


def test_name_of_several_sizes_takes_the_smallest_and_says_so() -> None:
    gpu, others = find_gpu("RTX 3060")
    assert (gpu.name, [other.name for other in others]) == ("GeForce RTX 3060 8GB", ["GeForce RTX 3060 12GB"])
    assert find_gpu("RTX 3060", 12 * GIB)[0].name == "GeForce RTX 3060 12GB"


@pytest.mark.parametrize("text", ["rtx 4099", "GeForce", "", "voodoo 2"])
def test_unknown_name_suggests_the_nearest(text: str) -> None:
    with pytest.raises(UsageError, match="in the catalogue") as caught:
        find_gpu(text)
    assert caught.value.hint is not None and caught.value.hint.startswith("the nearest: ")
    if text == "rtx 4099":
        assert "GeForce RTX 4090" in caught.value.hint


def test_detected_device_of_another_size_is_not_the_catalogue_s() -> None:
    assert match_gpu("NVIDIA GeForce RTX 4090", 24564 << 20) is not None
    assert match_gpu("NVIDIA GeForce RTX 4090", 48 << 30) is None
    assert match_gpu("NVIDIA Nothing 1", 8 << 30) is None


def test_usable_share_where_nothing_was_measured() -> None:
    gpu, _ = find_gpu("RTX 4070")
    assert gpu.usable_bytes == int(12 * USABLE_SHARE * GIB)
    assert find_gpu("RTX 4090")[0].usable_bytes == int(23.52 * GIB)
