"""Causal grouped-query attention that never expands K and V to the number of query heads.

All query heads that share a KV head are stacked along the query axis: [KVH, (H/KVH) * T, D] x [KVH, D, S]. Queries
are taken in blocks, so that the scores never need more than `MAX_SCORE_BYTES` however long the context is, and the
only mask is the triangle of the block itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_SCORE_BYTES = 64 << 20


def grouped_query_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attends the last T positions of a context of S tokens to all positions up to their own.

    Args:
        query: [..., H, T, D], the queries of positions S-T .. S-1
        key, value: [..., KVH, S, D]; H must be a multiple of KVH

    Returns:
        [..., T, H * D] in the dtype of `query`. Scores, softmax and the weighted sum run in float32: the products
        of this family's biased queries and keys overflow fp16, and bf16 is too coarse for the softmax.
    """
    *batch, heads, count, head_dim = query.shape
    kv_heads, context = key.shape[-3], key.shape[-2]
    repeat = heads // kv_heads
    scaled = query.float() * head_dim**-0.5
    scaled = scaled.unflatten(-3, (kv_heads, repeat))  # [..., KVH, R, T, D]
    key, value = key.float(), value.float()
    block = max(1, MAX_SCORE_BYTES // (4 * heads * context))
    outputs = []
    for first in range(0, count, block):
        last = min(first + block, count)
        seen = context - count + last  # keys that the last query of this block may see
        outputs.append(_attend_block(scaled[..., first:last, :], key[..., :seen, :], value[..., :seen, :]))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-2)  # [..., KVH, R, T, D]
    out = out.flatten(-4, -3).transpose(-3, -2)  # [..., T, H, D]
    return out.reshape(*batch, count, heads * head_dim).to(query.dtype)


def _attend_block(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One block: query [..., KVH, R, t, D] against key, value [..., KVH, s, D]; the last query sees all s keys."""
    rows = query.shape[-2]
    stacked = query.flatten(-3, -2)  # [..., KVH, R*t, D]
    scores = (stacked @ key.transpose(-2, -1)).unflatten(-2, (-1, rows))  # [..., KVH, R, t, s]
    if rows > 1:
        future = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
        scores[..., -rows:].masked_fill_(future, float("-inf"))
    weights = scores.softmax(dim=-1).flatten(-3, -2)  # [..., KVH, R*t, s]
    out: Tensor = (weights @ value).unflatten(-2, (-1, rows))
    return out
