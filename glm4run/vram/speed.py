"""How fast: a range for each class of device, never one number.

Decoding reads every weight but the embedding's once a token, and the cache: t = t0 + bytes / (share x bandwidth). The
fast end is the best share of the bandwidth that any engine was measured to reach on that class; the slow end is the
worst, behind the time that an eager torch runtime spends in Python each token. glm4run itself is measured on an H100.
Source: docs/vram.md, "Speed", with the measurements' addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glm4run.config import ModelConfig
from glm4run.reading_speed import reading_work
from glm4run.vram.gpus import Gpu

# 27.8 tok/s of a bf16 model whose bytes an A100 reads in 15 ms. Source: GLM-4's basic_demo table, HF eager.
EAGER_OVERHEAD_S = 0.021
# Class: {bits: (worst, best) share of the bandwidth that was measured}. 8 bits of GDDR cards: between its neighbours.
_SHARES: dict[str, dict[int, tuple[float, float]]] = {
    "NVIDIA GDDR": {16: (0.73, 0.87), 8: (0.54, 0.87), 4: (0.54, 0.75)},
    "NVIDIA HBM": {16: (0.39, 0.63), 8: (0.30, 0.46), 4: (0.30, 0.47)},
    "NVIDIA V100": {16: (0.63, 0.70), 8: (0.53, 0.59), 4: (0.40, 0.45)},
    "AMD": {16: (0.51, 0.80), 8: (0.51, 0.70), 4: (0.51, 0.67)},
    "Intel": {16: (0.50, 0.80), 8: (0.50, 0.70), 4: (0.50, 0.64)},
    "Apple": {16: (0.68, 0.84), 8: (0.56, 0.80), 4: (0.40, 0.80)},
}
# Of a CPU's read bandwidth, by the native kernels at 8 and 4 bits. Source: docs/performance.md, decode.
CPU_SHARES = (0.70, 0.93)
# Share of the arithmetic that prefill reaches: 34 % at 1k, 63 % from 32k on an A100. Source: the same table.
PREFILL_SHARES = (0.30, 0.63)


@dataclass(frozen=True)
class Speed:
    """Ranges, slow to fast: tokens a second; seconds to read a prompt of the whole context, None where unknown."""

    decode_tok_per_s: tuple[float, float]
    prefill_s: tuple[float, float] | None
    device_class: str


def device_class(gpu: Gpu) -> str:
    """Which row of measurements a GPU belongs to."""
    if gpu.vendor != "NVIDIA":
        return gpu.vendor
    if "V100" in gpu.name or "P100" in gpu.name:
        return "NVIDIA V100"
    has_hbm = gpu.kind == "datacenter" and gpu.bandwidth_gb_per_s > 900 and "L40" not in gpu.name
    return "NVIDIA HBM" if has_hbm else "NVIDIA GDDR"


def estimate_speed(
    gpu: Gpu | None, bits: int, read_bytes: int, config: ModelConfig, context_len: int, *, batch: int = 1
) -> Speed | None:
    """`read_bytes`: weights without the embedding, and the cache. None for a device that is not in the catalogue."""
    if gpu is None:
        return None
    name = device_class(gpu)
    worst, best = _SHARES[name][bits]
    seconds = read_bytes / (gpu.bandwidth_gb_per_s * 1e9)
    slow, fast = batch / (EAGER_OVERHEAD_S + seconds / worst), batch / (seconds / best)
    prefill = None
    if gpu.tflops is not None:
        work = prefill_flop(config, context_len) * batch
        prefill = (work / (PREFILL_SHARES[1] * gpu.tflops * 1e12), work / (PREFILL_SHARES[0] * gpu.tflops * 1e12))
    return Speed((slow, fast), prefill, name)


def cpu_speed(read_gb_per_s: float, read_bytes: int, *, batch: int = 1) -> Speed:
    """Of the native kernels, from the memory's read bandwidth as it was measured on this machine."""
    per_second = batch * read_gb_per_s * 1e9 / read_bytes
    return Speed((CPU_SHARES[0] * per_second, CPU_SHARES[1] * per_second), None, "this machine's memory")


def span_of(speeds: Sequence[Speed | None]) -> Speed | None:
    """From the slowest of several devices to the fastest."""
    known = [speed for speed in speeds if speed is not None]
    prefills = [speed.prefill_s for speed in known if speed.prefill_s is not None]
    if not known:
        return None
    return Speed(
        (min(s.decode_tok_per_s[0] for s in known), max(s.decode_tok_per_s[1] for s in known)),
        (min(p[0] for p in prefills), max(p[1] for p in prefills)) if prefills else None,
        f"{len(known)} cards of this size",
    )


def prefill_flop(config: ModelConfig, tokens: int) -> float:
    """Operations of reading a prompt: of the layers' linears and of causal attention."""
    work = reading_work(config, tokens)
    return work.linears + work.attention
