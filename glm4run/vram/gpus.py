"""The catalogue of GPUs, `gpus.csv`: published capacity, bandwidth and arithmetic, each row with its source."""

from __future__ import annotations

import csv
import difflib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from glm4run.errors import UsageError
from glm4run.memory import GIB

CATALOGUE = Path(__file__).with_name("gpus.csv")
# Of the nominal size, where no measured figure is in the catalogue: drivers and ECC keep the rest.
USABLE_SHARE = 0.97
_NOISE = frozenset(("nvidia", "amd", "intel", "geforce", "tesla", "graphics", "the", "gpu", "card", "corporation"))


@dataclass(frozen=True)
class Gpu:
    """One row. Bandwidth in decimal GB/s, arithmetic in dense 16-bit TFLOPS with float32 accumulation."""

    name: str
    vendor: str
    total_bytes: int
    usable_bytes: int
    bandwidth_gb_per_s: float
    tflops: float | None
    arch: str
    has_bf16: bool
    kind: str
    source: str
    note: str

    @property
    def is_supported(self) -> bool:
        """Whether torch runs on it under the name of CUDA, which is what glm4run drives."""
        return self.vendor in ("NVIDIA", "AMD")


@cache
def load_gpus() -> tuple[Gpu, ...]:
    """Every row of the catalogue."""
    with CATALOGUE.open(encoding="utf-8", newline="") as file:
        return tuple(_parse(row) for row in csv.DictReader(file))


def _parse(row: dict[str, str]) -> Gpu:
    nominal = float(row["vram_gib"])
    usable = float(row["usable_gib"]) if row["usable_gib"] else nominal * USABLE_SHARE
    return Gpu(
        name=row["name"],
        vendor=row["vendor"],
        total_bytes=int(nominal * GIB),
        usable_bytes=int(min(usable, nominal) * GIB),
        bandwidth_gb_per_s=float(row["bandwidth_gbs"]),
        tflops=float(row["bf16_tflops"]) if row["bf16_tflops"] else None,
        arch=row["arch"],
        has_bf16=row["bf16_native"] == "yes",
        kind=row["kind"],
        source=row["source"],
        note=row["note"],
    )


def find_gpu(text: str, total_bytes: int | None = None) -> tuple[Gpu, tuple[Gpu, ...]]:
    """The GPU that a name means, and others that it may mean as well. `total_bytes` decides between equal names.

    Raises:
        UsageError: no name in the catalogue has all the words; the nearest are named.
    """
    words = _words(text)
    found = [gpu for gpu in load_gpus() if words and words <= _words(gpu.name)]
    if not found:
        raise UsageError(
            f"no GPU {text!r} in the catalogue", hint=f"the nearest: {', '.join(_nearest(text))}; or a size"
        )
    fewest = min(_extra_words(gpu, words) for gpu in found)
    same = [gpu for gpu in found if _extra_words(gpu, words) == fewest]
    if total_bytes is not None:
        same.sort(key=lambda gpu: abs(gpu.total_bytes - total_bytes))
    else:
        same.sort(key=lambda gpu: gpu.total_bytes)  # the smallest is safe
    return same[0], tuple(same[1:])


def match_gpu(text: str, total_bytes: int) -> Gpu | None:
    """The row of a detected device; None where the catalogue has none of about its size."""
    try:
        gpu, _ = find_gpu(text, total_bytes)
    except UsageError:
        return None
    return gpu if abs(gpu.total_bytes - total_bytes) < 0.15 * gpu.total_bytes else None


def _words(name: str) -> frozenset[str]:
    """`NVIDIA GeForce RTX4090 (24 GB)` to {rtx, 4090, 24gb}."""
    spaced = re.sub(r"(\d+)\s*(gb|gib)\b", r"\1gb", name.lower())
    spaced = re.sub(r"\b(rtx|gtx|rx|arc)(?=\d)", r"\1 ", spaced)
    spaced = re.sub(r"(?<=\d)(ti|super|xtx|xt)\b", r" \1", spaced)
    return frozenset(re.findall(r"[a-z0-9+]+", spaced)) - _NOISE


def _extra_words(gpu: Gpu, words: frozenset[str]) -> int:
    """What the catalogue's name says beyond the asked words; its size does not count."""
    return sum(not re.fullmatch(r"\d+gb", word) for word in _words(gpu.name) - words)


def _nearest(text: str, count: int = 3) -> list[str]:
    def likeness(gpu: Gpu) -> float:
        ours, theirs = " ".join(sorted(_words(text))), " ".join(sorted(_words(gpu.name)))
        return difflib.SequenceMatcher(None, ours, theirs).ratio()

    return [gpu.name for gpu in sorted(load_gpus(), key=likeness, reverse=True)[:count]]
