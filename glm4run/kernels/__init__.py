"""The backends that multiply by a packed weight, behind one protocol, and the choice between them.

A backend arranges a `PackedWeight` once (`prepack`) and multiplies by it many times (`linear`). The choice is made
once, at load. A backend that the user named never falls back; `auto` says what it took and why.
To add one: a module with a class that has these members, and a line in `_BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from glm4run.errors import BackendError, UsageError
from glm4run.qformat import PackedWeight
from glm4run.quant_config import Kind, QuantScheme

# How activations meet a packed weight: rounded to int8 or int16 on the fly, which is faster on a CPU, or left as they
# are (bf16, or whatever float dtype the model computes in).
Activations = Literal["auto", "int8", "int16", "bf16"]
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)


@dataclass(frozen=True)
class LinearSpec:
    """What a backend is asked to run: weight [N, K], its scheme, and the device and dtype of the activations."""

    out_features: int
    in_features: int
    scheme: QuantScheme
    device: torch.device
    dtype: torch.dtype
    activations: Activations = "auto"


class Prepacked(Protocol):
    """A weight in a backend's own arrangement."""

    @property
    def spec(self) -> LinearSpec: ...
    @property
    def nbytes(self) -> int: ...


class MappedFile(Protocol):
    """A file in memory for as long as the object lives."""

    @property
    def address(self) -> int: ...
    def drop(self, address: int, nbytes: int) -> None:
        """Takes the pages from `address` on out of the process; what is read there comes from the file again."""
        ...


@dataclass(frozen=True)
class FileRange:
    """Where the packed values of a weight lie: consecutive rows from byte `offset` of an open file."""

    descriptor: int
    offset: int
    name: str  # for messages
    mapping: MappedFile | None = None  # the file in memory; whoever reads there holds it


class WeightSource(Protocol):
    """A weight that may still lie in its file. `PackedWeight` is one that does not.

    A weight of kind `int` gives its parts by name; one of another library's gives what is stored, for that library.
    """

    @property
    def scale_dtype(self) -> torch.dtype: ...

    def whole(self) -> PackedWeight:
        """All of it, in memory."""
        ...

    def side_tensors(self) -> tuple[Tensor, Tensor | None]:
        """Scales and packed zero points alone."""
        ...

    def stored(self) -> Mapping[str, Tensor]:
        """Every stored tensor of the linear but its bias, by suffix: just `weight` where it is not quantized yet."""
        ...

    def location(self) -> FileRange | None:
        """Where the packed values are, for a backend that reads them itself; None where they are in memory."""
        ...


class Backend(Protocol):
    """One way of computing x W^T from packed weights."""

    @property
    def name(self) -> str: ...
    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of weights that it reads; it is never asked about others."""
        ...

    @property
    def devices(self) -> tuple[str, ...]:
        """The types of devices that it is for: cpu, cuda. `auto` says nothing about backends for others."""
        ...

    def why_unavailable(self, spec: LinearSpec) -> str | None:
        """None if this backend can run `spec` on this machine, else the reason in one clause."""
        ...

    def describe(self) -> str:
        """The name, and which kernels it really runs on this machine."""
        ...

    def prepacked_bytes(self, spec: LinearSpec, stored_bytes: int) -> int:
        """What `prepack` will keep of a weight whose packed values, scales and zero points take `stored_bytes`."""
        ...

    def prepack(self, weight: WeightSource, spec: LinearSpec) -> Prepacked:
        """Arranges a weight for `linear`. May keep the tensors of `weight.whole()`, or drop them."""
        ...

    def linear(self, x: Tensor, weight: Prepacked, bias: Tensor | None = None) -> Tensor:
        """x [M, K] times the weight's transpose, plus bias [N] (in the dtype of x): [M, N] in the dtype of x."""
        ...

    def linear_together(self, x: Tensor, parts: Sequence[tuple[Prepacked, Tensor | None]]) -> list[Tensor]:
        """`linear` of one x with several weights and their biases."""
        ...


# Name to where it lives, best first: `auto` takes the first that can run every linear of a model.
_BACKENDS = {
    "native": ("glm4run.kernels.cpu.backend", "NativeBackend"),
    "triton": ("glm4run.kernels.triton.backend", "TritonBackend"),
    "torch": ("glm4run.kernels.torch_ops", "TorchBackend"),
    "reference": ("glm4run.kernels.reference", "ReferenceBackend"),
    "bitsandbytes": ("glm4run.kernels.bitsandbytes", "BitsandbytesBackend"),
    "quanto": ("glm4run.kernels.quanto", "QuantoBackend"),
}
BACKEND_NAMES = tuple(_BACKENDS)


def load_backend(name: str) -> Backend:
    """The backend called `name`. Raises UsageError for an unknown name."""
    if name not in _BACKENDS:
        raise UsageError(f"no backend {name!r}", hint=f"one of: auto, {', '.join(BACKEND_NAMES)}")
    module, attribute = _BACKENDS[name]
    backend: Backend = getattr(import_module(module), attribute)()
    return backend


def select_backend(name: str, specs: Iterable[LinearSpec]) -> tuple[Backend, str]:
    """The backend for a model's linears and, in one clause, why it was taken.

    Raises:
        BackendError: the named backend cannot run one of the linears.
    """
    wanted = list(dict.fromkeys(specs))
    if name != "auto":
        backend = load_backend(name)
        reason = _first_reason(backend, wanted)
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot run this model: {reason}", hint="use --backend auto")
        return backend, "asked for"
    refused: list[str] = []
    for candidate in BACKEND_NAMES:
        backend = load_backend(candidate)
        reason = _first_reason(backend, wanted)
        if reason is None:
            return backend, "; ".join(refused) or _why_first(wanted)
        if any(spec.scheme.kind in backend.kinds and spec.device.type in backend.devices for spec in wanted):
            refused.append(f"{candidate} cannot: {reason}")
    raise BackendError(f"no backend can run this model: {'; '.join(refused)}")


def _why_first(specs: list[LinearSpec]) -> str:
    foreign = next((spec.scheme.kind for spec in specs if spec.scheme.kind != "int"), None)
    return "the fastest that is built in" if foreign is None else f"it reads {foreign}"


def _first_reason(backend: Backend, specs: list[LinearSpec]) -> str | None:
    foreign = next((spec.scheme for spec in specs if spec.scheme.kind not in backend.kinds), None)
    if foreign is not None:
        return f"it reads {', '.join(backend.kinds)}, not {foreign.describe()}"
    reasons = (backend.why_unavailable(spec) for spec in specs)
    return next((reason for reason in reasons if reason is not None), None)
