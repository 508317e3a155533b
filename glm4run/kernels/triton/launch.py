"""Launches of kernels that have been launched before, without what Triton looks at each time.

A launch binds its arguments by name, derives what the kernel is specialized on from each of them, and looks the
compiled kernel up by all that: some 20 us of Python for a kernel of attention, as long as the kernel itself takes for a
short prompt. Here the same is kept under a key that is cheaper to make; what is then started is what Triton starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes of a pointer, or a factor of a whole number, that Triton makes use of
_INT32_BITS = 31

Argument = Tensor | int | float | None


class Launcher:
    """Launches, and remembers what was compiled for them."""

    def __init__(self) -> None:
        self.compiled: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}
        self.starts_directly = True  # until a Triton's compiled kernels turn out to take other arguments

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], args: Sequence[Argument], constants: dict[str, Any], **options: Any
    ) -> None:
        """`kernel[grid](*args, **constants, **options)`, on the device of the first argument.

        args: the kernel's parameters up to its constants, in order, the first one a tensor. constants: the rest, by
        name; all of them, and the options, of hashable values and from one place in the same order.
        """
        first = args[0]
        assert isinstance(first, Tensor)
        if first.device.type != "cuda":
            kernel[grid](*args, **constants, **options)
            return
        with current(first.device):
            self._launch(first.device.index, kernel, (*grid, 1, 1)[:3], args, constants, options)

    def _launch(
        self,
        device: int,
        kernel: Any,
        grid: tuple[int, ...],
        args: Sequence[Argument],
        constants: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        key = (kernel, device, *map(_specialized, args), *constants.values(), *options.values())
        found = self.compiled.get(key) if self.starts_directly else None
        if found is not None:
            compiled, rest = found
            try:
                compiled[grid](*args, *rest)
                return
            except TypeError:
                self.starts_directly = False
        compiled = kernel[grid](*args, **constants, **options)
        self.compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])


launch = Launcher()


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one, on which Triton launches and torch captures; does nothing elsewhere."""
    elsewhere = device.type == "cuda" and device.index is not None and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


def _specialized(value: Argument) -> object:
    """What of an argument a compiled kernel may depend on, or more of it."""
    if isinstance(value, Tensor):
        return value.dtype if value.data_ptr() % _ALIGNMENT == 0 else (value.dtype,)
    if isinstance(value, int):
        return value == 1, value % _ALIGNMENT == 0, value.bit_length() > _INT32_BITS
    return type(value)
