"""Rows of a cache, written: RoPE, the turn by the Hadamard matrix, rounding to 8 and 4 bits. `kv_rows.py` says what.

To be launched with `enable_fp_fusion=False`: every product and sum is then rounded alone, as torch does it, in the same
order, and the bytes are the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glm4run.kernels.triton.jit import INTERPRETED
from glm4run.kernels.triton.jit.order import let_others_begin, wait_for_others

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: added and taken off again it rounds to the nearest even whole number


@triton.jit
def bound(x):
    """Of a loop: the interpreter's scalars are arrays of one element, which NumPy does not take for numbers."""
    if INTERPRETED:
        return (x + tl.program_id(0) * 0).handle.data.item()
    return x


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """Float32 to `dtype`, to nearest even.

    The interpreter holds bf16 as integers: it can load, store and widen them, but neither multiply nor round them.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def times(a, b, acc):
    """acc + a @ b in float32; every product of 16 bits exact."""
    if INTERPRETED or a.dtype == tl.float32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def turned(x, N: tl.constexpr, D: tl.constexpr, LOG_D: tl.constexpr, NORM: tl.constexpr):
    """`kv_rows.turn` of float32 [N, D], stage by stage as there. NORM: 1 / sqrt(D)."""
    for stage in tl.static_range(LOG_D):
        pairs = tl.reshape(x, (N, D // (2 << stage), 2, 1 << stage))
        first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        pairs = tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))
        x = tl.reshape(pairs, (N, D))
    return x * NORM


@triton.jit
def roped(x, cos, sin, token, row_mask, N: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr):
    """`rope.apply_rope` of [N, D] in float32, not rounded."""
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (N, D // 2, 2)))
    pair = tl.arange(0, D // 2)
    turns = row_mask[:, None] & (pair[None, :] < ROTARY // 2)
    at = token[:, None] * (ROTARY // 2) + pair[None, :]
    c = tl.load(cos + at, mask=turns, other=1.0)
    s = tl.load(sin + at, mask=turns, other=0.0)
    first = tl.where(turns, even * c - odd * s, even)
    second = tl.where(turns, odd * c + even * s, odd)
    return tl.reshape(tl.join(first, second), (N, D))


@triton.jit
def _inverse(scale):
    return tl.where(scale == 0.0, 0.0, tl.div_rn(1.0, scale))  # a plain quotient is not rounded to nearest


@triton.jit
def _largest(x):
    """Of magnitudes along the last axis; NaN where one is."""
    return tl.where(tl.sum((x != x).to(tl.int32), axis=-1) > 0, float("nan"), tl.max(x, axis=-1))


@triton.jit
def _finite(x):
    """`nan_to_num(0)` of what is rounded and clamped next."""
    return tl.where(x == x, x, 0.0)


@triton.jit
def store_8(x, data, scales, row, mask, N: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr):
    """Turned rows [N, D] as int8 and their scales, at `row` of data [., D] and scales [., D / GROUP]."""
    x = tl.reshape(x, (N, D // GROUP, GROUP))
    scale = (_largest(tl.abs(x)) * (1.0 / 127)).to(tl.float16)
    steps = _finite(x * _inverse(scale.to(tl.float32))[:, :, None])
    steps = tl.minimum(tl.maximum(steps, -127.0), 127.0)
    levels = tl.reshape(((steps + ROUND) - ROUND).to(tl.int8), (N, D))
    group = tl.arange(0, D // GROUP)
    tl.store(scales + row[:, None] * (D // GROUP) + group[None, :], scale, mask=mask[:, None])
    tl.store(data + row[:, None] * D + tl.arange(0, D)[None, :], levels, mask=mask[:, None])


@triton.jit
def store_4(x, data, scales, row, mask, codes, N: tl.constexpr, D: tl.constexpr):
    """Turned rows [N, D] as nibbles, and their scale and codes, at `row` of data [., D / 2] and scales.

    codes: float32 [3, 64], steps, lowest levels and the inverse of steps.
    """
    GROUPS: tl.constexpr = D // 8
    RUN: tl.constexpr = 4 if GROUPS >= 4 else GROUPS  # codes that share three bytes
    BYTES: tl.constexpr = (6 * GROUPS + 7) // 8
    scale = (_largest(tl.abs(x)) * (1.0 / 127)).to(tl.float16)
    wide = scale.to(tl.float32)
    steps = _finite(x * _inverse(wide)[:, None])
    # Beyond what can be rounded below lies only what a scale of nearly zero gives; levels are clamped all the same.
    steps = tl.minimum(tl.maximum(steps, -4096.0), 4096.0)
    steps = ((steps * 16.0 + ROUND) - ROUND) * 0.0625
    code = tl.arange(0, 64)
    step, lowest, inverse = tl.load(codes + code), tl.load(codes + 64 + code), tl.load(codes + 128 + code)
    groups = tl.reshape(steps, (N, GROUPS, 2, 2, 2))
    error = tl.zeros((N, GROUPS, 64), tl.float32)
    low, high = tl.split(groups)  # even and odd values
    for odd in tl.static_range(2):
        pairs = high if odd else low
        left, right = tl.split(pairs)
        for second in tl.static_range(2):
            one, other = tl.split(right if second else left)
            for third in tl.static_range(2):
                value = other if third else one
                above = value[:, :, None] - lowest[None, None, :]
                level = (above * inverse[None, None, :] + ROUND) - ROUND
                level = tl.minimum(tl.maximum(level, 0.0), 15.0)
                lost = level * step[None, None, :] - above
                error += lost * lost
    best = tl.argmin(error, axis=2)  # [N, GROUPS]
    # Two bytes of the scale, then three bytes for every four codes.
    bits = scale.to(tl.uint16, bitcast=True).to(tl.int32)
    bits = tl.where(tl.abs(wide) < float("inf"), bits, 0x7E00)  # no level would make infinity NaN
    start = scales + row * (2 + BYTES)
    tl.store(start, (bits & 255).to(tl.uint8), mask=mask)
    tl.store(start + 1, (bits >> 8).to(tl.uint8), mask=mask)
    place = tl.arange(0, RUN) * 6
    words = tl.sum(tl.reshape(best, (N, GROUPS // RUN, RUN)) << place[None, None, :], axis=2)  # [N, GROUPS / RUN]
    byte = tl.arange(0, 4)
    at = 3 * tl.arange(0, GROUPS // RUN)[:, None] + byte[None, :]
    inside = (byte[None, :] < 3) & (at < BYTES)
    tl.store(
        start[:, None, None] + 2 + at[None, :, :],
        ((words[:, :, None] >> (8 * byte)[None, None, :]) & 255).to(tl.uint8),
        mask=mask[:, None, None] & inside[None, :, :],
    )
    above = tl.reshape(steps, (N, GROUPS, 8)) - tl.load(codes + 64 + best)[:, :, None]
    level = (above * tl.load(codes + 128 + best)[:, :, None] + ROUND) - ROUND
    level = tl.minimum(tl.maximum(level, 0.0), 15.0).to(tl.int32)
    even, odd_levels = tl.split(tl.reshape(level, (N, D // 2, 2)))
    tl.store(
        data + row[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :],
        (even | odd_levels << 4).to(tl.uint8),
        mask=mask[:, None],
    )


@triton.jit
def _keep(
    source,
    source_token,
    source_head,
    cos,
    sin,
    data,
    scales,
    capacity,
    offset,
    codes,
    program,
    start,
    tokens,
    KV_HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    LOG_D: tl.constexpr,
    NORM: tl.constexpr,
):
    """Rows as the model has them into one of the two halves of a cache."""
    d = tl.arange(0, D)
    row = program * N + tl.arange(0, N)
    mask = row < tokens * KV_HEADS
    token, head = row // KV_HEADS, row % KV_HEADS
    at = token.to(tl.int64) * source_token + head * source_head
    x = tl.load(source + at[:, None] + d[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
    if ROTARY > 0:
        x = narrowed(roped(x, cos, sin, token, mask, N, D, ROTARY), source.dtype.element_ty).to(tl.float32)
    kept = head.to(tl.int64) * capacity + start + token
    if BITS == 16:
        tl.store(data + kept[:, None] * D + d[None, :], narrowed(x, data.dtype.element_ty), mask=mask[:, None])
    else:
        if HAS_OFFSET:
            x -= tl.load(offset + head[:, None] * D + d[None, :], mask=mask[:, None], other=0.0)
        x = turned(x, N, D, LOG_D, NORM)
        if BITS == 8:
            store_8(x, data, scales, kept, mask, N, D, GROUP)
        else:
            store_4(x, data, scales, kept, mask, codes, N, D)


@triton.jit
def _ask(
    query,
    query_token,
    query_head,
    cos,
    sin,
    asked,
    asked_token,
    asked_head,
    query_scales,
    hadamard,
    program,
    tokens,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    TURN: tl.constexpr,
    DOT: tl.constexpr,
    LOG_D: tl.constexpr,
    NORM: tl.constexpr,
):
    """Queries, turned by their positions; where TURN by the Hadamard matrix too, and divided by their largest."""
    d = tl.arange(0, D)
    row = program * N + tl.arange(0, N)
    mask = row < tokens * HEADS
    token, head = row // HEADS, row % HEADS
    at = token.to(tl.int64) * query_token + head * query_head
    x = tl.load(query + at[:, None] + d[None, :], mask=mask[:, None], other=0.0)
    if ROTARY > 0:
        x = narrowed(roped(x, cos, sin, token, mask, N, D, ROTARY), query.dtype.element_ty)
    at = token.to(tl.int64) * asked_token + head * asked_head
    if TURN:
        if DOT:
            signs = narrowed(tl.load(hadamard + d[:, None] * D + d[None, :]).to(tl.float32), x.dtype)
            wide = times(x, signs, tl.zeros((N, D), tl.float32)) * NORM
        else:
            wide = turned(x.to(tl.float32), N, D, LOG_D, NORM)
        largest = tl.max(tl.abs(wide), axis=1)
        largest = tl.where(largest == 0.0, 1.0, largest)
        tl.store(query_scales + row, largest, mask=mask)
        shares = (wide * (1.0 / largest)[:, None]).to(tl.float16)
        tl.store(asked + at[:, None] + d[None, :], shares, mask=mask[:, None])
    else:
        tl.store(asked + at[:, None] + d[None, :], x, mask=mask[:, None])


@triton.jit(do_not_specialize=["start", "tokens", "query_programs", "key_programs"])
def write_rows(
    query,
    query_token,
    query_head,
    asked,
    asked_token,
    asked_head,
    query_scales,
    key,
    key_token,
    key_head,
    value,
    value_token,
    value_head,
    cos,
    sin,
    hadamard,
    codes,
    keys,
    key_scales,
    key_rows,
    offset,
    values,
    value_scales,
    value_rows,
    start,
    tokens,
    query_programs,
    key_programs,
    OVERLAPS: tl.constexpr,
    START_IS_POINTER: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    LOG_D: tl.constexpr,
    NORM: tl.constexpr,
    ROTARY: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    TURN_QUERY: tl.constexpr,
    DOT: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """RoPE of queries and keys (ROTARY > 0), and keys and values into the cache, from `start` on.

    The first `query_programs` take QUERY_ROWS queries each, ordered by token and head; the next `key_programs` take
    ROWS keys each, the rest values. `key_rows`, `value_rows`: rows of a head in the cache.
    """
    let_others_begin(OVERLAPS)
    wait_for_others(OVERLAPS)
    program = tl.program_id(0)
    if program < query_programs:
        _ask(
            query, query_token, query_head, cos, sin, asked, asked_token, asked_head, query_scales, hadamard,
            program, tokens, HEADS, QUERY_ROWS, D, ROTARY, TURN_QUERY, DOT, LOG_D, NORM,
        )  # fmt: skip
    else:
        first = start
        if START_IS_POINTER:
            first = tl.load(start)
        behind = program - query_programs
        if behind < key_programs:
            _keep(
                key, key_token, key_head, cos, sin, keys, key_scales, key_rows, offset, codes, behind, first, tokens,
                KV_HEADS, ROWS, D, ROTARY, KEY_BITS, KEY_GROUP, HAS_OFFSET, LOG_D, NORM,
            )  # fmt: skip
        else:
            _keep(
                value, value_token, value_head, cos, sin, values, value_scales, value_rows, offset, codes,
                behind - key_programs, first, tokens,
                KV_HEADS, ROWS, D, 0, VALUE_BITS, VALUE_GROUP, False, LOG_D, NORM,
            )  # fmt: skip
