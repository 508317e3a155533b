"""How kernels that follow each other overlap: programmatic dependent launch, of Hopper and later.

A kernel that is launched with it begins while the one before it still runs. What that one writes may be read, and what
it reads may be written over, only behind `wait_for_others`; weights may be read before. `let_others_begin` lets the
next kernel begin as soon as every program has come there. A kernel that is launched without waits by itself.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait_for_others(OVERLAPS: tl.constexpr):
    """Everything that was launched before is complete behind it."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_others_begin(OVERLAPS: tl.constexpr):
    """The next kernel may begin, up to its own wait."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
