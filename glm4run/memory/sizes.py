"""Sizes as people write them: tokens (`128k` = 131072) and bytes (`12GB` of a card, `7.8GiB`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
LARGEST_BARE_GIB = 999
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(mib|mb|m|gib|gb|g)?", re.IGNORECASE)


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


def parse_bytes(text: str) -> int:
    """Memory of a card or a machine: `12`, `12GB` and `12GiB` are 12 GiB (as vendors write it), `7800MiB`.

    Raises:
        ValueError: not a positive size; a bare number beyond 999 is no size but the name of a card (4090).
    """
    match = _BYTES.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0 or (match[2] is None and float(match[1]) > LARGEST_BARE_GIB):
        raise ValueError(f"{text!r} is not a size of memory")
    unit = MIB if (match[2] or "").lower().startswith("m") else GIB
    return int(float(match[1]) * unit)


@dataclass(frozen=True)
class Reserve:
    """Memory of a device to leave free: a share of it, or bytes."""

    share: float = 0.0
    bytes: int = 0

    def of(self, total_bytes: int) -> int:
        """In bytes, of a device of `total_bytes`."""
        return self.bytes + int(self.share * total_bytes)


def parse_reserve(text: str) -> Reserve:
    """`3%` of the device, or a size as `parse_bytes` reads it: `500MiB`, `1GB`. `0` is nothing.

    Raises:
        ValueError: neither, or not less than all of it.
    """
    stripped = text.strip()
    if stripped == "0":
        return Reserve()
    if not stripped.endswith("%"):
        return Reserve(bytes=parse_bytes(stripped))
    share = float(stripped[:-1]) / 100
    if not 0 <= share < 1:
        raise ValueError(f"{text!r} is not a share of a device")
    return Reserve(share)


def tokens_text(tokens: int) -> str:
    """Tokens as people say them, where that is exact: 131072 = `128k`, 128000 = `128000`."""
    for factor, letter in ((1024 * 1024, "m"), (1024, "k")):
        if tokens >= factor and tokens % factor == 0:
            return f"{tokens // factor}{letter}"
    return str(tokens)


def gib_text(nbytes: int) -> str:
    """Bytes in GiB with two decimals, signed."""
    return f"{nbytes / GIB:.2f}"
