"""What packing did: bits per weight, size, and the error of every tensor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4run.quant_config import QuantScheme

SCALE_BITS = 16
WORST = 5


@dataclass(frozen=True)
class TensorReport:
    """One packed linear. `signal` and `noise` are sums of squares: of the weights, and of what rounding changed."""

    name: str
    scheme: QuantScheme
    out_features: int
    in_features: int
    signal: float
    noise: float
    kept: str | None = None  # the method that was kept, where a calibrated one was compared with rounding to nearest
    held_out_error: float | None = None  # relative, of the linear's output over the held-out windows
    held_out_error_rtn: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it, for `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorReport:
        """The inverse of `to_json`."""
        return cls(**{**data, "scheme": QuantScheme(**data["scheme"])})

    @property
    def sqnr_db(self) -> float:
        return sqnr_db([self])

    @property
    def bits_per_weight(self) -> float:
        return self.scheme.bits + SCALE_BITS / (self.scheme.group_size or self.in_features)


@dataclass(frozen=True)
class LayerReport:
    """A calibrated layer: relative error of the residual behind it over the held-out windows, and rounding's."""

    layer: int
    error: float
    error_rtn: float

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class HeldOut:
    """What calibration was done on, and how its method and plain rounding do on what was held out."""

    calibration: Mapping[str, object]
    layers: tuple[LayerReport, ...]
    kl_mean: float
    kl_mean_rtn: float

    def as_json(self, tensors: Iterable[TensorReport]) -> dict[str, Any]:
        """What `glm4run.json` keeps under `calibration`."""
        rounded = [t.name for t in tensors if t.kept == "rtn"]
        return {
            **self.calibration,
            "held_out": {
                "kl_mean": _significant(self.kl_mean),
                "kl_mean_rtn": _significant(self.kl_mean_rtn),
                "layers": [
                    {"layer": x.layer, "error": _significant(x.error), "error_rtn": _significant(x.error_rtn)}
                    for x in self.layers
                ],
                "linears_where_rtn_was_better": rounded,
            },
        }


def _significant(value: float) -> float:
    return float(f"{value:.5g}")


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
    held_out: HeldOut | None = None
    measured: Mapping[str, Any] | None = None  # `evaluation.Evaluation.as_report`

    def worst(self, count: int = WORST) -> list[TensorReport]:
        """The linears that lost most."""
        return sorted(self.tensors, key=lambda t: t.sqnr_db)[:count]

    @property
    def bits_per_weight(self) -> float:
        """Over the packed linears, scales included."""
        return bits_per_weight(self.tensors)

    def by_kind(self) -> dict[str, list[TensorReport]]:
        """Tensors by the last part of their name, in the order of the model."""
        kinds: dict[str, list[TensorReport]] = {}
        for tensor in self.tensors:
            kinds.setdefault(tensor.name.rpartition(".")[2], []).append(tensor)
        return kinds

    def as_json(self) -> dict[str, Any]:
        """The keys of `glm4run.json`."""
        data: dict[str, Any] = {
            "recipe": self.recipe,
            "method": self.method,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "tensors": [_tensor_json(t) for t in self.tensors],
            "report": {
                "total_bytes": self.total_bytes,
                "by_kind": {
                    kind: {
                        "bits_per_weight": round(bits_per_weight(tensors), 4),
                        "sqnr_db": round(sqnr_db(tensors), 2),
                    }
                    for kind, tensors in self.by_kind().items()
                },
                "worst": [t.name for t in self.worst()],
                **(self.measured or {}),
            },
        }
        if self.held_out is not None:
            data["calibration"] = self.held_out.as_json(self.tensors)
        return data


def _tensor_json(tensor: TensorReport) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": tensor.name,
        "bits": tensor.scheme.bits,
        "group_size": tensor.scheme.group_size,
        "sqnr_db": round(tensor.sqnr_db, 2),
    }
    if tensor.kept is not None and tensor.held_out_error is not None and tensor.held_out_error_rtn is not None:
        data["method"] = tensor.kept
        data["held_out_error"] = _significant(tensor.held_out_error)
        data["held_out_error_rtn"] = _significant(tensor.held_out_error_rtn)
    return data


def bits_per_weight(tensors: Iterable[TensorReport]) -> float:
    """Of several packed linears together, scales included."""
    tensors = list(tensors)
    weights = [t.out_features * t.in_features for t in tensors]
    return sum(count * t.bits_per_weight for count, t in zip(weights, tensors, strict=True)) / sum(weights)
