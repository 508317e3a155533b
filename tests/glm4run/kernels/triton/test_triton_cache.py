"""Rows written by the Triton kernels are the bytes that `kv_rows` writes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from glm4run.kernels.triton.cache import Queries, append, ready, rope_append, why_not
from glm4run.kv_rows import KVLayer, KVRows, new_rows, turn
from glm4run.rope import apply_rope

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def rows_of(heads: int, tokens: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[heads, tokens, width], signed, of very different sizes, with a few large channels and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(heads, tokens, width, generator=generator)
    rows *= torch.randn(heads, tokens, 1, generator=generator).exp()
    rows[:, :, 1::13] += 20
    rows[0, tokens // 2] = 0
    return rows.to(dtype).to(DEVICE)


def empty_layer(
    kv_heads: int, capacity: int, width: int, bits: tuple[int, int], dtype: torch.dtype, offset: Tensor | None = None
) -> KVLayer:
    keys, values = (
        new_rows(kv_heads, capacity, width, kept, dtype=dtype, device=DEVICE, offset=shift)
        for kept, shift in zip(bits, (offset, None), strict=True)
    )
    for tensor in KVLayer(keys, values).tensors().values():
        tensor.fill_(7)
    return KVLayer(keys, values)


def same(ours: KVLayer, theirs: KVLayer) -> bool:
    """Of all bytes of the cache, those that nobody writes too; any NaN is as good as another."""
    return all(
        torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0)))
        for a, b in zip(ours.tensors().values(), theirs.tensors().values(), strict=True)
    )


def position(start: int) -> Tensor:
    return torch.tensor([start], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [(bits, torch.bfloat16) for bits in ((16, 16), (8, 8), (4, 4), (8, 4), (16, 8), (4, 16))]
    + [((8, 8), torch.float16), ((4, 4), torch.float32), ((16, 16), torch.float32)],
)
def test_appended_rows_are_the_same_bytes(bits: tuple[int, int], dtype: torch.dtype) -> None:
    for width, tokens, start in ((128, 3, 5), (16, 1, 0), (64, 18, 2), (256, 2, 1), (32, 5, 3)):
        offset = torch.randn(2, width, generator=torch.Generator().manual_seed(4)).to(DEVICE)
        key, value = (rows_of(2, tokens, width, seed, dtype) for seed in (0, 1))
        ours, theirs = (empty_layer(2, 30, width, bits, dtype, offset) for _ in range(2))
        theirs.keys.write(start, key)
        theirs.values.write(start, value)
        append(ours, position(start) if tokens > 2 else start, key, value)
        assert same(ours, theirs), (width, tokens, start)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_that_cannot_be_kept_read_as_nothing_finite(bits: int) -> None:
    for width in (128, 256):
        bad = rows_of(1, 6, width, 0)
        bad[0, 0, 5], bad[0, 1, 6], bad[0, 2, 7] = float("nan"), float("inf"), -float("inf")
        bad[0, 4] *= 1e30  # beyond what a scale of 16 bits reaches; the row before is all zeros
        bad[0, 5] *= 1e-9  # nothing
        ours, theirs = (empty_layer(1, 8, width, (bits, bits), torch.float32) for _ in range(2))
        append(ours, 1, bad, bad)
        theirs.keys.write(1, bad)
        theirs.values.write(1, bad)
        assert same(ours, theirs)
        read = ours.keys.read(7)[0, 1:]
        assert bool(read[[0, 1, 2, 4]].isnan().all()) and not bool(read[[3, 5]].any())


def heads_of(x: Tensor, width: int) -> Tensor:
    heads: Tensor = x.unflatten(-1, (-1, width)).transpose(0, 1)
    return heads


def as_asked(query: Tensor, keys: KVRows) -> Tensor:
    """What the queries of the kernels should be, in float64."""
    return (query if keys.scales is None else turn(query)).double()


def values_of(asked: Queries) -> Tensor:
    """[H, T, D] in float64."""
    values = asked.rows.double()
    return values if asked.scales is None else values * asked.scales.double().t()[..., None]


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [(bits, torch.bfloat16) for bits in ((16, 16), (8, 8), (4, 8))]
    + [((8, 8), torch.float16), ((8, 8), torch.float32), ((16, 16), torch.float16)],
)
def test_rope_and_append_in_one_launch(bits: tuple[int, int], dtype: torch.dtype) -> None:
    for width, rotary, tokens, heads in ((128, 64, 1, 4), (64, 64, 3, 2), (32, 12, 18, 6)):
        fused = rows_of(1, tokens, (heads + 4) * width, 3, dtype)[0]  # one product's result: rows at a distance
        query, key, value = fused.split((heads * width, 2 * width, 2 * width), dim=-1)
        angles = torch.arange(1, 1 + tokens)[:, None] * torch.rand(rotary // 2, generator=torch.Generator())
        cos, sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
        offset = torch.randn(2, width, generator=torch.Generator().manual_seed(4)).to(DEVICE)
        ours, theirs = (empty_layer(2, 30, width, bits, dtype, offset) for _ in range(2))
        turned_query, turned_key = (apply_rope(heads_of(x, width), cos, sin) for x in (query, key))
        theirs.keys.write(2, turned_key)
        theirs.values.write(2, heads_of(value, width))
        out = torch.empty_like(turned_query, dtype=dtype if bits[0] == 16 else torch.float16)
        before = fused.clone()
        asked = rope_append(query, key, value, cos, sin, ours, position(2), out)
        assert same(ours, theirs) and torch.equal(fused, before), (width, rotary, tokens)
        expected, got = as_asked(turned_query, ours.keys), values_of(asked)
        allowed = 0.0 if bits[0] == 16 else 2.0**-11 + 2.0**-22  # of the row's largest
        assert bool(((got - expected).abs() <= allowed * expected.abs().amax(-1, keepdim=True)).all())
        alone = ready(turned_query, ours)
        assert torch.equal(values_of(alone), got)
        again = rope_append(query, key, value, cos, sin, ours, 2)  # in place, where it fits
        assert torch.equal(values_of(again), got) and same(ours, theirs)
        assert (again.rows.data_ptr() == fused.data_ptr()) == (bits[0] == 16 or dtype != torch.float32)


def test_what_is_not_taken_says_why() -> None:
    layer = empty_layer(2, 8, 64, (8, 16), torch.bfloat16)
    assert why_not(layer, 4, 64, torch.bfloat16) is None
    assert "float32" in str(why_not(layer, 4, 64, torch.float32))
    assert "multiple" in str(why_not(layer, 3, 64, torch.bfloat16))
    assert "power of two" in str(why_not(empty_layer(2, 8, 40, (8, 8), torch.bfloat16), 4, 40, torch.bfloat16))
    apart = KVLayer(layer.keys, KVRows(layer.values.data.transpose(1, 2).contiguous().transpose(1, 2)))
    assert "run of memory" in str(why_not(apart, 4, 64, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [(16, 16), (8, 8), (4, 4)])
def test_a_prompt_of_the_family_is_the_same_bytes(bits: tuple[int, int]) -> None:
    key, value = (rows_of(2, 3000, 128, seed, torch.bfloat16) for seed in (0, 1))
    ours, theirs = (empty_layer(2, 3100, 128, bits, torch.bfloat16) for _ in range(2))
    append(ours, position(50), key, value)
    theirs.keys.write(50, key)
    theirs.values.write(50, value)
    assert same(ours, theirs)
