"""glibc's heap, told to give large blocks back. No torch.

By default glibc learns from each large block that is freed: up to 32 MiB it then keeps such blocks, and twice as much
at the heap's end. What a process holds then depends on the order of everything it ever freed: measured, up to 110 MiB
beyond its tensors. With a fixed threshold a large tensor's memory comes from the system and goes back to it.
"""

from __future__ import annotations

import ctypes
import os

from glm4run.memory.sizes import MIB

RETURNED_BYTES = MIB  # while loading, blocks from this size go back at once
# While running, new pages for each temporary cost time (12 % of a prefill's, measured), so that the heap may keep
# blocks of up to this share of the weights, and as much at its end: together less than a percent of the whole.
KEPT_SHARE, MOST_KEPT_BYTES = 256, 32 * MIB
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_OF_THE_USER = (("MALLOC_MMAP_THRESHOLD_", ""), ("GLIBC_TUNABLES", "mmap_threshold"))  # variable, what it then contains


def kept_block_bytes(weight_bytes: int) -> int:
    """The block size from which a running model's temporaries go back."""
    return max(RETURNED_BYTES, min(MOST_KEPT_BYTES, weight_bytes // KEPT_SHARE))


def return_large_blocks(threshold: int = RETURNED_BYTES) -> bool:
    """Blocks from `threshold` bytes go back at once in this process, and the heap's end from as many; says whether.

    What the user configured stays.
    """
    for variable, contained in _OF_THE_USER:
        value = os.environ.get(variable)
        if value is not None and contained in value:
            return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, another system
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, threshold) and mallopt(_M_TRIM_THRESHOLD, threshold))
