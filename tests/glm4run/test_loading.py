"""Folders of every layout to the same model, packed weights that stay packed, and contexts that fit."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from glm4run import load_model, memory
from glm4run.cards import demo_folder, load_cards
from glm4run.config import ModelConfig, RopeScaling, parse_config, read_config
from glm4run.errors import BackendError, CheckpointError, DoesNotFitError, UsageError
from glm4run.kernels import reference
from glm4run.kernels.cpu.backend import NativeWeight
from glm4run.layers import QuantizedLinear
from glm4run.loading import adapt_config, choose_context, choose_device, choose_dtype, load_weights
from glm4run_quantize.recipes import choose_recipe
from tests.builders import (
    SAME_MODEL,
    VOCAB,
    Layout,
    edit_json,
    edit_tensors,
    hf_weights,
    raw_config,
    write_checkpoint,
    write_packed,
)
from tests.native_library import needs_library

CPU = torch.device("cpu")
IDS = torch.randint(0, VOCAB, (30,), generator=torch.Generator().manual_seed(5)).tolist()
GIB = 1 << 30


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default int4 recipe: group sizes 32 and 128, int8 head."""
    return write_packed(tmp_path_factory.mktemp("loading") / "packed", source={"dtype": torch.bfloat16})


# --- layouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_layouts_give_equal_logits(tmp_path: Path, dtype: torch.dtype) -> None:
    logits = []
    for layout in SAME_MODEL:
        write_checkpoint(tmp_path / layout, layout, shards=2, dtype=dtype)
        logits.append(load_model(tmp_path / layout, dtype="fp32").logits(IDS))
    assert logits[0].shape == (len(IDS), VOCAB)
    assert float(logits[0].std()) > 0.1
    assert all(torch.equal(other, logits[0]) for other in logits[1:])


@pytest.mark.parametrize("layout", ["chatglm", "fused"])
def test_packed_folders_of_every_layout_are_the_same(tmp_path: Path, layout: Layout) -> None:
    ours = load_model(write_packed(tmp_path / layout, layout), dtype="fp32").logits(IDS)
    assert torch.equal(ours, load_model(write_packed(tmp_path / "glm", "glm"), dtype="fp32").logits(IDS))


def test_what_is_loaded_is_what_is_stored(tmp_path: Path) -> None:
    model = load_weights(write_checkpoint(tmp_path, "glm4"), dtype="fp32").model
    expected = hf_weights(raw_config("glm4"))
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_tied_embeddings_share_their_memory(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    edit_tensors(folder, {"lm_head.weight": None})
    model = load_weights(folder, dtype="fp32").model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


# --- packed


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}, {"head_bits": 16}, {"group_size": 32}], ids=str)
@pytest.mark.parametrize("layout", ["glm", "glm4"])
def test_backends_agree_on_a_whole_model(tmp_path: Path, layout: Layout, options: dict[str, Any]) -> None:
    folder = write_packed(tmp_path / "packed", layout, source={"dtype": torch.bfloat16}, **options)
    exact = load_model(folder, backend="reference", dtype="fp32").logits(IDS)
    tiled = load_model(folder, backend="torch", dtype="fp32")
    assert (tiled.backend, tiled.backend_reason) == ("torch", "asked for")
    assert relative_error(tiled.logits(IDS), exact) < 1e-4
    half = load_model(folder, backend="torch", dtype="bf16").logits(IDS)
    assert relative_error(half, exact) < 0.05


def test_packing_costs_little(tmp_path: Path) -> None:
    dense = load_model(write_checkpoint(tmp_path / "dense"), dtype="fp32").logits(IDS)
    eight = load_model(write_packed(tmp_path / "eight", bits=8, group_size=32), dtype="fp32").logits(IDS)
    assert 0 < float((eight - dense).norm() / dense.norm()) < 0.05


def tensors_held(module: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a module keeps, inside packed weights too."""
    yield from module.parameters()
    yield from module.buffers()
    for child in module.modules():
        if isinstance(child, QuantizedLinear):
            queue: list[Any] = [child.prepacked]
            while queue:
                item = queue.pop()
                if isinstance(item, Tensor):
                    yield item
                elif dataclasses.is_dataclass(item):
                    queue += [getattr(item, field.name) for field in dataclasses.fields(item)]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_dense_copy_of_a_packed_weight_is_kept(packed: Path, backend: str, dtype: str) -> None:
    loaded = load_model(packed, backend=backend, dtype=dtype)
    linears = [m for m in loaded.model.modules() if isinstance(m, nn.Linear)]
    assert linears == []
    assert sum(isinstance(m, QuantizedLinear) for m in loaded.model.modules()) == 2 * 6 + 1
    embedding = loaded.model.model.embed_tokens.weight
    floats = [t for t in tensors_held(loaded.model) if t.is_floating_point() and t is not embedding]
    smallest_weight = 64 * 128  # k_proj
    assert max(t.numel() for t in floats) < smallest_weight
    loaded.logits(IDS)
    assert max(t.numel() for t in tensors_held(loaded.model) if t.is_floating_point()) == embedding.numel()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_plan_counts_the_weights_that_are_held(packed: Path, backend: str, dtype: str) -> None:
    loaded = load_model(packed, backend=backend, dtype=dtype)
    planned = loaded.plan.weight_bytes
    held = sum(t.numel() * t.element_size() for t in tensors_held(loaded.model))
    assert planned * 0.95 <= held <= planned * 1.05


def test_plan_counts_dense_weights_exactly(tmp_path: Path) -> None:
    loaded = load_model(write_checkpoint(tmp_path, "glm4", dtype=torch.bfloat16), dtype="fp32")
    planned = loaded.plan.weight_bytes
    assert planned == sum(t.numel() * t.element_size() for t in tensors_held(loaded.model))


def test_plan_counts_the_cache_exactly(packed: Path) -> None:
    loaded = load_model(packed, context_len=100)
    planned = next(term.bytes for term in loaded.plan.terms if term.name == "kv_cache")
    assert planned == loaded.new_context().cache.nbytes


@needs_library
@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"group_size": 32}], ids=["int4", "int8", "g32"])
def test_mapped_weights_give_the_same_bits_and_stay_in_their_files(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = write_packed(tmp_path / "packed", source={"dtype": torch.bfloat16}, **options)
    expected = load_model(folder, backend="native").logits(IDS)
    calls: list[tuple[int, int]] = []
    loaded = load_model(folder, backend="native", mmap=True, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1]
    assert not any("native kernels" in notice for notice in loaded.notices)
    linears = [m.prepacked for m in loaded.model.modules() if isinstance(m, QuantizedLinear)]
    assert all(isinstance(weight, NativeWeight) and weight.is_mapped for weight in linears)
    embedding = loaded.model.model.embed_tokens.weight
    maps = Path("/proc/self/maps").read_text().splitlines() if sys.platform == "linux" else []
    ours = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps if str(folder) in line]
    assert not maps or any(first <= embedding.data_ptr() < last for first, last in ours)
    for file in folder.glob("*.safetensors"):
        file.unlink()  # or replaced: what is mapped stays
    assert torch.equal(loaded.logits(IDS), expected)
    assert loaded.plan.bytes_of("embedding") == 0
    assert loaded.plan.bytes_of("embedding_rows") == embedding.nbytes  # a small one, touched all over
    del loaded, linears, embedding
    gc.collect()
    assert sys.platform != "linux" or str(folder) not in Path("/proc/self/maps").read_text()


def test_what_the_native_kernels_do_not_run_is_never_mapped(packed: Path) -> None:
    read = load_model(packed, backend="torch", mmap=True)
    assert any("only the native kernels" in notice for notice in read.notices)
    assert read.plan.bytes_of("embedding") == read.model.model.embed_tokens.weight.nbytes
    assert torch.equal(read.logits(IDS), load_model(packed, backend="torch").logits(IDS))


@needs_library
def test_a_tied_embedding_is_read(tmp_path: Path) -> None:
    folder = write_packed(tmp_path / "packed", head_bits=16)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    edit_tensors(folder, {"lm_head.weight": None})
    mapped, read = load_model(folder, backend="native", mmap=True), load_model(folder, backend="native")
    assert mapped.plan.weight_bytes == read.plan.weight_bytes
    assert torch.equal(mapped.logits(IDS), read.logits(IDS))


def test_progress_ends_at_all_bytes(packed: Path) -> None:
    calls: list[tuple[int, int]] = []
    load_model(packed, progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == calls[-1][1]


# --- backends and dtypes


def test_backend_named_for_a_dense_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not packed") as caught:
        load_model(write_checkpoint(tmp_path), backend="torch")
    assert caught.value.hint is not None and "quantize" in caught.value.hint


def test_unknown_backend_is_an_error(packed: Path) -> None:
    with pytest.raises(UsageError, match="no backend 'fast'"):
        load_model(packed, backend="fast")


def test_named_backend_never_falls_back_and_auto_says_why(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glm4run.kernels import torch_ops
    from glm4run.kernels.cpu import backend

    monkeypatch.setattr(torch_ops.TorchBackend, "why_unavailable", lambda self, spec: "it is Sunday")
    with pytest.raises(BackendError, match="it is Sunday"):
        load_model(packed, backend="torch")
    monkeypatch.setattr(backend.NativeBackend, "why_unavailable", lambda self, spec: "it is broken")
    loaded = load_model(packed)
    assert loaded.backend == "reference"
    assert loaded.backend_reason == "native cannot: it is broken; torch cannot: it is Sunday"
    assert isinstance(loaded.model.lm_head, QuantizedLinear)
    assert isinstance(loaded.model.lm_head.backend, reference.ReferenceBackend)


def test_dense_models_say_that_nothing_is_packed(tmp_path: Path) -> None:
    loaded = load_model(write_checkpoint(tmp_path))
    assert (loaded.backend, loaded.backend_reason) == ("dense", "nothing is packed")


def test_auto_dtype(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, quantized = parse_config(raw_config()), read_config(packed)
    for supported, config, ram, expected in (
        (True, dense, None, torch.bfloat16),
        (False, dense, None, torch.float32),
        (False, dense, 100 * GIB, torch.float32),
        (False, dense, 0, torch.bfloat16),  # float32 would not fit
        (False, quantized, None, torch.bfloat16),
    ):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda supported=supported: supported)
        monkeypatch.setattr(memory, "available_ram_bytes", lambda ram=ram: ram)
        assert choose_dtype("auto", CPU, config) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "unknown dtype"),
        ({"device": "abacus"}, "unknown device"),
        ({"device": "meta"}, "not supported"),
        ({"yarn": "maybe"}, "yarn is"),
        ({"kv_bits": 3}, "3 bits was asked"),
        ({"kv_bits": "8:"}, "kv_bits is '8:'"),
        ({"kv_bits": "16:8:4"}, "kv_bits is"),
    ],
    ids=str,
)
def test_wrong_options_are_usage_errors(packed: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_model(packed, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_is_refused_where_there_is_none() -> None:
    assert choose_device("auto") == CPU
    with pytest.raises(UsageError, match="no CUDA device"):
        choose_device("cuda")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scale_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    folder = write_packed(tmp_path / "packed")
    edit_tensors(folder, {"lm_head.weight_scale": torch.full((VOCAB, 1), value)})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: lm_head\.weight_scale holds NaN or infinity"):
        load_model(folder)


# --- contexts


def run_of(config: ModelConfig) -> memory.Run:
    """int4 weights of a member on the CPU; the process is counted as 300 MiB that are still to be taken."""
    schemes = choose_recipe(config, 4)[0].schemes(config)
    weights = memory.plan_weights(
        config, memory.stored_tensors(config, schemes), schemes, backend="torch", dtype="bf16", device="cpu"
    )
    overhead = memory.Overhead("process", 300 * memory.MIB, "modelled", "")
    return memory.Run(weights, weights.compute(config, dtype="bf16", device="cpu"), overhead)


CHAT = run_of(load_cards()["glm-4-9b-chat"].config)


def available(monkeypatch: pytest.MonkeyPatch, value: int | None) -> None:
    monkeypatch.setattr(memory, "available_ram_bytes", lambda: value)


def test_default_context_is_the_model_s_where_it_fits(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 64 * GIB)
    assert load_model(packed).plan.context_len == 512
    assert load_model(packed, context_len=100).plan.context_len == 100


def test_context_beyond_the_model_names_its_limit(packed: Path) -> None:
    with pytest.raises(DoesNotFitError, match="513 tokens was asked for, this model has 512") as caught:
        load_model(packed, context_len=513)
    assert caught.value.hint == "use --ctx 512"
    assert caught.value.exit_code == 2


def test_memory_unknown_gives_a_modest_context(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, None)
    assert choose_context(CHAT, CPU, None).context_len == 8192
    assert choose_context(CHAT, CPU, 100_000).context_len == 100_000


def test_context_beyond_the_memory_names_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 10 * GIB)
    fitting = choose_context(CHAT, CPU, None)
    assert 1000 < fitting.context_len < 131072
    assert fitting.chunk == memory.PREFILL_CHUNK
    assert fitting.peak_bytes <= 10 * GIB
    assert choose_context(CHAT, CPU, fitting.context_len) == fitting
    with pytest.raises(DoesNotFitError, match=r"GiB, 10\.00 GiB are free on cpu") as caught:
        choose_context(CHAT, CPU, 131072)
    assert caught.value.hint == f"use --ctx {fitting.context_len}; `glm4run vram` shows what fits"


def test_context_that_fits_only_with_a_smaller_chunk_takes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 10 * GIB)
    largest = choose_context(CHAT, CPU, None)
    longer = choose_context(CHAT, CPU, largest.context_len + 500)
    assert longer.context_len == largest.context_len + 500
    assert longer.chunk < largest.chunk
    assert longer.peak_bytes <= 10 * GIB


def test_what_the_process_holds_already_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 10 * GIB)
    held = dataclasses.replace(CHAT, overhead=dataclasses.replace(CHAT.overhead, held_bytes=300 * memory.MIB))
    more = choose_context(held, CPU, None).context_len - choose_context(CHAT, CPU, None).context_len
    assert more > 5000  # at 40 KiB a token and a little for attention


def test_weights_beyond_the_memory_say_what_to_do(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 1000)
    with pytest.raises(DoesNotFitError, match="are free on cpu") as caught:
        load_model(packed)
    assert caught.value.hint is not None and "quantize" in caught.value.hint


@given(st.integers(0, 40 * GIB), st.integers(1, 131072), st.integers(1, 131072))
def test_what_fits_fits_at_every_smaller_context(ram: int, one: int, other: int) -> None:
    small, large = sorted((one, other))

    def fits(context_len: int) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            available(patch, ram)
            try:
                plan = choose_context(CHAT, CPU, context_len)
            except DoesNotFitError:
                return False
            return plan.context_len == context_len and plan.peak_bytes <= ram

    assert fits(small) or not fits(large)


# --- RoPE


def test_theta_of_the_user_wins(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, rope_theta=5e6)
    plain, changed = load_model(folder), load_model(folder, rope_theta=10000.0)
    assert (plain.config.rope_theta, changed.config.rope_theta) == (5e6, 10000.0)
    assert not torch.allclose(plain.logits(IDS), changed.logits(IDS))


def test_theta_of_the_user_silences_the_notice_about_the_hf_copies() -> None:
    card = load_cards()["glm-4-9b-chat"]
    config = dataclasses.replace(card.config, notices=("the -hf copy's config says",))
    adapted, notices = adapt_config(config, card, context_len=8192, rope_theta=1e4, yarn="auto")
    assert (adapted.rope_theta, adapted.notices, notices) == (1e4, (), [])


def adapt_0414(context_len: int | None, yarn: str, config: ModelConfig | None = None) -> tuple[ModelConfig, list[str]]:
    card = load_cards()["GLM-4-9B-0414"]
    return adapt_config(config or card.config, card, context_len=context_len, rope_theta=None, yarn=yarn)


@pytest.mark.parametrize("context_len", [None, 1, 32768])
def test_yarn_stays_off_within_the_native_context(context_len: int | None) -> None:
    config, notices = adapt_0414(context_len, "auto")
    assert (config, notices) == (load_cards()["GLM-4-9B-0414"].config, [])


def test_yarn_comes_with_a_notice_beyond_the_native_context() -> None:
    config, notices = adapt_0414(32769, "auto")
    assert config.rope_scaling == RopeScaling(factor=4.0, original_max_position_embeddings=32768)
    assert config.max_position_embeddings == 131072
    assert notices == ["YaRN x4: native context 32768, now 131072"]


def test_yarn_on_works_at_any_context() -> None:
    assert adapt_0414(1024, "on")[0].rope_scaling is not None


def test_yarn_off_keeps_the_native_context() -> None:
    stretched = load_cards()["GLM-4-9B-0414"].config.with_yarn(4.0)
    assert adapt_0414(None, "auto", stretched)[0] == stretched
    assert adapt_0414(None, "off", stretched)[0] == load_cards()["GLM-4-9B-0414"].config
    config, _ = adapt_0414(65536, "off")
    with pytest.raises(DoesNotFitError) as caught:
        choose_context(run_of(config), CPU, 65536)
    assert caught.value.hint == "use --ctx 32768, or --yarn auto"


def test_yarn_of_the_file_is_said_on_and_off() -> None:
    stretched = load_cards()["GLM-4-9B-0414"].config.with_yarn(4.0)
    said = "YaRN x4, as config.json says: native context 32768, now 131072 (--yarn off)"
    assert adapt_0414(None, "auto", stretched)[1] == adapt_0414(1024, "on", stretched)[1] == [said]
    assert adapt_0414(1024, "off", stretched)[1] == ["the YaRN of config.json is off: context 32768"]


@pytest.mark.parametrize("in_file", [False, True])
def test_one_token_beyond_what_yarn_reaches_is_refused_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_file: bool
) -> None:
    """A fine-tuned copy of the 0414 series has no card of its own: its architecture says how far it stretches."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    changes: dict[str, Any] = {"rope_scaling": yarn} if in_file else {}
    folder = write_checkpoint(tmp_path / "m", "glm4", **changes)
    assert load_model(folder, context_len=2048).plan.context_len == 2048
    monkeypatch.setattr("glm4run.loading.TensorLoader", None)
    with pytest.raises(DoesNotFitError, match="2049 tokens was asked for, this model has 2048"):
        load_model(folder, context_len=2049)


def test_logits_without_yarn_are_those_of_the_model_without_it(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    plain = load_model(write_checkpoint(tmp_path / "plain", "glm4"), dtype="fp32").logits(IDS)
    folder = write_checkpoint(tmp_path / "yarn", "glm4", rope_scaling=yarn)
    assert torch.equal(load_model(folder, dtype="fp32", yarn="off").logits(IDS), plain)
    on = load_model(folder, dtype="fp32").logits(IDS)
    assert not torch.allclose(on, plain)
    asked = load_model(write_checkpoint(tmp_path / "asked", "glm4"), dtype="fp32", context_len=513)
    assert torch.equal(asked.logits(IDS), on)
    assert asked.notices == ("YaRN x4: native context 512, now 2048",)


def test_yarn_for_a_model_that_is_not_stretched_is_an_error(packed: Path) -> None:
    with pytest.raises(UsageError, match="not extended with YaRN"):
        load_model(packed, yarn="on")


def test_long_context_with_a_small_base_is_said() -> None:
    config = dataclasses.replace(load_cards()["glm-4-9b-chat"].config, rope_theta=1e4)
    for context_len, expected in ((65535, 0), (65536, 1), (None, 1)):
        _, notices = adapt_config(config, None, context_len=context_len, rope_theta=None, yarn="auto")
        assert len(notices) == expected
    _, notices = adapt_config(
        load_cards()["glm-4-9b-chat"].config, None, context_len=None, rope_theta=None, yarn="auto"
    )
    assert notices == []


@pytest.mark.parametrize(("backend", "dtype"), [("torch", "bf16"), ("torch", "fp32"), ("reference", "fp32")])
def test_planned_weight_bytes_are_those_of_the_loaded_tensors(backend: str, dtype: str) -> None:
    loaded = load_weights(demo_folder(), backend=backend, dtype=dtype)
    held = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    held += sum(m.prepacked.nbytes for m in loaded.model.modules() if isinstance(m, QuantizedLinear))
    assert {term.kind for term in loaded.plan.terms if term.name in memory.WEIGHT_TERMS} == {"exact"}
    assert loaded.plan.weight_bytes == held
