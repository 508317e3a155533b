"""The forward's planned tensors against a trace of the real forward: every storage, as it comes and goes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm4run.attention import MAX_SCORE_BYTES
from glm4run.cards import load_cards
from glm4run.kv_format import parse_kv_bits
from glm4run.kv_order import cpu_orders
from glm4run.kv_rows import new_rows, quantize_rows
from glm4run.memory import plan_weights, stored_tensors, workspace
from glm4run.memory.workspace import Compute, forward_peak
from glm4run_quantize.recipes import choose_recipe
from tests.tracing import MemoryTrace, meta_model, trace_forward

LAYERS = 2  # all layers do the same


@pytest.fixture(autouse=True)
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of CUDA kernels asks the device, and kernels ask a tensor where it lies: meta counts as CUDA here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.device.type == "meta"), raising=False)


def compute_of(member: str, bits: int, dtype: str = "bf16", batch: int = 1, device: str = "cuda") -> Compute:
    config = dataclasses.replace(load_cards()[member].config, num_hidden_layers=LAYERS)
    schemes = choose_recipe(config, bits)[0].schemes(config) if bits < 16 else {}
    weights = plan_weights(
        config, stored_tensors(config, schemes), schemes, backend="torch", dtype=dtype, device=device
    )
    return weights.compute(config, dtype=dtype, device=device, batch=batch)


@pytest.mark.parametrize(
    ("member", "bits", "dtype"),
    [
        *(("glm-4-9b-chat", bits, "bf16") for bits in (16, 8, 4)),
        *(("glm-4-9b-chat", bits, "fp16") for bits in (16, 4)),
        *(("glm-4-9b-chat", 16, "fp32"), ("GLM-4-9B-0414", 16, "bf16"), ("glm-4-9b-chat-1m", 4, "bf16")),
    ],
)
@pytest.mark.parametrize(("context", "chunk"), [(64, 64), (1024, 512), (9000, 128), (32768, 2048)])
def test_peak_is_that_of_the_traced_forward(member: str, bits: int, dtype: str, context: int, chunk: int) -> None:
    compute = compute_of(member, bits, dtype)
    schemes = choose_recipe(compute.config, bits)[0].schemes(compute.config) if bits < 16 else {}
    traced = trace_forward(meta_model(compute.config, schemes, dtype), context, chunk).peak
    planned = forward_peak(compute, chunk, context).bytes
    # Past the bound of the scores a block of q is counted whole; else the two agree almost to the byte.
    assert traced * 0.999 <= planned <= traced * 1.06


@pytest.mark.parametrize(("bits", "dtype"), [(16, "bf16"), (8, "bf16"), (4, "bf16"), (16, "fp16"), (16, "fp32")])
@pytest.mark.parametrize(("context", "chunk"), [(64, 64), (1024, 512), (32768, 2048)])
def test_peak_with_every_logit_is_that_of_the_trace(bits: int, dtype: str, context: int, chunk: int) -> None:
    compute = compute_of("glm-4-9b-chat", bits, dtype)
    schemes = choose_recipe(compute.config, bits)[0].schemes(compute.config) if bits < 16 else {}
    model = meta_model(compute.config, schemes, dtype)
    traced = trace_forward(model, context, chunk, every_position=True).peak
    planned = forward_peak(compute, chunk, context, every_position=True).bytes
    assert traced * 0.999 <= planned <= traced * 1.06


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kept", ["8", "4", "16:4", "8:16"])
@pytest.mark.parametrize(("context", "chunk"), [(64, 64), (1024, 512), (131072, 64), (32768, 2048)])
def test_peak_over_a_quantized_cache_is_that_of_the_trace(dtype: str, kept: str, context: int, chunk: int) -> None:
    compute = compute_of("glm-4-9b-chat", 4, dtype)
    schemes = choose_recipe(compute.config, 4)[0].schemes(compute.config)
    model = meta_model(compute.config, schemes, dtype)
    traced = trace_forward(model, context, chunk, kept=kept, for_cpu=False).peak
    planned = forward_peak(compute, chunk, context, kv_format=parse_kv_bits(kept)).bytes
    assert traced * 0.999 <= planned <= traced * 1.06


@pytest.mark.parametrize("kept", ["8", "16:8", "8:16"])
def test_peak_over_a_cache_in_the_order_of_a_cpu_is_that_of_the_trace(kept: str) -> None:
    """In torch, whose operations read it as rows. The linears are small, or what they take would hide it."""
    shape = load_cards()["glm-4-9b-chat"].config
    config = dataclasses.replace(shape, num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=64)
    weights = plan_weights(config, stored_tensors(config, {}), {}, backend="dense", dtype="fp32", device="cpu")
    compute = weights.compute(config, dtype="fp32", device="cpu")
    traced = trace_forward(meta_model(config, {}, "fp32"), 32768, 1, kept=kept, for_cpu=True).peak
    planned = forward_peak(compute, 1, 32768, kv_format=parse_kv_bits(kept)).bytes
    assert traced * 0.999 <= planned <= traced * 1.06


@pytest.mark.parametrize("head_dim", [128, 96])  # 96: they lie as rows in any case
@pytest.mark.parametrize("bits", [8, 4])
def test_reading_rows_takes_what_is_planned(bits: int, head_dim: int) -> None:
    """Beside what it leaves; a forward holds more at other steps, so that its peak does not show it."""
    glm = compute_of("glm-4-9b-chat", 4, device="cpu")
    compute = dataclasses.replace(glm, config=dataclasses.replace(glm.config, head_dim=head_dim))
    heads, device = glm.config.num_key_value_heads, torch.device("meta")
    order = cpu_orders(head_dim)[0]
    rows = new_rows(heads, 4096, head_dim, bits, dtype=torch.float32, device=device, order=order)
    with torch.no_grad(), MemoryTrace() as trace:
        kept = rows.turned(4096)
    left, beside = workspace.widened_bytes(compute, 4096, bits)
    assert left == 4 * kept.numel()
    assert 0.95 <= trace.peak / (left + beside) <= 1.005


@pytest.mark.parametrize("bits", [8, 4])
def test_quantizing_rows_takes_what_is_planned(bits: int) -> None:
    """Other steps of a forward hold more, so that its peak does not show it."""
    compute, tokens = compute_of("glm-4-9b-chat", 4), 32
    rows = torch.empty(compute.config.num_key_value_heads, tokens, compute.config.head_dim, device="meta")
    with torch.no_grad(), MemoryTrace() as trace:
        quantize_rows(rows, bits)
    planned = workspace.quantizing_bytes(compute.config, tokens, bits)
    assert planned * 0.99 <= trace.peak <= planned * 1.002


def test_bound_of_the_scores_is_attention_s() -> None:
    assert workspace.MAX_SCORE_BYTES == MAX_SCORE_BYTES


SIZES = st.integers(1, 1 << 18)
CHUNKS = st.integers(1, 4096)


@given(st.sampled_from([16, 8, 4]), st.sampled_from(["bf16", "fp32"]), SIZES, SIZES, CHUNKS, CHUNKS, st.integers(1, 4))
def test_peak_grows_with_context_chunk_and_batch(
    bits: int, dtype: str, one: int, other: int, chunk: int, other_chunk: int, batch: int
) -> None:
    (short, long), (few, many) = sorted((one, other)), sorted((chunk, other_chunk))
    compute = compute_of("glm-4-9b-chat", bits, dtype)
    peak = forward_peak(compute, few, short).bytes
    assert peak <= forward_peak(compute, few, long).bytes
    assert peak <= forward_peak(compute, many, short).bytes
    assert peak <= forward_peak(dataclasses.replace(compute, batch=batch), few, short).bytes
    assert peak <= forward_peak(compute, few, short, logits_rows=1 + batch).bytes


@given(SIZES, CHUNKS)
def test_every_tensor_has_a_size(context: int, chunk: int) -> None:
    moment = forward_peak(compute_of("glm-4-9b-chat", 4), chunk, context)
    assert moment.bytes == sum(moment.tensors.values())
    assert all(nbytes > 0 for nbytes in moment.tensors.values())
