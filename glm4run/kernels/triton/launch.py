"""Launches of kernels that have been launched before, without what Triton looks at each time.

A launch binds its arguments by name, derives what the kernel is specialized on from each of them, and looks the
compiled kernel up by all that: some 20 us of Python for a kernel of attention, as long as the kernel itself takes for a
short prompt. Here the same is kept under a key that is cheaper to make; what is then called is what Triton calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from triton import knobs
from triton.runtime import driver

_ALIGNMENT = 16  # bytes of a pointer, or a factor of a whole number, that Triton makes use of
_INT32_BITS = 31

_compiled: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], args: Sequence[Tensor | int | float], constants: dict[str, Any], **options: Any
) -> None:
    """`kernel[grid](*args, **constants, **options)`.

    args: the kernel's parameters up to its constants, in order, the first one a tensor on the device. constants: the
    rest, by name; all of them, and the options, of hashable values and from one place in the same order.
    """
    device = args[0].device if isinstance(args[0], Tensor) else None
    if device is None or device.type != "cuda":
        kernel[grid](*args, **constants, **options)
        return
    key = (kernel, device.index, *map(_specialized, args), *constants.values(), *options.values())
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*args, **constants, **options)
        _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
        return
    compiled, rest = found
    sizes = (*grid, 1, 1)[:3]
    stream = driver.active.get_current_stream(device.index)
    values = (*args, *rest)
    compiled.run(
        *sizes,
        stream,
        compiled.function,
        compiled.packed_metadata,
        compiled.launch_metadata(sizes, stream, *values),
        knobs.runtime.launch_enter_hook,
        knobs.runtime.launch_exit_hook,
        *values,
    )


def _specialized(value: Tensor | int | float) -> object:
    """What of an argument a compiled kernel may depend on, or more of it."""
    if isinstance(value, Tensor):
        return value.dtype if value.data_ptr() % _ALIGNMENT == 0 else (value.dtype,)
    if isinstance(value, int):
        return value == 1, value % _ALIGNMENT == 0, value.bit_length() > _INT32_BITS
    return float
