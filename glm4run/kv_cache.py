"""Keys and values of the tokens seen so far, in memory that is allocated once.

Knows shapes and positions; must not know the model. A layer appends and gets back views over everything up to the
new tokens, so nothing is copied or concatenated as the conversation grows. To trim is to move `position`, to fork is
to copy rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from glm4run.config import ModelConfig
from glm4run.huge_pages import HugePages
from glm4run.kv_format import KVFormat, rows_for, tensor_widths
from glm4run.kv_order import Order, cpu_orders
from glm4run.kv_rows import KVLayer, KVRows, new_rows

HUGE_PAGES_EVERY = 1024  # tokens
ALIGNMENT = 64


class _Memory:
    """One run of memory on the CPU, which tensors are cut from: its huge pages are then nearly all of it."""

    def __init__(self, nbytes: int) -> None:
        self.memory = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8)
        self.used = -self.memory.data_ptr() % ALIGNMENT
        self.pages = HugePages(self.memory.data_ptr(), nbytes)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        start, nbytes = self.used, math.prod(shape) * dtype.itemsize
        self.used += _aligned(nbytes)
        return self.memory[start : start + nbytes].view(dtype).view(shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class KVCache:
    """Keys and values of one sequence: `layers`, each with rows [KVH, capacity].

    `position` is the number of tokens held. `append` writes a layer's part of the next tokens without moving
    `position`; `advance` moves it once all layers have written.
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kv_format: KVFormat = KVFormat(),  # noqa: B008 (frozen)
        key_offsets: Sequence[Tensor] = (),
        for_cpu: bool | None = None,
        floats_for_cpu: bool = False,
    ) -> None:
        """`key_offsets`: of each layer float32 [KVH, D], what its keys have in common (`key_offset.py`); none are taken
        off where there are none. `for_cpu`: whether rows of 8 bits lie as a CPU's instructions take them; None: where
        they are on one. `floats_for_cpu`: whether bf16 do, which the torch operations then have to copy."""
        self.capacity = capacity
        self.position = 0
        self.format = kv_format
        heads, room, width = config.num_key_value_heads, rows_for(capacity), config.head_dim
        self._in_huge_pages = 0  # tokens
        self._memory: _Memory | None = None
        if device.type == "cpu":
            both = (kv_format.key_bits, kv_format.value_bits)
            widths = [each for bits in both for each in tensor_widths(width, bits, dtype.itemsize)]
            self._memory = _Memory(config.num_hidden_layers * sum(_aligned(heads * room * each) for each in widths))
        quantized_for_cpu = device.type == "cpu" if for_cpu is None else for_cpu
        key_order, value_order = cpu_orders(width)

        def rows(bits: int, order: Order, offset: Tensor | None = None) -> KVRows:
            arranged = floats_for_cpu if bits == 16 else quantized_for_cpu
            order = order if arranged else Order.ROWS
            empty = None if self._memory is None else self._memory.empty
            return new_rows(
                heads, room, width, bits, dtype=dtype, device=device, offset=offset, order=order, empty=empty
            )

        offsets: Sequence[Tensor | None] = key_offsets or [None] * config.num_hidden_layers
        self.layers = [
            KVLayer(rows(kv_format.key_bits, key_order, offset), rows(kv_format.value_bits, value_order))
            for offset in offsets
        ]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes key and value [KVH, T, D] behind `position`; returns all so far [KVH, position + T, D], as they read.

        Those are views where the cache holds floats as rows.
        """
        end = self.require(key.shape[1])
        keys, values = self.layers[layer].keys, self.layers[layer].values
        keys.write(self.position, key)
        values.write(self.position, value)
        return keys.read(end), values.read(end)

    def require(self, count: int) -> int:
        """The position behind `count` more tokens. Raises ValueError where they do not fit."""
        end = self.position + count
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {end} were asked for")
        return end

    def advance(self, count: int) -> None:
        """Makes the `count` tokens that every layer has appended part of the past."""
        assert self.position + count <= self.capacity
        self.position += count
        self._grow_huge_pages()

    def truncate(self, position: int) -> None:
        """Forgets every token from `position` on; costs nothing."""
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot truncate a cache of {self.position} tokens to {position}")
        self.position = position

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """The memory of a layer, by name; the token axis second."""
        return self.layers[layer].tensors()

    def rows(self, layer: int, start: int, end: int) -> dict[str, Tensor]:
        """What a layer holds of the tokens `start` to `end`, by name, the token axis second: the same in whatever order
        it lies, and views where it lies as rows."""
        return self.layers[layer].rows(start, end)

    def restore(self, layer: int, start: int, rows: dict[str, Tensor]) -> None:
        """Writes what `rows` gave back at `start`; `position` stays. Raises ValueError where shape or dtype differ."""
        self.layers[layer].restore(start, rows)

    def copy_from(self, other: KVCache, count: int) -> None:
        """Becomes the first `count` tokens of `other`, a cache of the same model and format: the same bits.

        A copy of what a forward would have to compute: 40 KiB a token for GLM-4-9B. The rows of a head stay one run of
        memory, which is what every kernel reads.

        Raises:
            ValueError: `other` holds fewer tokens, or this cache has no room for them.
        """
        if not 0 <= count <= min(other.position, self.capacity):
            raise ValueError(f"{count} tokens of {other.position} do not go into a cache of {self.capacity}")
        if other is not self:
            for mine, theirs in zip(self.layers, other.layers, strict=True):
                mine.keys.copy_from(theirs.keys, count)
                mine.values.copy_from(theirs.values, count)
        self.position = count
        self._grow_huge_pages()

    def _grow_huge_pages(self) -> None:
        tokens = self.position // HUGE_PAGES_EVERY * HUGE_PAGES_EVERY
        if self._memory is None or tokens <= self._in_huge_pages:
            return
        self._in_huge_pages = tokens
        tensors = [tensor for layer in range(len(self.layers)) for tensor in self.tensors(layer).values()]
        self._memory.pages.fill(
            (head.data_ptr(), tokens * head.stride(0) * head.element_size()) for tensor in tensors for head in tensor
        )

    @property
    def bytes_per_token(self) -> int:
        """What keys and values of one token take."""
        return self.nbytes // rows_for(self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(
            t.numel() * t.element_size() for layer in range(len(self.layers)) for t in self.tensors(layer).values()
        )
