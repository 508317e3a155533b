"""Attention by the Triton kernels against float64 over what a cache says.

Weights are rounded to 16 bits before they meet the values, of quantized values always to bf16; queries that meet
quantized keys have 11 bits of their row's largest. Nothing else is rounded but the result.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from glm4run.attention import grouped_query_attention
from glm4run.kernels.triton.attention import Tiles, attend, choose_splits, choose_tiles, scratch_floats
from glm4run.kv_rows import KVLayer, attend_turned, new_rows

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
BF16_STEP = 2.0**-8
KINDS = [(keys, values) for keys in (16, 8, 4) for values in (16, 8, 4)]
# heads, KV heads, D, tokens, positions: the family's group and smaller ones, one that is no power of two, wide heads
CASES = ((16, 1, 128, 1, 131), (4, 2, 64, 1, 300), (3, 3, 16, 1, 1), (1, 1, 64, 33, 97), (6, 2, 32, 2, 33),
         (2, 1, 256, 2, 70))  # fmt: skip


def rows_of(heads: int, positions: int, width: int, seed: int, outlier: float = 0.0) -> Tensor:
    """[heads, positions, width], signed, with a few large channels."""
    rows = torch.randn(heads, positions, width, generator=torch.Generator().manual_seed(seed))
    rows[:, :, 1::13] += outlier
    return rows.to(DEVICE)


def layer_of(bits: tuple[int, int], key: Tensor, value: Tensor, room: int = 19, offset: bool = True) -> KVLayer:
    """A cache of these rows, and behind them what nobody may look at."""
    kv_heads, positions, width = key.shape
    shift = torch.randn(kv_heads, width, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    layer = KVLayer(
        *(
            new_rows(kv_heads, positions + room, width, kept, dtype=key.dtype, device=DEVICE, offset=taken)
            for kept, taken in zip(bits, (shift if offset else None, None), strict=True)
        )
    )
    for tensor in layer.tensors().values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        else:
            tensor.fill_(126)  # two of them are a NaN too
            tensor.view(torch.uint8)[..., 1::2] = 127
    layer.keys.write(0, key)
    layer.values.write(0, value)
    return layer


def exact(query: Tensor, layer: KVLayer, positions: int) -> tuple[Tensor, Tensor]:
    """Attention in float64, [T, H, D], and the same over the values' magnitudes."""
    heads, tokens, width = query.shape
    keys, values = (kept.read(positions).double() for kept in (layer.keys, layer.values))
    repeat = heads // keys.shape[0]
    scores = query.double() @ keys.repeat_interleave(repeat, 0).transpose(1, 2) / width**0.5  # [H, T, S]
    future = torch.ones(tokens, positions, device=DEVICE).triu(positions - tokens + 1).bool()
    weights = scores.masked_fill_(future, float("-inf")).softmax(-1)
    values = values.repeat_interleave(repeat, 0)
    return (weights @ values).transpose(0, 1), (weights @ values.abs()).transpose(0, 1)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def check(got: Tensor, query: Tensor, layer: KVLayer, positions: int, *where: object) -> None:
    heads, _, width = query.shape
    expected, size = exact(query, layer, positions)
    error = got.double().unflatten(-1, (heads, width)) - expected
    coarse = query.dtype == torch.bfloat16 or layer.values.scales is not None
    step = BF16_STEP if coarse else 2.0**-11 if query.dtype == torch.float16 else 2.0**-20
    if layer.keys.scales is not None:
        step += 2.0**-10
    allowed = step * (expected.abs() + 3 * size)
    if layer.values.scales is not None:  # what is rounded is turned: errors of one spread over all
        allowed = allowed + step * size.amax(-1, keepdim=True)
    assert bool((error.abs() <= allowed + 1e-6).all()), (float((error.abs() / allowed).max()), *where)
    assert rms(error) <= step * rms(size), (rms(error) / rms(size), *where)


@pytest.mark.parametrize("bits", KINDS)
def test_every_kind_of_row_equals_float64(bits: tuple[int, int]) -> None:
    for heads, kv_heads, width, tokens, positions in CASES:
        key, value = rows_of(kv_heads, positions, width, 0, 3.0), rows_of(kv_heads, positions, width, 1)
        layer = layer_of(bits, key.bfloat16(), value.bfloat16())
        query = rows_of(heads, tokens, width, 2).bfloat16()
        start = positions - tokens
        at = torch.tensor([start], dtype=torch.int32, device=DEVICE)
        whole = attend(query, layer, at, splits=1)
        check(whole, query, layer, positions, heads, width, tokens, positions)
        for splits in (3,):  # some have more than there are blocks
            parts = attend(query, layer, start, splits=splits)
            check(parts, query, layer, positions, heads, width, tokens, positions, splits)


def test_a_position_in_memory_is_a_position() -> None:
    layer = layer_of((8, 4), rows_of(2, 90, 64, 0).bfloat16(), rows_of(2, 90, 64, 1).bfloat16())
    query = rows_of(4, 2, 64, 2).bfloat16()
    at = torch.tensor([88], dtype=torch.int32, device=DEVICE)
    for splits in (None, 1):
        parts = attend(query, layer, at, splits=splits)
        assert torch.equal(parts, attend(query, layer, 88, splits=splits or 4))
        assert torch.equal(parts, attend(query, layer, at, splits=splits)), "not the same twice"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [(16, 16), (8, 8), (4, 16), (16, 4)])
def test_other_dtypes_equal_float64(bits: tuple[int, int], dtype: torch.dtype) -> None:
    for (heads, kv_heads, width), tokens, positions in (((8, 1, 128), 1, 130), ((2, 1, 64), 9, 75)):
        key, value = rows_of(kv_heads, positions, width, 0, 3.0), rows_of(kv_heads, positions, width, 1)
        layer = layer_of(bits, key.to(dtype), value.to(dtype))
        query = rows_of(heads, tokens, width, 2).to(dtype)
        for splits in (1, 2):
            got = attend(query, layer, positions - tokens, splits=splits)
            assert got.dtype == dtype
            check(got, query, layer, positions, heads, width, tokens, positions, splits)


@pytest.mark.parametrize("bits", [(16, 16), (8, 8)])
def test_the_reference_is_the_reference(bits: tuple[int, int]) -> None:
    """What the model would compute without the kernels."""
    layer = layer_of(bits, rows_of(2, 90, 64, 0).bfloat16(), rows_of(2, 90, 64, 1).bfloat16())
    query = rows_of(8, 5, 64, 2).bfloat16()
    expected = attend_turned(query.float(), layer, 90, grouped_query_attention)
    assert rms(attend(query, layer, 85) - expected) < 2 * BF16_STEP * rms(expected)


@pytest.mark.parametrize("bits", [(16, 16), (8, 8), (4, 4)])
def test_what_is_alike_for_all_keys_is_their_mean(bits: tuple[int, int]) -> None:
    """All weights are alike then: a position too many or too few would show."""
    for tokens, positions in ((1, 63), (1, 257), (2, 64), (17, 91)):
        value = torch.randint(-3, 4, (1, positions, 32), generator=torch.Generator().manual_seed(1)).float().to(DEVICE)
        layer = layer_of(bits, rows_of(1, positions, 32, 0).bfloat16(), value.bfloat16())
        query = torch.zeros(2, tokens, 32, dtype=torch.bfloat16, device=DEVICE)
        expected, _ = exact(query, layer, positions)
        for splits in (1, 3):
            got = attend(query, layer, positions - tokens, splits=splits).double().unflatten(-1, (2, 32))
            allowed = BF16_STEP * expected.abs() + (1e-6 if bits[1] == 16 else 2e-3)  # the result is rounded
            assert bool(((got - expected).abs() <= allowed).all()), (tokens, positions)


@pytest.mark.parametrize("bits", [(16, 16), (8, 8), (4, 4)])
@pytest.mark.parametrize("direction", [1, -1])
def test_scores_of_hundreds_that_rise_or_fall_all_the_way(bits: tuple[int, int], direction: int) -> None:
    positions, width = 260, 64
    query = 8 * rows_of(8, 2, width, 2).bfloat16()
    slope = direction * torch.arange(positions, device=DEVICE)[:, None] / positions
    towards = torch.stack([query[:4, 0].float().mean(0), query[4:, 0].float().mean(0)])  # [KVH, D]
    key = (rows_of(2, positions, width, 0) * 0.1 + 8 * slope * towards[:, None]).bfloat16()
    layer = layer_of(bits, key, rows_of(2, positions, width, 1).bfloat16())
    expected, size = exact(query, layer, positions)
    for splits in (1, 4):
        got = attend(query, layer, positions - 2, splits=splits).double().unflatten(-1, (8, width))
        # A query of so many sizes is rounded to 11 bits of its largest: scores of hundreds move by tenths.
        allowed = 4 * BF16_STEP if bits[0] == 16 else 0.1
        assert rms(got - expected) <= allowed * rms(size)


@pytest.mark.parametrize(("bits", "width"), [(16, 32), (8, 32), (8, 128), (4, 64)])
def test_what_is_not_finite_reaches_those_who_see_it(bits: int, width: int) -> None:
    for which, bad in ((0, float("nan")), (0, float("inf")), (1, float("nan")), (1, float("inf"))):
        pair = [rows_of(2, 83, width, 0).bfloat16(), rows_of(2, 83, width, 1).bfloat16()]
        pair[which][1, 76, 3] = bad
        layer, query = layer_of((bits, bits), pair[0], pair[1]), rows_of(4, 7, width, 2).bfloat16().abs()
        for splits in (1, 2) if which == 1 else (1,):
            finite = attend(query, layer, 74, splits=splits).unflatten(-1, (4, width)).isfinite()
            assert bool(finite[:, :2].all()), "the other KV head"
            if which == 0:  # a weight of nothing times a value that is not finite is none either
                assert bool(finite[:2, 2:].all()), "tokens before it"
            seen = finite[2:, 2:]
            alone = which == 1 and bits == 16  # a value of its own; else a score, or all that share a scale
            assert not bool(seen[..., 3].any() if alone else seen.any()), "tokens behind it"


@pytest.mark.parametrize("bits", [(16, 16), (8, 8), (4, 4)])
def test_a_query_that_is_not_finite_is_no_silent_number(bits: tuple[int, int]) -> None:
    layer = layer_of(bits, rows_of(2, 83, 64, 0).bfloat16(), rows_of(2, 83, 64, 1).bfloat16())
    for bad in (float("nan"), -float("inf")):
        query = rows_of(4, 1, 64, 2).bfloat16()
        query[3, 0, 5] = bad
        for splits in (1, 2):
            finite = attend(query, layer, 82, splits=splits).unflatten(-1, (4, 64)).isfinite()
            assert bool(finite[0, :3].all()) and not bool(finite[0, 3].any()), bad


def test_parts_of_several_blocks_cover_the_context() -> None:
    """Where there are many blocks a part takes one or two of them, and some parts are left over."""
    layer = layer_of((16, 16), rows_of(1, 705, 16, 0).bfloat16(), rows_of(1, 705, 16, 1).bfloat16())
    query = rows_of(2, 1, 16, 2).bfloat16()
    for positions in (705, 700, 577):
        got = attend(query, layer, positions - 1, splits=66, tiles=Tiles(16, 16, 4, 1))
        check(got, query, layer, positions, positions)


def test_memory_that_is_given_is_used_and_strides_are_followed() -> None:
    layer = layer_of((8, 8), rows_of(2, 90, 64, 0).bfloat16(), rows_of(2, 90, 64, 1).bfloat16())
    query, tiles = rows_of(8, 3, 64, 2).bfloat16(), Tiles(16, 32, 4, 2)
    apart = query.transpose(0, 1).contiguous().transpose(0, 1)
    out = torch.empty(3, 8 * 64, dtype=torch.bfloat16, device=DEVICE)
    scratch = torch.full((scratch_floats(3, 8, 64, 2) + 3,), 5.0, device=DEVICE)
    got = attend(apart, layer, 87, splits=2, tiles=tiles, out=out, scratch=scratch)
    assert got is out and torch.equal(got, attend(query, layer, 87, splits=2, tiles=tiles))
    assert bool((scratch[-3:] == 5).all()) and bool((scratch[:-3] != 5).all())
    with pytest.raises(AssertionError):
        attend(query, layer, 87, splits=2, tiles=tiles, scratch=scratch[:-4])


def test_tiles_and_splits_fit_what_there_is() -> None:
    device = torch.device("cpu")
    for rows in (1, 16, 33, 4096):
        tiles = choose_tiles(rows, 128, 16, 16, torch.bfloat16)
        assert min(rows, 64) <= tiles.rows <= max(16, 2 * rows)
    tiles = Tiles(16, 64, 4, 3)
    assert choose_splits(1, 32, 2, 65, tiles, device) == 2
    assert choose_splits(1, 32, 2, None, tiles, device) * 2 >= 8
    assert choose_splits(4096, 32, 2, 1 << 20, Tiles(128, 64, 8, 2), device) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("bits", KINDS)
def test_the_familys_shape_at_depth(bits: tuple[int, int]) -> None:
    for tokens, positions in ((1, 30001), (8, 9000), (1000, 3333)):
        key, value = rows_of(2, positions, 128, 0, 3.0), rows_of(2, positions, 128, 1)
        layer = layer_of(bits, key.bfloat16(), value.bfloat16())
        query = rows_of(32, tokens, 128, 2).bfloat16()
        at = torch.tensor([positions - tokens], dtype=torch.int32, device=DEVICE)
        first = attend(query, layer, at)
        check(first, query, layer, positions, tokens, positions)
        assert torch.equal(first, attend(query, layer, at)), "not the same twice"


@pytest.mark.gpu
def test_one_graph_serves_every_position() -> None:
    layer = layer_of((8, 8), rows_of(2, 3000, 128, 0).bfloat16(), rows_of(2, 3000, 128, 1).bfloat16())
    query, at = rows_of(32, 1, 128, 2).bfloat16(), torch.tensor([5], dtype=torch.int32, device=DEVICE)
    out = attend(query, layer, at)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(query, layer, at)
    for start in (0, 64, 2999):
        at.fill_(start)
        graph.replay()
        check(out, query, layer, start + 1, start)
