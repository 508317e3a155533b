"""Second-order rounding: what rounding one weight costs is made up for by the weights that are not rounded yet.

The error of a linear's output over the calibration tokens is tr(E H E^T) with E = W - Q and H the sum of x x^T.

1. Group scales are searched first (`mse`, weighted by H's diagonal), so that the order of columns is free: the format
   needs no index of groups.
2. Columns are rounded one by one, those with the largest H_jj first; each error is spread over the columns left by the
   inverse of H, held as a Cholesky factor and applied in blocks. Source: GPTQ, arXiv 2210.17323.
3. Rounds of refinement: every weight is moved to the step that is best given all the others (coordinate descent on the
   same error), then all scales of a row are solved for together by least squares.

Where the input that the packed model sees differs from the source's, `cross` (the sum of x_source x^T) moves the target
to the weight that comes closest to the source's output from the input at hand: W cross H^-1, damped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4run.quant_config import QuantScheme
from glm4run_quantize.methods.grid import bounds, in_groups, stored
from glm4run_quantize.methods.mse import find_scales
from glm4run_quantize.methods.rows import on_all_cores

DAMPING = 0.05  # of the mean diagonal of H, added to it; 0.01 fits the calibration text too closely
BLOCK = 128  # columns whose mutual updates are applied at once
ROUNDS = 3
REFIT_BYTES = 128 << 20
SCALE_RIDGE = 1e-6


def prepare(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """H [K, K] with dead inputs set to 1 and the diagonal raised by `damping` of its mean. In place."""
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = 1.0
    diagonal += damping * diagonal[~dead].mean() if bool((~dead).any()) else 1.0
    return hessian


def moved_target(weight: Tensor, hessian: Tensor, cross: Tensor, damped: Tensor) -> Tensor:
    """W + W (cross - H) D^-1 [N, K], with H as measured and D the prepared one.

    Without damping this is W cross H^-1. The damping pulls it towards W, and inputs that were hardly ever seen leave W
    as it is: only the difference of the two moments moves it.
    """
    factor = torch.linalg.cholesky(damped)
    if weight.shape[0] < weight.shape[1]:  # fewer right-hand sides that way
        return weight + torch.cholesky_solve((weight @ (cross - hessian)).t().contiguous(), factor).t()
    correction = torch.cholesky_solve((cross - hessian).t().contiguous(), factor).t()
    return weight + weight @ correction


def quantize_gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    *,
    act_order: bool = True,
    rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor]:
    """weight [N, K] float32 to (q int8 [N, K], scale [N, G] in `scale_dtype`); `hessian` [K, K] is a prepared H."""
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True) if act_order else torch.arange(len(diagonal), device=weight.device)
    factor = _inverse_factor(hessian, order)

    def round_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = find_scales(rows, scheme, scale_dtype, diagonal, by_size=False)
        q = _sweep(rows, factor, order, scale, scheme)
        for _ in range(rounds):
            fitted = [
                _refit_scales(part, hessian, q_part, old, scheme)
                for part, q_part, old in zip(*(t.split(_rows_to_refit(scale)) for t in (rows, q, scale)), strict=True)
            ]
            scale = torch.cat(fitted)
            q = _descend(rows, hessian, q, scale, scheme)
        return q, scale

    return on_all_cores(round_rows, weight)


def _inverse_factor(hessian: Tensor, order: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of H with rows and columns in `order`."""
    factor = torch.linalg.cholesky(hessian[order][:, order])
    inverse = torch.cholesky_inverse(factor)
    del factor
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def _rows_to_refit(scale: Tensor) -> int:
    """Rows whose systems of equations fit REFIT_BYTES."""
    return max(1, REFIT_BYTES // (4 * scale.shape[1] ** 2))


def output_error(weight: Tensor, restored: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T)."""
    error = weight - restored
    return float(((error @ hessian) * error).sum(dtype=torch.float64))


def _columns(scale: Tensor, width: int) -> Tensor:
    """Scales [N, G] as one float row per column: [K, N]."""
    return scale.float().repeat_interleave(width // scale.shape[1], dim=1).t().contiguous()


def _sweep(weight: Tensor, factor: Tensor, order: Tensor, scale: Tensor, scheme: QuantScheme) -> Tensor:
    """Step 2. Columns lie in rows here, where one is contiguous."""
    low, high = bounds(scheme.bits)
    width = weight.shape[1]
    left = weight.t()[order].contiguous()  # [K, N], what is still to be rounded
    steps = _columns(scale, width)[order]
    q = torch.empty_like(left, dtype=torch.int8)
    for first in range(0, width, BLOCK):
        last = min(first + BLOCK, width)
        block = left[first:last]
        local = factor[first:last, first:last]
        errors = torch.empty_like(block)
        for i in range(last - first):
            step = steps[first + i]
            rounded = (block[i] / step).round_().clamp_(low, high)
            q[first + i] = rounded.to(torch.int8)
            error = (block[i] - rounded.mul_(step)) / local[i, i]
            block[i + 1 :].addr_(local[i, i + 1 :], error, alpha=-1)
            errors[i] = error
        left[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(width, device=order.device)
    return q[back].t().contiguous()


def _descend(weight: Tensor, hessian: Tensor, q: Tensor, scale: Tensor, scheme: QuantScheme) -> Tensor:
    """One pass of coordinate descent over all columns."""
    low, high = bounds(scheme.bits)
    width = weight.shape[1]
    steps = _columns(scale, width)
    values = q.t().float()  # [K, N]
    error = weight.t() - values * steps
    gradient = hessian @ error  # H E, [K, N]
    diagonal = hessian.diagonal()
    for first in range(0, width, BLOCK):
        last = min(first + BLOCK, width)
        local = gradient[first:last]
        moved = torch.empty_like(local)
        for i in range(last - first):
            step, value = steps[first + i], values[first + i]
            best = (value + local[i] / (diagonal[first + i] * step)).round_().clamp_(low, high)
            change = (best - value) * step
            values[first + i] = best
            local.addr_(hessian[first:last, first + i], change, alpha=-1)
            moved[i] = change
        rest = torch.cat((hessian[:first, first:last], hessian[last:, first:last]))
        update = rest @ moved
        gradient[:first] -= update[:first]
        gradient[last:] -= update[first:]
    return values.to(torch.int8).t().contiguous()


def _refit_scales(weight: Tensor, hessian: Tensor, q: Tensor, scale: Tensor, scheme: QuantScheme) -> Tensor:
    """The scales of every row that are best for its steps, by least squares: A s = b of size G, where

    A_gh = q_g^T H_gh q_h and b_g = q_g^T (H w)_g. A row whose stored scales would be worse keeps its old ones.
    """
    rows, groups = scale.shape
    values = in_groups(q.float(), scheme)  # [N, G, g]
    size = values.shape[-1]
    target = in_groups(weight @ hessian, scheme)
    right = (values * target).sum(-1)  # [N, G]
    left = torch.empty(rows, groups, groups, device=weight.device)
    for g in range(groups):  # A is symmetric
        spread = values[:, g] @ hessian[g * size : (g + 1) * size, g * size :]  # [N, K - g * size]
        left[:, g, g:] = (spread.unflatten(-1, (-1, size)) * values[:, g:]).sum(-1)
        left[:, g:, g] = left[:, g, g:]
    old = scale.float()
    diagonal = left.diagonal(dim1=-2, dim2=-1)
    ridge = SCALE_RIDGE * diagonal.mean(-1, keepdim=True) + 1e-30
    diagonal += ridge
    solved = torch.linalg.solve(left, (right + ridge * old).unsqueeze(-1)).squeeze(-1)
    fresh = stored(solved, scale.dtype)

    def cost(s: Tensor) -> Tensor:
        return (torch.einsum("ng,ngh,nh->n", s, left, s) - 2 * (s * right).sum(-1)).nan_to_num(float("inf"))

    better = cost(fresh.float()) < cost(old)
    return torch.where(better.unsqueeze(-1), fresh, scale)
