"""Attention over a cache on a CUDA device: one kernel for prefill and decoding, and for rows of every kind.

Nothing is expanded to the number of query heads, there is no mask but the comparison of a position with a row's own,
and memory grows with nothing but the new tokens. A few tokens split the context over the device and sum up what the
parts found, in the same order every time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from triton import next_power_of_2

from glm4run.kernels.triton import overlap
from glm4run.kernels.triton.cache import Queries, code_pairs, hadamard, ready, rows_of
from glm4run.kernels.triton.jit.attention import attend_rows, combine
from glm4run.kernels.triton.launch import launch
from glm4run.kv_format import group_of, tensor_widths
from glm4run.kv_rows import KVLayer, KVRows

PROGRAMS_PER_MULTIPROCESSOR = 2
PREFETCHED_ROWS = 128  # of a part of the context
MOST_SPLITS, FEWEST_SUMMED = 128, 16  # what is summed up at once


@dataclass(frozen=True)
class Tiles:
    """How a launch is cut: rows (tokens times the heads that share a KV head) and positions of a program's step."""

    rows: int
    positions: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most


def choose_tiles(rows: int, head_dim: int, key_bits: int, value_bits: int, dtype: torch.dtype) -> Tiles:
    """For `rows` queries a KV head."""
    wide = head_dim > 128
    if dtype == torch.float32:  # in the plain units: correct first
        return Tiles(16, 32, 4, 1)
    block = min(max(16, next_power_of_2(rows)), 128)
    quantized = min(key_bits, value_bits) < 16
    if block == 16 and quantized and not wide:  # more warps, as they work more for what they read
        return Tiles(16, 128, 8, 2, 128)
    if block < 64:
        return Tiles(block, 32 if wide else 64, 4, 3)
    if wide:
        return Tiles(64, 32, 8, 2)
    if block < 128:
        return Tiles(64, 64, 4, 2)
    if quantized:
        return Tiles(128, 64 if 4 in (key_bits, value_bits) else 128, 8, 2)
    return Tiles(128, 128, 8, 3)


def choose_splits(
    tokens: int, heads: int, kv_heads: int, visible: int | None, tiles: Tiles, device: torch.device
) -> int:
    """Parts of the context that fill the device; no more than there are blocks of the `visible` positions."""
    programs = kv_heads * -(-tokens * (heads // kv_heads) // tiles.rows)
    splits = min(MOST_SPLITS, max(1, PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(device) // programs))
    return splits if visible is None else min(splits, -(-visible // tiles.positions))


def scratch_floats(tokens: int, heads: int, head_dim: int, splits: int) -> int:
    """Float32 values that `attend` needs beside its result."""
    return splits * tokens * heads * (head_dim + 2) if splits > 1 else 0


def attend(
    query: Tensor | Queries,
    layer: KVLayer,
    start: int | Tensor,
    *,
    splits: int | None = None,
    out: Tensor | None = None,
    scratch: Tensor | None = None,
    tiles: Tiles | None = None,
    prefetch: bool = True,
) -> Tensor:
    """Causal grouped-query attention of T tokens at positions `start` .. start + T - 1, which the cache holds already.

    Args:
        query: [H, T, D] with contiguous rows, or what `rope_append` made of them
        start: an int, or an int32 tensor [1] on the device; the launch then depends on T and `splits` alone
        splits: parts of the context; chosen for the device where None
        out: [T, H * D], contiguous; of the dtype of the result
        scratch: float32, `scratch_floats` or more
        prefetch: whether rows of the cache are asked for while the kernels before still run

    Returns:
        [T, H * D] in the queries' dtype; of queries made ready for quantized keys in that of `out`, or of values that
        are floats, or bf16.
    """
    kept = query if isinstance(query, Queries) else ready(query, layer)
    keys, values = layer.keys, layer.values
    heads, tokens, head_dim = kept.rows.shape
    kv_heads = keys.data.shape[0]
    device = kept.rows.device
    if out is None:
        dtype = query.dtype if isinstance(query, Tensor) else _result_dtype(kept, values)
        out = torch.empty(tokens, heads * head_dim, dtype=dtype, device=device)
    repeat = heads // kv_heads
    if tiles is None:
        floats = torch.float32 if torch.float32 in (keys.data.dtype, values.data.dtype) else torch.bfloat16
        tiles = choose_tiles(tokens * repeat, head_dim, keys.bits, values.bits, floats)
    if splits is None:
        visible = None if isinstance(start, Tensor) else start + tokens
        splits = choose_splits(tokens, heads, kv_heads, visible, tiles, device)
    split = splits > 1
    floats_needed = scratch_floats(tokens, heads, head_dim, splits)
    if scratch is None:
        scratch = torch.empty(max(floats_needed, 1), dtype=torch.float32, device=device)
    assert scratch.numel() >= floats_needed and out.is_contiguous()
    sums = scratch[splits * tokens * heads * head_dim :] if split else scratch
    signs = hadamard(head_dim, device) if values.scales is not None else out
    norm = 1 / math.sqrt(head_dim)
    shape = {"KV_HEADS": kv_heads, "REPEAT": repeat, "D": head_dim, "NORM": norm}
    shape |= {"START_IS_POINTER": isinstance(start, Tensor), "BLOCK_M": tiles.rows, "BLOCK_N": tiles.positions}
    shape |= overlap(device)
    key_data, key_scales, key_rows = rows_of(keys)
    value_data, value_scales, value_rows = rows_of(values)
    launch(
        attend_rows,
        (-(-tokens * repeat // tiles.rows), kv_heads, splits),
        (
            kept.rows,
            kept.rows.stride(1),
            kept.rows.stride(0),
            kept.rows if kept.scales is None else kept.scales,
            key_data,
            key_scales,
            key_rows,
            value_data,
            value_scales,
            value_rows,
            code_pairs(device) if 4 in (keys.bits, values.bits) else out,
            signs,
            start,
            tokens,
            splits,
            out,
            scratch,
            sums,
            norm * math.log2(math.e),
        ),
        {
            "SPLIT": split,
            "PREFETCH": PREFETCHED_ROWS if prefetch and shape["OVERLAPS"] and split else 0,
            "KEY_BITS": keys.bits,
            "VALUE_BITS": values.bits,
            **_scale_widths("KEY", head_dim, keys.bits),
            **_scale_widths("VALUE", head_dim, values.bits),
            **shape,
        },
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        maxnreg=tiles.registers,
    )
    if split:
        turned = values.scales is not None
        most = max(FEWEST_SUMMED, next_power_of_2(splits))
        chunk = min(most, MOST_SPLITS, (1 << 14) // head_dim)
        part = head_dim if turned or chunk < MOST_SPLITS else min(head_dim, 32)
        launch(
            combine,
            (tokens * heads, head_dim // part),
            (scratch, sums, out, signs, start, tokens, splits),
            {"TURNED": turned, "MOST": most, "CHUNK": chunk, "PART": part, **shape},
            num_warps=max(4, head_dim // 16) if turned else 4,
        )
    return out


def _scale_widths(name: str, head_dim: int, bits: int) -> dict[str, int]:
    """What the kernel has to know of a row's scales: how many groups (8 bits), and elements a row."""
    groups = head_dim // group_of(8, head_dim)
    width = 0 if bits == 16 else groups if bits == 8 else tensor_widths(head_dim, 4, 0)[1]
    return {f"{name}_GROUPS": groups, f"{name}_WIDTH": width}


def _result_dtype(queries: Queries, values: KVRows) -> torch.dtype:
    if queries.scales is None:
        return queries.rows.dtype
    return values.data.dtype if values.scales is None else torch.bfloat16


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
