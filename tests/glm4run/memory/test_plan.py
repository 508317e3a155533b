"""The plan grows with what it plans for, finds the largest context, and names every byte once."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4run.cards import load_cards
from glm4run.memory import (
    GIB,
    MIB,
    PREFILL_CHUNK,
    WEIGHT_TERMS,
    MemoryPlan,
    Run,
    choose_plan,
    device_overhead,
    kv_bytes_per_token,
    largest_context,
    plan_run,
    plan_weights,
    process_overhead,
    stored_tensors,
)
from glm4run_quantize.recipes import choose_recipe

MEMBERS = st.sampled_from(["glm-4-9b-chat", "glm-4-9b-chat-1m", "GLM-4-9B-0414"])
BITS = st.sampled_from([16, 8, 4])
KV_BITS = st.sampled_from([16, 8, 4])
DEVICES = st.sampled_from(["cpu", "cuda"])
CONTEXTS = st.integers(1, 1 << 20)


def run_of(member: str = "glm-4-9b-chat", bits: int = 4, device: str = "cuda", **changes: object) -> Run:
    config = load_cards()[member].config
    schemes = choose_recipe(config, bits)[0].schemes(config) if bits < 16 else {}
    weights = plan_weights(
        config, stored_tensors(config, schemes), schemes, backend="torch", dtype="bf16", device=device
    )
    overhead = device_overhead() if device == "cuda" else process_overhead(None, config.vocab_size)
    run = Run(weights, weights.compute(config, dtype="bf16", device=device), overhead)
    return dataclasses.replace(run, **changes)  # type: ignore[arg-type]  # fields of Run, by name


RUNS = {
    (m, b, d): run_of(m, b, d)
    for m in ("glm-4-9b-chat", "glm-4-9b-chat-1m", "GLM-4-9B-0414")
    for b in (16, 8, 4)
    for d in ("cpu", "cuda")
}


def peak(run: Run, context: int, **changes: object) -> int:
    return plan_run(dataclasses.replace(run, **changes), context).peak_bytes  # type: ignore[arg-type]


def test_cache_of_the_family() -> None:
    cards = load_cards()
    assert kv_bytes_per_token(cards["glm-4-9b-chat"].config, 2) == 40_960
    assert kv_bytes_per_token(cards["glm-4-9b-chat-1m"].config, 2) == 81_920
    assert plan_run(run_of(), 131072).bytes_of("kv_cache") == 5 * GIB
    assert plan_run(run_of("glm-4-9b-chat-1m"), 131072).bytes_of("kv_cache") == 10 * GIB


def test_plan_of_a_million_tokens() -> None:
    """Whole numbers all the way: 80 GiB of cache at 1,048,576, a block of 64 tokens less before it."""
    last, full = (plan_run(run_of("glm-4-9b-chat-1m"), n) for n in (1_048_512, 1_048_576))
    assert full.bytes_of("kv_cache") == 80 * GIB
    assert full.bytes_of("kv_cache") - last.bytes_of("kv_cache") == 64 * 81_920
    assert full.bytes_of("kv_cache") == 2 * plan_run(run_of(), 1_048_576).bytes_of("kv_cache")


def test_cache_rows_of_fewer_bits() -> None:
    """int8 with a 16-bit scale a row: 20.31 KiB a token; int4 with such a scale and 12 bytes of codes: 12.19."""
    tokens = [plan_run(run_of(kv_bits=bits), 1024).bytes_of("kv_cache") for bits in (16, 8, 4)]
    assert tokens == [41_943_040, 21_299_200, 12_779_520]
    run = dataclasses.replace(run_of(kv_bits=8), value_bits=4)
    assert plan_run(run, 1024).bytes_of("kv_cache") == (21_299_200 + 12_779_520) // 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_term_is_named_once_and_says_where_it_comes_from(device: str) -> None:
    plan = plan_run(run_of(device=device), 8192)
    assert len({term.name for term in plan.terms}) == len(plan.terms)
    assert all(term.bytes >= 0 and term.formula for term in plan.terms)
    exact = {term.name for term in plan.terms if term.kind == "exact"}
    assert exact == {*WEIGHT_TERMS, "kv_cache"}
    assert plan.peak_bytes == sum(term.bytes for term in plan.terms)
    assert plan.weight_bytes == run_of(device=device).weights.bytes
    assert ("device_context" if device == "cuda" else "process") in {term.name for term in plan.terms}


def test_every_logit_is_a_term_of_its_own() -> None:
    """4 B x 151552 a position: 1184 MiB at 2048, as the head's output alone would be in float32."""
    run = dataclasses.replace(run_of(), every_logits=True)
    one, all_ = plan_run(run_of(), 2048), plan_run(run, 2048)
    assert all_.bytes_of("every_logits") == 1184 * MIB
    assert all_.peak_bytes >= one.peak_bytes + 1184 * MIB - one.bytes_of("logits")
    assert {term.kind for term in all_.terms if term.name == "every_logits"} == {"exact"}


@given(MEMBERS, BITS, DEVICES, KV_BITS, CONTEXTS, CONTEXTS)
def test_longer_contexts_never_need_less(
    member: str, bits: int, device: str, kv_bits: int, one: int, other: int
) -> None:
    small, large = sorted((one, other))
    run = RUNS[member, bits, device]
    assert peak(run, small, kv_bits=kv_bits) <= peak(run, large, kv_bits=kv_bits)


@given(MEMBERS, DEVICES, CONTEXTS, st.integers(1, 8), st.integers(1, 8))
def test_more_sequences_and_more_bits_never_need_less(
    member: str, device: str, context: int, one: int, other: int
) -> None:
    few, many = sorted((one, other))
    sixteen, eight, four = (RUNS[member, bits, device] for bits in (16, 8, 4))

    def with_batch(run: Run, batch: int) -> Run:
        return dataclasses.replace(run, compute=dataclasses.replace(run.compute, batch=batch))

    assert peak(with_batch(four, few), context) <= peak(with_batch(four, many), context)
    assert peak(four, context) < peak(eight, context) < peak(sixteen, context)
    # The cache alone: in a short context what reading a quantized one in torch takes is more than it saves.
    caches = [plan_run(dataclasses.replace(four, kv_bits=kept), context).bytes_of("kv_cache") for kept in (4, 8, 16)]
    assert caches == sorted(caches)


@given(MEMBERS, BITS, DEVICES, CONTEXTS, st.integers(1, 4096), st.integers(1, 4096))
def test_larger_chunks_never_need_less(member: str, bits: int, device: str, context: int, one: int, other: int) -> None:
    small, large = sorted((one, other))
    run = RUNS[member, bits, device]
    assert peak(run, context, chunk=small) <= peak(run, context, chunk=large)


@given(MEMBERS, BITS, DEVICES, CONTEXTS, st.integers(1, 4), KV_BITS)
def test_nothing_is_negative(member: str, bits: int, device: str, context: int, batch: int, kv_bits: int) -> None:
    run = RUNS[member, bits, device]
    run = dataclasses.replace(run, kv_bits=kv_bits, compute=dataclasses.replace(run.compute, batch=batch))
    assert all(term.bytes >= 0 for term in plan_run(run, context).terms)


@given(MEMBERS, BITS, st.integers(-GIB, 60 * GIB), CONTEXTS)
def test_largest_context_fits_and_the_next_does_not(member: str, bits: int, available: int, limit: int) -> None:
    run = RUNS[member, bits, "cuda"]
    largest = largest_context(run, available, limit)
    assert 0 <= largest <= limit
    if largest:
        assert peak(run, largest) <= available
    if largest < limit:
        assert peak(run, largest + 1) > available


def test_activations_do_not_grow_with_the_prompt() -> None:
    """Attention's scores are bounded; only what it widens of the cache grows: 4 bytes x 2 x 256 a token."""
    terms = [plan_run(run_of(), n) for n in (16384, 131072)]
    assert terms[0].bytes_of("prefill_activations") == terms[1].bytes_of("prefill_activations")
    grown = terms[1].bytes_of("attention") - terms[0].bytes_of("attention")
    assert grown == (131072 - 16384) * 2 * 4 * 256


def plan_in(gib: float, wanted: int | None, run: Run | None = None) -> MemoryPlan | None:
    return choose_plan(run or run_of(), int(gib * GIB), wanted, 131072)


def test_chunk_shrinks_only_where_the_context_needs_it() -> None:
    needed = peak(run_of(), 131072) / GIB
    plans = [plan_in(needed + 0.001, 131072), plan_in(needed - 0.001, 131072)]
    chunks = [0 if plan is None else plan.chunk for plan in plans]
    assert chunks[0] == PREFILL_CHUNK
    assert 0 < chunks[1] < PREFILL_CHUNK
    assert plan_in(9.0, None) == plan_run(run_of(), largest_context(run_of(), 9 * GIB, 131072))
    assert plan_in(6.0, 1024) is None
    assert plan_in(3.0, None) is None
    assert plan_in(-3.0, None) is None


def test_measured_process_counts_as_held() -> None:
    overhead = process_overhead(500 * MIB, 1000)
    assert (overhead.kind, overhead.held_bytes) == ("measured", 500 * MIB)
    assert overhead.bytes > 500 * MIB
    assert process_overhead(None, 1000).held_bytes == 0
    assert device_overhead(is_open=True).held_bytes < device_overhead().bytes
    assert device_overhead(300 * MIB).kind == "measured"
