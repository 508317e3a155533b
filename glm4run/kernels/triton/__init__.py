"""CUDA kernels in Triton: products with packed weights, the rows of a cache, attention, what lies between.

Triton comes with torch's CUDA builds and compiles for the card at hand, so nothing is built at install. Importing this
module does not import it: it says whether the others may be imported.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_CAPABILITY = (8, 0)  # bf16 in the tensor cores, which every kernel counts on
OVERLAPPING_CAPABILITY = (9, 0)
LEAST_TRITON, OVERLAPPING_TRITON = (3, 4), (3, 6)  # those of torch 2.8 and 2.11


@functools.cache
def why_missing(device: torch.device) -> str | None:
    """None if the kernels run on `device`, else the reason in one clause."""
    if device.type != "cuda":
        return "its kernels run on CUDA devices"
    if find_spec("triton") is None:
        return "triton is not installed"
    version = _triton_version()
    if version < LEAST_TRITON:
        return f"it needs triton {_dotted(LEAST_TRITON)}, {_dotted(version)} is installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"it needs compute capability {_dotted(LEAST_CAPABILITY)}, this device has {_dotted(capability)}"
    return _why_not_started()


def _why_not_started() -> str | None:
    """None where Triton can start kernels. It builds what starts them with a C compiler and Python's headers."""
    from triton.runtime import driver

    try:
        driver.active.get_current_device()
    except Exception as error:  # of a compiler, a loader, a driver: whatever it is, another backend runs
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"Triton cannot start kernels, for which it needs a C compiler and Python's headers: {first}"
    return None


@functools.cache
def overlap(device: torch.device) -> dict[str, bool]:
    """What a launch on `device` is given so that a kernel begins while the one before it ends (`jit/order.py`)."""
    overlaps = device.type == "cuda" and torch.cuda.get_device_capability(device) >= OVERLAPPING_CAPABILITY
    return {"OVERLAPS": True, "launch_pdl": True} if overlaps and knows_overlap() else {"OVERLAPS": False}


def knows_overlap() -> bool:
    """Whether this Triton has the instructions for it. In 3.4 they do not compile."""
    return _triton_version() >= OVERLAPPING_TRITON


def _triton_version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
