"""Products with weights as they stand in the file, on CUDA: which kernel of `jit/linear.py` runs, and in what blocks.

Few rows of x meet the weight in float32 (decoding lives from the memory's bandwidth), more of them in the tensor cores,
and a chunk of a prompt meets tiles of the dense weight, which cuBLAS multiplies. Nothing here waits for the device or
looks at what it computes, so that every call can be part of a CUDA graph.

Bytes a product reads: N * K * b / 8 of values, N * G of scales; the dense weight is never whole.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import next_power_of_2

from glm4run.kernels import LinearSpec
from glm4run.kernels.triton import overlap
from glm4run.kernels.triton.jit.linear import dequantize_rows, multiply_rows, multiply_tiles
from glm4run.kernels.triton.launch import launch
from glm4run.qformat import WORD_BITS, PackedWeight

MOST_FEW = 4  # rows of x that meet a weight in float32
MANY_ROWS = 8192  # weights of as many rows have programs enough, whatever a program takes
MOST_TILED, MOST_TILED_OF_FEW = 64, 32  # beyond, the weight is made dense a tile at a time: with many rows, with fewer
TILE_BYTES = 64 << 20  # of a dense tile in x's dtype
TILE_STEP = 2048  # rows; whole waves of cuBLAS's blocks where there is room for them
MOST_TOGETHER = 3  # weights of one launch


@dataclass(frozen=True)
class Few:
    """Blocks of `multiply_rows`: rows of the weight a program, blocks of four words of each a step."""

    rows: int
    blocks: int = 32
    warps: int = 1
    unroll: int = 4


@dataclass(frozen=True)
class Tiles:
    """Blocks of `multiply_tiles`: rows of x and of the weight a program, packed bytes of each a step (64 or 128)."""

    tokens: int
    rows: int
    bytes: int = 64
    warps: int = 4
    stages: int = 4


# By rows of x, rounded up. Chosen by benchmarks/cuda_linear.py.
FEW = {1: Few(8), 2: Few(4, unroll=2), 4: Few(4, unroll=1)}
# One row of x and int4: whole short rows a step where there are few of them, one step ahead where there are many.
FEW_SHORT, MANY_SHORT, LONG = Few(4, blocks=128, warps=4, unroll=1), Few(4, unroll=1), Few(4)
SHORT_BLOCKS = 128
OF_FEW_ROWS = Few(4, blocks=64, warps=2, unroll=1)  # otherwise, where the weight has few rows: more warps for each
TILES = {16: Tiles(16, 32), 32: Tiles(32, 32), 64: Tiles(64, 64, stages=3)}
FLOAT32_TILES = Tiles(16, 32, stages=2)
DEQUANTIZE_ROWS, DEQUANTIZE_WORDS, DEQUANTIZE_WARPS = 4, 256, 8


@dataclass(frozen=True)
class Form:
    """What weights of one launch have in common."""

    bits: int
    words: int  # of a row
    group_words: int  # of a group
    has_zeros: bool
    scale_dtype: torch.dtype


@dataclass(frozen=True)
class TritonWeight:
    """The weight as it stands in the file, on the device."""

    packed: Tensor  # int32 [N, W]
    scale: Tensor  # [N, G]
    zero_point: Tensor | None  # int32 [N * b / 32, G]
    spec: LinearSpec
    form: Form

    @property
    def nbytes(self) -> int:
        tensors = (self.packed, self.scale, *(() if self.zero_point is None else (self.zero_point,)))
        return sum(t.numel() * t.element_size() for t in tensors)


def prepack(weight: PackedWeight, spec: LinearSpec) -> TritonWeight:
    """The weight for `multiply`; its tensors are kept."""
    bits, group = spec.scheme.bits, spec.scheme.group_size
    group_words = (spec.in_features if group is None else group) * bits // WORD_BITS
    form = Form(bits, weight.packed.shape[1], group_words, weight.zero_point is not None, weight.scale.dtype)
    zero_point = None if weight.zero_point is None else weight.zero_point.contiguous()
    return TritonWeight(weight.packed.contiguous(), weight.scale.contiguous(), zero_point, spec, form)


@dataclass(frozen=True)
class Kernel:
    """A kernel of `jit` with its constants."""

    jit: Any
    constants: dict[str, int | bool]
    options: dict[str, int]
    rows: int  # of the weight a program
    tokens: int = 1  # rows of x a program

    def run(self, grid: tuple[int, int, int], arguments: Sequence[Tensor | int | None]) -> None:
        launch(self.jit, grid, arguments, self.constants, **self.options)


def multiply(
    x: Tensor,
    weights: Sequence[TritonWeight],
    biases: Sequence[Tensor | None],
    outs: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """x [M, K] times each weight's transpose, plus its bias [N]: [M, N] each, in the dtype of x.

    `outs`: where the results go, [M, N] with rows of consecutive elements. Where None they are made, and may be columns
    of one tensor.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    M = x.shape[0]
    dense = most_tiled(max(weight.spec.out_features for weight in weights)) < M
    if outs is None and dense and _dense_at_once(x, weights, biases):
        return _multiply_joined(x, weights, biases)
    if outs is None:
        outs = [torch.empty(M, weight.spec.out_features, dtype=x.dtype, device=x.device) for weight in weights]
    if M == 0:
        return list(outs)
    if not dense and _run_together(weights, biases):
        _launch(x, weights, biases, outs)
        return list(outs)
    for weight, bias, out in zip(weights, biases, outs, strict=True):
        if dense:
            _multiply_dense(x, weight, bias, out)
        else:
            _launch(x, [weight], [bias], [out])
    return list(outs)


def most_tiled(out_features: int) -> int:
    """Rows of x up to which a weight stays packed. `memory.kernels` mirrors it."""
    return MOST_TILED if out_features >= MANY_ROWS else MOST_TILED_OF_FEW


def _run_together(weights: Sequence[TritonWeight], biases: Sequence[Tensor | None]) -> bool:
    same_form = all(weight.form == weights[0].form for weight in weights[1:])
    return len(weights) <= MOST_TOGETHER and same_form and _all_or_none(biases)


def _all_or_none(biases: Sequence[Tensor | None]) -> bool:
    return len({bias is None for bias in biases}) == 1


def _launch(
    x: Tensor, weights: Sequence[TritonWeight], biases: Sequence[Tensor | None], outs: Sequence[Tensor]
) -> None:
    """One launch for all weights. They share their form, and have all a bias or none."""
    M = x.shape[0]
    tokens, few = next_power_of_2(M), M <= MOST_FEW
    form, has_bias = weights[0].form, biases[0] is not None
    if few:
        blocks = _choose_few(form, tokens, sum(weight.spec.out_features for weight in weights))
        kernel = _few_kernel(form, x.device, tokens, blocks, len(weights), has_bias)
    else:
        kernel = _tiles_kernel(form, x.dtype, x.device, max(tokens, 16), len(weights), has_bias)
    arguments: list[Tensor | int | None] = [x]
    ends, end = [], 0
    for weight, bias, out in zip(weights, biases, outs, strict=True):
        N = weight.spec.out_features
        packed = weight.packed if few else weight.packed.view(torch.uint8)
        arguments += (packed, weight.scale, weight.zero_point, bias, out, N, out.stride(0))
        end += -(-N // kernel.rows)
        ends.append(end)
    arguments += [None] * (7 * (MOST_TOGETHER - len(weights)))
    starts = [*ends[:-1], None, None][: MOST_TOGETHER - 1]  # of the second and the third weight
    arguments += (x.stride(0), M, *starts)
    kernel.run((end, -(-M // kernel.tokens) if not few else 1, 1), arguments)


def _choose_few(form: Form, tokens: int, rows: int) -> Few:
    """For up to `tokens` rows of x and `rows` of the weights."""
    if tokens > 1 or form.bits != 4:
        return FEW[tokens] if rows >= MANY_ROWS else OF_FEW_ROWS
    if form.words > 4 * SHORT_BLOCKS:
        return LONG
    return MANY_SHORT if rows >= MANY_ROWS else FEW_SHORT


def _constants(form: Form, device: torch.device) -> dict[str, int | bool]:
    of_form = {"W": form.words, "BITS": form.bits, "GROUP_WORDS": form.group_words, "HAS_ZEROS": form.has_zeros}
    return of_form | overlap(device)


@functools.cache
def _few_kernel(form: Form, device: torch.device, tokens: int, few: Few, parts: int, has_bias: bool) -> Kernel:
    """For up to `tokens` rows of x."""
    constants = {
        **_constants(form, device),
        "HAS_BIAS": has_bias,
        "PARTS": parts,
        "MB": tokens,
        "ROWS": few.rows,
        "B": min(few.blocks, next_power_of_2(form.words // 4 + 1) // 2),  # no more than a row has
        "UNROLL": few.unroll,
    }
    return Kernel(multiply_rows, constants, {"num_warps": few.warps}, few.rows, tokens)


@functools.cache
def _tiles_kernel(
    form: Form, dtype: torch.dtype, device: torch.device, tokens: int, parts: int, has_bias: bool
) -> Kernel:
    """For up to `tokens` rows of x in `dtype`, or for more, several programs each."""
    tiles = TILES[min(tokens, max(TILES))]
    if dtype == torch.float32:  # no tensor cores: these are its products one by one
        tiles = FLOAT32_TILES
    constants = {
        **_constants(form, device),
        "HAS_BIAS": has_bias,
        "PARTS": parts,
        "BM": tiles.tokens,
        "BN": tiles.rows,
        "BYTES": min(tiles.bytes, 16 * form.group_words),  # four groups at most
    }
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return Kernel(multiply_tiles, constants, options, tiles.rows, tiles.tokens)


@functools.cache
def _dense_kernel(form: Form, device: torch.device) -> Kernel:
    constants = {**_constants(form, device), "ROWS": DEQUANTIZE_ROWS, "BW": DEQUANTIZE_WORDS}
    return Kernel(dequantize_rows, constants, {"num_warps": DEQUANTIZE_WARPS}, DEQUANTIZE_ROWS)


def dense_tile_rows(out_features: int, in_features: int, element_bytes: int) -> int:
    """Rows of the weight that are dense at once. `memory.kernels` mirrors it."""
    fitting = TILE_BYTES // (in_features * element_bytes)
    whole = fitting // TILE_STEP * TILE_STEP
    return min(out_features, whole or max(fitting, 16))


def _dense_at_once(x: Tensor, weights: Sequence[TritonWeight], biases: Sequence[Tensor | None]) -> bool:
    """Whether several weights are one product: the dense ones fit a tile, and have all a bias or none."""
    N, K = sum(weight.spec.out_features for weight in weights), x.shape[1]
    return len(weights) > 1 and _all_or_none(biases) and dense_tile_rows(N, K, x.element_size()) >= N


def _multiply_joined(x: Tensor, weights: Sequence[TritonWeight], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """One product of x with the dense weights under each other; the results are columns of its."""
    counts = [weight.spec.out_features for weight in weights]
    scratch = torch.empty(sum(counts), x.shape[1], dtype=x.dtype, device=x.device)
    for weight, rows in zip(weights, scratch.split(counts), strict=True):
        _dequantize(weight, 0, rows)
    given = [bias for bias in biases if bias is not None]
    joined = torch.addmm(torch.cat(given), x, scratch.t()) if given else torch.mm(x, scratch.t())
    return list(joined.split(counts, dim=1))


def _multiply_dense(x: Tensor, weight: TritonWeight, bias: Tensor | None, out: Tensor) -> None:
    """One tile of the dense weight after the other, all in one scratch."""
    N, K = weight.spec.out_features, weight.spec.in_features
    tile_rows = dense_tile_rows(N, K, x.element_size())
    scratch = torch.empty(tile_rows, K, dtype=x.dtype, device=x.device)
    for first in range(0, N, tile_rows):
        count = min(tile_rows, N - first)
        _dequantize(weight, first, scratch[:count])
        torch.mm(x, scratch[:count].t(), out=out[:, first : first + count])
    if bias is not None:
        out.add_(bias)


def _dequantize(weight: TritonWeight, first: int, out: Tensor) -> None:
    """Rows of the weight from `first` on, dense, to out [count, K]."""
    count, kernel = out.shape[0], _dense_kernel(weight.form, out.device)
    grid = (-(-weight.form.words // DEQUANTIZE_WORDS), -(-count // DEQUANTIZE_ROWS), 1)
    kernel.run(grid, (weight.packed, weight.scale, weight.zero_point, out, first, count))
