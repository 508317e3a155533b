"""torch keeps to one thread beside the native library, and gets its threads back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from glm4run import load_model
from glm4run.cards import demo_folder
from glm4run.kernels.cpu.library import why_missing
from glm4run.sampling import Sampler, SamplingParams
from glm4run.torch_threads import one_torch_thread


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_one_thread_inside_and_all_of_them_behind() -> None:
    with one_torch_thread():
        assert torch.get_num_threads() == 1
        with one_torch_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    with one_torch_thread(False):
        assert torch.get_num_threads() == 3
    with pytest.raises(ZeroDivisionError), one_torch_thread():
        raise ZeroDivisionError
    assert torch.get_num_threads() == 3


def test_sampling_takes_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    rand = torch.rand

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return rand(*args, **kwargs)

    monkeypatch.setattr(torch, "rand", watched)
    allowed = torch.ones(8, dtype=torch.bool)
    Sampler(SamplingParams(temperature=1.0), allowed).sample(torch.zeros(8), [])
    assert seen == [1]
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_only_a_model_that_runs_in_the_native_library_takes_one(backend: str) -> None:
    if backend == "native" and why_missing() is not None:
        pytest.skip(f"no native library: {why_missing()}")
    model = load_model(demo_folder(), backend=backend, context_len=64, threads=2)
    seen: list[int] = []
    model.model.model.norm.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    steps = model.stream("GLM", SamplingParams(max_new_tokens=3))
    assert "".join(step.text for step in steps)
    assert set(seen) == {1 if backend == "native" else 2}
    assert torch.get_num_threads() == 2
