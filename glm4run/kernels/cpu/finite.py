"""Whether a tensor holds NaN or infinity, in one pass of the native library where that is there."""

from __future__ import annotations

import torch
from torch import Tensor

from glm4run.kernels.cpu.backend import DTYPE_CODES
from glm4run.kernels.cpu.library import native, why_missing


def all_finite(tensor: Tensor) -> bool:
    """True where none of the numbers is NaN or infinite. Any shape; a tensor without numbers is finite.

    torch's own `isfinite` makes three temporaries of what it looks at, which took most of the start of a mapped model.
    """
    if tensor.device.type == "cpu" and tensor.dtype in DTYPE_CODES and tensor.is_contiguous() and why_missing() is None:
        return bool(native().g4_all_finite(tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.numel()))
    return bool(torch.isfinite(tensor).all())
