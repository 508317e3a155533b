"""The order in which numbers lie is nobody's matter but the kernels': what is written is what is read."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from glm4run.kv_cache import KVCache
from glm4run.kv_format import KVFormat, parse_kv_bits, rows_for
from glm4run.kv_order import Order, cpu_orders, put, taken
from tests.glm4run.test_kv_cache import CONFIG

CPU = torch.device("cpu")


WIDTH = 64


KINDS = (torch.int8, torch.bfloat16)


def empty(order: Order, capacity: int, kind: torch.dtype = torch.int8) -> Tensor:
    stored = torch.uint8 if order is Order.KEYS and kind == torch.int8 else kind
    return torch.full((2, capacity, WIDTH), 99, dtype=stored)


def rows(count: int, kind: torch.dtype = torch.int8) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(-127, 128, (2, count, WIDTH), generator=generator, dtype=torch.int8).to(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", Order)
def test_rows_are_taken_as_they_were_put_whatever_part(order: Order, kind: torch.dtype) -> None:
    whole, data = rows(141, kind), empty(order, 192, kind)
    edges = (0, 1, 3, 16, 60, 64, 65, 128, 130, 141)
    for first, last in itertools.pairwise(edges):
        put(data, order, first, whole[:, first:last])
    for start, end in itertools.combinations_with_replacement(edges, 2):
        assert torch.equal(taken(data, order, start, end), whole[:, start:end]), (start, end)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", Order)
def test_putting_rows_touches_no_others(order: Order, kind: torch.dtype) -> None:
    data, kept = empty(order, 128, kind), rows(128, kind)
    put(data, order, 0, kept)
    put(data, order, 62, rows(5, kind))
    expected = torch.cat((kept[:, :62], rows(5, kind), kept[:, 67:]), dim=1)
    assert torch.equal(taken(data, order, 0, 128), expected)


@pytest.mark.parametrize(("kind", "word", "above"), [(torch.int8, 4, 128), (torch.bfloat16, 2, 0)])
def test_numbers_lie_where_the_library_reads_them(kind: torch.dtype, word: int, above: int) -> None:
    """Source: `place_of` of kernels.h."""
    whole = rows(128, kind)
    keys, values = empty(Order.KEYS, 128, kind), empty(Order.VALUES, 128, kind)
    put(keys, Order.KEYS, 0, whole)
    put(values, Order.VALUES, 0, whole)
    for s, d in itertools.product((0, 1, 15, 16, 63, 64, 127), (0, 3, 4, 15, 16, 63)):
        at = s // 16 * 16 * WIDTH + d // word * 16 * word + s % 16 * word + d % word
        assert torch.equal(keys.flatten(1)[:, at].int(), whole[:, s, d].int() + above)
        at = s // 64 * 64 * WIDTH + d // 16 * 1024 + s % 64 // word * 16 * word + d % 16 * word + s % word
        assert torch.equal(values.flatten(1)[:, at], whole[:, s, d])


WIDE = dataclasses.replace(CONFIG, head_dim=WIDTH)


def tokens(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, WIDTH, generator=generator), torch.randn(2, count, WIDTH, generator=generator)


def cache_of(kept: str, for_cpu: bool | None, capacity: int = 100) -> KVCache:
    return KVCache(
        WIDE,
        capacity,
        dtype=torch.bfloat16,
        device=CPU,
        kv_format=parse_kv_bits(kept),
        for_cpu=for_cpu,
        floats_for_cpu=bool(for_cpu),
    )


@pytest.mark.parametrize("kept", ["8", "8:4", "16:8", "16"])
def test_a_cache_reads_the_same_in_either_order(kept: str) -> None:
    caches = [cache_of(kept, for_cpu) for for_cpu in (True, False)]
    for first, count in ((0, 55), (55, 1), (56, 33)):
        read = [cache.append(1, *tokens(count, seed=first)) for cache in caches]
        for one, other in zip(*read, strict=True):
            assert torch.equal(one, other)
        for cache in caches:
            cache.advance(count)
    for start, end in ((0, 89), (3, 3), (7, 66)):
        one, other = (cache.rows(1, start, end) for cache in caches)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kept", ["8", "16"])
@pytest.mark.parametrize("there", [True, False])
def test_rows_of_one_order_restore_into_the_other(there: bool, kept: str) -> None:
    source, target = cache_of(kept, there), cache_of(kept, not there)
    source.append(2, *tokens(17, seed=1))
    target.append(2, *tokens(17, seed=2))
    before = {name: tensor.clone() for name, tensor in target.rows(2, 0, 17).items()}
    target.restore(2, 5, source.rows(2, 3, 10))
    for name, tensor in target.rows(2, 0, 17).items():
        expected = torch.cat((before[name][:, :5], source.rows(2, 3, 10)[name], before[name][:, 12:]), dim=1)
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("kept", ["8", "16"])
def test_a_fork_holds_the_same(kept: str) -> None:
    source, fork = cache_of(kept, True), cache_of(kept, True)
    for layer in range(len(source.layers)):
        source.append(layer, *tokens(90, seed=layer))
    source.advance(90)
    fork.copy_from(source, 67)
    for name, tensor in fork.rows(1, 0, 67).items():
        assert torch.equal(tensor, source.rows(1, 0, 67)[name])


def test_rows_beyond_the_memory_are_refused() -> None:
    cache, other = cache_of("8", True, capacity=8), cache_of("8", True)
    other.append(0, *tokens(65, seed=1))
    with pytest.raises(ValueError, match="expected were"):
        cache.restore(0, 2, other.rows(0, 0, 65))


def test_a_cache_lies_as_a_cpu_takes_it_where_it_is_on_one() -> None:
    layer = cache_of("8", None).layers[0]
    assert (layer.keys.order, layer.values.order) == cpu_orders(WIDTH) == (Order.KEYS, Order.VALUES)
    assert layer.values.data.shape[1] == rows_for(100) == 128
    for kept in ("4", "16"):  # torch's operations read floats as they lie
        layer = cache_of(kept, None).layers[0]
        assert (layer.keys.order, layer.values.order) == (Order.ROWS, Order.ROWS)
    layer = cache_of("16", True).layers[0]
    assert (layer.keys.order, layer.values.order) == (Order.KEYS, Order.VALUES)
    wide = KVCache(WIDE, 8, dtype=torch.float32, device=CPU, floats_for_cpu=True)
    assert wide.layers[0].keys.order is Order.ROWS  # two to a word are bf16
    narrow = KVCache(CONFIG, 8, dtype=torch.float32, device=CPU, kv_format=KVFormat(8, 8))
    assert narrow.layers[0].keys.order is Order.ROWS  # of 16 columns
    meta = KVCache(WIDE, 8, dtype=torch.float32, device=torch.device("meta"), kv_format=KVFormat(8, 8))
    assert meta.layers[0].keys.order is Order.ROWS
