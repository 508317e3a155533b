"""Products with packed weights in the native library.

A weight is laid out in panels of 16 rows once (`src/layout.h`) and then read forward, one stream per thread; or its
values stay in their file, mapped into memory, and only scales and zero points are laid out. Such a weight can still be
laid out later, while it is in use (`NativeWeight.move`): products are the same to the bit. Up to 16 tokens run a kernel
that is bound by the stream of values, more tokens a blocked product on the integer units.

Activations are quantized on the fly to int8 or int16 per token and group of 64 (or 32), or kept as floats. int4 weights
take int8 by default: what it adds to their own loss is negligible. int8 weights take int16, since int8 activations
would lose more than the weights did. `docs/quality.md` has the measurements.
"""

from __future__ import annotations

import ctypes
import dataclasses
import weakref
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glm4run.errors import CheckpointError, GenerationError
from glm4run.kernels import LinearSpec, MappedFile, Prepacked, WeightSource
from glm4run.kernels.cpu.library import G4Output, G4Stored, G4Weight, active_isa, native, why_missing
from glm4run.qformat import num_groups, packed_width, unpack_zero_points
from glm4run.quant_config import Kind

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # G4Dtype
ACTIVATION_BITS = {"int8": 8, "int16": 16, "bf16": 0}
MAX_TOGETHER = 3
K_STEP, PANEL_ROWS = 32, 16  # of src/layout.h
SLICE_BYTES = 2 << 20  # a thread, of a weight that moves: a huge page


class NativeWeight:
    """A weight that the library can read. What is its own of that memory is given back with this object."""

    def __init__(self, struct: G4Weight, spec: LinearSpec, memory: _Memory) -> None:
        self.struct, self.spec = struct, spec
        self._memory = memory
        weakref.finalize(self, memory.release)

    @property
    def is_mapped(self) -> bool:
        """Whether the values are the file's own pages."""
        return bool(self.struct.row_bytes) and not self.struct.panels

    @property
    def nbytes(self) -> int:
        """Scales, and values as they lie: in panels or in their file."""
        return _kept_bytes(self.spec, self.struct)

    @property
    def panel_bytes(self) -> int:
        """What the values take once they are laid out."""
        return int(native().g4_laid_out_bytes(ctypes.byref(self.struct)))

    def move(self) -> Generator[None]:
        """Lays mapped values out in panels, a few milliseconds of work at a time, and then takes these for products.

        Products may run meanwhile, in other threads too. Once all is there the file's pages leave this process.

        Raises:
            MemoryError: there is no room; the weight is used as before.
        """
        if not self.is_mapped:
            return
        library, reference = native(), ctypes.byref(self.struct)
        panels = self._memory.allocate(self.panel_bytes)
        try:
            assert self.struct.values is not None
            count = -(-self.struct.rows // PANEL_ROWS)
            each = self.panel_bytes // count
            step = max(1, library.g4_threads() * SLICE_BYTES // each)
            stored = G4Stored(rows=self.struct.values, row_bytes=self.struct.row_bytes)
            for first in range(0, count, step):
                some = min(step, count - first)
                library.g4_lay_out(reference, ctypes.byref(stored), first, some, panels)
                yield
            library.g4_take_panels(reference, panels)
        finally:
            if not self.struct.panels:
                self._memory.free(panels)
        self._memory.leave_file(self.struct.values, self.struct.rows * self.struct.row_bytes)


class NativeBackend:
    """The C++ kernels, on any CPU."""

    name = "native"
    kinds: tuple[Kind, ...] = ("int",)
    devices: tuple[str, ...] = ("cpu",)

    def why_unavailable(self, spec: LinearSpec) -> str | None:
        if spec.device.type != "cpu":
            return f"it has no kernels for {spec.device.type}"
        missing = why_missing()
        if missing is not None:
            return missing
        if spec.dtype not in DTYPE_CODES:
            return f"it has no kernels for {spec.dtype}"
        group = spec.scheme.group_size
        if group is not None and group % K_STEP:
            return f"group size {group} is no multiple of {K_STEP}"
        return None

    def describe(self) -> str:
        return f"native ({active_isa()}, {native().g4_threads()} threads)"

    def prepacked_bytes(self, spec: LinearSpec, stored_bytes: int) -> int:
        code = 2 if _scale_bytes(spec, stored_bytes) == 4 else 0
        return _kept_bytes(spec, _struct(spec, code))

    def prepack(self, weight: WeightSource, spec: LinearSpec) -> NativeWeight:
        """Lays the weight out panel by panel, straight from its file where it lies in one: no second copy exists.

        Values whose file is mapped (`FileRange.mapping`) stay where they are.
        """
        library = native()
        struct = _struct(spec, DTYPE_CODES[weight.scale_dtype])
        memory = _Memory()
        prepacked = NativeWeight(struct, spec, memory)  # from here on it gives the memory back
        struct.side = memory.allocate(int(library.g4_side_bytes(ctypes.byref(struct))))
        scale, zero_words = weight.side_tensors()
        scale = scale.contiguous()
        zero_point = None
        if zero_words is not None:
            zero_point = unpack_zero_points(zero_words, spec.scheme.bits, spec.out_features)  # int8 [N, G]
        zero_address = None if zero_point is None else zero_point.data_ptr()
        library.g4_lay_out_side(ctypes.byref(struct), scale.data_ptr(), zero_address, struct.side)
        _take_values(weight, spec, struct, memory)
        return prepacked

    def linear(self, x: Tensor, weight: Prepacked, bias: Tensor | None = None) -> Tensor:
        """x [M, K] to [M, N] in the dtype of x; bias [N] in that dtype."""
        return self.linear_together(x, [(weight, bias)])[0]

    def linear_together(self, x: Tensor, parts: Sequence[tuple[Prepacked, Tensor | None]]) -> list[Tensor]:
        """The products of one x [M, K] with several weights. Those that go together run as one piece of work."""
        weights = [weight for weight, _ in parts]
        if len(parts) > 1 and not _go_together(weights):
            return [self.linear(x, weight, bias) for weight, bias in parts]
        if x.stride(1) != 1:
            x = x.contiguous()
        tokens = x.shape[0]
        code = DTYPE_CODES[x.dtype]
        results: list[Tensor] = []
        outputs: Any = (G4Output * len(parts))()
        for output, (weight, bias) in zip(outputs, parts, strict=True):
            assert isinstance(weight, NativeWeight)
            assert bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
            y = torch.empty(tokens, weight.spec.out_features, dtype=x.dtype)
            results.append(y)
            output.weight = ctypes.pointer(weight.struct)
            output.bias = None if bias is None else bias.data_ptr()
            output.y, output.stride = y.data_ptr(), weight.spec.out_features
        if tokens == 0:
            return results
        failed = native().g4_linear(x.data_ptr(), x.stride(0), code, tokens, outputs, len(parts))
        if failed:
            raise GenerationError("out of memory for the activations", hint="use a smaller --ctx or a shorter prompt")
        return results


@dataclass
class _Memory:
    """What a weight lies in: pieces of the library's memory, and the file that it is mapped from."""

    pieces: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # address, bytes
    mapping: MappedFile | None = None

    def allocate(self, nbytes: int) -> int:
        address: int | None = native().g4_allocate(nbytes)
        if not address:
            raise MemoryError(f"{nbytes} bytes for a packed weight")
        self.pieces.append((address, nbytes))
        return address

    def free(self, address: int) -> None:
        """Gives one piece back."""
        piece = next(piece for piece in self.pieces if piece[0] == address)
        self.pieces.remove(piece)
        native().g4_free(*piece)

    def leave_file(self, address: int, nbytes: int) -> None:
        """Drops the pages of the file from `address` on, which nothing reads any more."""
        if self.mapping is not None:
            self.mapping.drop(address, nbytes)
            self.mapping = None

    def release(self) -> None:
        """Gives it back when no thread can read it any more: `g4_free` waits for those that are late."""
        for address, nbytes in self.pieces:
            native().g4_free(address, nbytes)
        self.pieces.clear()
        self.mapping = None


def _take_values(weight: WeightSource, spec: LinearSpec, struct: G4Weight, memory: _Memory) -> None:
    """Points `struct` at the weight's values: in their file where that is mapped, else laid out."""
    width, whole = 4 * packed_width(spec.in_features, spec.scheme.bits), _row_bytes(spec)
    place = weight.location() if width == whole else None
    stored = G4Stored(row_bytes=whole)
    if place is None:  # in memory, or rows that end early
        packed = weight.whole().packed.contiguous()
        if width != whole:
            packed = F.pad(packed, (0, (whole - width) // 4))
        stored.rows = packed.data_ptr()
    elif place.mapping is not None:
        struct.values, struct.row_bytes = place.mapping.address + place.offset, whole
        memory.mapping = place.mapping
        return
    else:
        stored.descriptor, stored.offset = place.descriptor, place.offset
    struct.values = memory.allocate(int(native().g4_laid_out_bytes(ctypes.byref(struct))))
    panels = -(-spec.out_features // PANEL_ROWS)
    if native().g4_lay_out(ctypes.byref(struct), ctypes.byref(stored), 0, panels, struct.values) != 0:
        assert place is not None
        raise CheckpointError(f"{place.name} cannot be read to its end", hint="download the file again")


def _row_bytes(spec: LinearSpec) -> int:
    """Of a row that reaches to a multiple of 32 columns."""
    return -(-spec.in_features // K_STEP) * K_STEP * spec.scheme.bits // 8


def _kept_bytes(spec: LinearSpec, struct: G4Weight) -> int:
    """Scales, and values as they lie: in their file, or in panels (which `struct` before it has any values means)."""
    library, reference = native(), ctypes.byref(struct)
    in_file = struct.row_bytes and not struct.panels
    values = spec.out_features * struct.row_bytes if in_file else int(library.g4_laid_out_bytes(reference))
    return values + int(library.g4_side_bytes(reference))


def _go_together(weights: Sequence[Prepacked]) -> bool:
    """Whether the weights read the same activations in the same form (`activation_group` in src/layout.h)."""
    native_weights = [weight for weight in weights if isinstance(weight, NativeWeight)]
    assert len(native_weights) == len(weights)
    kinds = {(w.struct.activations, w.spec.in_features, w.spec.scheme) for w in native_weights}
    return len(kinds) == 1 and len(weights) <= MAX_TOGETHER


def _activation_bits(spec: LinearSpec) -> int:
    """8 or 16 for activations quantized on the fly, 0 where they stay floats."""
    default = "int8" if spec.scheme.bits == 4 else "int16"
    return ACTIVATION_BITS[default if spec.activations == "auto" else spec.activations]


def _struct(spec: LinearSpec, scale_code: int) -> G4Weight:
    struct = G4Weight(
        side=None,
        values=None,
        row_bytes=0,
        rows=spec.out_features,
        columns=spec.in_features,
        bits=spec.scheme.bits,
        group=spec.scheme.group_size or 0,
        scale_dtype=scale_code,
        asymmetric=not spec.scheme.symmetric,
        activations=_activation_bits(spec),
    )
    struct.together = native().g4_panels_together(ctypes.byref(struct))
    return struct


def _scale_bytes(spec: LinearSpec, stored_bytes: int) -> int:
    """Bytes of one stored scale, from the bytes of values, scales and zero points together."""
    bits, groups = spec.scheme.bits, num_groups(spec.in_features, spec.scheme)
    values = 4 * spec.out_features * packed_width(spec.in_features, bits)
    zero_points = 0 if spec.scheme.symmetric else 4 * packed_width(spec.out_features, bits) * groups
    return (stored_bytes - values - zero_points) // (spec.out_features * groups)
