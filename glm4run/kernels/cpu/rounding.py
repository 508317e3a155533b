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
    return _pack(native().g4_round_pack, weight, scheme)


def search_and_pack(
    weight: Tensor, scheme: QuantScheme, importance: Tensor, candidates: Sequence[float]
) -> tuple[Tensor, Tensor, float, float] | None:
    """The same by the scale search of `mse`: importance [K], and the steps that a largest weight may land on."""
    importance = importance.float().contiguous()
    assert importance.shape == (weight.shape[1],)
    steps = (ctypes.c_float * len(candidates))(*candidates)
    return _pack(native().g4_search_pack, weight, scheme, importance.data_ptr(), steps, len(candidates))


def _pack(
    function: Callable[..., int], weight: Tensor, scheme: QuantScheme, *search: object
) -> tuple[Tensor, Tensor, float, float] | None:
    """Calls one of the two; `search` is what only the one that searches takes."""
    assert scheme.group_size is not None
    rows, columns = weight.shape
    packed = torch.empty(rows, columns * scheme.bits // 32, dtype=torch.int32)
    scale = torch.empty(rows, columns // scheme.group_size, dtype=weight.dtype)
    sums = (ctypes.c_double * 2)()
    damaged = function(
        weight.data_ptr(),
        DTYPE_CODES[weight.dtype],
        rows,
        columns,
        scheme.bits,
        scheme.group_size,
        *search,
        scale.data_ptr(),
        packed.data_ptr(),
        sums,
    )
    assert damaged in (0, 1)
    return None if damaged else (packed, scale, sums[0], sums[1])
