"""`MemoryPlan`: every byte of a run, by name. The one place that counts bytes. No torch.

The loader sizes the KV cache and chooses the default context by it. Each term is exact (it is allocated so),
modelled (a formula, checked against runs) or measured.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from glm4run.config import ModelConfig

GIB = 1 << 30
PREFILL_CHUNK = 512  # tokens; the activations below are for one chunk, whatever the prompt's length
HEADROOM_BYTES = 512 << 20  # left to the rest of the process: interpreter, libraries, allocator slack


@dataclass(frozen=True)
class Term:
    """One line of a plan."""

    name: str
    bytes: int
    kind: Literal["exact", "modelled", "measured"]


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs, in bytes, at one context length (tokens)."""

    context_len: int
    terms: tuple[Term, ...]

    @property
    def peak_bytes(self) -> int:
        return sum(term.bytes for term in self.terms)


def kv_bytes_per_token(config: ModelConfig, dtype_bytes: int) -> int:
    """Keys and values of one token over all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype_bytes


def plan_run(config: ModelConfig, weight_bytes: int, context_len: int, *, dtype_bytes: int) -> MemoryPlan:
    """The plan of one sequence of up to `context_len` tokens.

    `weight_bytes` is what the loaded weights take, `dtype_bytes` the size of an activation and cache element.
    """
    chunk = min(PREFILL_CHUNK, context_len)
    # Of one layer at once: residual, normed input, gate and up, their product, in float32 where a kernel widens.
    width = 4 * config.hidden_size + 3 * config.intermediate_size
    # Scores are bounded by attention.MAX_SCORE_BYTES; keys and values of one layer are widened to float32.
    scores = 2 * min(64 << 20, 4 * config.num_attention_heads * chunk * context_len)
    widened = 2 * 4 * config.num_key_value_heads * config.head_dim * context_len
    return MemoryPlan(
        context_len,
        (
            Term("weights", weight_bytes, "exact"),
            Term("kv_cache", kv_bytes_per_token(config, dtype_bytes) * context_len, "exact"),
            Term("prefill_activations", 4 * chunk * width, "modelled"),
            Term("attention", scores + widened, "modelled"),
            Term("logits", 4 * 3 * config.vocab_size, "modelled"),
            Term("process", HEADROOM_BYTES, "modelled"),
        ),
    )


def largest_context(
    config: ModelConfig, weight_bytes: int, available_bytes: int, limit: int, *, dtype_bytes: int
) -> int:
    """The largest context up to `limit` whose plan fits; 0 if none does. The plan is monotone in the context."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        plan = plan_run(config, weight_bytes, middle, dtype_bytes=dtype_bytes)
        if plan.peak_bytes <= available_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def available_ram_bytes() -> int | None:
    """Memory that this process may still take: the machine's, or less where a cgroup says so. None if unknown."""
    found = [value for value in (_meminfo_available(), *_cgroup_available()) if value is not None]
    return min(found) if found else None


def _meminfo_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:  # not Linux: what there is, not what is free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return None


def _cgroup_available() -> Iterable[int | None]:
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            yield max(0, int(Path(limit).read_text()) - int(Path(usage).read_text()))
        except (OSError, ValueError):  # no cgroup, or "max"
            yield None


def parse_size(text: str) -> int:
    """A number of tokens: `8k` = 8192, `128k` = 131072, `1m` = 1048576, a plain integer as it is.

    Raises:
        ValueError: not a positive size.
    """
    lowered = text.strip().lower()
    factor = {"k": 1024, "m": 1024 * 1024}.get(lowered[-1:], 1)
    value = int(lowered[:-1] if factor > 1 else lowered) * factor
    if value <= 0:
        raise ValueError(f"{text!r} is not a positive size")
    return value
