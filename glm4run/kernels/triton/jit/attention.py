"""Causal grouped-query attention over the rows of a cache, as floats or as the integers that they are kept as.

A program has the rows of a block of tokens times the query heads that share a KV head, and takes blocks of positions
one after the other with a running maximum (arXiv 2112.05682, 2205.14135). Rows of integers go into the matrix units
as integers, which 16 bits hold exactly; a position's scale multiplies its scores, or its weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glm4run.kernels.triton.jit import INTERPRETED
from glm4run.kernels.triton.jit.cache import bound, narrowed, times
from glm4run.kernels.triton.jit.order import let_others_begin, wait_for_others

MANY_SPLITS = tl.constexpr(64)


@triton.jit
def _stretch(visible, split, splits, BLOCK_N: tl.constexpr):
    """Positions of one split, and how many splits have any.

    A split of one block costs more than it saves where there are many: what it found must be written and read again.
    Then it is half of them, one program a multiprocessor instead of two.
    """
    blocks = tl.cdiv(visible, BLOCK_N)
    wanted = tl.where((splits >= MANY_SPLITS) & (blocks < 2 * splits), splits // 2, splits)
    used = tl.minimum(blocks, wanted)
    return split * blocks // used * BLOCK_N, tl.minimum((split + 1) * blocks // used * BLOCK_N, visible), used


# Of four int8 x the bytes x + 128, behind 0x64 each: 1024 + 128 + x as float16, less 1152.
HALVES_OF_BYTES = tl.constexpr("""
{
    .reg .b32 shifted, pair, less;
    xor.b32 shifted, $2, 0x80808080;
    mov.b32 less, 0x64806480;
    prmt.b32 pair, shifted, 0x64646464, 0x4140;
    sub.f16x2 $0, pair, less;
    prmt.b32 pair, shifted, 0x64646464, 0x4342;
    sub.f16x2 $1, pair, less;
}
""")

# The same as bf16: 128 and the low seven bits, less 128, or 256 where the sign is set.
BRAINS_OF_BYTES = tl.constexpr("""
{
    .reg .b32 pair, low, sign, minus;
    mov.b32 minus, 0xBF80BF80;
    prmt.b32 pair, $2, 0x43434343, 0x4140;
    and.b32 low, pair, 0xFF7FFF7F;
    and.b32 sign, pair, 0xFF80FF80;
    fma.rn.bf16x2 $0, sign, minus, low;
    prmt.b32 pair, $2, 0x43434343, 0x4342;
    and.b32 low, pair, 0xFF7FFF7F;
    and.b32 sign, pair, 0xFF80FF80;
    fma.rn.bf16x2 $1, sign, minus, low;
}
""")


# Into L2, where $2 is not zero.
PREFETCH_LINE = tl.constexpr("""
{
    .reg .pred wanted;
    setp.ne.u32 wanted, $2, 0;
    @wanted prefetch.global.L2 [$1];
    mov.u32 $0, 0;
}
""")


@triton.jit
def _prefetch(rows, begin, end, ROWS: tl.constexpr, ROW_BYTES: tl.constexpr):
    """Asks for rows begin .. end - 1, at most the first ROWS of them; rows: a head's first."""
    LINE: tl.constexpr = 128
    byte = tl.arange(0, ROWS * ROW_BYTES // LINE) * LINE
    wanted = (byte < (end - begin) * ROW_BYTES).to(tl.int32)
    at = rows.to(tl.int64) + begin.to(tl.int64) * ROW_BYTES + byte
    tl.inline_asm_elementwise(PREFETCH_LINE, "=r,l,r", [at, wanted], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _integers(x, dtype: tl.constexpr):
    """Int8 to floats of 16 bits, which hold them exactly."""
    if INTERPRETED:
        y = x.to(tl.float32).to(dtype)
    elif dtype == tl.float16:
        y = tl.inline_asm_elementwise(HALVES_OF_BYTES, "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4)
    else:
        # Not pure, so that it happens where whole rows lie in registers, four bytes together: a column's are apart.
        y = tl.inline_asm_elementwise(BRAINS_OF_BYTES, "=r,=r,r", [x], dtype=tl.bfloat16, is_pure=False, pack=4)
    return y


@triton.jit
def _half(low, high):
    """Two bytes as a float16, in float32."""
    return (low.to(tl.uint16) | (high.to(tl.uint16) << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _nibble(words, step, lowest, i: tl.constexpr):
    """lowest + step * u of the i-th nibble u: whole numbers, in float32."""
    return ((words >> (4 * i)) & 15).to(tl.float32) * step + lowest


# Of a word of eight nibbles u, a code, and the table of steps and lowest levels of 16 bits, lowest + step * u, in pairs
# of neighbours: behind the bits of 1024 (float16) or 128 (bf16) a nibble is that much more. The table is looked up in
# here because a load of Triton's own would want another layout than the words have.
PAIRS_OF_NIBBLES = """
{
    .reg .b64 at;
    .reg .b32 odd, step, lowest, pair, one, less;
    mad.wide.u32 at, $5, 4, $6;
    ld.global.nc.b32 pair, [at];
    shr.u32 odd, $4, 4;
    prmt.b32 step, pair, 0, 0x1010;
    prmt.b32 lowest, pair, 0, 0x3232;
    mov.b32 one, ONE;
    mov.b32 less, LESS;
    prmt.b32 pair, $4, odd, 0x4400;
    lop3.b32 pair, pair, 0x000F000F, BITS, 0xEA;
    fma.rn.TYPE pair, pair, one, less;
    fma.rn.TYPE $0, pair, step, lowest;
    prmt.b32 pair, $4, odd, 0x5511;
    lop3.b32 pair, pair, 0x000F000F, BITS, 0xEA;
    fma.rn.TYPE pair, pair, one, less;
    fma.rn.TYPE $1, pair, step, lowest;
    prmt.b32 pair, $4, odd, 0x6622;
    lop3.b32 pair, pair, 0x000F000F, BITS, 0xEA;
    fma.rn.TYPE pair, pair, one, less;
    fma.rn.TYPE $2, pair, step, lowest;
    prmt.b32 pair, $4, odd, 0x7733;
    lop3.b32 pair, pair, 0x000F000F, BITS, 0xEA;
    fma.rn.TYPE pair, pair, one, less;
    fma.rn.TYPE $3, pair, step, lowest;
}
"""


def _pairs_of_nibbles(kind: str, one: str, less: str, bits: str) -> str:
    """Of f16x2 or bf16x2; the others are in every half: 1, what the bits are less than 0, and the bits."""
    named = {"TYPE": kind, "ONE": one, "LESS": less, "BITS": bits}
    text = PAIRS_OF_NIBBLES
    for name, value in named.items():
        text = text.replace(name, value)
    return text


HALVES_OF_NIBBLES = tl.constexpr(_pairs_of_nibbles("f16x2", "0x3C003C00", "0xE400E400", "0x64006400"))
BRAINS_OF_NIBBLES = tl.constexpr(_pairs_of_nibbles("bf16x2", "0x3F803F80", "0xC300C300", "0x43004300"))


@triton.jit
def _codes_4(scales, begin, visible, N: tl.constexpr, D: tl.constexpr):
    """Of rows of 4 bits the codes, four of 6 bits in an int32 [N, D / 32], and the scale [N]."""
    GROUPS: tl.constexpr = D // 8
    RUN: tl.constexpr = 4 if GROUPS >= 4 else GROUPS
    RUNS: tl.constexpr = GROUPS // RUN
    WIDTH: tl.constexpr = 2 + (6 * GROUPS + 7) // 8
    at = begin + tl.arange(0, N)
    if WIDTH % 2 == 0:
        halves = scales.to(tl.pointer_type(tl.float16)) + at * (WIDTH // 2)
        scale = tl.load(halves, mask=at < visible, other=0.0).to(tl.float32)
    else:
        row = scales + at * WIDTH
        scale = _half(tl.load(row, mask=at < visible, other=0), tl.load(row + 1, mask=at < visible, other=0))
    # As one run, so that neighbours of a row are a thread's, or its neighbours'.
    run = tl.arange(0, N * RUNS)
    at = begin + run // RUNS
    place = scales + at * WIDTH + 2 + 3 * (run % RUNS)
    packed = tl.load(place, mask=at < visible, other=0).to(tl.int32)
    packed |= tl.load(place + 1, mask=at < visible, other=0).to(tl.int32) << 8
    if RUN == 4:
        packed |= tl.load(place + 2, mask=at < visible, other=0).to(tl.int32) << 16
    return tl.reshape(packed, (N, RUNS)), scale


@triton.jit
def _rows_4(
    data, packed, codes, at, valid, N: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, dtype: tl.constexpr
):
    """Rows of 4 bits as whole numbers [N, D]. data: words of a group of eight; packed: of `_codes_4`.

    codes: int32 [2, 64], a code's step and lowest level, as two float16, and as two bf16.
    """
    GROUPS: tl.constexpr = D // 8
    words_at = data + at[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    words = tl.load(words_at, mask=valid[:, None], other=0) if MASKED else tl.load(words_at)
    if GROUPS >= 4:
        code = tl.join(tl.join(packed & 63, (packed >> 12) & 63), tl.join((packed >> 6) & 63, (packed >> 18) & 63))
    else:
        code = tl.join(packed & 63, (packed >> 6) & 63)
    code = tl.reshape(code, (N, GROUPS))
    # What is joined comes so that value i of a group is the i-th.
    if INTERPRETED:
        pair = tl.load(codes + code)
        step = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        lowest = ((pair >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        even = tl.join(
            tl.join(_nibble(words, step, lowest, 0), _nibble(words, step, lowest, 4)),
            tl.join(_nibble(words, step, lowest, 2), _nibble(words, step, lowest, 6)),
        )
        odd = tl.join(
            tl.join(_nibble(words, step, lowest, 1), _nibble(words, step, lowest, 5)),
            tl.join(_nibble(words, step, lowest, 3), _nibble(words, step, lowest, 7)),
        )
        x = tl.reshape(tl.join(even, odd), (N, D)).to(dtype)
    else:
        if dtype == tl.float16:
            first, second, third, fourth = tl.inline_asm_elementwise(
                HALVES_OF_NIBBLES, "=r,=r,=r,=r,r,r,l", [words, code, codes.to(tl.int64)],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
            )  # fmt: skip
        else:
            first, second, third, fourth = tl.inline_asm_elementwise(
                BRAINS_OF_NIBBLES, "=r,=r,=r,=r,r,r,l", [words, code, (codes + 64).to(tl.int64)],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
            )  # fmt: skip
        pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
        bits = tl.join((pairs & 0xFFFF).to(tl.uint16), ((pairs >> 16) & 0xFFFF).to(tl.uint16))
        x = tl.reshape(bits, (N, D)).to(dtype, bitcast=True)
    return x


@triton.jit
def _rows_8(data, scales, at, valid, N: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, MASKED: tl.constexpr,
            dtype: tl.constexpr):  # fmt: skip
    """Rows of 8 bits [N, D], whole numbers where a row has one scale, and the (largest) scale of each [N]."""
    d = tl.arange(0, D)
    if MASKED:
        x = tl.load(data + at[:, None] * D + d[None, :], mask=valid[:, None], other=0)
    else:
        x = tl.load(data + at[:, None] * D + d[None, :])
    if GROUPS == 1:
        if MASKED:
            scale = tl.load(scales + at, mask=valid, other=0.0).to(tl.float32)
        else:
            scale = tl.load(scales + at).to(tl.float32)
        return _integers(x, dtype), scale
    groups = tl.load(scales + at[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :], mask=valid[:, None], other=0.0).to(
        tl.float32
    )
    largest = tl.max(groups, axis=1)
    share = tl.where(groups == 0.0, 0.0, groups / largest[:, None])  # of what is not finite: NaN
    wide = tl.reshape(x.to(tl.float32), (N, GROUPS, D // GROUPS)) * share[:, :, None]
    return narrowed(tl.reshape(wide, (N, D)), dtype), largest


@triton.jit
def _rows_16(data, at, valid, D: tl.constexpr, MASKED: tl.constexpr):
    d = tl.arange(0, D)
    if MASKED:
        return tl.load(data + at[:, None] * D + d[None, :], mask=valid[:, None], other=0.0)
    return tl.load(data + at[:, None] * D + d[None, :])


@triton.jit
def _blocks(
    acc,
    top,
    total,
    q,
    factor,
    limit,
    first,
    last,
    visible,
    keys,
    key_scales,
    values,
    value_scales,
    codes,
    D: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Positions first .. last - 1, in whole blocks but for the end of the context, where MASKED.

    top: the largest score so far, to be multiplied by `factor` as every score.
    """
    if KEY_BITS == 4:  # a block ahead: nothing that is so narrow goes through shared memory by itself
        key_codes, key_scale = _codes_4(key_scales, first, visible, BLOCK_N, D)
    if VALUE_BITS == 4:
        value_codes, value_scale = _codes_4(value_scales, first, visible, BLOCK_N, D)
    for begin in tl.range(bound(first), bound(last), BLOCK_N):
        at = begin + tl.arange(0, BLOCK_N)
        valid = at < visible
        empty = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if KEY_BITS == 16:
            scores = times(q, tl.trans(_rows_16(keys, at, valid, D, MASKED)), empty)
        else:
            if KEY_BITS == 8:
                k, scale = _rows_8(keys, key_scales, at, valid, BLOCK_N, D, KEY_GROUPS, MASKED, tl.float16)
            else:
                scale = key_scale
                k = _rows_4(keys, key_codes, codes, at, valid, BLOCK_N, D, MASKED, tl.float16)
                key_codes, key_scale = _codes_4(key_scales, begin + BLOCK_N, visible, BLOCK_N, D)
            scores = times(q, tl.trans(k), empty) * scale[None, :]
        if MASKED:
            scores = tl.where(at[None, :] <= limit[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        shift = new_top * factor
        if MASKED:  # a row may see nothing of this block, and of none before
            shift = tl.where(new_top == float("-inf"), 0.0, shift)
        weights = tl.exp2(scores * factor[:, None] - shift[:, None])
        fade = tl.exp2(top * factor - shift)
        total = total * fade + tl.sum(weights, axis=1)
        acc = acc * fade[:, None]
        if VALUE_BITS == 16:
            v = _rows_16(values, at, valid, D, MASKED)
        else:
            if VALUE_BITS == 8:
                v, scale = _rows_8(values, value_scales, at, valid, BLOCK_N, D, VALUE_GROUPS, MASKED, tl.bfloat16)
            else:
                scale = value_scale
                v = _rows_4(values, value_codes, codes, at, valid, BLOCK_N, D, MASKED, tl.bfloat16)
                value_codes, value_scale = _codes_4(value_scales, begin + BLOCK_N, visible, BLOCK_N, D)
            weights = weights * scale[None, :]
        acc = times(narrowed(weights, v.dtype), v, acc)
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["start", "tokens", "splits"])
def attend_rows(
    query,
    query_token,
    query_head,
    query_scales,
    keys,
    key_scales,
    key_rows,
    values,
    value_scales,
    value_rows,
    codes,
    hadamard,
    start,
    tokens,
    splits,
    out,
    partial,
    partial_sums,
    factor,
    OVERLAPS: tl.constexpr,
    START_IS_POINTER: tl.constexpr,
    SPLIT: tl.constexpr,
    KV_HEADS: tl.constexpr,
    REPEAT: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Grid: blocks of rows, the last tokens first; KV heads; splits of the context.

    query: as the keys are, or float16 where they are quantized, and then turned, with `query_scales` [T, H]. factor:
    log2(e) / sqrt(D). key_rows, value_rows: rows of a head; *_WIDTH: bytes of a row's scales (4 bits) or how many
    (8 bits). Without SPLIT the result goes to out [T, H * D]; with it sums, not divided yet, go to partial float32
    [splits, T * H, D], and each row's maximum (of base 2) and weight to partial_sums float32 [2, splits, T * H].
    PREFETCH: rows of a split that are asked for before the kernels before this one have ended.
    """
    HEADS: tl.constexpr = KV_HEADS * REPEAT
    let_others_begin(OVERLAPS)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    KEY_BYTES: tl.constexpr = (
        D * KEY_BITS // 8 if KEY_BITS < 16 else D * (keys.dtype.element_ty.primitive_bitwidth // 8)
    )
    VALUE_BYTES: tl.constexpr = (
        D * VALUE_BITS // 8 if VALUE_BITS < 16 else D * (values.dtype.element_ty.primitive_bitwidth // 8)
    )
    if PREFETCH > 0:
        # Rows of earlier steps are there already: they come while others end. A position that is not up to date yet
        # would only ask for other rows than are needed.
        earlier = start
        if START_IS_POINTER:
            earlier = tl.load(start)
        earlier = tl.minimum(tl.maximum(earlier, 1), tl.minimum(key_rows, value_rows))
        begin, end, used = _stretch(earlier, split, splits, BLOCK_N)
        if split < used:
            _prefetch(
                keys + kv_head.to(tl.int64) * key_rows * (D // 8 if KEY_BITS == 4 else D),
                begin, end, PREFETCH, KEY_BYTES,
            )  # fmt: skip
            _prefetch(
                values + kv_head.to(tl.int64) * value_rows * (D // 8 if VALUE_BITS == 4 else D),
                begin, end, PREFETCH, VALUE_BYTES,
            )  # fmt: skip
    wait_for_others(OVERLAPS)
    first_position = start
    if START_IS_POINTER:
        first_position = tl.load(start)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < tokens * REPEAT
    token = tl.minimum(row // REPEAT, tokens - 1)
    head = kv_head * REPEAT + row % REPEAT
    limit = first_position + token
    visible = first_position + tl.minimum((block * BLOCK_M + BLOCK_M - 1) // REPEAT + 1, tokens)
    begin, end, used = _stretch(visible, split, splits, BLOCK_N)
    if split >= used:
        return
    d = tl.arange(0, D)
    q = tl.load(
        query + (token.to(tl.int64) * query_token + head * query_head)[:, None] + d[None, :],
        mask=inside[:, None],
        other=0.0,
    )
    scale = tl.full((BLOCK_M,), 1.0, tl.float32) * factor
    if KEY_BITS != 16:
        scale *= tl.load(query_scales + token * HEADS + head, mask=inside, other=0.0)
        key_scales += kv_head.to(tl.int64) * key_rows * KEY_WIDTH
    if VALUE_BITS != 16:
        value_scales += kv_head.to(tl.int64) * value_rows * VALUE_WIDTH
    keys += kv_head.to(tl.int64) * key_rows * (D // 8 if KEY_BITS == 4 else D)
    values += kv_head.to(tl.int64) * value_rows * (D // 8 if VALUE_BITS == 4 else D)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # All rows see the blocks that end before the first one's own position.
    seen_by_all = (first_position + block * BLOCK_M // REPEAT + 1) // BLOCK_N * BLOCK_N
    middle = tl.maximum(tl.minimum(end // BLOCK_N * BLOCK_N, seen_by_all), begin)
    acc, top, total = _blocks(
        acc, top, total, q, scale, limit, begin, middle, visible, keys, key_scales, values, value_scales, codes,
        D, KEY_BITS, VALUE_BITS, KEY_GROUPS, VALUE_GROUPS, BLOCK_M, BLOCK_N, False,
    )  # fmt: skip
    acc, top, total = _blocks(
        acc, top, total, q, scale, limit, middle, end, visible, keys, key_scales, values, value_scales, codes,
        D, KEY_BITS, VALUE_BITS, KEY_GROUPS, VALUE_GROUPS, BLOCK_M, BLOCK_N, True,
    )  # fmt: skip
    at = token.to(tl.int64) * HEADS + head
    if SPLIT:
        at += split.to(tl.int64) * tokens * HEADS
        tl.store(partial + at[:, None] * D + d[None, :], acc, mask=inside[:, None])
        tl.store(partial_sums + at, top * scale, mask=inside)
        tl.store(partial_sums + splits.to(tl.int64) * tokens * HEADS + at, total, mask=inside)
    else:
        acc = acc / total[:, None]
        if VALUE_BITS != 16:  # turned back: two terms of bf16 are the value up to 2**-17 of it
            signs = tl.load(hadamard + d[:, None] * D + d[None, :])
            high = narrowed(acc, tl.bfloat16)
            low = narrowed(acc - high.to(tl.float32), tl.bfloat16)
            acc = times(low, signs, times(high, signs, tl.zeros((BLOCK_M, D), tl.float32))) * NORM
        tl.store(out + at[:, None] * D + d[None, :], narrowed(acc, out.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["start", "tokens", "splits"])
def combine(
    partial,
    partial_sums,
    out,
    hadamard,
    start,
    tokens,
    splits,
    START_IS_POINTER: tl.constexpr,
    KV_HEADS: tl.constexpr,
    REPEAT: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MOST: tl.constexpr,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """What the splits of `attend_rows` found, to PART values of a row of out a program; grid: rows, parts of D.

    MOST: a power of two from `splits` on, of which CHUNK are read at once.
    """
    HEADS: tl.constexpr = KV_HEADS * REPEAT
    let_others_begin(OVERLAPS)
    row = tl.program_id(0)
    d = tl.program_id(1) * PART + tl.arange(0, PART)
    if TURNED:  # PART is D: a constant may be read before the sums are there
        other = tl.arange(0, D)
        signs = tl.load(hadamard + d[:, None] * D + other[None, :])
    wait_for_others(OVERLAPS)
    token = row // HEADS
    first_position = start
    if START_IS_POINTER:
        first_position = tl.load(start)
    block = (token * REPEAT + row % REPEAT) // BLOCK_M
    visible = first_position + tl.minimum((block * BLOCK_M + BLOCK_M - 1) // REPEAT + 1, tokens)
    _, _, used = _stretch(visible, 0, splits, BLOCK_N)
    rows = tokens * HEADS
    split = tl.arange(0, MOST)
    some = tl.arange(0, CHUNK)
    at = some.to(tl.int64) * rows + row
    found = tl.load(partial + at[:, None] * D + d[None, :], mask=(some < used)[:, None], other=0.0)
    own_tops = tl.load(partial_sums + at, mask=some < used, other=float("-inf"))
    tops = tl.load(partial_sums + split.to(tl.int64) * rows + row, mask=split < used, other=float("-inf"))
    totals = tl.load(partial_sums + (splits + split).to(tl.int64) * rows + row, mask=split < used, other=0.0)
    top = tl.max(tops, axis=0)
    total = tl.sum(tl.exp2(tops - top) * totals, axis=0)
    acc = found * tl.where(some < used, tl.exp2(own_tops - top), 0.0)[:, None]
    for first in range(CHUNK, bound(used), CHUNK):
        more = first + tl.arange(0, CHUNK)
        at = more.to(tl.int64) * rows + row
        weight = tl.exp2(tl.load(partial_sums + at, mask=more < used, other=float("-inf")) - top)
        found = tl.load(partial + at[:, None] * D + d[None, :], mask=(more < used)[:, None], other=0.0)
        acc += found * tl.where(more < used, weight, 0.0)[:, None]
    result = tl.sum(acc, axis=0) / total
    if TURNED:
        result = tl.sum(signs.to(tl.float32) * result[:, None], axis=0) * NORM
        d = other
    tl.store(out + row.to(tl.int64) * D + d, narrowed(result, out.dtype.element_ty))
