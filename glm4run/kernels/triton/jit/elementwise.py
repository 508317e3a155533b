"""RMSNorm, the residual's sum with it, SwiGLU. One program a row; a row is read once and stays in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from glm4run.kernels.triton.jit.order import let_others_begin, wait_for_others


@triton.jit
def _normed(wide, weight_ptr, columns, inside, size, eps):
    """wide / rms(wide) * weight in float32, with the rounding of `layers.rms_norm`."""
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    return wide * scale * tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def rms_norm(x_ptr, weight_ptr, out_ptr, size, eps, OVERLAPS: tl.constexpr, BLOCK: tl.constexpr):
    """x [rows, size] to out, in out's dtype."""
    row = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    let_others_begin(OVERLAPS)
    wait_for_others(OVERLAPS)
    wide = tl.load(x_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
    normed = _normed(wide, weight_ptr, columns, inside, size, eps)
    tl.store(out_ptr + row + columns, normed.to(x_ptr.dtype.element_ty).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_rms_norm(
    x_ptr,
    branch_ptr,
    branch_weight_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    size,
    eps,
    NORMS_BRANCH: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """residual = x + branch (normed first with NORMS_BRANCH), rounded to its dtype; out = its norm, in out's dtype."""
    row = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    dtype = residual_ptr.dtype.element_ty
    let_others_begin(OVERLAPS)
    wait_for_others(OVERLAPS)
    branch = tl.load(branch_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
    if NORMS_BRANCH:
        branch = _normed(branch, branch_weight_ptr, columns, inside, size, eps).to(dtype).to(tl.float32)
    residual = (tl.load(x_ptr + row + columns, mask=inside, other=0.0).to(tl.float32) + branch).to(dtype)
    tl.store(residual_ptr + row + columns, residual, mask=inside)
    normed = _normed(residual.to(tl.float32), weight_ptr, columns, inside, size, eps)
    tl.store(out_ptr + row + columns, normed.to(dtype).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul(gate_up_ptr, out_ptr, size, OVERLAPS: tl.constexpr, BLOCK: tl.constexpr):
    """gate_up [rows, 2 size] to out [rows, size]: silu of the first half times the second, in out's dtype."""
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    at = gate_up_ptr + row * 2 * size + columns
    let_others_begin(OVERLAPS)
    wait_for_others(OVERLAPS)
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + size, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * size + columns, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)
