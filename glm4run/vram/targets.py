"""Where a model is to run: this machine's GPU or RAM, a card by its name, or a size of memory. No torch."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from glm4run.errors import UsageError
from glm4run.memory import (
    Calibration,
    Overhead,
    calibrated_cpu,
    device_overhead,
    gib_text,
    parse_bytes,
    process_overhead,
    read_calibration,
)
from glm4run.vram.detect import Found, Holder, detect_gpus, detect_ram
from glm4run.vram.gpus import USABLE_SHARE, Gpu, find_gpu, load_gpus, match_gpu

NATIVE_LIBRARY, NATIVE_LIBRARY_VARIABLE = "glm4run/kernels/cpu/glm4run_cpu.so", "GLM4RUN_CPU_LIBRARY"
AVX512 = {"avx512bw", "avx512dq", "avx512vl"}  # with these torch counts bf16 products as fast


@dataclass(frozen=True)
class Target:
    """A device: `device` is what torch calls it (cpu or cuda), `free_bytes` what a run may take of it."""

    name: str
    device: str
    total_bytes: int
    free_bytes: int
    source: str
    gpu: Gpu | None = None
    holders: tuple[Holder, ...] = ()
    notes: tuple[str, ...] = ()
    similar: tuple[Gpu, ...] = ()  # cards of this size, where only a size is known
    calibration: Calibration | None = None  # what `--calibrate` measured of this machine's own device
    is_local: bool = False  # a device of this machine

    @property
    def is_supported(self) -> bool:
        """Whether glm4run drives this device."""
        return self.device == "cpu" or self.gpu is None or self.gpu.is_supported

    def overhead(self, tokenizer: int, context_bytes: int | None) -> Overhead:
        """What a process takes there beside tensors; `tokenizer` in bytes."""
        if self.device == "cpu":
            return process_overhead(None, tokenizer, self.calibration)
        return device_overhead(context_bytes, calibration=self.calibration)

    def dtype(self, *, packed: bool, dense_bytes: int) -> str:
        """What `--dtype auto` computes in there; see `loading.choose_dtype`. `dense_bytes`: the model in float32."""
        if self.device == "cuda":
            return "bf16" if self.gpu is None or self.gpu.has_bf16 else "fp16"
        if packed or _cpu_has_fast_bf16() or dense_bytes >= self.free_bytes:
            return "bf16"
        return "fp32"

    def backend(self) -> str:
        """The backend that `--backend auto` takes there. Triton's kernels need the bf16 of the tensor cores."""
        if self.device == "cpu":
            return "native" if _has_native_library() else "torch"
        return "triton" if self.gpu is None or (self.gpu.is_supported and self.gpu.has_bf16) else "torch"


def resolve_target(text: str) -> Target:
    """The device that `--gpu` means: auto, cpu, a size such as 12GB, or a name.

    Raises:
        UsageError: an unknown name; the nearest are named.
    """
    if text == "auto":
        return _detected()
    if text == "cpu":
        return _ram()
    try:
        size = parse_bytes(text)
    except ValueError:
        return of_gpu(*find_gpu(text))
    name = f"a card of {gib_text(size).removesuffix('.00')} GiB"
    similar = tuple(gpu for gpu in load_gpus() if gpu.is_supported and gpu.total_bytes == size)
    note = f"about {USABLE_SHARE:.0%} of a card is usable; its name tells more, as in --gpu 'RTX 4070'"
    return Target(name, "cuda", size, int(size * USABLE_SHARE), "as given", notes=(note,), similar=similar)


def of_gpu(gpu: Gpu, others: tuple[Gpu, ...] = ()) -> Target:
    """A card of the catalogue, empty."""
    notes = [gpu.note] if gpu.note else []
    if others:
        notes.insert(0, f"the name also means {', '.join(other.name for other in others[:4])}; the smallest is taken")
    if not gpu.is_supported:
        notes.append(f"glm4run does not run on {gpu.vendor} GPUs yet: the plan is that of a CUDA device of this size")
    if not gpu.has_bf16:
        notes.append("no bf16 arithmetic: planned in fp16, whose residual and last projections are float32")
    return Target(gpu.name, "cuda", gpu.total_bytes, gpu.usable_bytes, "catalogue", gpu, (), tuple(notes))


def _detected() -> Target:
    """The GPU with the most free memory, else the machine's RAM."""
    found = detect_gpus()
    if not found:
        return _ram()
    best = max(found, key=lambda gpu: gpu.free_bytes)
    target = _of_found(best)
    rest = [f"{gpu.name} ({gib_text(gpu.free_bytes)} GiB free)" for gpu in found if gpu is not best]
    if rest:
        note = f"also here: {', '.join(rest)}; --gpus {len(found)} estimates a split over all"
        target = Target(**{**vars(target), "notes": (*target.notes, note)})
    return target


def _of_found(found: Found) -> Target:
    gpu = match_gpu(found.name, found.total_bytes)
    notes = []
    if found.vendor == "Apple":
        notes.append("glm4run does not run on Apple GPUs yet: it uses the CPU (--gpu cpu)")
    elif gpu is None:
        notes.append(f"{found.name} is not in the catalogue: no speeds")
    holders = tuple(sorted(found.holders, key=lambda holder: -holder.bytes))
    return Target(
        found.name,
        "cuda",
        found.total_bytes,
        found.free_bytes,
        found.source,
        gpu,
        holders,
        tuple(notes),
        calibration=read_calibration(found.name),
        is_local=True,
    )


def _ram() -> Target:
    found = detect_ram()
    if found is None:
        raise UsageError("this system does not say how much memory it has", hint="give a size: --gpu 16GB")
    calibration = read_calibration(calibrated_cpu())
    return Target(
        found.name, "cpu", found.total_bytes, found.free_bytes, found.source, calibration=calibration, is_local=True
    )


def _cpu_has_fast_bf16() -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return set(flags.split()) >= AVX512


def _has_native_library() -> bool:
    """Looked for where it can be imported from, as importing the backends would import torch."""
    named = os.environ.get(NATIVE_LIBRARY_VARIABLE)
    if named:
        return Path(named).is_file()
    package = Path(__file__).resolve().parents[2]
    return any((Path(root or ".") / NATIVE_LIBRARY).is_file() for root in (str(package), *sys.path))
