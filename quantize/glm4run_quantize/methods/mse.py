"""Scale and clip search: per group, the scale of either sign that leaves the smallest (weighted) squared error.

An error counts by the `importance` of its input, the second moment of what the weight is multiplied by, and by
sqrt(s^2 + w^2), with s the spread of the row: large weights matter more than their share of the squares says. Both were
kept because they help on a real model; the second factor is llama.cpp's.

Every candidate maps the group's largest weight to a given number of steps, below or above the middle; the weights are
rounded to it, and the scale that fits those steps best in the least-squares sense replaces the candidate. Fewer steps
than the grid has mean clipping nothing, more mean clipping the largest weights for a finer grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4run.kernels.cpu.rounding import search_scales as native_search
from glm4run.kernels.cpu.rounding import takes_rounding
from glm4run.quant_config import QuantScheme
from glm4run_quantize.methods.grid import bounds, in_groups, round_to, stored
from glm4run_quantize.methods.rows import on_all_cores

# Where the largest weight may land, in steps; a candidate of either sign each. Found on a real model's weights. At 8
# bits a scale a few percent larger costs next to nothing, and some lie better for the weights that count most.
STEPS = {4: tuple(5.5 + 0.25 * i for i in range(17)), 8: tuple(114 + 0.5 * i for i in range(30))}
REFITS = 2


def quantize_mse(
    weight: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """weight [N, K] to (q int8 [N, K], scale [N, G] in `scale_dtype`); `importance` is [K], all alike where None."""

    def of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = find_scales(rows, scheme, scale_dtype, importance, by_size=True)
        return round_to(rows, scale, scheme), scale

    return on_all_cores(of_rows, weight)


def error_weights(weight: Tensor, importance: Tensor | None) -> Tensor:
    """How much the squared error of each weight counts: [N, K]."""
    wide = weight.float()
    sizes = (wide.square().mean(-1, keepdim=True) + wide.square()).sqrt_()
    return sizes if importance is None else sizes * importance


def find_scales(
    weight: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, importance: Tensor | None, *, by_size: bool
) -> Tensor:
    """The scales [N, G]: by the native library where it takes the weight, else by `search_scales`.

    An error counts by `importance` [K] alone, or `by_size` of its weight as well.
    """
    if takes_rounding(weight, scheme):
        counts = torch.ones(weight.shape[1]) if importance is None else importance
        found = native_search(weight, scheme, counts, STEPS[scheme.bits], scale_dtype, by_size=by_size)
        if found is not None:
            return found
    return search_scales(weight, scheme, scale_dtype, error_weights(weight, importance) if by_size else importance)


def search_scales(
    weight: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, importance: Tensor | None = None
) -> Tensor:
    """The scales alone, [N, G] in `scale_dtype`; `importance` [K] or [N, K] weights the squared errors."""
    low, high = bounds(scheme.bits)
    grouped = in_groups(weight.float(), scheme)  # [N, G, g]
    h = torch.ones((), device=weight.device) if importance is None else in_groups(importance.float(), scheme)
    weighted = grouped * h
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))  # [N, G, 1], signed
    safe = torch.where(largest == 0, torch.ones_like(largest), largest)
    best = torch.zeros_like(largest)
    gain = torch.full_like(largest, -1.0)
    for steps in STEPS[scheme.bits]:
        # Where nothing is clipped, both signs are alike.
        for sign in (-1.0,) if steps < high + 0.5 else (-1.0, 1.0):
            q = (grouped * (sign * steps / safe)).round_().clamp_(low, high)
            # sum h (w - s q)^2 is smallest at s = sum(h w q) / sum(h q q), and smaller by sum(h w q)^2 / sum(h q q)
            fit = (weighted * q).sum(-1, keepdim=True)
            size = (q.square_() * h).sum(-1, keepdim=True)
            candidate = torch.where(size > 0, fit.square() / size, -1.0)
            better = candidate > gain
            gain = torch.where(better, candidate, gain)
            best = torch.where(better, fit / size, best)
    best = torch.where(largest == 0, torch.ones_like(best), best)
    best = stored(best, scale_dtype)
    error = _error(grouped, best, h, low, high)
    for _ in range(REFITS):
        q = (grouped / best.float()).round_().clamp_(low, high)
        size = (q.square() * h).sum(-1, keepdim=True)
        fitted = torch.where(size > 0, (weighted * q).sum(-1, keepdim=True) / size, best.float())
        again = stored(fitted, scale_dtype)
        new_error = _error(grouped, again, h, low, high)
        better = new_error < error
        best, error = torch.where(better, again, best), torch.where(better, new_error, error)
    return best.squeeze(-1)


def _error(grouped: Tensor, scale: Tensor, h: Tensor, low: int, high: int) -> Tensor:
    wide = scale.float()
    q = (grouped / wide).round_().clamp_(low, high)
    return (q.mul_(wide).sub_(grouped).square_() * h).sum(-1, keepdim=True)
