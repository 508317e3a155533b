"""Launches that skip what Triton looks at: the same call, and a new look wherever a kernel may differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from glm4run.kernels.triton.launch import Argument, Launcher


class Compiled:
    """What Triton compiled: started with everything in order."""

    def __init__(self, *, takes_constants: bool) -> None:
        self.takes_constants = takes_constants
        self.starts: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*args: Any) -> None:
            if not self.takes_constants:
                raise TypeError("function takes exactly 12 arguments (14 given)")
            self.starts.append((grid, args))

        return start


class Kernel:
    arg_names = ("x", "size", "FIRST", "SECOND")

    def __init__(self, *, takes_constants: bool = True) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.compiled = Compiled(takes_constants=takes_constants)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*args: Any, **rest: Any) -> Compiled:
            self.calls.append((grid, args, rest))
            return self.compiled

        return call


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)


def on_cuda(first: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(64, dtype=dtype).as_subclass(OnCuda)[first:]


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Launcher()


def test_the_second_launch_is_the_compiled_kernels_with_constants_in_their_places(launch: Launcher) -> None:
    kernel, x = Kernel(), on_cuda()
    constants = {"SECOND": 2, "launch_pdl": True, "FIRST": 1}
    launch(kernel, (7,), (x, 32), constants, num_warps=4)
    assert kernel.calls == [((7, 1, 1), (x, 32), {**constants, "num_warps": 4})] and not kernel.compiled.starts
    launch(kernel, (8, 2), (x, 48), constants, num_warps=4)
    ((grid, args),) = kernel.compiled.starts
    assert len(kernel.calls) == 1 and grid == (8, 2, 1)
    assert args[0] is x and args[1:] == (48, 1, 2)


def test_what_a_kernel_may_be_specialized_on_is_looked_at_again(launch: Launcher) -> None:
    kernel = Kernel()
    launches: list[tuple[tuple[Argument, ...], int, int]] = [
        ((on_cuda(), 32), 1, 4),
        ((on_cuda(1), 32), 1, 4),
        ((on_cuda(dtype=torch.float16), 32), 1, 4),
        ((on_cuda(), 33), 1, 4),
        ((on_cuda(), 1), 1, 4),
        ((on_cuda(), 1 << 32), 1, 4),
        ((on_cuda(), 0.5), 1, 4),
        ((on_cuda(), None), 1, 4),
        ((on_cuda(), on_cuda()), 1, 4),
        ((on_cuda(), 32), 2, 4),
        ((on_cuda(), 32), 1, 8),
    ]
    for args, first, warps in 2 * launches:
        launch(kernel, (1,), args, {"FIRST": first, "SECOND": 0}, num_warps=warps)
    assert len(kernel.calls) == len(kernel.compiled.starts) == len(launches)


def test_compiled_kernels_that_take_other_arguments_are_started_through_triton(launch: Launcher) -> None:
    kernel = Kernel(takes_constants=False)
    for size in range(4):
        launch(kernel, (3,), (on_cuda(), 32 + 32 * size), {"FIRST": 1, "SECOND": 2})
    assert [args[1] for _, args, _ in kernel.calls] == [32, 64, 96, 128]
    assert not launch.starts_directly


def test_elsewhere_the_launch_is_tritons(launch: Launcher) -> None:
    kernel = Kernel()
    for _ in range(2):
        launch(kernel, (1,), (torch.zeros(4), 4), {"FIRST": 1, "SECOND": 2}, num_warps=4)
    assert len(kernel.calls) == 2 and not kernel.compiled.starts
