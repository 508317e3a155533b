"""Rounding and the search of scales in the native library: a weight's rows straight to packed words and scales."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from glm4run.kernels.cpu.backend import DTYPE_CODES
from glm4run.kernels.cpu.library import native, why_missing
from glm4run.quant_config import QuantScheme

MAX_GROUP = 128


def takes_rounding(weight: Tensor, scheme: QuantScheme) -> bool:
    """Whether the library is there and takes this weight [N, K] as it is."""
    group = scheme.group_size
    return (
        why_missing() is None
        and weight.device.type == "cpu"
        and weight.dtype in DTYPE_CODES
        and weight.is_contiguous()
        and scheme.symmetric
        and group is not None
        and group <= MAX_GROUP
        and group % 16 == 0
        and weight.shape[1] % group == 0
    )


def round_and_pack(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor, float, float] | None:
    """weight [N, K] to (packed int32 [N, K*b/32], scale [N, G] in the weight's dtype, sum of squares of the weights,
    and of what rounding changes). None where a weight is NaN or infinite.
    """
    packed, scale = _packed_like(weight, scheme), _scale_like(weight, scheme, weight.dtype)
    sums = _call(native().g4_round_pack, weight, scheme, scale.data_ptr(), packed.data_ptr())
    return None if sums is None else (packed, scale, *sums)


def search_and_pack(
    weight: Tensor, scheme: QuantScheme, importance: Tensor, candidates: Sequence[float]
) -> tuple[Tensor, Tensor, float, float] | None:
    """The same by the scale search of `mse`: importance [K], and the steps that a largest weight may land on."""
    packed, scale = _packed_like(weight, scheme), _scale_like(weight, scheme, weight.dtype)
    sums = _search(weight, scheme, importance, candidates, scale, packed, by_size=True)
    return None if sums is None else (packed, scale, *sums)


def search_scales(
    weight: Tensor,
    scheme: QuantScheme,
    importance: Tensor,
    candidates: Sequence[float],
    scale_dtype: torch.dtype,
    *,
    by_size: bool,
) -> Tensor | None:
    """The scales [N, G] of that search alone, in `scale_dtype`. `by_size`: errors of large weights count more, as in
    `mse`; else by `importance` alone. None where a weight is NaN or infinite.
    """
    scale = _scale_like(weight, scheme, scale_dtype)
    sums = _search(weight, scheme, importance, candidates, scale, None, by_size=by_size)
    return None if sums is None else scale


def _packed_like(weight: Tensor, scheme: QuantScheme) -> Tensor:
    return torch.empty(weight.shape[0], weight.shape[1] * scheme.bits // 32, dtype=torch.int32)


def _scale_like(weight: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> Tensor:
    assert scheme.group_size is not None
    return torch.empty(weight.shape[0], weight.shape[1] // scheme.group_size, dtype=dtype)


def _search(
    weight: Tensor,
    scheme: QuantScheme,
    importance: Tensor,
    candidates: Sequence[float],
    scale: Tensor,
    packed: Tensor | None,
    *,
    by_size: bool,
) -> tuple[float, float] | None:
    importance = importance.float().contiguous()
    assert importance.shape == (weight.shape[1],)
    steps = (ctypes.c_float * len(candidates))(*candidates)
    return _call(
        native().g4_search_pack,
        weight,
        scheme,
        importance.data_ptr(),
        int(by_size),
        steps,
        len(candidates),
        DTYPE_CODES[scale.dtype],
        scale.data_ptr(),
        None if packed is None else packed.data_ptr(),
    )


def _call(
    function: Callable[..., int], weight: Tensor, scheme: QuantScheme, *rest: object
) -> tuple[float, float] | None:
    """One of the two functions over a weight; its two sums, or None where it met what is no number."""
    sums = (ctypes.c_double * 2)()
    rows, columns = weight.shape
    facts = (weight.data_ptr(), DTYPE_CODES[weight.dtype], rows, columns, scheme.bits, scheme.group_size)
    damaged = function(*facts, *rest, sums)
    assert damaged in (0, 1)
    return None if damaged else (sums[0], sums[1])
