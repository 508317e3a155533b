"""What lies between the products of a layer, in the native library. Same results as the torch code, up to rounding.

Callers have checked with `runs` that the tensors are on the CPU, contiguous and of a dtype that the library knows.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from glm4run.kernels.cpu.backend import DTYPE_CODES
from glm4run.kernels.cpu.library import G4Cache, G4CacheRows, native
from glm4run.kv_format import group_of
from glm4run.kv_order import Order, cpu_orders
from glm4run.kv_rows import KVLayer, KVRows

MAX_ROTARY_DIM = 512
MAX_QUANTIZED_HEAD = 512  # of src/kernels.h
FEW_TOKENS, ONE_STRETCH = 8, 256  # tokens and positions, of src/layer_ops.cpp


def runs(*tensors: Tensor) -> bool:
    """Whether the library takes these tensors as they are."""
    return all(t.is_contiguous() for t in tensors) and takes(*tensors)


def takes(*tensors: Tensor) -> bool:
    """Whether the library knows the tensors' device and dtype; their strides are the caller's matter."""
    return all(t.device.type == "cpu" and t.dtype in DTYPE_CODES for t in tensors)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., size] to the same shape and dtype; weight float32 [size]."""
    out = torch.empty_like(x)
    size = x.shape[-1]
    native().g4_rms_norm(
        x.data_ptr(), DTYPE_CODES[x.dtype], x.numel() // size, size, weight.data_ptr(), eps, out.data_ptr()
    )
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """[..., 2 size] to [..., size]: silu of the first half times the second."""
    size = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], size, dtype=gate_up.dtype)
    native().g4_silu_mul(gate_up.data_ptr(), DTYPE_CODES[gate_up.dtype], out.numel() // size, size, out.data_ptr())
    return out


def rope_(x: Tensor, head_dim: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns x [T, heads * head_dim] in place; cos, sin float32 [T, R/2]."""
    tokens, width = x.shape
    native().g4_rope(
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        tokens,
        width // head_dim,
        head_dim,
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[-1],
    )
    return x


def cache_struct(layer: KVLayer) -> G4Cache:
    """A layer's cache, which is `in_order`, as the library takes it. The tensors must outlive it."""
    assert in_order(layer)
    data = layer.keys.data
    floats = layer.keys.data.dtype if layer.keys.scales is None else layer.values.data.dtype
    return G4Cache(
        keys=_rows_struct(layer.keys),
        values=_rows_struct(layer.values),
        capacity=data.stride(0) // data.stride(1),
        dtype=DTYPE_CODES.get(floats, 0),
    )


def _rows_struct(rows: KVRows) -> G4CacheRows:
    laid_out = rows.order is not Order.ROWS
    if rows.scales is None:
        return G4CacheRows(data=rows.data.data_ptr(), scales=None, bits=16, group=0, laid_out=laid_out)
    return G4CacheRows(
        data=rows.data.data_ptr(),
        scales=rows.scales.data_ptr(),
        bits=rows.bits,
        group=group_of(rows.bits, rows.head_dim),
        offset=None if rows.offset is None else rows.offset.data_ptr(),
        laid_out=laid_out,
    )


def in_order(layer: KVLayer) -> bool:
    """Whether rows of 8 bits lie as the library's instructions take them; bf16 may or may not."""
    both = zip((layer.keys, layer.values), cpu_orders(layer.keys.head_dim), strict=True)
    return all(rows.order is order or (rows.bits != 8 and rows.order is Order.ROWS) for rows, order in both)


def takes_cache(layer: KVLayer, head_dim: int) -> bool:
    """Whether the library takes the cache: contiguous on the CPU, in its order, and no wider than its buffers."""
    suits = head_dim <= MAX_QUANTIZED_HEAD and in_order(layer)
    return suits and all(t.device.type == "cpu" and t.is_contiguous() for t in layer.tensors().values())


def append(cache: KVLayer, start: int, key: Tensor, value: Tensor) -> None:
    """Keeps key and value [KVH, T, D], of the same strides and contiguous rows, from position `start` on."""
    kv_heads, tokens, head_dim = key.shape
    native().g4_cache_append(
        ctypes.byref(cache_struct(cache)),
        key.data_ptr(),
        value.data_ptr(),
        key.stride(1),
        key.stride(0),
        DTYPE_CODES[key.dtype],
        tokens,
        kv_heads,
        head_dim,
        start,
    )


def attention(query: Tensor, cache: KVLayer, positions: int) -> Tensor:
    """Causal grouped-query attention of the last T of `positions`: query [H, T, D] to [T, H * D] in its dtype.

    Rows of floats are of that dtype too.
    """
    library = native()
    heads, tokens, head_dim = query.shape
    kv_heads = cache.keys.data.shape[0]
    floats = library.g4_attention_floats(tokens, heads, kv_heads, head_dim, positions)
    work = torch.empty(floats, dtype=torch.float32)
    out = torch.empty(tokens, heads * head_dim, dtype=query.dtype)
    library.g4_attention(
        query.data_ptr(),
        query.stride(1),
        query.stride(0),
        DTYPE_CODES[query.dtype],
        ctypes.byref(cache_struct(cache)),
        tokens,
        heads,
        kv_heads,
        head_dim,
        positions,
        work.data_ptr(),
        out.data_ptr(),
    )
    return out
