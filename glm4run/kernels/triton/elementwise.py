"""What lies between the products of a layer on CUDA. Same results as the torch code, up to rounding.

Callers have checked that the tensors are contiguous and on a device for which `why_missing` is None.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from glm4run.kernels.triton import overlap
from glm4run.kernels.triton.jit import elementwise as jit
from glm4run.kernels.triton.launch import launch

SILU_BLOCK = 1024


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., size] normed, in `dtype` (that of x where None). Bytes moved: x read, the result written."""
    size = x.shape[-1]
    out = torch.empty_like(x, dtype=dtype)
    block = triton.next_power_of_2(size)
    constants = {**overlap(x.device), "BLOCK": block}
    launch(jit.rms_norm, (x.numel() // size,), (x, weight, out, size, eps), constants, num_warps=_warps(block))
    return out


def add_rms_norm(
    x: Tensor, branch: Tensor, branch_weight: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The next residual, x + branch [..., size] in the dtype of x, and its norm in `dtype`.

    With `branch_weight` the branch is normed before it joins.
    """
    size = x.shape[-1]
    residual, out = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    block = triton.next_power_of_2(size)
    inner = weight if branch_weight is None else branch_weight
    constants = {"NORMS_BRANCH": branch_weight is not None, **overlap(x.device), "BLOCK": block}
    args = (x, branch, inner, weight, residual, out, size, eps)
    launch(jit.add_rms_norm, (x.numel() // size,), args, constants, num_warps=_warps(block))
    return residual, out


def silu_mul(gate_up: Tensor) -> Tensor:
    """[..., 2 size] to [..., size]: silu of the first half times the second."""
    size = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], size, dtype=gate_up.dtype, device=gate_up.device)
    grid = (triton.cdiv(size, SILU_BLOCK), out.numel() // size)
    launch(jit.silu_mul, grid, (gate_up, out, size), {**overlap(out.device), "BLOCK": SILU_BLOCK})
    return out


def _warps(block: int) -> int:
    """Sixteen values a thread or less, so that a row stays in registers."""
    return min(16, max(1, block // 512))
