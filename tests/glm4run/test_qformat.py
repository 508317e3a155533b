"""The packed format, against hand-worked groups, itself, and the library whose format it is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from glm4run.qformat import (
    PackedWeight,
    dequantize,
    num_groups,
    pack,
    pack_zero_points,
    packed_tensor_shapes,
    packed_width,
    unpack,
    unpack_unsigned,
    unpack_zero_points,
)
from glm4run.quant_config import QuantScheme

each_bits = pytest.mark.parametrize("bits", [4, 8])


def int32(*words: int) -> Tensor:
    """Words as they are written down, 0x00000000 .. 0xffffffff."""
    return torch.tensor([word - (1 << 32) if word >= 1 << 31 else word for word in words], dtype=torch.int32)


def random_values(bits: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)


def random_weight(N: int, K: int, scheme: QuantScheme, seed: int = 0) -> tuple[PackedWeight, Tensor]:
    """A packed weight and, in float64 and without any packing, what it stands for."""
    generator = torch.Generator().manual_seed(seed)
    G = num_groups(K, scheme)
    q = random_values(scheme.bits, N, K, seed=seed)
    scale = torch.rand(N, G, generator=generator) + 0.5
    zero_point = None if scheme.symmetric else random_values(scheme.bits, N, G, seed=seed + 1)
    centred = q.double().reshape(N, G, K // G)
    if zero_point is not None:
        centred = centred - zero_point.double()[..., None]
    weight = PackedWeight(
        packed=pack(q, scheme.bits),
        scale=scale,
        zero_point=None if zero_point is None else pack_zero_points(zero_point, scheme.bits),
        out_features=N,
        in_features=K,
        scheme=scheme,
    )
    return weight, (centred * scale.double()[..., None]).reshape(N, K)


# Hand-worked goldens


def test_golden_int4_group() -> None:
    # u = q + 8 is 0..15; eight nibbles a word, the lowest k in the lowest nibble.
    q = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.int8)
    packed = pack(q, 4)
    assert torch.equal(packed, int32(0x76543210, 0xFEDCBA98)[None])
    assert torch.equal(unpack(packed, 4, 16), q)
    # One group of 16 with scale 0.25: -8 * 0.25 = -2.0, -7 * 0.25 = -1.75, .., 7 * 0.25 = 1.75.
    scheme = QuantScheme(4, 16)
    weight = PackedWeight(packed, torch.tensor([[0.25]]), None, 1, 16, scheme)
    expected = [-2.0, -1.75, -1.5, -1.25, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert dequantize(weight).tolist() == [expected]
    # Two groups of 8 with scales 0.5 and 2: -8 * 0.5 = -4.0 .. -1 * 0.5 = -0.5, then 0 * 2 .. 7 * 2 = 14.
    halves = PackedWeight(packed, torch.tensor([[0.5, 2.0]]), None, 1, 16, QuantScheme(4, 8))
    assert dequantize(halves).tolist() == [
        [-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0]
    ]


def test_golden_int8_group() -> None:
    # u = q + 128: 0x00, 0x7f, 0x80, 0xff from the lowest byte up.
    q = torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8)
    packed = pack(q, 8)
    assert torch.equal(packed, int32(0xFF807F00)[None])
    assert torch.equal(unpack(packed, 8, 4), q)
    # Scale 0.5: -128 * 0.5 = -64.0, -1 * 0.5 = -0.5, 0, 127 * 0.5 = 63.5.
    weight = PackedWeight(packed, torch.tensor([[0.5]]), None, 1, 4, QuantScheme(8, 4))
    assert dequantize(weight).tolist() == [[-64.0, -0.5, 0.0, 63.5]]


def test_golden_int4_zero_points() -> None:
    # Three rows, one group: zp = -8, 0, 7 -> u = 0, 8, 15; rows go up the nibbles of one word; unused nibbles are 0.
    zero_points = torch.tensor([[-8], [0], [7]], dtype=torch.int8)
    packed = pack_zero_points(zero_points, 4)
    assert torch.equal(packed, int32(0x00000F80)[:, None])
    # Every row q = -8..7, scale 0.5. Row 0: (q + 8) / 2 = 0, 0.5, .. 7.5; row 1: q / 2; row 2: (q - 7) / 2 = -7.5 .. 0.
    q = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 1)
    weight = PackedWeight(pack(q, 4), torch.full((3, 1), 0.5), packed, 3, 16, QuantScheme(4, 16, symmetric=False))
    rows = dequantize(weight)
    assert rows[0].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5]
    assert rows[1].tolist() == [-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert rows[2].tolist() == [
        -7.5,
        -7.0,
        -6.5,
        -6.0,
        -5.5,
        -5.0,
        -4.5,
        -4.0,
        -3.5,
        -3.0,
        -2.5,
        -2.0,
        -1.5,
        -1.0,
        -0.5,
        0.0,
    ]


def test_golden_int8_zero_points() -> None:
    # zp = -128, 3 -> u = 0x00, 0x83; q = -128, 3, 127, 0 with scale 0.25.
    zero_points = torch.tensor([[-128], [3]], dtype=torch.int8)
    packed = pack_zero_points(zero_points, 8)
    assert torch.equal(packed, int32(0x00008300)[:, None])
    q = torch.tensor([[-128, 3, 127, 0]], dtype=torch.int8).repeat(2, 1)
    weight = PackedWeight(pack(q, 8), torch.full((2, 1), 0.25), packed, 2, 4, QuantScheme(8, 4, symmetric=False))
    # Row 0: (q + 128) / 4 = 0, 32.75, 63.75, 32. Row 1: (q - 3) / 4 = -32.75, 0, 31, -0.75.
    assert dequantize(weight).tolist() == [[0.0, 32.75, 63.75, 32.0], [-32.75, 0.0, 31.0, -0.75]]


# Round trips


@given(data=st.data(), bits=st.sampled_from([4, 8]), N=st.integers(1, 9), K=st.integers(1, 70))
def test_pack_round_trips_and_fills_words_from_the_bottom(data: st.DataObject, bits: int, N: int, K: int) -> None:
    half = 1 << (bits - 1)
    row = st.lists(st.integers(-half, half - 1), min_size=K, max_size=K)
    rows = data.draw(st.lists(row, min_size=N, max_size=N))
    q = torch.tensor(rows, dtype=torch.int8)
    packed = pack(q, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (N, packed_width(K, bits))
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, bits, K), q)
    assert torch.equal(unpack_unsigned(packed, bits, K).int(), q.int() + half)
    # The definition itself, in Python's integers: bits beyond K are zero.
    for words, values in zip(packed.tolist(), rows, strict=True):
        whole = sum((value + half) << (bits * k) for k, value in enumerate(values))
        assert [word & 0xFFFFFFFF for word in words] == [(whole >> (32 * j)) & 0xFFFFFFFF for j in range(len(words))]


@given(bits=st.sampled_from([4, 8]), N=st.integers(1, 41), G=st.integers(1, 5), seed=st.integers(0, 1000))
def test_zero_points_round_trip_for_any_number_of_rows(bits: int, N: int, G: int, seed: int) -> None:
    zero_points = random_values(bits, N, G, seed=seed)
    packed = pack_zero_points(zero_points, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (packed_width(N, bits), G)
    assert packed.is_contiguous()
    assert torch.equal(unpack_zero_points(packed, bits, N), zero_points)


@each_bits
def test_pack_takes_views_that_are_not_contiguous(bits: int) -> None:
    q = random_values(bits, 64, 24)
    assert torch.equal(pack(q.t(), bits), pack(q.t().contiguous(), bits))
    packed = pack(q, bits)
    assert torch.equal(unpack(packed[:, 1:], bits, 8), q[:, 32 // bits :][:, :8])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("N", [1, 7, 8, 13])
@each_bits
def test_dequantize_equals_the_definition(bits: int, N: int, group_size: int | None, symmetric: bool) -> None:
    weight, expected = random_weight(N, 128, QuantScheme(bits, group_size, symmetric))
    dense = dequantize(weight)
    assert dense.dtype == torch.float32
    # Differences of integers are exact, so the only rounding is that of one product.
    assert torch.equal(dense, expected.float())


@each_bits
def test_dequantize_per_channel_where_k_fills_no_word(bits: int) -> None:
    weight, expected = random_weight(5, 37, QuantScheme(bits, None, symmetric=False))
    assert torch.equal(dequantize(weight), expected.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_rounds_once_to_the_wanted_dtype(dtype: torch.dtype) -> None:
    weight, expected = random_weight(9, 64, QuantScheme(4, 32, symmetric=False))
    dense = dequantize(weight, dtype)
    assert dense.dtype == dtype
    assert torch.equal(dense, expected.float().to(dtype))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_dequantize_widens_the_scale_before_it_multiplies(scale_dtype: torch.dtype) -> None:
    weight, _ = random_weight(4, 32, QuantScheme(8, 32))
    narrow = dataclasses.replace(weight, scale=weight.scale.to(scale_dtype))
    wide = dataclasses.replace(weight, scale=weight.scale.to(scale_dtype).float())
    assert torch.equal(dequantize(narrow), dequantize(wide))


@given(
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    N=st.integers(1, 40),
    first=st.none() | st.integers(-45, 45),
    last=st.none() | st.integers(-45, 45),
)
def test_dequantize_of_a_slice_of_rows_equals_the_rows_of_all(
    bits: int, symmetric: bool, N: int, first: int | None, last: int | None
) -> None:
    weight, _ = random_weight(N, 64, QuantScheme(bits, 32, symmetric))
    rows = slice(first, last)
    assert torch.equal(dequantize(weight, rows=rows), dequantize(weight)[rows])


@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantize_of_every_other_row(symmetric: bool) -> None:
    weight, _ = random_weight(24, 64, QuantScheme(4, 32, symmetric))
    assert torch.equal(dequantize(weight, rows=slice(1, 20, 3)), dequantize(weight)[1:20:3])


# Shapes and names


@pytest.mark.parametrize(
    ("count", "bits", "words"), [(0, 4, 0), (1, 4, 1), (8, 4, 1), (9, 4, 2), (4, 8, 1), (5, 8, 2), (13696, 4, 1712)]
)
def test_packed_width_rounds_up(count: int, bits: int, words: int) -> None:
    assert packed_width(count, bits) == words


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 128), (8, 64), (8, None), (4, None)])
def test_declared_shapes_are_those_of_the_tensors(bits: int, group_size: int | None, symmetric: bool) -> None:
    scheme = QuantScheme(bits, group_size, symmetric)
    weight, _ = random_weight(13, 256, scheme)
    declared = packed_tensor_shapes(13, 256, scheme)
    tensors = dict(weight.tensors())
    assert list(tensors) == list(declared)
    spelled = {torch.int32: "I32", torch.int64: "I64", torch.float32: "F32"}
    for suffix, tensor in tensors.items():
        shape, dtypes = declared[suffix]
        assert tuple(tensor.shape) == shape
        assert spelled[tensor.dtype] in dtypes
    assert tensors["weight_shape"].tolist() == [13, 256]
    assert weight.nbytes == sum(t.nbytes for suffix, t in tensors.items() if suffix != "weight_shape")


def test_declared_shapes_of_a_real_projection() -> None:
    shapes = packed_tensor_shapes(4096, 13696, QuantScheme(4, 32, symmetric=False))
    assert {suffix: shape for suffix, (shape, _) in shapes.items()} == {
        "weight_packed": (4096, 1712),
        "weight_scale": (4096, 428),
        "weight_shape": (2,),
        "weight_zero_point": (512, 428),
    }


# The library whose format it is


@pytest.mark.transformers
@pytest.mark.parametrize(("N", "K"), [(1, 8), (3, 37), (7, 64), (16, 13696)])
@each_bits
def test_packs_and_unpacks_as_compressed_tensors_does(bits: int, N: int, K: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    q = random_values(bits, N, K)
    theirs = pack_to_int32(q, bits)
    assert torch.equal(pack(q, bits), theirs)
    assert torch.equal(unpack(theirs, bits, K), unpack_from_int32(theirs, bits, q.shape))


@pytest.mark.transformers
@pytest.mark.parametrize(("N", "G"), [(1, 1), (13, 3), (32, 4), (37, 107)])
@each_bits
def test_packs_zero_points_as_compressed_tensors_does(bits: int, N: int, G: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    zero_points = random_values(bits, N, G)
    theirs = pack_to_int32(zero_points, bits, packed_dim=0)
    assert torch.equal(pack_zero_points(zero_points, bits), theirs)
    assert torch.equal(
        unpack_zero_points(theirs, bits, N), unpack_from_int32(theirs, bits, zero_points.shape, packed_dim=0)
    )
