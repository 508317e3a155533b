"""What packing did: bits per weight, size, and the error of every tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4run.quant_config import QuantScheme

SCALE_BITS = 16


@dataclass(frozen=True)
class TensorReport:
    """One packed linear. `signal` and `noise` are sums of squares: of the weights, and of what rounding changed."""

    name: str
    scheme: QuantScheme
    out_features: int
    in_features: int
    signal: float
    noise: float

    @property
    def sqnr_db(self) -> float:
        return sqnr_db([self])

    @property
    def bits_per_weight(self) -> float:
        return self.scheme.bits + SCALE_BITS / (self.scheme.group_size or self.in_features)


def sqnr_db(tensors: Iterable[TensorReport]) -> float:
    """Signal to quantization noise of several tensors together, in dB; capped where nothing was lost."""
    tensors = list(tensors)
    signal, noise = sum(t.signal for t in tensors), sum(t.noise for t in tensors)
    return 999.0 if noise == 0 or signal == 0 else 10 * math.log10(signal / noise)


@dataclass(frozen=True)
class QuantizeReport:
    """The result of one `quantize` run."""

    output: Path
    recipe: str
    method: str
    tensors: list[TensorReport]
    total_bytes: int
    seconds: float
    notices: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        """Over the packed linears, scales included."""
        weights = [t.out_features * t.in_features for t in self.tensors]
        bits = sum(count * t.bits_per_weight for count, t in zip(weights, self.tensors, strict=True))
        return bits / sum(weights)

    def by_kind(self) -> dict[str, list[TensorReport]]:
        """Tensors by the last part of their name, in the order of the model."""
        kinds: dict[str, list[TensorReport]] = {}
        for tensor in self.tensors:
            kinds.setdefault(tensor.name.rpartition(".")[2], []).append(tensor)
        return kinds

    def as_json(self) -> dict[str, Any]:
        """The keys of `glm4run.json`."""
        return {
            "recipe": self.recipe,
            "method": self.method,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "tensors": [
                {
                    "name": t.name,
                    "bits": t.scheme.bits,
                    "group_size": t.scheme.group_size,
                    "sqnr_db": round(t.sqnr_db, 2),
                }
                for t in self.tensors
            ],
            "report": {
                "total_bytes": self.total_bytes,
                "by_kind": {
                    kind: {
                        "bits_per_weight": round(tensors[0].bits_per_weight, 4),
                        "sqnr_db": round(sqnr_db(tensors), 2),
                    }
                    for kind, tensors in self.by_kind().items()
                },
            },
        }
