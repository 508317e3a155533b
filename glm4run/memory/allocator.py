"""A model of PyTorch's CUDA caching allocator: what it reserves from the device for a list of tensors that come and go.

Requests are rounded to 512 bytes. Up to 1 MiB they share segments of 2 MiB, up to 10 MiB segments of 20 MiB, larger
ones get a segment of their own, rounded to 2 MiB. A free block is reused by best fit and split where enough is left; a
segment goes back to the device only when a request fails otherwise. Source: c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field

from glm4run.memory.sizes import MIB

MIN_BLOCK = 512
SMALL_REQUEST, LARGE_REQUEST = MIB, 10 * MIB
SMALL_SEGMENT, LARGE_SEGMENT, ROUND_LARGE = 2 * MIB, 20 * MIB, 2 * MIB


class DeviceFullError(Exception):
    """A request that does not fit, even after every free segment went back to the device."""


@dataclass(eq=False)
class _Block:
    size: int
    small: bool
    address: int  # decides between free blocks of one size, as in the original
    free: bool = False
    before: _Block | None = None
    after: _Block | None = None


@dataclass
class CachingAllocator:
    """`capacity` bounds what may be reserved; None for a device without end."""

    capacity: int | None = None
    reserved: int = 0
    allocated: int = 0
    peak_reserved: int = 0
    peak_allocated: int = 0
    retries: int = 0  # times that cached segments had to go back
    _next_address: int = 0
    _blocks: dict[object, _Block] = field(default_factory=dict)
    _free: dict[bool, list[tuple[int, int, _Block]]] = field(default_factory=lambda: {True: [], False: []})

    def allocate(self, key: object, nbytes: int) -> None:
        """Takes memory for the tensor `key`. Raises DeviceFullError where there is none."""
        if nbytes == 0:
            return
        size = -(-nbytes // MIN_BLOCK) * MIN_BLOCK
        small = size <= SMALL_REQUEST
        block = self._take_free(size, small) or self._new_segment(size, small)
        left = block.size - size
        if left >= MIN_BLOCK if small else left > SMALL_REQUEST:
            rest = _Block(left, small, block.address + size, before=block, after=block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, size
            self._release(rest)
        self._blocks[key] = block
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, key: object) -> None:
        """Gives back the memory of `key` to the cache, joined with free neighbours."""
        block = self._blocks.pop(key, None)
        if block is None:
            return
        self.allocated -= block.size
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                self._withdraw(neighbour)
                block = _join(neighbour, block) if neighbour is block.before else _join(block, neighbour)
        self._release(block)

    def replay(self, events: Iterable[tuple[object, int]]) -> None:
        """(key, bytes) allocates, (key, negative bytes) frees."""
        for key, nbytes in events:
            if nbytes >= 0:
                self.allocate(key, nbytes)
            else:
                self.free(key)

    def _take_free(self, size: int, small: bool) -> _Block | None:
        pool = self._free[small]
        at = bisect.bisect_left(pool, (size, -1))
        return self._withdraw(pool[at][2]) if at < len(pool) else None

    def _new_segment(self, size: int, small: bool) -> _Block:
        if small:
            segment = SMALL_SEGMENT
        else:
            segment = LARGE_SEGMENT if size < LARGE_REQUEST else -(-size // ROUND_LARGE) * ROUND_LARGE
        if self.capacity is not None and self.reserved + segment > self.capacity:
            self._return_segments()
            if self.reserved + segment > self.capacity:
                raise DeviceFullError(f"{segment} bytes more than {self.reserved} of {self.capacity}")
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self._next_address += segment
        return _Block(segment, small, self._next_address - segment)

    def _return_segments(self) -> None:
        self.retries += 1
        for small in (True, False):
            for _, _, block in list(self._free[small]):
                if block.before is None and block.after is None:
                    self._withdraw(block)
                    self.reserved -= block.size

    def _release(self, block: _Block) -> None:
        block.free = True
        bisect.insort(self._free[block.small], (block.size, block.address, block))

    def _withdraw(self, block: _Block) -> _Block:
        pool = self._free[block.small]
        pool.pop(bisect.bisect_left(pool, (block.size, block.address)))
        block.free = False
        return block


def _join(first: _Block, second: _Block) -> _Block:
    first.size += second.size
    first.after = second.after
    if second.after is not None:
        second.after.before = first
    return first


def reserved_for_equal(nbytes: int, count: int) -> int:
    """`reserved_for` of `count` tensors of one size, without a replay."""
    size = -(-nbytes // MIN_BLOCK) * MIN_BLOCK
    if size == 0:
        return 0
    if size >= LARGE_REQUEST:
        return count * -(-size // ROUND_LARGE) * ROUND_LARGE
    segment = SMALL_SEGMENT if size <= SMALL_REQUEST else LARGE_SEGMENT
    return -(-count // (segment // size)) * segment


def reserved_for(sizes: Iterable[int]) -> int:
    """What tensors that stay reserve."""
    allocator = CachingAllocator()
    allocator.replay(enumerate(sizes))
    return allocator.reserved
