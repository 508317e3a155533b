"""The model of PyTorch's caching allocator: its published constants, reuse, splitting, merging, giving back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4run.memory import MIB
from glm4run.memory.allocator import CachingAllocator, DeviceFullError, reserved_for, reserved_for_equal


@pytest.mark.parametrize(
    ("nbytes", "reserved"),
    [
        *((0, 0), (1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB - 512, 20 * MIB)),
        *((10 * MIB, 10 * MIB), (10 * MIB + 1, 12 * MIB), (33 * MIB, 34 * MIB)),
    ],
)
def test_segment_of_one_tensor(nbytes: int, reserved: int) -> None:
    assert reserved_for([nbytes]) == reserved


def test_small_tensors_share_a_segment() -> None:
    assert reserved_for([512 * 1024] * 4) == 2 * MIB
    assert reserved_for([512 * 1024] * 5) == 4 * MIB
    assert reserved_for([9 * MIB] * 2) == 20 * MIB
    assert reserved_for([9 * MIB] * 3) == 40 * MIB


def test_requests_are_rounded_to_512_bytes() -> None:
    allocator = CachingAllocator()
    allocator.allocate("a", 1)
    assert allocator.allocated == 512


def test_free_block_is_used_again_and_the_best_fit_first() -> None:
    allocator = CachingAllocator()
    for key, size in (("large", 40 * MIB), ("middle", 24 * MIB)):
        allocator.allocate(key, size)
    allocator.free("large")
    allocator.free("middle")
    allocator.allocate("new", 23 * MIB)  # of the 24 MiB block: what is left, 1 MiB, is not worth a split
    allocator.allocate("other", 40 * MIB)
    assert allocator.reserved == 64 * MIB
    assert allocator.allocated == 64 * MIB


def test_neighbours_merge() -> None:
    allocator = CachingAllocator()
    allocator.allocate("whole", 60 * MIB)
    allocator.free("whole")
    for key in "abc":
        allocator.allocate(key, 20 * MIB)
    for key in "acb":
        allocator.free(key)
    allocator.allocate("whole", 60 * MIB)
    assert allocator.reserved == 60 * MIB


def test_cached_segments_go_back_before_a_request_fails() -> None:
    allocator = CachingAllocator(capacity=100 * MIB)
    allocator.allocate("a", 60 * MIB)
    allocator.free("a")
    allocator.allocate("b", 80 * MIB)
    assert (allocator.retries, allocator.reserved) == (1, 80 * MIB)
    with pytest.raises(DeviceFullError):
        allocator.allocate("c", 40 * MIB)


@given(st.integers(0, 64 * MIB), st.integers(1, 100))
def test_equal_tensors_have_a_closed_form(nbytes: int, count: int) -> None:
    assert reserved_for_equal(nbytes, count) == reserved_for([nbytes] * count)


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 64 * MIB)), max_size=60))
def test_whatever_comes_and_goes_adds_up(requests: list[tuple[int, int]]) -> None:
    allocator = CachingAllocator()
    live: dict[int, int] = {}
    for key, nbytes in requests:
        if key in live:
            allocator.free(key)
            del live[key]
        else:
            allocator.allocate(key, nbytes)
            live[key] = nbytes
        assert sum(live.values()) <= allocator.allocated <= allocator.reserved <= allocator.peak_reserved
    for key in live:
        allocator.free(key)
    assert allocator.allocated == 0
    allocator._return_segments()
    assert allocator.reserved == 0  # everything merged back into whole segments
