"""Keys and values of the tokens seen so far, in memory that is allocated once.

Knows shapes and positions; must not know the model. A layer appends and gets back views over everything up to the
new tokens, so nothing is copied or concatenated as the conversation grows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4run.config import ModelConfig
from glm4run.kv_rows import KVLayer, KVRows


class KVCache:
    """Keys and values of one sequence: `layers`, each with rows [KVH, capacity].

    `position` is the number of tokens held. `append` writes a layer's part of the next tokens without moving
    `position`; `advance` moves it once all layers have written.
    """

    def __init__(self, config: ModelConfig, capacity: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = capacity
        self.position = 0
        shape = (config.num_key_value_heads, capacity, config.head_dim)

        def rows() -> KVRows:
            # `empty`: a page costs memory only once a token has been written to it.
            return KVRows(torch.empty(shape, dtype=dtype, device=device))

        self.layers = [KVLayer(rows(), rows()) for _ in range(config.num_hidden_layers)]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes key and value [KVH, T, D] behind `position`; returns views [KVH, position + T, D] of all so far."""
        end = self.require(key.shape[1])
        keys, values = self.layers[layer].keys.data, self.layers[layer].values.data
        keys[:, self.position : end] = key
        values[:, self.position : end] = value
        return keys[:, :end], values[:, :end]

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

    def truncate(self, position: int) -> None:
        """Forgets every token from `position` on; costs nothing."""
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot truncate a cache of {self.position} tokens to {position}")
        self.position = position

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """The memory of a layer, by name; the token axis second."""
        return {"keys": self.layers[layer].keys.data, "values": self.layers[layer].values.data}

    def rows(self, layer: int, start: int, end: int) -> dict[str, Tensor]:
        """What a layer holds of the tokens `start` to `end`, by name: views, the token axis second."""
        return {name: tensor[:, start:end] for name, tensor in self.tensors(layer).items()}

    def restore(self, layer: int, start: int, rows: dict[str, Tensor]) -> None:
        """Writes what `rows` gave back at `start`; `position` stays. Raises ValueError where shape or dtype differ."""
        for name, target in self.rows(layer, start, start + next(iter(rows.values())).shape[1]).items():
            if rows[name].shape != target.shape or rows[name].dtype != target.dtype:
                raise ValueError(f"{name} are {rows[name].dtype} {tuple(rows[name].shape)}, the cache's are not")
            target.copy_(rows[name])

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(
            t.numel() * t.element_size() for layer in range(len(self.layers)) for t in self.tensors(layer).values()
        )
