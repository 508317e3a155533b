"""What a process takes beside the model's tensors: on the CPU itself and its tokenizer, on a GPU the CUDA context."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glm4run.memory.calibration import Calibration
from glm4run.memory.sizes import MIB
from glm4run.memory.terms import Kind, Term

# A process that has imported torch and glm4run, before it loads anything. Source: measured, docs/vram.md.
PROCESS_BYTES = 224 * MIB
# Pages of the libraries that are touched only while loading and running. Source: measured, docs/vram.md.
LATER_BYTES = 23 * MIB
# Memory of a loaded tokenizer, for each byte of its file, or of the family's token. Source: measured, docs/vram.md.
TOKENIZER_JSON_FACTOR, TOKENIZER_MODEL_FACTOR, TOKENIZER_BYTES_PER_TOKEN = 11.0, 38.5, 670
# What the grammar engine keeps of each token. Source: 31 MB for the family's 151,343, benchmarks/structured.py.
GRAMMAR_BYTES_PER_TOKEN = 205
# CUDA context and cuBLAS of a process. Source: 451-456 MiB on an RTX 4090 (ggml-org/llama.cpp pull request 15860).
DEVICE_CONTEXT_BYTES = 450 * MIB
CUBLAS_BYTES = 32 * MIB  # of it, taken by the first product


@dataclass(frozen=True)
class Overhead:
    """What a process takes on its device beside tensors."""

    name: str
    bytes: int
    kind: Kind
    formula: str
    held_bytes: int = 0  # what is taken already, and so is not part of what is still free
    slack_bytes: int = 0  # what a GPU's allocator was measured to reserve beyond the planned tensors


def process_overhead(measured_bytes: int | None, tokenizer: int, calibration: Calibration | None = None) -> Overhead:
    """Of a run on the CPU: what the process holds already, or what it usually does, and its tokenizer."""
    later = (LATER_BYTES if calibration is None else calibration.later_bytes) + tokenizer
    formula = f"and its tokenizer, about {tokenizer / MIB:.0f} MiB"
    if measured_bytes is None and calibration is not None:
        formula = f"interpreter and torch, measured here on {calibration.date}, {formula}"
        return Overhead("process", calibration.context_bytes + later, "measured", formula)
    if measured_bytes is None:
        return Overhead("process", PROCESS_BYTES + later, "modelled", f"interpreter, torch, {formula}")
    return Overhead("process", measured_bytes + later, "measured", f"held before loading, {formula}", measured_bytes)


def tokenizer_bytes(folder: Path | None, vocab_size: int) -> int:
    """What the tokenizer of a folder takes once it is loaded; that of the family where there is no folder."""
    for name, factor in (("tokenizer.json", TOKENIZER_JSON_FACTOR), ("tokenizer.model", TOKENIZER_MODEL_FACTOR)):
        path = None if folder is None else folder / name
        if path is not None and path.is_file():
            return int(factor * path.stat().st_size)
    return TOKENIZER_BYTES_PER_TOKEN * vocab_size


def grammar_term(tokens: int) -> Term:
    """Of a run whose answers are held to a form: the vocabulary as the grammar engine has it."""
    return Term(
        "grammar", GRAMMAR_BYTES_PER_TOKEN * tokens, "measured", f"{GRAMMAR_BYTES_PER_TOKEN} B x {tokens} tokens"
    )


def device_overhead(
    context_bytes: int | None = None, *, is_open: bool = False, calibration: Calibration | None = None
) -> Overhead:
    """Of a run on a GPU: the CUDA context and cuBLAS. `is_open`: the context is there already."""
    if context_bytes is None and calibration is not None:
        formula = f"CUDA context and cuBLAS, measured here on {calibration.date}"
        held = max(0, calibration.context_bytes - CUBLAS_BYTES) if is_open else 0
        slack = calibration.slack_bytes or 0
        return Overhead("device_context", calibration.context_bytes, "measured", formula, held, slack)
    if context_bytes is None:
        held = DEVICE_CONTEXT_BYTES - CUBLAS_BYTES if is_open else 0
        formula = "CUDA context and cuBLAS of one process"
        return Overhead("device_context", DEVICE_CONTEXT_BYTES, "modelled", formula, held)
    return Overhead("device_context", context_bytes, "measured", "CUDA context and cuBLAS, as given")
