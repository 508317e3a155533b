"""The plan against a replay: the storages of a traced forward through the model of PyTorch's caching allocator.

A device with the plan's bytes (and half a percent) runs the trace, one with 1 % less does not: they agree. Weights
and cache are those of the whole 40 layers; of the forwards two layers are traced, in the first chunk, one in the middle
and the last, as every layer and chunk makes the same tensors but for the context's length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from glm4run.cards import load_cards
from glm4run.memory import MemoryPlan, Run, device_overhead, plan_run, plan_weights, stored_tensors
from glm4run.memory.allocator import CachingAllocator, DeviceFullError
from glm4run.quant_config import QuantScheme
from glm4run_quantize.recipes import choose_recipe
from tests.tracing import meta_model, trace_forward

CONFIG = load_cards()["glm-4-9b-chat"].config
TRACED_LAYERS = 2
Events = list[tuple[object, int]]


@pytest.fixture(autouse=True)
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels ask the device and the tensors: meta counts as CUDA here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.device.type == "meta"), raising=False)


def schemes_of(bits: int) -> dict[str, QuantScheme]:
    return choose_recipe(CONFIG, bits)[0].schemes(CONFIG) if bits < 16 else {}


def run_of(bits: int, chunk: int) -> Run:
    schemes = schemes_of(bits)
    weights = plan_weights(
        CONFIG, stored_tensors(CONFIG, schemes), schemes, backend="torch", dtype="bf16", device="cuda"
    )
    return Run(weights, weights.compute(CONFIG, dtype="bf16", device="cuda"), device_overhead(), chunk)


def events_of(run: Run, bits: int, context: int) -> Events:
    """Weights, cache, then three chunks of the prompt."""
    events: Events = [(f"weight {i}", item.bytes) for i, item in enumerate(run.weights.kept)]
    rows = 2 * CONFIG.num_hidden_layers
    tensor = CONFIG.num_key_value_heads * CONFIG.head_dim * 2 * context
    events += [(f"cache {i}", tensor) for i in range(rows)]
    few = dataclasses.replace(CONFIG, num_hidden_layers=TRACED_LAYERS)
    schemes = {name: scheme for name, scheme in schemes_of(bits).items() if _is_traced(name)}
    model = meta_model(few, schemes, "bf16")
    chunks = range(run.chunk, context + 1, run.chunk)
    for number in sorted({0, len(chunks) // 2, len(chunks) - 1}):
        traced = trace_forward(model, chunks[number], run.chunk).events
        events += [((number, key), nbytes) for key, nbytes in traced]
    return events


def _is_traced(name: str) -> bool:
    return name == "lm_head" or int(name.split(".")[2]) < TRACED_LAYERS


def runs_in(events: Events, capacity: int) -> bool:
    try:
        CachingAllocator(capacity).replay(events)
    except DeviceFullError:
        return False
    return True


def without_context(plan: MemoryPlan) -> int:
    return plan.peak_bytes - plan.bytes_of("device_context")


def cases() -> Iterator[tuple[int, int, int]]:
    for bits in (16, 8, 4):
        for context in (1024, 63 * 1024, 131072):
            for chunk in (128, 512, 1024):
                yield bits, context, chunk


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "context", "chunk"), list(cases()))
def test_plan_is_what_a_device_needs(bits: int, context: int, chunk: int) -> None:
    run = run_of(bits, chunk)
    plan = plan_run(run, context)
    events = events_of(run, bits, context)
    assert runs_in(events, without_context(plan) + plan.peak_bytes // 200)
    assert not runs_in(events, without_context(plan) - plan.peak_bytes // 100)
