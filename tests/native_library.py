"""What tests of the native library share: which instruction sets there are, and running with one of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from glm4run.kernels import Activations, LinearSpec
from glm4run.kernels.cpu.backend import NativeBackend, NativeWeight
from glm4run.kernels.cpu.library import active_isa, available_isas, native, set_isa, why_missing
from glm4run.kv_rows import KVRows
from tests.packed_cases import Case

MISSING = why_missing()
ISAS = () if MISSING is not None else tuple(isa for isa, runs in available_isas().items() if runs)

# CI has a compiler: there the library must be built, and nothing that needs it may be skipped.
needs_library = pytest.mark.skipif(MISSING is not None and not os.environ.get("CI"), reason=f"no library: {MISSING}")
each_isa = pytest.mark.parametrize("isa", ISAS or ("missing",))


@contextmanager
def running(isa: str | None = None, threads: int = 1) -> Iterator[None]:
    """One instruction set (None: the best) and a number of threads; afterwards those that were."""
    before, count = active_isa(), native().g4_threads()
    try:
        if isa is not None:
            set_isa(isa)
        native().g4_set_threads(threads)
        yield
    finally:
        set_isa(before)
        native().g4_set_threads(count)


def spec_for(case: Case, activations: Activations, dtype: torch.dtype = torch.float32) -> LinearSpec:
    weight = case.weight
    return LinearSpec(
        weight.out_features, weight.in_features, weight.scheme, torch.device("cpu"), dtype, activations=activations
    )


def prepacked(case: Case, activations: Activations) -> NativeWeight:
    """The weight as the native backend holds it. Prepacking does not depend on the dtype of the activations."""
    return NativeBackend().prepack(case.weight, spec_for(case, activations))


def product(x: Tensor, weight: NativeWeight, bias: Tensor | None = None) -> Tensor:
    return NativeBackend().linear(x, weight, bias)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, NaN and the sign of zero included."""
    wide = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(wide), b.contiguous().view(wide))


def in_bytes(rows: KVRows, isa: str) -> bool:
    """Whether queries that meet these keys, or weights that meet these values, are rounded to bytes."""
    one_scale = rows.scales is not None and (rows.bits == 4 or rows.scales.shape[-1] == 1)
    return isa.startswith("avx512") and one_scale and rows.head_dim % 64 == 0
