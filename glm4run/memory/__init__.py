"""What a run needs of memory, and what there is of it: the one place that counts bytes. No torch.

`vram` prints a plan, the loader chooses context and chunk by the same plan, `--check-plan` compares it with the peak.
"""

from glm4run.memory.available import available_ram_bytes, peak_resident_bytes, resident_bytes, total_ram_bytes
from glm4run.memory.calibration import Calibration, calibrated_cpu, read_calibration
from glm4run.memory.overhead import Overhead, device_overhead, grammar_term, process_overhead, tokenizer_bytes
from glm4run.memory.plan import (
    HEADROOM_BYTES,
    LARGER_CHUNKS,
    SMALLER_CHUNKS,
    Run,
    choose_plan,
    embedding_in_file,
    every_logits_bytes,
    kv_bytes_per_token,
    largest_context,
    plan_run,
)
from glm4run.memory.sizes import GIB, MIB, Reserve, gib_text, parse_bytes, parse_reserve, parse_size, tokens_text
from glm4run.memory.terms import PREFILL_CHUNK, WEIGHT_TERMS, MemoryPlan, Term
from glm4run.memory.weights import Stored, Weights, plan_weights, stored_tensors
from glm4run.memory.workspace import attends_natively, logits_block_rows

__all__ = [
    "GIB",
    "HEADROOM_BYTES",
    "LARGER_CHUNKS",
    "MIB",
    "PREFILL_CHUNK",
    "SMALLER_CHUNKS",
    "WEIGHT_TERMS",
    "Calibration",
    "MemoryPlan",
    "Overhead",
    "Reserve",
    "Run",
    "Stored",
    "Term",
    "Weights",
    "attends_natively",
    "available_ram_bytes",
    "calibrated_cpu",
    "choose_plan",
    "device_overhead",
    "embedding_in_file",
    "every_logits_bytes",
    "gib_text",
    "grammar_term",
    "kv_bytes_per_token",
    "largest_context",
    "logits_block_rows",
    "parse_bytes",
    "parse_reserve",
    "parse_size",
    "peak_resident_bytes",
    "plan_run",
    "plan_weights",
    "process_overhead",
    "read_calibration",
    "resident_bytes",
    "stored_tensors",
    "tokenizer_bytes",
    "tokens_text",
    "total_ram_bytes",
]
