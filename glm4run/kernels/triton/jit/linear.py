"""Products with packed weights, in Triton's language.

A word of 32 bits holds 8 values of 4 bits or 4 of 8, lowest k in the lowest bits, stored as u = q + 2^(b-1)
(`qformat`). With everything else masked away, the bits of one value are a float32 as they stand: for a value at bit p,
p + b <= 24, the subnormal number u * 2^(p - 149) (bit 23 is the exponent's lowest, where floats go on being even).
So a value costs one AND, and the power of two goes to the activations, where it is exact. Only what lies above bit 23
is shifted. Subnormal operands are as fast as others on a GPU.
"""

import triton
import triton.language as tl

from glm4run.kernels.triton.jit import INTERPRETED
from glm4run.kernels.triton.jit.order import let_others_begin, wait_for_others

# Activations times 2^(LIFT - p) by words' floats are products times 2^(LIFT - 149). Activations may be up to 2^32.
LIFT = tl.constexpr(96)
DROP = tl.constexpr(2.0 ** (96 - 149))
RAISE = tl.constexpr(2.0 ** (149 - 96))


@triton.jit
def _bits(word, mask: tl.constexpr):
    """The values under the mask as float32: u * 2^(p - 149)."""
    return (word & mask).to(tl.float32, bitcast=True)


@triton.jit
def _split4(x, D0: tl.constexpr, D1: tl.constexpr):
    """x [D0 * D1, 4] to its four [D0, D1]."""
    even, odd = tl.split(tl.reshape(x, (D0, D1, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _split8(x, D0: tl.constexpr, D1: tl.constexpr):
    """x [D0 * D1, 8] to its eight [D0, D1]."""
    even, odd = tl.split(tl.reshape(x, (D0, D1, 2, 2, 2)))
    even0, even1 = tl.split(even)
    odd0, odd1 = tl.split(odd)
    x0, x4 = tl.split(even0)
    x2, x6 = tl.split(even1)
    x1, x5 = tl.split(odd0)
    x3, x7 = tl.split(odd1)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _scaled(x, p: tl.constexpr):
    """x [MB, B] as it meets the values at bit p: [MB, 1, B]."""
    return (x * 2.0 ** (LIFT - p))[:, None, :]


@triton.jit
def _meet_word4(word, x_at, mask, part, total, MB: tl.constexpr, B: tl.constexpr):
    """Adds a word's eight values u [ROWS, B] times x to part [MB, ROWS, B], and x to total [MB, B]."""
    word = word[None, :, :]
    upper = word >> 8
    # A thread's x in as few loads as there can be: of 16 bytes each.
    if x_at.dtype.element_ty.primitive_bitwidth == 16:
        eight = tl.load(x_at + tl.arange(0, 8)[None, :], mask=mask, other=0.0).to(tl.float32)
        x0, x1, x2, x3, x4, x5, x6, x7 = _split8(eight, MB, B)
    else:
        low = tl.load(x_at + tl.arange(0, 4)[None, :], mask=mask, other=0.0).to(tl.float32)
        high = tl.load(x_at + 4 + tl.arange(0, 4)[None, :], mask=mask, other=0.0).to(tl.float32)
        x0, x1, x2, x3 = _split4(low, MB, B)
        x4, x5, x6, x7 = _split4(high, MB, B)
    total += ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7))
    part += _scaled(x0, 0) * _bits(word, 0xF)
    part += _scaled(x1, 4) * _bits(word, 0xF0)
    part += _scaled(x2, 8) * _bits(word, 0xF00)
    part += _scaled(x3, 12) * _bits(word, 0xF000)
    part += _scaled(x4, 16) * _bits(word, 0xF0000)
    part += _scaled(x5, 20) * _bits(word, 0xF00000)
    part += _scaled(x6, 16) * _bits(upper, 0xF0000)
    part += _scaled(x7, 20) * _bits(upper, 0xF00000)
    return part, total


@triton.jit
def _meet_word8(word, x_at, mask, part, total, MB: tl.constexpr, B: tl.constexpr):
    """The same of a word's four values of 8 bits."""
    word = word[None, :, :]
    four = tl.load(x_at + tl.arange(0, 4)[None, :], mask=mask, other=0.0).to(tl.float32)
    x0, x1, x2, x3 = _split4(four, MB, B)
    total += (x0 + x1) + (x2 + x3)
    part += _scaled(x0, 0) * _bits(word, 0xFF)
    part += _scaled(x1, 8) * _bits(word, 0xFF00)
    part += _scaled(x2, 16) * _bits(word, 0xFF0000)
    part += _scaled(x3, 16) * _bits(word >> 8, 0xFF0000)
    return part, total


@triton.jit
def _zero_point(zeros, rows, groups, G, BITS: tl.constexpr):
    """Stored zero points, packed along N: `rows` and `groups` broadcast to the result's shape."""
    word = tl.load(zeros + (rows * BITS // 32) * G + groups)
    return ((word >> (rows * BITS % 32)) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _own_weight(
    packed0, scales0, zeros0, bias0, out0, N0, stride0,
    packed1, scales1, zeros1, bias1, out1, N1, stride1,
    packed2, scales2, zeros2, bias2, out2, N2, stride2,
    end0, end1, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The weight that a program multiplies by, and its number among the programs of that weight."""
    program = tl.program_id(0)
    packed = packed0
    scales = scales0
    zeros = zeros0 if HAS_ZEROS else packed0  # something that can be returned
    bias = bias0 if HAS_BIAS else out0
    out = out0
    N = N0
    out_stride = stride0
    if PARTS > 1:  # noqa: SIM102 (decided when compiled)
        if program >= end0:
            program -= end0
            packed = packed1
            scales = scales1
            out = out1
            N = N1
            out_stride = stride1
            if HAS_ZEROS:
                zeros = zeros1
            if HAS_BIAS:
                bias = bias1
            if PARTS > 2:  # noqa: SIM102 (decided when compiled)
                if program >= end1 - end0:
                    program -= end1 - end0
                    packed = packed2
                    scales = scales2
                    out = out2
                    N = N2
                    out_stride = stride2
                    if HAS_ZEROS:
                        zeros = zeros2
                    if HAS_BIAS:
                        bias = bias2
    return program, packed, scales, zeros, bias, out, N, out_stride


# Sizes are never made constants: a size of 1 would be one, and the weights of a launch differ in theirs.
SIZES = ["N0", "N1", "N2", "stride0", "stride1", "stride2", "M", "end0", "end1"]


@triton.jit(do_not_specialize=SIZES)
def multiply_rows(
    x,  # [M, K], rows x_stride apart
    packed0,  # int32 [N, W]
    scales0,  # [N, G]
    zeros0,  # int32 [N * BITS / 32, G], or None
    bias0,  # [N], or None
    out0,  # [M, N], rows stride0 apart
    N0,
    stride0,
    packed1,
    scales1,
    zeros1,
    bias1,
    out1,
    N1,
    stride1,
    packed2,
    scales2,
    zeros2,
    bias2,
    out2,
    N2,
    stride2,
    x_stride,
    M,
    end0,  # the first program of the second weight
    end1,
    W: tl.constexpr,
    BITS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,  # words of a group, W where a row is one
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
    MB: tl.constexpr,
    ROWS: tl.constexpr,
    B: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Few rows of x by up to three weights. A program has ROWS rows of one weight, B blocks of four words a step.

    A block is of one group, and one load of a thread. The next step's words and scales are under way meanwhile.

    Everything is float32 and x stays what it is. The stored u are summed as they are; what they have too much, zero
    point times sum of x, is taken off beforehand, once for all rows.
    """
    program, packed, scales, zeros, bias, out, N, out_stride = _own_weight(
        packed0, scales0, zeros0, bias0, out0, N0, stride0,
        packed1, scales1, zeros1, bias1, out1, N1, stride1,
        packed2, scales2, zeros2, bias2, out2, N2, stride2,
        end0, end1, HAS_ZEROS, HAS_BIAS, PARTS,
    )  # fmt: skip
    G: tl.constexpr = W // GROUP_WORDS
    VALUES: tl.constexpr = 32 // BITS  # in a word
    # The last step begins where the row's last B blocks do: what was multiplied before meets zeros.
    STEPS: tl.constexpr = (W // 4 + B - 1) // B
    LAST: tl.constexpr = W // 4 - B
    let_others_begin(OVERLAPS)
    # Indices are flat: a layout of one dimension leaves no choice, so that a thread loads the words, scales and
    # activations that it needs, and nothing is exchanged before the sums are.
    flat = tl.arange(0, ROWS * B)
    columns = flat % B
    rows = tl.minimum(program * ROWS + flat // B, N - 1)
    x_flat = tl.arange(0, MB * B)
    x_columns = x_flat % B
    x_at = x + (x_flat // B * x_stride + x_columns * (4 * VALUES))[:, None]
    token_mask = x_flat // B < M
    words_at = packed + (rows * W + columns * 4)[:, None] + tl.arange(0, 4)[None, :]
    scale_at = scales + rows * G
    next_words = tl.load(words_at, cache_modifier=".cg")
    next_scale = tl.load(scale_at + columns * 4 // GROUP_WORDS)
    wait_for_others(OVERLAPS)  # the weights were there before; x may just be made
    scale = next_scale.to(tl.float32)
    acc = tl.zeros((MB, ROWS, B), tl.float32)
    for step in tl.range(0, STEPS, loop_unroll_factor=UNROLL):
        word0, word1, word2, word3 = _split4(next_words, ROWS, B)
        start = tl.minimum(step * B, LAST)
        ahead = tl.minimum((step + 1) * B, LAST)
        follows = tl.full((ROWS * B,), step + 1, tl.int32) < STEPS
        next_words = tl.load(words_at + ahead * 4, mask=follows[:, None], other=0, cache_modifier=".cg")
        next_scale = tl.load(scale_at + (ahead + columns) * 4 // GROUP_WORDS, mask=follows, other=0.0)
        mask = token_mask
        if (W // 4) % B != 0:
            mask = mask & (start + x_columns >= step * B)
        mask = mask[:, None]
        here = x_at + start * (4 * VALUES)
        part = tl.zeros((MB, ROWS, B), tl.float32)
        total = tl.zeros((MB, B), tl.float32)
        if BITS == 4:
            part, total = _meet_word4(word0, here, mask, part, total, MB, B)
            part, total = _meet_word4(word1, here + 8, mask, part, total, MB, B)
            part, total = _meet_word4(word2, here + 16, mask, part, total, MB, B)
            part, total = _meet_word4(word3, here + 24, mask, part, total, MB, B)
        else:
            part, total = _meet_word8(word0, here, mask, part, total, MB, B)
            part, total = _meet_word8(word1, here + 4, mask, part, total, MB, B)
            part, total = _meet_word8(word2, here + 8, mask, part, total, MB, B)
            part, total = _meet_word8(word3, here + 12, mask, part, total, MB, B)
        total = (total * DROP)[:, None, :]
        if HAS_ZEROS:
            zero = _zero_point(zeros, rows, (start + columns) * 4 // GROUP_WORDS, G, BITS)
            part -= tl.reshape(zero, (ROWS, B))[None, :, :] * total
        else:
            part -= total * (1 << (BITS - 1))
        acc += part * tl.reshape(scale, (ROWS, B))[None, :, :]
        scale = next_scale.to(tl.float32)
    y = tl.sum(acc, axis=2) * RAISE  # [MB, ROWS]
    all_rows = program * ROWS + tl.arange(0, ROWS)
    tokens = tl.arange(0, MB)
    row_mask = all_rows < N
    if HAS_BIAS:
        y += tl.load(bias + all_rows, mask=row_mask, other=0.0).to(tl.float32)[None, :]
    out_at = out + tokens[:, None] * out_stride + all_rows[None, :]
    tl.store(out_at, y.to(out.dtype.element_ty), mask=(tokens < M)[:, None] & row_mask[None, :])


@triton.jit
def _meet(byte, mask: tl.constexpr, p: tl.constexpr, zero, x, acc, DTYPE: tl.constexpr):
    """Adds the products of the values u [BN, BB] under the mask, at bit p, with x [BM, BB]: of u - zero, exact.

    In bf16, which has float32's range, the power of two that is left goes to x and saves an instruction a weight.
    Everything here is a function of loads and constants: so the compiler loads bytes as the tensor cores want their
    operands, and no weight goes through shared memory a second time.
    """
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        values = (_bits(byte, mask) * 2.0**127 - zero * 2.0 ** (p - 22)).to(DTYPE)
        x = (x.to(tl.float32) * 2.0 ** (22 - p)).to(DTYPE)
    else:
        values = (_bits(byte, mask) * 2.0**100 * 2.0 ** (49 - p) - zero).to(DTYPE)
    if INTERPRETED:  # it multiplies the bits of bf16 as if they were integers
        x, values = x.to(tl.float32), values.to(tl.float32)
    return tl.dot(x, tl.trans(values), acc, input_precision="ieee")


@triton.jit
def _scales_ahead(scale_at, byte, WB: tl.constexpr, GROUP_BYTES: tl.constexpr):
    """Scales of the group that a byte of the row is of, or of the last where it is past the row."""
    return tl.load(scale_at + tl.minimum(byte, WB - 1) // GROUP_BYTES)


@triton.jit(do_not_specialize=SIZES)
def multiply_tiles(
    x,
    packed0,
    scales0,
    zeros0,
    bias0,
    out0,
    N0,
    stride0,
    packed1,
    scales1,
    zeros1,
    bias1,
    out1,
    N1,
    stride1,
    packed2,
    scales2,
    zeros2,
    bias2,
    out2,
    N2,
    stride2,
    x_stride,
    M,
    end0,
    end1,
    W: tl.constexpr,
    BITS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BYTES: tl.constexpr,
):
    """More rows of x by up to three weights: a program has BM rows of x and BN of one weight.

    The values less their zero point are exact in x's dtype, and meet x in the tensor cores. A group's sum is scaled in
    float32. Arguments as of `multiply_rows`, but `packed` as bytes; BYTES are those of a row and step.
    """
    program, packed, scales, zeros, bias, out, N, out_stride = _own_weight(
        packed0, scales0, zeros0, bias0, out0, N0, stride0,
        packed1, scales1, zeros1, bias1, out1, N1, stride1,
        packed2, scales2, zeros2, bias2, out2, N2, stride2,
        end0, end1, HAS_ZEROS, HAS_BIAS, PARTS,
    )  # fmt: skip
    let_others_begin(OVERLAPS)
    wait_for_others(OVERLAPS)
    VALUES: tl.constexpr = 8 // BITS  # in a byte
    WB: tl.constexpr = 4 * W
    GROUP_BYTES: tl.constexpr = 4 * GROUP_WORDS
    BB: tl.constexpr = BYTES if GROUP_BYTES % BYTES == 0 or GROUP_WORDS == W else GROUP_BYTES  # of one group
    INNER: tl.constexpr = BYTES // BB
    G: tl.constexpr = W // GROUP_WORDS
    DTYPE: tl.constexpr = x.dtype.element_ty
    all_rows = program * BN + tl.arange(0, BN)
    rows = tl.minimum(all_rows, N - 1)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.arange(0, BB)
    ks = tl.arange(0, BB * VALUES)
    x_at = x + tl.minimum(tokens, M - 1)[:, None] * x_stride + ks[None, :]
    byte_at = packed + (rows * WB)[:, None] + columns[None, :]
    scale_at = scales + rows * G
    # Scales come a step ahead: nothing waits for them. At most four groups are in a step.
    ahead0 = _scales_ahead(scale_at, 0, WB, GROUP_BYTES)
    ahead1 = _scales_ahead(scale_at, BB, WB, GROUP_BYTES)
    ahead2 = _scales_ahead(scale_at, 2 * BB, WB, GROUP_BYTES)
    ahead3 = _scales_ahead(scale_at, 3 * BB, WB, GROUP_BYTES)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, WB, BYTES):
        scale0, scale1, scale2, scale3 = ahead0, ahead1, ahead2, ahead3
        ahead0 = _scales_ahead(scale_at, step + BYTES, WB, GROUP_BYTES)
        if INNER > 1:
            ahead1 = _scales_ahead(scale_at, step + BYTES + BB, WB, GROUP_BYTES)
        if INNER > 2:
            ahead2 = _scales_ahead(scale_at, step + BYTES + 2 * BB, WB, GROUP_BYTES)
            ahead3 = _scales_ahead(scale_at, step + BYTES + 3 * BB, WB, GROUP_BYTES)
        for inner in tl.static_range(INNER):
            start = step + inner * BB
            xs = tl.load(x_at + start * VALUES, mask=(start * VALUES + ks)[None, :] < WB * VALUES, other=0.0)
            byte = tl.load(byte_at + start, mask=(start + columns)[None, :] < WB, other=0).to(tl.int32)
            zero = 1 << (BITS - 1)
            if HAS_ZEROS:
                zero = _zero_point(zeros, rows, tl.minimum(start, WB - 1) // GROUP_BYTES, G, BITS)[:, None]
            part = tl.zeros((BM, BN), tl.float32)
            if BITS == 4:
                even, odd = tl.split(tl.reshape(xs, (BM, BB, 2)))
                part = _meet(byte, 0xF, 0, zero, even, part, DTYPE)
                part = _meet(byte, 0xF0, 4, zero, odd, part, DTYPE)
            else:
                part = _meet(byte, 0xFF, 0, zero, xs, part, DTYPE)
            scale = scale0 if inner == 0 else scale1 if inner == 1 else scale2 if inner == 2 else scale3
            acc += part * scale.to(tl.float32)[None, :]
    row_mask = all_rows < N
    if HAS_BIAS:
        acc += tl.load(bias + all_rows, mask=row_mask, other=0.0).to(tl.float32)[None, :]
    out_at = out + tokens[:, None] * out_stride + all_rows[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=(tokens < M)[:, None] & row_mask[None, :])


@triton.jit
def _value(word, mask: tl.constexpr, p: tl.constexpr):
    """The u under the mask, at bit p, as float32. Two factors, as 2^149 is beyond the largest float."""
    return _bits(word, mask) * 2.0**100 * 2.0 ** (49 - p)


@triton.jit
def _rounded(word, mask: tl.constexpr, p: tl.constexpr, zero, scale, DTYPE: tl.constexpr):
    return ((_value(word, mask, p) - zero) * scale).to(DTYPE)


@triton.jit(do_not_specialize=["first", "count"], do_not_specialize_on_alignment=["packed"])
def dequantize_rows(
    packed,
    scales,
    zeros,
    out,  # [count, K]
    first,  # the weight's row that is row 0 of out
    count,
    W: tl.constexpr,
    BITS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    OVERLAPS: tl.constexpr,
    ROWS: tl.constexpr,
    BW: tl.constexpr,
):
    """(u - zero point) * scale of `count` rows in the dtype of out, each rounded once. A thread has whole words."""
    G: tl.constexpr = W // GROUP_WORDS
    let_others_begin(OVERLAPS)
    wait_for_others(OVERLAPS)
    VALUES: tl.constexpr = 32 // BITS
    flat = tl.arange(0, ROWS * BW)
    own = tl.program_id(1) * ROWS + flat // BW
    columns = tl.program_id(0) * BW + flat % BW
    inside = (own < count) & (columns < W)
    rows = first + tl.minimum(own, count - 1)
    columns = tl.minimum(columns, W - 1)
    word = tl.load(packed + rows * W + columns)
    scale = tl.load(scales + rows * G + columns // GROUP_WORDS).to(tl.float32)
    zero = tl.full((ROWS * BW,), 1 << (BITS - 1), tl.float32)
    if HAS_ZEROS:
        zero = _zero_point(zeros, rows, columns // GROUP_WORDS, G, BITS)
    DTYPE: tl.constexpr = out.dtype.element_ty
    upper = word >> 8
    if BITS == 4:
        v0 = _rounded(word, 0xF, 0, zero, scale, DTYPE)
        v1 = _rounded(word, 0xF0, 4, zero, scale, DTYPE)
        v2 = _rounded(word, 0xF00, 8, zero, scale, DTYPE)
        v3 = _rounded(word, 0xF000, 12, zero, scale, DTYPE)
        v4 = _rounded(word, 0xF0000, 16, zero, scale, DTYPE)
        v5 = _rounded(word, 0xF00000, 20, zero, scale, DTYPE)
        v6 = _rounded(upper, 0xF0000, 16, zero, scale, DTYPE)
        v7 = _rounded(upper, 0xF00000, 20, zero, scale, DTYPE)
        evens = tl.join(tl.join(v0, v4), tl.join(v2, v6))
        odds = tl.join(tl.join(v1, v5), tl.join(v3, v7))
        dense = tl.reshape(tl.join(evens, odds), (ROWS * BW, 8))
    else:
        v0 = _rounded(word, 0xFF, 0, zero, scale, DTYPE)
        v1 = _rounded(word, 0xFF00, 8, zero, scale, DTYPE)
        v2 = _rounded(word, 0xFF0000, 16, zero, scale, DTYPE)
        v3 = _rounded(upper, 0xFF0000, 16, zero, scale, DTYPE)
        dense = tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), (ROWS * BW, 4))
    out_at = out + ((own * W + columns) * VALUES)[:, None] + tl.arange(0, VALUES)[None, :]
    tl.store(out_at, dense, mask=inside[:, None])
