"""Native attention against float64, on every instruction set that this machine runs.

Over rows of floats it is exact up to float32, but for softmax weights over bf16 rows: an instruction set that
multiplies pairs of bf16 rounds them to bf16. Nothing here may depend on threads, on the tokens beside one, or on what
lies behind.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from glm4run.kernels.cpu import ops as native
from glm4run.kv_format import parse_kv_bits, rows_for
from glm4run.kv_order import Order, cpu_orders
from glm4run.kv_rows import KVLayer, new_rows, turn
from tests.native_library import ISAS, each_isa, in_bytes, needs_library, running, same_bits

pytestmark = needs_library

CPU = torch.device("cpu")
# heads, KV heads, D: the family's; lanes that are not filled, or more than once; odd widths and wide ones
SHAPES = ((32, 2, 128), (9, 3, 32), (34, 2, 40), (3, 1, 33), (5, 1, 256), (16, 1, 80))
BF16_STEP = 2.0**-8  # of a weight rounded to bf16 half of it, of the sum of weights the other


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with running(threads=1):
        yield


def rows_of(heads: int, positions: int, width: int, seed: int, outlier: float = 0.0) -> Tensor:
    """[heads, positions, width], signed, with a few large channels."""
    rows = torch.randn(heads, positions, width, generator=torch.Generator().manual_seed(seed))
    rows[:, :, 1::13] += outlier
    return rows


def layer_of(kept: str, key: Tensor, value: Tensor, *, as_rows: bool = False, room: int = 0) -> KVLayer:
    formats, (heads, positions, width) = parse_kv_bits(kept), key.shape
    orders, capacity = [Order.ROWS] * 2 if as_rows else cpu_orders(width), rows_for(max(room, positions))
    layer = KVLayer(
        *(
            new_rows(heads, capacity, width, bits, dtype=key.dtype, device=CPU, order=order)
            for bits, order in zip((formats.key_bits, formats.value_bits), orders, strict=True)
        )
    )
    native.append(layer, 0, key, value)
    return layer


def exact(query: Tensor, layer: KVLayer, positions: int) -> tuple[Tensor, Tensor]:
    """Attention in float64 over what the rows say, [T, H, D], and the same over the values' magnitudes."""
    heads, tokens, width = query.shape
    keys, values = (rows.read(positions).double() for rows in (layer.keys, layer.values))
    repeat = heads // keys.shape[0]
    scores = query.double() @ keys.repeat_interleave(repeat, 0).transpose(1, 2) / width**0.5  # [H, T, S]
    scores.masked_fill_(torch.ones(tokens, positions).triu(positions - tokens + 1).bool(), float("-inf"))
    values = values.repeat_interleave(repeat, 0)
    weights = scores.softmax(-1)
    return (weights @ values).transpose(0, 1), (weights @ values.abs()).transpose(0, 1)


@each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_rows_of_floats_equal_float64(isa: str, dtype: torch.dtype) -> None:
    for heads, kv_heads, width in SHAPES:
        for tokens, positions in ((1, 1), (1, 64), (1, 331), (4, 130), (8, 129), (9, 9), (21, 150)):
            key, value = rows_of(kv_heads, positions, width, 0, 3.0).to(dtype), rows_of(kv_heads, positions, width, 1)
            layer = layer_of("16", key, value.to(dtype))
            query = rows_of(heads, tokens, width, 2).to(dtype)
            expected, size = exact(query, layer, positions)
            with running(isa):
                got = native.attention(query, layer, positions).double().unflatten(-1, (heads, width))
            rounded = BF16_STEP * size if dtype == torch.bfloat16 and isa == "avx512-bf16" else 0.0
            allowed = torch.finfo(dtype).eps * expected.abs() + 2e-5 * size + rounded
            assert bool(((got - expected).abs() <= allowed).all()), (heads, kv_heads, width, tokens, positions)


def as_bytes(query: Tensor, layer: KVLayer, positions: int, isa: str) -> Tensor:
    """`exact` over queries and weights rounded as the kernels say, float64 [T, H, D]."""
    heads, tokens, width = query.shape
    keys, values = (rows.turned(positions).double() for rows in (layer.keys, layer.values))
    asked = (query if layer.keys.scales is None else turn(query)).double()
    if in_bytes(layer.keys, isa):
        step = asked.abs().amax(-1, keepdim=True) / 127
        asked = (asked / step + 0.5).floor() * step
    repeat = heads // keys.shape[0]
    scores = asked @ keys.repeat_interleave(repeat, 0).transpose(1, 2) / width**0.5
    scores.masked_fill_(torch.ones(tokens, positions).triu(positions - tokens + 1).bool(), float("-inf"))
    weights = scores.softmax(-1)
    totals = weights.sum(-1, keepdim=True)
    if in_bytes(layer.values, isa):
        assert layer.values.scales is not None
        kept = layer.values.scales[:, :positions]
        scale = kept[..., 0] if layer.values.bits == 8 else kept[..., :2].contiguous().view(torch.float16)[..., 0]
        scales = scale.double().repeat_interleave(repeat, 0)[:, None]  # [H, 1, S]
        dither = torch.tensor([(1 + 2 * int(f"{i:04b}"[::-1], 2)) / 32 for i in range(16)], dtype=torch.float64)
        for first in range(0, positions, 64):
            block = slice(first, min(first + 64, positions))
            seen = weights[..., block] > 0
            largest = (scales[..., block] * seen).amax(-1, keepdim=True) * weights[..., block].amax(-1, keepdim=True)
            step = (largest / 254.5).clamp_min(1e-300)
            scaled = weights[..., block] * scales[..., block] / step
            more = dither.repeat(4)[: scaled.shape[-1]]
            weights[..., block] = (scaled + more).floor() * step / scales[..., block]
    out = weights @ values.repeat_interleave(repeat, 0) / totals
    return (out if layer.values.scales is None else turn(out).double()).transpose(0, 1)


@each_isa
@pytest.mark.parametrize("kept", ["8", "4", "8:4", "16:8", "4:16"])
def test_quantized_rows_equal_float64_over_what_they_hold(isa: str, kept: str) -> None:
    for heads, kv_heads, width in ((32, 2, 128), (18, 2, 64), (34, 2, 40), (5, 1, 256), (3, 1, 192), (6, 3, 96)):
        for tokens, positions in ((1, 331), (3, 130), (21, 150)):
            key, value = rows_of(kv_heads, positions, width, 0, 3.0), rows_of(kv_heads, positions, width, 1)
            layer = layer_of(kept, key.bfloat16(), value.bfloat16())
            query = rows_of(heads, tokens, width, 2).bfloat16()
            lossless, size = exact(query, layer, positions)
            rounded = in_bytes(layer.keys, isa) or in_bytes(layer.values, isa)
            expected = as_bytes(query, layer, positions, isa) if rounded else lossless
            with running(isa):
                got = native.attention(query, layer, positions).double().unflatten(-1, (heads, width))
            allowed = BF16_STEP * (expected.abs() + size) + 1e-3
            beyond = (got - expected).abs() / allowed
            where = (heads, kv_heads, width, tokens, positions)
            if rounded:  # what lies between two steps in one precision may not in another; and all of it loses little
                assert float((beyond > 1).double().mean()) < 0.002, where
                assert float((expected - lossless).square().mean().sqrt() / size.square().mean().sqrt()) < 0.006, where
            assert float(beyond.max()) <= (4 if rounded else 1), where


@each_isa
@pytest.mark.parametrize("kept", ["16", "8", "4"])
def test_what_is_alike_for_all_keys_is_their_mean(isa: str, kept: str) -> None:
    """Every weight is exactly 1 then, rounded or not: a position too many or too few would show."""
    for tokens, positions in ((1, 63), (1, 257), (2, 64), (17, 91)):
        value = torch.randint(-3, 4, (2, positions, 32), generator=torch.Generator().manual_seed(1)).float()
        layer = layer_of(kept, rows_of(2, positions, 32, 0).bfloat16(), value.bfloat16())
        query = torch.zeros(32, tokens, 32, dtype=torch.bfloat16)
        expected, _ = exact(query, layer, positions)
        with running(isa):
            got = native.attention(query, layer, positions).double().unflatten(-1, (32, 32))
        allowed = BF16_STEP * expected.abs() + 1e-4  # the result is rounded
        assert bool(((got - expected).abs() <= allowed).all()), (tokens, positions)


@each_isa
def test_many_small_weights_beside_a_large_one_keep_their_sum(isa: str) -> None:
    """Rounded to the nearest of 254 steps of the largest each of them would be nothing, or all of them 0.4 % of it."""
    for small in (0.0005, 0.0015, 0.003):
        query = torch.zeros(16, 1, 128, dtype=torch.bfloat16)
        query[..., 0] = 1.0
        key, value = torch.zeros(1, 64, 128), torch.ones(1, 64, 128)
        key[0, 5, 0] = -math.log(small) * 128**0.5
        value[0, 5] = 0.0
        value[..., 1:] = 0.0
        layer = layer_of("8", key.bfloat16(), value.bfloat16())
        expected, _ = exact(query, layer, 64)
        with running(isa):
            got = native.attention(query, layer, 64).double().unflatten(-1, (16, 128))
        assert float((got - expected)[..., 0].abs().max()) < 0.008, small  # of 0.03 to 0.16: two steps of weights


@each_isa
@pytest.mark.parametrize("kept", ["16", "8", "4"])
@pytest.mark.parametrize("direction", [1, -1])
def test_scores_that_rise_or_fall_all_the_way(isa: str, kept: str, direction: int) -> None:
    """By far more than what weights may exceed the maximum they were taken for, and for each head at another pace."""
    positions, width = 600, 128
    query = rows_of(32, 1, width, 2).bfloat16()
    slope = direction * torch.arange(positions)[:, None] / positions
    towards = torch.stack([query[:16, 0].float().mean(0), query[16:, 0].float().mean(0)])  # [KVH, D]
    key = (rows_of(2, positions, width, 0) * 0.1 + 60 * slope * towards[:, None]).bfloat16()
    layer = layer_of(kept, key, rows_of(2, positions, width, 1).bfloat16())
    expected, size = exact(query, layer, positions)
    with running(isa):
        got = native.attention(query, layer, positions).double().unflatten(-1, (32, width))
    assert bool(((got - expected).abs() <= 2 * BF16_STEP * (expected.abs() + size) + 2e-3).all())


@each_isa
@pytest.mark.parametrize("kept", ["16", "8", "4"])
def test_neither_threads_nor_other_tokens_change_a_bit(isa: str, kept: str) -> None:
    positions, tokens = 700, 29
    key, value = rows_of(2, positions, 64, 0).bfloat16(), rows_of(2, positions, 64, 1).bfloat16()
    layer, query = layer_of(kept, key, value), rows_of(32, tokens, 64, 2).bfloat16()

    def attend(first: int, last: int, threads: int = 1) -> Tensor:
        with running(isa, threads=threads):
            return native.attention(query[:, first:last].contiguous(), layer, positions - tokens + last)

    whole, few = attend(0, tokens), attend(3, 9)
    for threads in (2, 3):
        assert same_bits(attend(0, tokens, threads), whole) and same_bits(attend(3, 9, threads), few)
    assert same_bits(torch.cat((attend(0, 10), attend(10, tokens))), whole)  # a prefill in two chunks
    assert same_bits(torch.cat([attend(t, t + 1) for t in range(3, 9)]), few)  # decoding one by one


@each_isa
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("kept", "width"), [("16", 32), ("8", 32), ("8", 128), ("4", 64)])
def test_what_is_not_finite_reaches_those_who_see_it_and_nobody_else(
    isa: str, kept: str, width: int, bad: float
) -> None:
    for which in (0, 1):
        for position in (76, 77):  # either of a pair
            pair = [rows_of(2, 83, width, 0).bfloat16(), rows_of(2, 83, width, 1).bfloat16()]
            pair[which][1, position, 3] = bad
            layer, query = layer_of(kept, *pair), rows_of(4, 12, width, 2).bfloat16().abs()
            with running(isa):
                finite = native.attention(query, layer, 83).unflatten(-1, (4, width)).isfinite()
            assert bool(finite[:, :2].all()), "the other KV head"
            assert bool(finite[: position - 71, 2:].all()), "tokens before it"
            seen = finite[position - 71 :, 2:]
            alone = which == 1 and kept == "16"  # a value of its own; else a score, or all that share a scale
            assert not bool(seen[..., 3].any() if alone else seen.any()), "tokens behind it"


@each_isa
@pytest.mark.parametrize("width", [64, 128, 192])
def test_bf16_that_lie_as_words_give_the_bits_of_rows(isa: str, width: int) -> None:
    """Whatever stands in the places of rows that nobody wrote."""
    for tokens, positions in ((1, 1), (1, 63), (1, 64), (1, 1100), (5, 77), (8, 130), (30, 191)):
        key, value = (rows_of(2, positions, width, seed).bfloat16() for seed in (0, 1))
        query = rows_of(32, tokens, width, 2).bfloat16()
        rows, words = layer_of("16", key, value, as_rows=True), layer_of("16", key, value)
        assert (rows.keys.order, words.keys.order, words.values.order) == (Order.ROWS, Order.KEYS, Order.VALUES)
        for layer in (rows, words):
            for tensor in layer.tensors().values():
                tensor.fill_(float("nan"))
            native.append(layer, 0, key, value)
        with running(isa):
            assert same_bits(*(native.attention(query, layer, positions) for layer in (rows, words)))


@each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_come_to_their_places_a_few_at_a_time(isa: str, dtype: torch.dtype) -> None:
    """Rows of another dtype are rounded on the way. Python reads what the library wrote."""
    key, value = (rows_of(2, 150, 128, seed).to(dtype) for seed in (0, 1))
    layer = layer_of("16", key.bfloat16()[:, :0], value.bfloat16()[:, :0], room=150)
    with running(isa):
        for first, last in itertools.pairwise((0, 1, 17, 64, 65, 150)):
            native.append(layer, first, key[:, first:last], value[:, first:last])
    assert same_bits(layer.keys.read(150), key.bfloat16())
    assert same_bits(layer.values.read(150), value.bfloat16())


@each_isa
@pytest.mark.parametrize("kept", ["16", "8", "4"])
def test_a_query_that_is_not_finite_is_no_silent_number(isa: str, kept: str) -> None:
    layer = layer_of(kept, rows_of(2, 83, 128, 0).bfloat16(), rows_of(2, 83, 128, 1).bfloat16())
    for bad in (float("nan"), float("inf")):
        query = rows_of(4, 1, 128, 2).bfloat16()
        query[3, 0, 5] = bad
        with running(isa):
            finite = native.attention(query, layer, 83).unflatten(-1, (4, 128)).isfinite()
        assert bool(finite[0, :3].all()) and not bool(finite[0, 3].any()), bad


@pytest.mark.skipif("avx512-bf16" not in ISAS, reason="no AVX512-BF16")
def test_rounding_the_weights_is_all_that_bf16_pairs_lose() -> None:
    """No more than the result's own rounding to bf16."""
    key, value = rows_of(2, 2000, 128, 0).bfloat16(), rows_of(2, 2000, 128, 1).bfloat16()
    layer, query = layer_of("16", key, value), rows_of(32, 1, 128, 2).bfloat16()
    expected, _ = exact(query, layer, 2000)
    with running("avx512-bf16"):
        got = native.attention(query, layer, 2000).double().unflatten(-1, (32, 128))
    with running("avx512-vnni"):
        floats = native.attention(query, layer, 2000).double().unflatten(-1, (32, 128))
    ours, theirs = ((x - expected).square().mean().sqrt() for x in (got, floats))
    assert 1.0 < float(ours / theirs) < 2**0.5
