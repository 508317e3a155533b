"""Writes keys and values into a cache on a CUDA device, and makes queries ready for it. `kv_rows.py` has the format.

Nothing here waits for the device or allocates but through torch, so that a CUDA graph may hold it; where a position is
a tensor on the device, one graph serves every position. Tables are made at a device's first call, which must not be
inside a capture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from glm4run.kernels.triton import DTYPES, overlap
from glm4run.kernels.triton.jit.cache import write_rows
from glm4run.kernels.triton.launch import launch
from glm4run.kv_format import CODES, group_of
from glm4run.kv_order import Order
from glm4run.kv_rows import KVLayer, KVRows, turn

MIN_HEAD, MAX_HEAD = 16, 256
FEW_TOKENS = 16  # up to which a program takes one row, and turns it stage by stage


@dataclass(frozen=True, eq=False)
class Queries:
    """Queries as attention over a layer's keys takes them.

    rows: [H, T, D], of any strides but the last; of the keys' dtype where those are floats, else turned, in float16,
    divided by `scales` float32 [T, H].
    """

    rows: Tensor
    scales: Tensor | None = None


def why_not(layer: KVLayer, heads: int, head_dim: int, dtype: torch.dtype) -> str | None:
    """None if the kernels take a layer's cache and queries [heads, T, head_dim] of `dtype`, else why not."""
    if head_dim & (head_dim - 1) or not MIN_HEAD <= head_dim <= MAX_HEAD:
        return f"heads of {head_dim} values are no power of two from {MIN_HEAD} to {MAX_HEAD}"
    if dtype not in DTYPES:
        return f"queries are {dtype}"
    if heads % layer.keys.data.shape[0]:
        return f"{heads} heads are no multiple of {layer.keys.data.shape[0]} KV heads"
    for rows in (layer.keys, layer.values):
        if rows.scales is None and rows.data.dtype != dtype:
            return f"the cache is {rows.data.dtype}, queries are {dtype}"
        if rows.order is not Order.ROWS:
            return "rows lie in the order of a CPU's instructions"
    for tensor in layer.tensors().values():
        if not tensor[0].is_contiguous():
            return "a head's rows are not one run of memory"
    for rows in (layer.keys, layer.values):
        if rows.scales is not None and _capacity(rows.data) != _capacity(rows.scales):
            return "rows and their scales have different capacities"
    return None


def append(layer: KVLayer, start: int | Tensor, key: Tensor, value: Tensor) -> None:
    """Keeps key and value [KVH, T, D], whose rows are contiguous, from position `start` on.

    `start` may be an int32 tensor [1] on the device.
    """
    _write(layer, start, None, key, value, None, None)


def rope_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    layer: KVLayer,
    start: int | Tensor,
    query_out: Tensor | None = None,
) -> Queries:
    """Turns queries and keys by their positions, keeps keys and values from `start` on; returns the queries.

    Args:
        query: [T, H * D], overwritten where `query_out` is None and the result is as wide
        key, value: [T, KVH * D]; all three with contiguous rows, at any distance
        cos, sin: float32 [T, R / 2], contiguous
        query_out: [H, T, D] with contiguous rows; float16 where keys are quantized, else of the queries' dtype
    """
    head_dim = layer.keys.head_dim
    asking, keys, values = (x.unflatten(-1, (-1, head_dim)).transpose(0, 1) for x in (query, key, value))
    return _write(layer, start, asking, keys, values, (cos, sin), query_out)


def ready(query: Tensor, layer: KVLayer) -> Queries:
    """Queries [H, T, D] for a layer's keys, as `rope_append` gives them; the same memory where keys are floats."""
    if layer.keys.scales is None:
        return Queries(query)
    out = torch.empty(query.shape, dtype=torch.float16, device=query.device)
    return _write(layer, 0, query, None, None, None, out)


def _write(
    layer: KVLayer,
    start: int | Tensor,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    turns: tuple[Tensor, Tensor] | None,
    query_out: Tensor | None,
) -> Queries:
    """One launch: queries [H, T, D], keys and values [KVH, T, D], of which some may be None."""
    some = query if query is not None else key
    assert some is not None
    tokens, head_dim = some.shape[1:]
    kv_heads, heads = layer.keys.data.shape[0], 0 if query is None else query.shape[0]
    turn_query = query is not None and layer.keys.scales is not None
    scales = None
    if query is not None and query_out is None:
        query_out = query
        if turn_query:
            half = query.dtype.itemsize == torch.float16.itemsize
            query_out = query.view(torch.float16) if half else torch.empty_like(query, dtype=torch.float16)
    if turn_query:
        scales = torch.empty(tokens, heads, dtype=torch.float32, device=some.device)
    many = tokens > FEW_TOKENS
    query_rows, rows, warps = (64, 4, 4) if many else (1, 1, 4 if 4 in (layer.keys.bits, layer.values.bits) else 1)
    if key is not None and value is not None:
        write_programs = -(-tokens * kv_heads // rows)
        assert key.stride(-1) == value.stride(-1) == 1
    else:
        write_programs, key, value = 0, some, some
    query_programs = -(-tokens * heads // query_rows)
    asked = some if query_out is None else query_out
    asking = some if query is None else query
    cos, sin = (some, some) if turns is None else turns
    keys, values = layer.keys, layer.values
    launch(
        write_rows,
        (query_programs + 2 * write_programs,),
        (
            asking,
            asking.stride(1),
            asking.stride(0),
            asked,
            asked.stride(1),
            asked.stride(0),
            some if scales is None else scales,
            key,
            key.stride(1),
            key.stride(0),
            value,
            value.stride(1),
            value.stride(0),
            cos,
            sin,
            hadamard(head_dim, some.device) if turn_query and many else some,
            code_table(some.device) if 4 in (keys.bits, values.bits) else some,
            keys.data,
            keys.data if keys.scales is None else keys.scales,
            _capacity(keys.data),
            some if keys.offset is None else keys.offset,
            values.data,
            values.data if values.scales is None else values.scales,
            _capacity(values.data),
            start,
            tokens,
            query_programs,
            write_programs,
        ),
        {
            **overlap(some.device),
            "START_IS_POINTER": isinstance(start, Tensor),
            "HEADS": max(heads, 1),
            "KV_HEADS": kv_heads,
            "D": head_dim,
            "LOG_D": head_dim.bit_length() - 1,
            "NORM": 1 / math.sqrt(head_dim),
            "ROTARY": 0 if turns is None else 2 * cos.shape[-1],
            "KEY_BITS": keys.bits,
            "KEY_GROUP": group_of(8, head_dim),
            "HAS_OFFSET": keys.scales is not None and keys.offset is not None,
            "VALUE_BITS": values.bits,
            "VALUE_GROUP": group_of(8, head_dim),
            "TURN_QUERY": turn_query,
            "DOT": many,
            "QUERY_ROWS": query_rows,
            "ROWS": rows,
        },
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return Queries(asked, scales)


def rows_of(rows: KVRows) -> tuple[Tensor, Tensor, int]:
    """Values as the kernels read them, their scales (or anything), and the rows of a head."""
    data = rows.data.view(torch.int32) if rows.bits == 4 else rows.data
    return data, rows.data if rows.scales is None else rows.scales, _capacity(rows.data)


def _capacity(data: Tensor) -> int:
    """Rows from one head's first to the next head's."""
    return data.stride(0) // data.stride(1)


@cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """The matrix that `kv_rows.turn` multiplies by, its entries 1 and -1: bf16 [size, size]."""
    return (turn(torch.eye(size)) * math.sqrt(size)).round().bfloat16().to(device)


@cache
def code_table(device: torch.device) -> Tensor:
    """Steps, lowest levels, and the inverse of steps, by code: float32 [3, 64]."""
    step, lowest = torch.tensor(CODES, dtype=torch.float32).unbind(-1)
    return torch.stack((step, lowest, 1 / step)).to(device)


@cache
def code_pairs(device: torch.device) -> Tensor:
    """Of each code the step and, in the high half, the lowest level, as two float16, and as two bf16: int32 [2, 64]."""
    pairs = torch.tensor(CODES, dtype=torch.float32)
    return torch.stack([pairs.to(dtype).view(torch.int32)[:, 0] for dtype in (torch.float16, torch.bfloat16)]).to(
        device
    )
