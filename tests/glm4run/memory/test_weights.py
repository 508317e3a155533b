"""Planned bytes of weights and cache against the tensors that the real loader makes, to the byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import synthesize
import torch

from glm4run.cards import demo_folder, load_cards
from glm4run.checkpoint.layouts import linear_shapes
from glm4run.config import ModelConfig
from glm4run.kernels import BACKEND_NAMES, LinearSpec, load_backend
from glm4run.kernels.cpu.library import why_missing
from glm4run.kernels.reference import ReferenceBackend
from glm4run.kernels.torch_ops import CPU_TILE_BYTES, CUDA_TILE_BYTES, Int4PackedWeight, TorchBackend, _int4_kernel_runs
from glm4run.kv_cache import KVCache
from glm4run.kv_format import parse_kv_bits, rows_for
from glm4run.layers import QuantizedLinear
from glm4run.loading import input_dtype, load_weights
from glm4run.memory import (
    Run,
    device_overhead,
    kernels,
    kv_bytes_per_token,
    plan_run,
    plan_weights,
    process_overhead,
    stored_tensors,
)
from glm4run.memory.kernels import Linear, choose_kernel, kept_bytes
from glm4run.memory.weights import CLASSES
from glm4run.quant_config import QuantScheme
from glm4run_quantize.recipes import choose_recipe
from tests.builders import write_packed
from tests.tracing import DTYPES, META, meta_model, weight_bytes

CHAT = load_cards()["glm-4-9b-chat"].config
GROUPS = (None, 32, 64, 128)


@pytest.fixture(autouse=True)
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of CUDA kernels asks the device, which need not be there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))


def choices() -> Iterator[tuple[int, int | None, int]]:
    yield from product((4, 8), GROUPS, (8, 16))


@pytest.mark.parametrize(("bits", "group", "head_bits"), list(choices()))
def test_whole_9b_model_on_the_meta_device(bits: int, group: int | None, head_bits: int) -> None:
    """Every bits x group x head; group None is the default recipe."""
    schemes = choose_recipe(CHAT, bits, group_size=group, head_bits=head_bits)[0].schemes(CHAT)
    stored = stored_tensors(CHAT, schemes)
    weights = plan_weights(CHAT, stored, schemes, backend="torch", dtype="bf16", device="cuda")
    assert weights.bytes == weight_bytes(meta_model(CHAT, schemes, "bf16"))
    assert sum(weights.by_class.values()) == weights.bytes
    assert tuple(weights.by_class) == CLASSES


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("member", ["glm-4-9b-chat", "glm-4-9b-chat-1m", "GLM-4-9B-0414"])
def test_dense_members_on_the_meta_device(member: str, dtype: str) -> None:
    config = load_cards()[member].config
    weights = plan_weights(config, stored_tensors(config, {}), {}, backend="dense", dtype=dtype, device="cuda")
    assert weights.bytes == weight_bytes(meta_model(config, {}, dtype))


def test_published_sizes() -> None:
    """bf16: the published index's total, and norms in float32. Source: glm4-facts, the index's `total_size`."""
    weights = plan_weights(CHAT, stored_tensors(CHAT, {}), {}, backend="dense", dtype="bf16", device="cuda")
    norms = (2 * CHAT.num_hidden_layers + 1) * CHAT.hidden_size
    assert weights.bytes == 18_799_902_720 + 2 * norms
    assert weights.by_class["embedding"] == weights.by_class["head"] == 2 * 620_756_992


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_demo_by_class(backend: str, dtype: str) -> None:
    loaded = load_weights(demo_folder(), backend=backend, dtype=dtype)
    model = loaded.model
    by_class = {name: loaded.plan.bytes_of(name) for name in CLASSES}
    assert by_class["embedding"] == model.model.embed_tokens.weight.nbytes
    vectors = [p.nbytes for name, p in model.named_parameters() if name.endswith("bias") or "norm" in name]
    assert by_class["norms_and_biases"] == sum(vectors)
    packed = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert by_class["linears"] + by_class["head"] + by_class["scales"] == sum(
        m.prepacked.nbytes for m in packed.values()
    )
    assert sum(by_class.values()) == loaded.plan.weight_bytes == weight_bytes(model)


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4, "head_bits": 16}, {"group_size": 32}], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_small_packed_models(tmp_path: Path, options: dict[str, Any], dtype: str) -> None:
    loaded = load_weights(write_packed(tmp_path / "packed", **options), backend="torch", dtype=dtype)
    assert loaded.plan.weight_bytes == weight_bytes(loaded.model)


@pytest.mark.parametrize("kept", ["16", "8", "4", "8:4", "16:4"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_quantized_cache_is_planned_to_the_byte(kept: str, device: str, dtype: str) -> None:
    """The family's heads, and those of the other small models: groups that do not divide a head are the whole head."""
    kv_format = parse_kv_bits(kept)
    for head_dim, context in ((128, 131072), (64, 1000), (32, 17), (48, 64)):
        config = dataclasses.replace(SMALL, head_dim=head_dim)
        cache = KVCache(config, context, dtype=DTYPES[dtype], device=META, kv_format=kv_format)
        weights = plan_weights(config, stored_tensors(config, {}), {}, backend="dense", dtype=dtype, device=device)
        overhead = process_overhead(0, 0, None) if device == "cpu" else device_overhead(is_open=True, calibration=None)
        run = Run(weights, weights.compute(config, dtype=dtype, device=device), overhead)
        run = dataclasses.replace(run, kv_bits=kv_format.key_bits, value_bits=kv_format.value_bits)
        assert plan_run(run, context).bytes_of("kv_cache") == cache.nbytes
        assert cache.nbytes % rows_for(context) == 0


@pytest.mark.parametrize("context", [1, 1024, 63 * 1024, 131072])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("member", ["glm-4-9b-chat", "glm-4-9b-chat-1m"])
def test_cache(member: str, dtype: str, context: int) -> None:
    config = load_cards()[member].config
    cache = KVCache(config, context, dtype=DTYPES[dtype], device=META)
    assert cache.nbytes == rows_for(context) * kv_bytes_per_token(config, DTYPES[dtype].itemsize)


# The real 135M model's own shape; no group of 128 divides its 576 columns. Source: its config.json.
SMALL = ModelConfig(
    model_type="glm",
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=49152,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    partial_rotary_factor=1.0,
    attention_bias=True,
    eos_token_id=(2, 0),
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(
    ("layers", "bits", "group", "head_bits"),
    [(30, 4, None, 8), *((1, *rest) for rest in product((4, 8), (None, 32, 64), (8, 16)))],
)
def test_tensors_of_a_135m_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int, bits: int, group: int | None, head_bits: int
) -> None:
    """Really loaded by every backend of ours, with a conversation's cache: each to the byte. Once all layers."""
    monkeypatch.setattr(synthesize, "POOL_BYTES", 4 << 20)
    config = dataclasses.replace(SMALL, num_hidden_layers=layers)
    recipe, _ = choose_recipe(config, bits, group_size=group, head_bits=head_bits)
    synthesize.synthesize(config, recipe, tmp_path / "model", demo_folder())
    for backend in BACKEND_NAMES:
        if backend in ("bitsandbytes", "quanto") or (backend == "native" and why_missing() is not None):
            continue  # theirs are other weights
        if backend == "triton":
            continue  # on a CPU there is nothing to load
        loaded = load_weights(tmp_path / "model", backend=backend, dtype="bf16", context_len=700)
        model = loaded.model
        packed = [m for name, m in model.named_modules() if isinstance(m, QuantizedLinear) and name != "lm_head"]
        head = model.lm_head
        head_bytes = head.prepacked.nbytes if isinstance(head, QuantizedLinear) else head.weight.nbytes
        plan = loaded.plan
        assert plan.bytes_of("linears", "scales", "head") == sum(m.prepacked.nbytes for m in packed) + head_bytes
        assert plan.bytes_of("embedding") == model.model.embed_tokens.weight.nbytes == 2 * 49152 * 576
        vectors = [p.nbytes for name, p in model.named_parameters() if name.endswith("bias") or "norm" in name]
        assert plan.bytes_of("norms_and_biases") == sum(vectors)
        assert plan.weight_bytes == weight_bytes(model)
        cache = KVCache(config, plan.context_len, dtype=model.dtype, device=torch.device("cpu"))
        assert plan.bytes_of("kv_cache") == cache.nbytes


# --- the choice of kernels


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_kernels_are_those_that_torch_s_backend_takes(device: str, dtype: str, symmetric: bool) -> None:
    backend, reference = TorchBackend(), ReferenceBackend()
    for bits, group, (n, k) in product((4, 8), (*GROUPS, 256), ((4096, 13696), (151552, 4096), (17, 256), (24, 160))):
        if group is not None and k % group:
            continue
        scheme = QuantScheme(bits, group, symmetric)
        spec = LinearSpec(n, k, scheme, torch.device(device), DTYPES[dtype])
        linear = Linear(n, k, scheme)
        kernel = choose_kernel(linear, backend="torch", device=device, dtype=dtype)
        assert kernel == ("int4" if _int4_kernel_runs(spec) else "tiled"), spec
        assert kept_bytes(linear, kernel, 2) == backend.prepacked_bytes(spec, linear.stored_bytes)
        assert kept_bytes(linear, "reference", 2) == reference.prepacked_bytes(spec, linear.stored_bytes)


def test_tiles_are_those_of_the_kernels() -> None:
    assert (kernels.CPU_TILE_BYTES, kernels.CUDA_TILE_BYTES) == (CPU_TILE_BYTES, CUDA_TILE_BYTES)


@pytest.mark.skipif(why_missing() is not None, reason="the native library is not here")
@pytest.mark.parametrize("symmetric", [True, False])
def test_native_panels(symmetric: bool) -> None:
    backend = load_backend("native")
    for bits, group, (n, k) in product((4, 8), GROUPS, ((4096, 13696), (151552, 4096), (17, 256), (24, 160))):
        if group is not None and k % group:
            continue
        scheme = QuantScheme(bits, group, symmetric)
        spec = LinearSpec(n, k, scheme, torch.device("cpu"), torch.bfloat16)
        assert backend.why_unavailable(spec) is None
        linear = Linear(n, k, scheme)
        assert kept_bytes(linear, "native", 2) == backend.prepacked_bytes(spec, linear.stored_bytes)


def test_meta_model_runs_the_int4_kernel() -> None:
    """Else the test of the whole model would not test what a GPU keeps."""
    schemes = {module: QuantScheme(4, 128) for module in linear_shapes(CHAT) if module.startswith("model.layers.0.")}
    model = meta_model(CHAT, schemes, "bf16")
    linear = model.get_submodule("model.layers.0.mlp.gate_up_proj")
    assert isinstance(linear, QuantizedLinear)
    assert isinstance(linear.prepacked, Int4PackedWeight)
    assert input_dtype("lm_head", torch.bfloat16) == torch.bfloat16
