"""The order in which integers of 8 bits lie is nobody's matter but the kernels': what is written is what is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glm4run.kv_cache import KVCache
from glm4run.kv_format import KVFormat, parse_kv_bits, rows_for
from glm4run.kv_order import CPU_ORDERS, Order, put, taken
from tests.glm4run.test_kv_cache import CONFIG, tokens

CPU = torch.device("cpu")


def empty(order: Order, capacity: int, width: int = 6) -> Tensor:
    kind = torch.uint8 if order is Order.UNSIGNED else torch.int8
    return torch.full((2, capacity, width), 99, dtype=kind)


def rows(count: int, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(-127, 128, (2, count, width), generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("order", Order)
def test_rows_are_taken_as_they_were_put_whatever_part(order: Order) -> None:
    whole, data = rows(21), empty(order, 24)
    for first, last in ((0, 1), (1, 3), (3, 4), (4, 12), (12, 18), (18, 21)):
        put(data, order, first, whole[:, first:last])
    for start in range(22):
        for end in range(start, 22):
            assert torch.equal(taken(data, order, start, end), whole[:, start:end]), (start, end)


@pytest.mark.parametrize("order", Order)
def test_putting_rows_touches_no_others(order: Order) -> None:
    data, kept = empty(order, 24), rows(24)
    put(data, order, 0, kept)
    put(data, order, 5, rows(2))
    expected = torch.cat((kept[:, :5], rows(2), kept[:, 7:]), dim=1)
    assert torch.equal(taken(data, order, 0, 24), expected)


def test_bytes_lie_where_the_library_reads_them() -> None:
    whole = rows(8)
    unsigned, fours = empty(Order.UNSIGNED, 8), empty(Order.FOURS, 8)
    put(unsigned, Order.UNSIGNED, 0, whole)
    put(fours, Order.FOURS, 0, whole)
    assert torch.equal(unsigned.int(), whole.int() + 128)
    for position in range(8):
        for column in range(6):
            at = position // 4 * 4 * 6 + column * 4 + position % 4
            assert torch.equal(fours.flatten(1)[:, at], whole[:, position, column])


def cache_of(kept: str, for_cpu: bool | None, capacity: int = 30) -> KVCache:
    kv_format = parse_kv_bits(kept)
    return KVCache(CONFIG, capacity, dtype=torch.float32, device=CPU, kv_format=kv_format, for_cpu=for_cpu)


@pytest.mark.parametrize("kept", ["8", "8:4", "16:8"])
def test_a_cache_reads_the_same_in_either_order(kept: str) -> None:
    caches = [cache_of(kept, for_cpu) for for_cpu in (True, False)]
    for first, count in ((0, 5), (5, 1), (6, 13)):
        read = [cache.append(1, *tokens(count, seed=first)) for cache in caches]
        for one, other in zip(*read, strict=True):
            assert torch.equal(one, other)
        for cache in caches:
            cache.advance(count)
    for start, end in ((0, 19), (3, 3), (7, 18)):
        one, other = (cache.rows(1, start, end) for cache in caches)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("there", [True, False])
def test_rows_of_one_order_restore_into_the_other(there: bool) -> None:
    source, target = cache_of("8", there), cache_of("8", not there)
    source.append(2, *tokens(17, seed=1))
    target.append(2, *tokens(17, seed=2))
    before = {name: tensor.clone() for name, tensor in target.rows(2, 0, 17).items()}
    target.restore(2, 5, source.rows(2, 3, 10))
    for name, tensor in target.rows(2, 0, 17).items():
        expected = torch.cat((before[name][:, :5], source.rows(2, 3, 10)[name], before[name][:, 12:]), dim=1)
        assert torch.equal(tensor, expected), name


def test_rows_beyond_the_memory_are_refused() -> None:
    cache, other = cache_of("8", True, capacity=8), cache_of("8", True)
    other.append(0, *tokens(9, seed=1))
    with pytest.raises(ValueError, match="expected were"):
        cache.restore(0, 2, other.rows(0, 0, 9))


def test_a_cache_lies_as_a_cpu_takes_it_where_it_is_on_one() -> None:
    layer = cache_of("8", None).layers[0]
    assert (layer.keys.order, layer.values.order) == CPU_ORDERS
    assert layer.values.data.shape[1] == rows_for(30) == 32
    for kept in ("4", "16"):
        layer = cache_of(kept, None).layers[0]
        assert (layer.keys.order, layer.values.order) == (Order.ROWS, Order.ROWS)
    meta = KVCache(CONFIG, 8, dtype=torch.float32, device=torch.device("meta"), kv_format=KVFormat(8, 8))
    assert meta.layers[0].keys.order is Order.ROWS
