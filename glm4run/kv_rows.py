"""How keys and values are kept: rows of one KV head and one position each, as floats.

The one description that the cache, the kernels and the files share. Knows shapes and dtypes; must not know the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class KVRows:
    """Keys, or values, of one layer and one sequence.

    data: floats [KVH, S, D], the rows of a head one after the other.
    """

    data: Tensor

    @property
    def positions(self) -> int:
        """S, the rows that there is room for."""
        return self.data.shape[-2]


@dataclass(frozen=True, eq=False)
class KVLayer:
    """What one layer keeps of one sequence."""

    keys: KVRows
    values: KVRows
