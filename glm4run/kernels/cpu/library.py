"""The native library: where it lies, what it offers, which instruction set it uses. No torch.

The instruction set is the best that this machine runs. `GLM4RUN_CPU_ISA` forces one by name, or `none` to do without
the library; `GLM4RUN_CPU_LIBRARY` names another build of it (a sanitizer's, say).
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path

from glm4run.errors import UsageError
from glm4run.machine import default_threads

ABI = 11  # GLM4RUN_ABI in src/abi.h
FILE_NAME = "glm4run_cpu.so"
ISA_VARIABLE, LIBRARY_VARIABLE = "GLM4RUN_CPU_ISA", "GLM4RUN_CPU_LIBRARY"
WITHOUT = "none"


class G4Weight(Structure):
    """A weight; `src/abi.h` explains the fields."""

    _fields_ = (
        ("side", c_void_p),
        ("values", c_void_p),
        ("row_bytes", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
        ("bits", c_int32),
        ("group", c_int32),
        ("scale_dtype", c_int32),
        ("asymmetric", c_int32),
        ("activations", c_int32),
        ("together", c_int32),
        ("panels", c_void_p),
    )


class G4Stored(Structure):
    """Where a weight's values are stored: in memory or in a file."""

    _fields_ = (("rows", c_void_p), ("row_bytes", c_int64), ("offset", c_int64), ("descriptor", c_int32))


class G4Output(Structure):
    """One weight of a product, its bias, and where the result goes."""

    _fields_ = (("weight", POINTER(G4Weight)), ("bias", c_void_p), ("y", c_void_p), ("stride", c_int64))


class G4CacheRows(Structure):
    """Keys or values of one layer and one sequence."""

    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("bits", c_int32),
        ("group", c_int32),
        ("offset", c_void_p),
        ("laid_out", c_int32),
    )


class G4Cache(Structure):
    """What one layer keeps of one sequence."""

    _fields_ = (("keys", G4CacheRows), ("values", G4CacheRows), ("capacity", c_int64), ("dtype", c_int32))


class G4Layer(Structure):
    """One decoder layer whose linears are all prepacked."""

    _fields_ = (
        ("input_norm", c_void_p),
        ("post_attention_norm", c_void_p),
        ("branch_attention_norm", c_void_p),
        ("branch_mlp_norm", c_void_p),
        ("query", G4Output),
        ("key", G4Output),
        ("value", G4Output),
        ("output", G4Output),
        ("gate_up", G4Output),
        ("down", G4Output),
    )


class G4Stack(Structure):
    """All layers of a model."""

    _fields_ = (
        ("layers", POINTER(G4Layer)),
        ("count", c_int64),
        ("hidden", c_int64),
        ("intermediate", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("rotary_half", c_int64),
        ("dtype", c_int32),
        ("eps", c_float),
    )


# Name to result and arguments, as in src/*.cpp.
_SIGNATURES = {
    "g4_isa_name": (c_char_p, (c_int32, POINTER(c_int32))),
    "g4_isa": (c_char_p, ()),
    "g4_set_isa": (c_int32, (c_char_p,)),
    "g4_set_threads": (None, (c_int32,)),
    "g4_threads": (c_int32, ()),
    "g4_allocate": (c_void_p, (c_int64,)),
    "g4_free": (None, (c_void_p, c_int64)),
    "g4_read": (c_uint64, (c_void_p, c_int64, c_int64)),
    "g4_laid_out_bytes": (c_int64, (POINTER(G4Weight),)),
    "g4_panels_together": (c_int32, (POINTER(G4Weight),)),
    "g4_lay_out": (c_int32, (POINTER(G4Weight), POINTER(G4Stored), c_int64, c_int64, c_void_p)),
    "g4_take_panels": (None, (POINTER(G4Weight), c_void_p)),
    "g4_idle_seconds": (c_double, ()),
    "g4_all_finite": (c_int32, (c_void_p, c_int32, c_int64)),
    "g4_side_bytes": (c_int64, (POINTER(G4Weight),)),
    "g4_lay_out_side": (None, (POINTER(G4Weight), c_void_p, c_void_p, c_void_p)),
    "g4_linear": (c_int32, (c_void_p, c_int64, c_int32, c_int64, POINTER(G4Output), c_int32)),
    "g4_stack": (
        c_int32,
        (
            *(POINTER(G4Stack), c_void_p, c_int64, c_int64, POINTER(c_int64)),
            *(c_void_p, c_void_p, POINTER(POINTER(G4Cache))),
        ),
    ),
    "g4_round_pack": (
        c_int32,
        (c_void_p, c_int32, c_int64, c_int64, c_int32, c_int64, c_void_p, c_void_p, POINTER(c_double)),
    ),
    "g4_search_pack": (
        c_int32,
        (
            *(c_void_p, c_int32, c_int64, c_int64, c_int32, c_int64),
            *(c_void_p, c_int32, c_void_p, c_int64, c_int32, c_void_p, c_void_p, POINTER(c_double)),
        ),
    ),
    "g4_rms_norm": (None, (c_void_p, c_int32, c_int64, c_int64, c_void_p, c_float, c_void_p)),
    "g4_silu_mul": (None, (c_void_p, c_int32, c_int64, c_int64, c_void_p)),
    "g4_rope": (None, (c_void_p, c_int32, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int64)),
    "g4_cache_append": (
        None,
        (
            *(POINTER(G4Cache), c_void_p, c_void_p, c_int64, c_int64, c_int32),
            *(c_int64, c_int64, c_int64, c_int64),
        ),
    ),
    "g4_attention_floats": (c_int64, (c_int64, c_int64, c_int64, c_int64, c_int64)),
    "g4_attention": (
        None,
        (
            *(c_void_p, c_int64, c_int64, c_int32, POINTER(G4Cache)),
            *(c_int64, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p),
        ),
    ),
}


class NativeUnavailableError(Exception):
    """Why the library cannot be used, in one clause."""


@cache
def native() -> ctypes.CDLL:
    """The library, bound, with its threads and its instruction set chosen.

    Raises:
        NativeUnavailableError: not built, not loadable, of another version, or turned off.
        UsageError: the environment asks for an instruction set that is not there.
    """
    wanted = os.environ.get(ISA_VARIABLE, "")
    if wanted == WITHOUT:
        raise NativeUnavailableError(f"it is turned off ({ISA_VARIABLE}={WITHOUT})")
    path = _find()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"{path} cannot be loaded ({error})") from error
    if library.g4_abi() != ABI:
        raise NativeUnavailableError(f"{path} has interface {library.g4_abi()}, expected {ABI}: install glm4run again")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            raise NativeUnavailableError(f"{path} lacks {name}: install glm4run again")
        function.restype, function.argtypes = result, arguments
    library.g4_set_threads(default_threads())
    if wanted:
        set_isa(wanted, library)
    return library


def why_missing() -> str | None:
    """None where the library is there, else the reason in one clause."""
    try:
        native()
    except NativeUnavailableError as error:
        return str(error)
    return None


def available_isas(library: ctypes.CDLL | None = None) -> dict[str, bool]:
    """The instruction sets that were built in, best first, and whether this machine runs them."""
    library = library or native()
    found: dict[str, bool] = {}
    runs = c_int32()
    while (name := library.g4_isa_name(len(found), ctypes.byref(runs))) is not None:
        found[name.decode()] = bool(runs.value)
    return found


def active_isa() -> str:
    """The instruction set in use."""
    name: bytes = native().g4_isa()
    return name.decode()


def set_isa(name: str, library: ctypes.CDLL | None = None) -> None:
    """Uses another instruction set from now on. Raises UsageError where this machine does not run it."""
    library = library or native()
    if library.g4_set_isa(name.encode()) != 0:
        usable = ", ".join(isa for isa, runs in available_isas(library).items() if runs)
        raise UsageError(
            f"no instruction set {name!r} on this machine", hint=f"{ISA_VARIABLE} is one of: {usable}, {WITHOUT}"
        )


def _find() -> Path:
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        return Path(named)
    import glm4run.kernels.cpu

    # An editable install has its own folder for what was built; the package's path names both.
    for folder in glm4run.kernels.cpu.__path__:
        path = Path(folder) / FILE_NAME
        if path.is_file():
            return path
    raise NativeUnavailableError("it was not built (no C++ compiler when glm4run was installed)")
