"""The kernels themselves: functions in Triton's language, without launchers. Imported only where Triton is there."""

from __future__ import annotations

import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)  # over CPU tensors, in the tests
