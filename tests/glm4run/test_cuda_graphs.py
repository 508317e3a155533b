"""The model over Triton's operations, and its forward as it is captured, against torch's. Interpreted on a CPU."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from glm4run.config import parse_config
from glm4run.kv_cache import KVCache
from glm4run.kv_format import parse_kv_bits
from glm4run.kv_rows import KVLayer
from glm4run.memory import plan_weights, stored_tensors
from glm4run.memory import workspace as workspace_module
from glm4run.memory.workspace import forward_peak
from glm4run.model import Glm4Model
from glm4run.ops import Ops, TritonOps, Turns
from tests.builders import Layout, hf_weights, raw_config
from tests.tracing import MemoryTrace

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]  # of masked lanes
pytest.importorskip("triton", reason="triton is not installed")
if torch.cuda.is_available():
    pytest.skip("these are interpreted; test_on_cuda.py has what a GPU computes", allow_module_level=True)

from glm4run.cuda_graphs import CapturedForward  # noqa: E402
from glm4run.kernels.triton import attention  # noqa: E402

CPU = torch.device("cpu")
IDS = [5, 77, 120, 3, 200, 41, 9, 9, 260, 18, 130, 6]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CLOSE = {"bf16": 3e-2, "fp16": 4e-3, "fp32": 2e-5}
CLOSE_KEPT = {"bf16": 5e-2, "fp16": 2e-2, "fp32": 2e-2}  # a value's rounding may fall the other way


class Interpreted(CapturedForward):
    """Without graphs: what a capture would record is run every time."""

    def _run(self, count: int, layers: list[KVLayer]) -> Tensor:
        return self._forward(count, layers)


class Collected(TritonOps):
    """The interpreter's launches are cycles that hold their tensors; a GPU's do not."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _collected(super().rms_norm(x, weight, eps))

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return _collected(super().silu_mul(gate_up))

    def attend_new(self, projected: list[Tensor], head_dim: int, rope: Turns, cache: KVLayer, start: int) -> Tensor:
        return _collected(super().attend_new(projected, head_dim, rope, cache, start))


def _collected(result: Tensor) -> Tensor:
    gc.collect()
    return result


def model_of(layout: Layout, dtype: str, ops: Ops) -> Glm4Model:
    raw = raw_config(layout)
    model = Glm4Model(parse_config(raw), dtype=DTYPES[dtype], ops=ops)
    model.load_state_dict(hf_weights(raw))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "norm" in name else DTYPES[dtype])
    return model.eval().requires_grad_(False)


def cache_of(model: Glm4Model, kept: str) -> KVCache:
    kv_format = parse_kv_bits(kept)
    return KVCache(model.config, 40, dtype=model.dtype, device=CPU, kv_format=kv_format, for_cpu=False)


@pytest.mark.parametrize(("layout", "dtype"), [("glm", "bf16"), ("glm4", "fp16"), ("glm4", "fp32")])
def test_a_forward_over_tritons_operations_is_that_of_torchs(layout: Layout, dtype: str) -> None:
    expected, found = (model_of(layout, dtype, ops) for ops in (Ops(), TritonOps()))
    ids = torch.tensor(IDS)
    for kept in ("16", "8:4"):
        rows = [model(ids, cache_of(model, kept), logits="all") for model in (expected, found)]
        limit = (CLOSE if kept == "16" else CLOSE_KEPT)[dtype]
        torch.testing.assert_close(rows[1], rows[0], rtol=limit, atol=limit * float(rows[0].abs().max()))


@pytest.mark.parametrize(
    ("layout", "dtype", "kept"),
    [("glm4", "bf16", "16"), ("glm", "bf16", "8:4"), ("glm4", "fp16", "8"), ("glm", "fp32", "16")],
)
def test_what_is_captured_is_the_modules_forward(layout: Layout, dtype: str, kept: str) -> None:
    model = model_of(layout, dtype, TritonOps())
    caches = [cache_of(model, kept) for _ in range(2)]
    for cache in caches:
        model(torch.tensor(IDS[:4]), cache)
    for token in IDS[4:7]:
        model.whole = None
        expected = model(torch.tensor([token]), caches[0])
        model.whole = Interpreted(model, CPU, 2048)
        found = model(torch.tensor([token]), caches[1])
        limit = (CLOSE if kept == "16" else CLOSE_KEPT)[dtype]
        torch.testing.assert_close(found, expected, rtol=limit, atol=limit * float(expected.abs().max()))
    assert caches[0].position == caches[1].position == 7
    with pytest.raises(ValueError, match="holds 40 tokens"):
        caches[1].position = 40
        model(torch.tensor([1]), caches[1])


class Recorded(CapturedForward):
    """Graphs whose replay runs again what was recorded, into the same result."""

    def __init__(self, model: Glm4Model, chunk: int) -> None:
        super().__init__(model, CPU, chunk)
        self.launched: list[int] = []  # tokens of each forward that was not a replay

    def _forward(self, count: int, caches: list[KVLayer]) -> Tensor:
        self.launched.append(count)
        return super()._forward(count, caches)

    def _capture(self, count: int, layers: list[KVLayer]) -> tuple[Any, Tensor]:
        out = torch.zeros(count, self.model.config.hidden_size, dtype=self.model.dtype)
        again, kept = super()._forward, [weakref.ref(layer) for layer in layers]  # a graph holds no cache either
        return SimpleNamespace(replay=lambda: out.copy_(again(count, [cast(KVLayer, layer()) for layer in kept]))), out


def test_a_forward_is_launched_once_and_captured_when_it_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glm4run.cuda_graphs.LARGER_CHUNKS", (3,))
    model = model_of("glm", "fp32", TritonOps())
    captured = Recorded(model, 3)
    assert [captured.takes(count) for count in (1, 2, 3)] == [True, False, True]
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for whole, rows in ((captured, found), (None, expected)):
        model.whole = whole
        caches = [cache_of(model, "16"), cache_of(model, "16")]
        for cache in caches:
            rows += [model.hidden_states(torch.tensor(IDS[first : first + 3]), cache) for first in (0, 3)]
            rows += [model.hidden_states(torch.tensor([token]), cache) for token in IDS[6:9]]
            assert cache.position == 9
    assert captured.launched == 2 * [3, 1]  # of each cache; what came again was replayed
    for row, wanted in zip(found, expected, strict=True):  # also those before the last: a result is its caller's
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-4)
    del caches, cache
    gc.collect()
    assert not captured._graphs


@pytest.mark.parametrize("head_dim", [8, 24])
def test_heads_that_the_kernels_do_not_take_are_torchs(head_dim: int) -> None:
    raw = raw_config("glm", head_dim=head_dim)
    models = []
    for ops in (Ops(), TritonOps()):
        model = Glm4Model(parse_config(raw), ops=ops)
        model.load_state_dict(hf_weights(raw))
        models.append(model.eval())
    with torch.no_grad():
        rows = [model(torch.tensor(IDS), cache_of(model, "16"), logits="all") for model in models]
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "kept", "tokens"),
    [("bf16", "16", 12), ("bf16", "8", 1), ("fp16", "16", 12), ("fp16", "8", 12), ("fp32", "8:16", 12)],
)
def test_the_plan_knows_the_tensors_of_a_forward(
    dtype: str, kept: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace_module, "TRITON_PROGRAMS", 2 * attention._multiprocessors(CPU))
    model = model_of("glm", dtype, Collected())
    config = model.config
    weights = plan_weights(config, stored_tensors(config, {}), {}, backend="dense", dtype=dtype, device="cuda")
    compute = weights.compute(config, dtype=dtype, device="cuda", ops="triton")
    cache = cache_of(model, kept)
    cache.position = 40 - tokens
    ids = torch.zeros(tokens, dtype=torch.long)
    trace = MemoryTrace()
    with torch.no_grad(), trace:
        model(ids, cache)
    planned = forward_peak(compute, tokens, 40, kv_format=parse_kv_bits(kept))
    sampled = planned.tensors.get("sampling", 0)  # of a step that the trace does not see
    assert trace.peak * 0.99 <= planned.bytes
    assert planned.bytes - sampled <= 1.06 * trace.peak + 2048
