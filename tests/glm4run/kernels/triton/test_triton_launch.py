"""Launches that skip what Triton looks at: the same call, and a new look wherever a kernel may differ."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from glm4run.kernels.triton import launch as module
from glm4run.kernels.triton.launch import launch


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.runs: list[tuple[Any, ...]] = []

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        self.runs.append(args)


class Kernel:
    arg_names = ("x", "size", "FIRST", "SECOND")

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.compiled = Compiled()

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


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_compiled", {})
    monkeypatch.setattr(
        module, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: "stream"))
    )


def test_the_second_launch_is_the_compiled_kernels_with_constants_in_their_places() -> None:
    kernel, x = Kernel(), on_cuda()
    constants = {"SECOND": 2, "launch_pdl": True, "FIRST": 1}
    launch(kernel, (7,), (x, 32), constants, num_warps=4)
    assert kernel.calls == [((7,), (x, 32), {**constants, "num_warps": 4})] and not kernel.compiled.runs
    launch(kernel, (8, 2), (x, 48), constants, num_warps=4)
    (run,) = kernel.compiled.runs
    assert len(kernel.calls) == 1 and run[:6] == (8, 2, 1, "stream", "function", "metadata")
    assert run[9] is x and run[10:] == (48, 1, 2)


def test_what_a_kernel_may_be_specialized_on_is_looked_at_again() -> None:
    kernel = Kernel()
    launches: list[tuple[tuple[torch.Tensor | int | float, ...], int, int]] = [
        ((on_cuda(), 32), 1, 4),
        ((on_cuda(1), 32), 1, 4),
        ((on_cuda(dtype=torch.float16), 32), 1, 4),
        ((on_cuda(), 33), 1, 4),
        ((on_cuda(), 1), 1, 4),
        ((on_cuda(), 1 << 32), 1, 4),
        ((on_cuda(), 0.5), 1, 4),
        ((on_cuda(), on_cuda()), 1, 4),
        ((on_cuda(), 32), 2, 4),
        ((on_cuda(), 32), 1, 8),
    ]
    for args, first, warps in 2 * launches:
        launch(kernel, (1,), args, {"FIRST": first, "SECOND": 0}, num_warps=warps)
    assert len(kernel.calls) == len(kernel.compiled.runs) == len(launches)


def test_elsewhere_the_launch_is_tritons() -> None:
    kernel = Kernel()
    for _ in range(2):
        launch(kernel, (1,), (torch.zeros(4), 4), {"FIRST": 1, "SECOND": 2}, num_warps=4)
    assert len(kernel.calls) == 2 and not kernel.compiled.runs
