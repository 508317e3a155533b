"""In how many bits keys and values are kept, and what that takes in memory. `kv_rows.py` does it. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from glm4run.errors import UsageError

BITS = (16, 8, 4)
GROUPS = {8: 128, 4: 32}  # values of a row that share a scale; a shorter row is one group
SCALES = {8: 1, 4: 2}  # float16 numbers of a group
LEVELS = {8: 127, 4: 15}


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


def row_bytes(head_dim: int, bits: int, float_bytes: int) -> int:
    """Memory of one key, or value, of one head, with its scales."""
    return sum(tensor_widths(head_dim, bits, float_bytes))


def tensor_widths(head_dim: int, bits: int, float_bytes: int) -> tuple[int, ...]:
    """Bytes of a row in each tensor that keeps a part of it: the values; their scales."""
    if bits == 16:
        return (head_dim * float_bytes,)
    return head_dim * bits // 8, 2 * SCALES[bits] * (head_dim // group_of(bits, head_dim))
