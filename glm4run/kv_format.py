"""In how many bits keys and values are kept, and what that takes in memory. `kv_rows.py` does it. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from glm4run.errors import UsageError

BITS = (16, 8, 4)
GROUPS = {8: 128, 4: 8}  # values of a row that share a scale, or a code; a row that is no multiple of that is one group
LEVELS = {8: 127, 4: 15}
SCALE_BYTES, CODE_BITS = 2, 6
ROWS_TOGETHER = 64  # so many may lie as one block
CPU_COLUMNS = 64  # rows of a multiple of so many lie otherwise on a CPU (`kv_order.py`)

# Steps and lowest levels of a group in 4 bits, in units of its row's scale; with their mirror images they are 64, and a
# group's code is the index of one. `benchmarks/kv_codes.py` chooses them. The native library has them too.
_HALF = (
    *((2, -15), (4, -30), (6, -40), (7, -43), (7, -32), (8, -60), (8, -55), (8, -50), (9, -52), (9, -46), (9, -40)),
    *((10, -72), (10, -66), (10, -59), (11, -76), (11, -63), (11, -59), (11, -39), (12, -87), (12, -83), (12, -77)),
    *((12, -56), (13, -87), (13, -77), (13, -71), (13, -68), (14, -93), (14, -87), (14, -83), (15, -102), (15, -98)),
    *((16, -120), (16, -116), (16, -113)),
)
CODES = tuple(sorted({*_HALF, *((step, -lowest - LEVELS[4] * step) for step, lowest in _HALF)}))


@dataclass(frozen=True)
class KVFormat:
    """Bits of keys and of values: 16 (floats as they are computed, 32 bits wide in a float32 model), 8 or 4."""

    key_bits: int = 16
    value_bits: int = 16

    def __post_init__(self) -> None:
        for bits in (self.key_bits, self.value_bits):
            if bits not in BITS:
                raise UsageError(f"a cache of {bits} bits was asked for", hint="16, 8 or 4 bits, or two such as 8:4")

    def __str__(self) -> str:
        if self.key_bits == self.value_bits:
            return str(self.key_bits)
        return f"{self.key_bits}:{self.value_bits}"

    @property
    def is_quantized(self) -> bool:
        return min(self.key_bits, self.value_bits) < 16


def parse_kv_bits(value: str | int | KVFormat) -> KVFormat:
    """`8` for both, `8:4` for keys and values. Raises UsageError."""
    if isinstance(value, KVFormat):
        return value
    words = str(value).split(":")
    if len(words) > 2 or not all(word.isdecimal() for word in words):
        raise UsageError(f"kv_bits is {str(value)!r}", hint="16, 8 or 4, or keys and values apart: 8:4")
    return KVFormat(int(words[0]), int(words[-1]))


def group_of(bits: int, head_dim: int) -> int:
    """Values of a row that share a scale: the format's group, the whole row where it is no multiple of that."""
    return GROUPS[bits] if head_dim % GROUPS[bits] == 0 else head_dim


def rows_for(tokens: int) -> int:
    """Rows that a cache of so many tokens has: whole blocks, in whatever format."""
    return -(-tokens // ROWS_TOGETHER) * ROWS_TOGETHER


def row_bytes(head_dim: int, bits: int, float_bytes: int) -> int:
    """Memory of one key, or value, of one head, with its scales."""
    return sum(tensor_widths(head_dim, bits, float_bytes))


def tensor_widths(head_dim: int, bits: int, float_bytes: int) -> tuple[int, ...]:
    """Bytes of a row in each tensor that keeps a part of it: the values; their scales."""
    if bits == 16:
        return (head_dim * float_bytes,)
    groups = head_dim // group_of(bits, head_dim)
    if bits == 8:
        return head_dim, SCALE_BYTES * groups
    return head_dim // 2, SCALE_BYTES + -(-CODE_BITS * groups // 8)
