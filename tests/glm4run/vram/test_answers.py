"""The answers: rows, longest contexts, the ladder, splits, cards; and that they grow and shrink as they must."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm4run.cards import load_cards
from glm4run.errors import CheckpointError, Glm4RunError, UsageError
from glm4run.loading import load_weights
from glm4run.memory import GIB
from glm4run.vram.answers import (
    Question,
    cards_that_fit,
    gpus_to_split_over,
    ladder,
    layers_to_offload,
    longest_context,
    make_row,
    make_rows,
    recommend,
)
from glm4run.vram.choices import BITS, Choice, default_bits, find_subject, make_run
from glm4run.vram.gpus import load_gpus
from glm4run.vram.speed import device_class, estimate_speed, prefill_flop
from glm4run.vram.targets import Target, of_gpu, resolve_target
from tests.builders import edit_tensors, write_checkpoint, write_packed

CHAT = find_subject(None)
CONTEXTS = (1024, 63 * 1024, 131072)


def question(gpu: str = "12GB", *choices: Choice, contexts: tuple[int, ...] = CONTEXTS) -> Question:
    return Question(CHAT, resolve_target(gpu), contexts, choices or tuple(Choice(b) for b in ("16", "8", "4")))


ASKED = question()


def test_twelve_gigabytes() -> None:
    """The new user's question: int4 up to 128k, int8 for short contexts, bf16 not at all."""
    asked = question("12GB")
    fits = {(row.choice.label, row.plan.context_len): row.fits for row in make_rows(asked)}
    assert {key for key, value in fits.items() if value} == {
        ("int8", 1024),
        ("int4", 1024),
        ("int4", 64512),
        ("int4", 131072),
    }
    best = recommend(asked)
    assert best is not None and best.choice.label == "int4"
    assert 64512 < best.tokens < longest_context(asked, Choice("4")).tokens == 131072


@given(st.sampled_from(BITS), st.integers(-1, 90), st.integers(1, 131072))
def test_longest_context_is_what_fits(bits: str, gib: int, context_len: int) -> None:
    target = Target("x", "cuda", 96 * GIB, gib * GIB, "test")
    asked = Question(CHAT, target, (context_len,), (Choice(bits),))
    longest = longest_context(asked, Choice(bits)).tokens
    assert make_row(asked, Choice(bits), context_len).fits == (context_len <= longest)


@given(st.integers(1, 131072), st.sampled_from([4, 8, 16]))
def test_more_bits_and_gpus_and_host_memory_order_the_needs(context_len: int, kv_bits: int) -> None:
    asked = ASKED
    peaks = [asked.plan(Choice(bits, kv_bits=kv_bits), context_len).peak_bytes for bits in ("4", "nf4", "8", "16")]
    assert peaks == sorted(peaks)
    whole = asked.plan(Choice("4", kv_bits=kv_bits), context_len).peak_bytes
    for smaller in ({"embed_on_host": True}, {"gpus": 2}, {"offloaded_layers": 10}, {"gpus": 2, "split": "tp"}):
        choice = dataclasses.replace(Choice("4", kv_bits=kv_bits), **smaller)
        assert choice.estimated
        assert asked.plan(choice, context_len).peak_bytes < whole


def test_embedding_on_the_host_saves_the_embedding() -> None:
    asked = question()
    saved = [asked.plan(Choice("4", embed_on_host=away), 8192).peak_bytes for away in (False, True)]
    assert saved[0] - saved[1] == 2 * 620_756_992


def test_drafts_need_logits_a_model_and_its_cache_at_the_real_context() -> None:
    asked = question()
    ngram = asked.plan(Choice("4", drafted_tokens=4), 1024)
    assert ngram.peak_bytes >= asked.plan(Choice("4"), 1024).peak_bytes
    assert not ngram.bytes_of("draft_weights")
    drafted = dataclasses.replace(asked, draft=find_subject("demo"))
    short, long = (drafted.plan(Choice("4", drafted_tokens=4), n) for n in (1024, 2048))
    assert short.bytes_of("draft_weights") == long.bytes_of("draft_weights") > 1_000_000
    assert long.bytes_of("draft_kv_cache") == 2 * short.bytes_of("draft_kv_cache") > 0


def test_ladder_goes_down_and_says_what_runs_now() -> None:
    asked = question("8GB")
    steps = ladder(asked, Choice("8", head_bits=16), 131072)
    peaks = [step.plan_bytes for step in steps]
    assert peaks == sorted(peaks, reverse=True)
    assert [step.saved_bytes > 0 for step in steps] == [True] * len(steps)
    runs_now = {step.option: step.runs_now for step in steps}
    assert runs_now["--chunk 128"] and runs_now["--head-bits 8"] and runs_now["--bits 4"]
    assert not runs_now["--embed host"] and runs_now["--kv-bits 8"] and runs_now["--kv-bits 4"]
    assert steps[-1].fits == (steps[-1].plan_bytes <= asked.target.free_bytes)


def test_layers_to_offload_and_gpus_to_split_over_are_the_fewest() -> None:
    asked = question("8GB")
    choice = Choice("4")
    layers = layers_to_offload(asked, choice, 131072)
    assert layers is not None

    def fits(**changes: object) -> bool:
        return make_row(asked, dataclasses.replace(choice, **changes), 131072).fits  # type: ignore[arg-type]

    assert fits(offloaded_layers=layers) and not fits(offloaded_layers=layers - 1)
    count = gpus_to_split_over(asked, choice, 131072)
    assert count is not None and fits(gpus=count) and not fits()
    assert layers_to_offload(question("1GB"), choice, 131072) is None


def test_free_memory_below_zero_need() -> None:
    target = Target("full", "cuda", 8 * GIB, 0, "test")
    asked = Question(CHAT, target, (1024,), (Choice("4"),))
    row = make_row(asked, Choice("4"), 1024)
    assert row.headroom_bytes == -row.plan.peak_bytes
    assert longest_context(asked, Choice("4")).tokens == 0
    assert recommend(asked) is None


# --- several GPUs


def test_two_kv_heads_cannot_be_cut_in_four() -> None:
    asked = question()
    caches = [asked.plan(Choice("16", gpus=count, split="tp"), 131072).bytes_of("kv_cache") for count in (1, 2, 4, 8)]
    assert caches == [5 * GIB, 5 * GIB // 2, 5 * GIB // 2, 5 * GIB // 2]


def test_half_of_ffn_is_no_multiple_of_128() -> None:
    """13696 / 2 = 6848 = 53.5 x 128. The default recipe's down_proj is at 32 and can be cut."""
    with pytest.raises(UsageError, match="group size 128 does not divide the 6848 columns") as caught:
        question().run(Choice("4", group_size=128, gpus=2, split="tp"))
    assert caught.value.hint == "--group-size 64 or 32"
    assert question().run(Choice("4", group_size=64, gpus=2, split="tp"))
    assert question().run(Choice("4", gpus=2, split="tp"))
    with pytest.raises(UsageError, match="do not divide by 3 GPUs"):
        question().run(Choice("4", gpus=3, split="tp"))


def test_pipeline_holds_one_table_and_half_of_the_layers() -> None:
    asked = question()
    whole, half = asked.plan(Choice("16"), 8192), asked.plan(Choice("16", gpus=2, split="pp"), 8192)
    assert half.bytes_of("linears") * 2 == whole.bytes_of("linears")
    assert half.bytes_of("kv_cache") * 2 == whole.bytes_of("kv_cache")
    assert half.bytes_of("head", "embedding") * 2 == whole.bytes_of("head", "embedding")


def test_every_layer_but_one_may_be_offloaded() -> None:
    assert question().run(Choice("4", offloaded_layers=39))
    with pytest.raises(UsageError, match="the model has 40"):
        question().run(Choice("4", offloaded_layers=40))


# --- models


def test_family_member_of_four_kv_heads_has_twice_the_cache() -> None:
    million = find_subject("glm-4-9b-chat-1m")
    asked = dataclasses.replace(question(), subject=million)
    assert asked.plan(Choice("4"), 131072).bytes_of("kv_cache") == 10 * GIB
    assert million.context_limit == 1 << 20
    assert find_subject("GLM-4-9B-0414").context_limit == 131072  # with YaRN
    assert find_subject(load_cards()["glm-4-9b"].hub_ids[0]).context_limit == 8192


@pytest.mark.parametrize("packed", [True, False])
def test_folder_is_planned_from_its_headers_as_it_is_loaded(tmp_path: Path, packed: bool) -> None:
    folder = write_packed(tmp_path / "m") if packed else write_checkpoint(tmp_path / "m", dtype=torch.bfloat16)
    subject = find_subject(str(folder))
    target = Target("RAM", "cpu", 64 * GIB, 64 * GIB, "test")
    asked = Question(subject, target, (128,), tuple(Choice(b) for b in default_bits(subject)))
    loaded = load_weights(folder, backend="torch" if packed else "auto", dtype="bf16" if packed else "auto")
    choice = asked.choices[0]
    overhead = target.overhead(0, None)
    dtype = str(loaded.model.dtype).replace("torch.", "").replace("bfloat16", "bf16").replace("float32", "fp32")
    run = make_run(subject, choice, overhead, device="cpu", dtype=dtype, backend="torch")
    assert run.weights.by_class == {
        name: loaded.plan.bytes_of(name) for name in ("linears", "scales", "embedding", "head", "norms_and_biases")
    }


def test_damaged_folder_is_an_error(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    edit_tensors(folder, {"model.norm.weight": None})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        find_subject(str(folder))


def test_unknown_model_names_the_members() -> None:
    with pytest.raises(Glm4RunError, match="no model 'glm-5'") as caught:
        find_subject("glm-5")
    assert caught.value.hint is not None and "glm-4-9b-chat" in caught.value.hint


# --- devices and speed


def test_device_without_bf16_is_planned_in_fp16() -> None:
    t4 = resolve_target("T4")
    assert t4.dtype(packed=True, dense_bytes=0) == "fp16"
    assert any("no bf16" in note for note in t4.notes)
    assert resolve_target("4090").dtype(packed=True, dense_bytes=0) == "bf16"


def test_cards_that_fit_do_and_every_smaller_one_does_not() -> None:
    asked = question()
    cards = cards_that_fit(asked, Choice("4"), 131072, per_vendor=3)
    assert {card.gpu.vendor for card in cards} == {"NVIDIA", "AMD", "Intel", "Apple"}
    assert all(card.used_share < 0.97 and card.longest_tokens == 131072 for card in cards)
    smallest = min(card.gpu.total_bytes for card in cards if card.gpu.vendor == "NVIDIA")
    for gpu in load_gpus():
        if gpu.vendor == "NVIDIA" and gpu.total_bytes < smallest and gpu.kind != "laptop":
            row = make_row(dataclasses.replace(asked, target=of_gpu(gpu)), Choice("4"), 131072)
            assert not row.fits or row.is_tight, gpu.name


def test_speeds_are_ranges_that_fall_with_bits_and_context() -> None:
    asked = question("4090")
    ranges = [make_row(asked, Choice(bits), 1024).speed for bits in ("16", "8", "4")]
    assert all(speed is not None for speed in ranges)
    highs = [speed.decode_tok_per_s[1] for speed in ranges if speed is not None]
    assert highs == sorted(highs)
    near, far = (make_row(asked, Choice("4"), n).speed for n in (1024, 131072))
    assert near is not None and far is not None
    assert near.decode_tok_per_s[1] > far.decode_tok_per_s[1]
    for speed in (near, far):
        assert speed.decode_tok_per_s[0] < speed.decode_tok_per_s[1]
        assert speed.prefill_s is not None and speed.prefill_s[0] < speed.prefill_s[1]


def test_measured_speeds_lie_in_their_ranges() -> None:
    """GLM-4-9B on an A100: 27.8 tok/s of bf16 in eager torch; V100: 36.1 in a native engine. Source: docs/vram.md."""
    for name, low, high in (("A100 SXM4 80GB", 27.8, 84.28 * 14.14 / 17.56), ("Tesla V100 SXM2 32GB", 20.0, 36.1)):
        gpu = next(gpu for gpu in load_gpus() if gpu.name == name)
        speed = estimate_speed(gpu, 16, 17_560_000_000, CHAT.config, 1000)
        assert speed is not None
        slow, fast = speed.decode_tok_per_s
        assert slow <= low * 1.1 and high <= fast * 1.02


def test_every_gpu_has_a_class_with_measurements() -> None:
    for gpu in load_gpus():
        assert estimate_speed(gpu, 4, GIB, CHAT.config, 1024) is not None, device_class(gpu)
    assert estimate_speed(None, 4, GIB, CHAT.config, 1024) is None


def test_arithmetic_of_a_prompt() -> None:
    """128k tokens on an A100 took 63 % of 312 TFLOPS; attention is 72 % of the work. Source: vram.md, section 4."""
    total = prefill_flop(CHAT.config, 128_000)
    linears = 2 * 8_157_921_280 * 128_000
    assert 1 - linears / total == pytest.approx(0.72, abs=0.01)
