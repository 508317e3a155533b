"""The plan counts what is allocated, grows with the context, and finds the largest that fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm4run import memory
from glm4run.cards import load_cards
from glm4run.config import parse_config
from glm4run.kv_cache import KVCache
from glm4run.memory import MemoryPlan, kv_bytes_per_token, largest_context, parse_size, plan_run
from tests.builders import raw_config

GIB = 1 << 30
CARDS = st.sampled_from(sorted(load_cards()))


def plan(card: str, context_len: int, dtype_bytes: int = 2) -> MemoryPlan:
    return plan_run(load_cards()[card].config, 6 * GIB, context_len, dtype_bytes=dtype_bytes)


def test_cache_of_the_family() -> None:
    cards = load_cards()
    assert kv_bytes_per_token(cards["glm-4-9b-chat"].config, 2) == 40_960
    assert kv_bytes_per_token(cards["glm-4-9b-chat-1m"].config, 2) == 81_920
    terms = {term.name: term.bytes for term in plan("glm-4-9b-chat", 131072).terms}
    assert terms["kv_cache"] == 5 * GIB


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cache_is_allocated_as_planned(dtype: torch.dtype) -> None:
    config = parse_config(raw_config())
    cache = KVCache(config, 77, dtype=dtype, device=torch.device("cpu"))
    assert cache.nbytes == 77 * kv_bytes_per_token(config, dtype.itemsize)


def test_plan_names_every_term_once() -> None:
    terms = plan("glm-4-9b-chat", 8192).terms
    assert len({term.name for term in terms}) == len(terms)
    assert all(term.bytes > 0 for term in terms)
    assert {term.name for term in terms if term.kind == "exact"} == {"weights", "kv_cache"}


@given(CARDS, st.integers(1, 1 << 20), st.integers(1, 1 << 20))
def test_longer_contexts_never_need_less(card: str, one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert plan(card, small).peak_bytes <= plan(card, large).peak_bytes
    assert plan(card, large, 2).peak_bytes <= plan(card, large, 4).peak_bytes


@given(CARDS, st.integers(0, 60 * GIB), st.integers(1, 1 << 20))
def test_largest_context_fits_and_the_next_does_not(card: str, available: int, limit: int) -> None:
    largest = largest_context(load_cards()[card].config, 6 * GIB, available, limit, dtype_bytes=2)
    assert 0 <= largest <= limit
    if largest:
        assert plan(card, largest).peak_bytes <= available
    if largest < limit:
        assert plan(card, largest + 1).peak_bytes > available


def test_prefill_activations_do_not_grow_with_the_prompt() -> None:
    terms = [{t.name: t.bytes for t in plan("glm-4-9b-chat", n).terms} for n in (8192, 131072)]
    for name in ("prefill_activations", "logits", "process"):
        assert terms[0][name] == terms[1][name]


def test_available_memory_is_the_smallest_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_meminfo_available", lambda: 5)
    monkeypatch.setattr(memory, "_cgroup_available", lambda: iter([3, None]))
    assert memory.available_ram_bytes() == 3
    monkeypatch.setattr(memory, "_cgroup_available", lambda: iter([None, None]))
    assert memory.available_ram_bytes() == 5
    monkeypatch.setattr(memory, "_meminfo_available", lambda: None)
    assert memory.available_ram_bytes() is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not Linux")
def test_available_memory_of_this_machine_is_plausible() -> None:
    available = memory.available_ram_bytes()
    assert available is not None
    assert 16 << 20 < available < 1 << 45


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8k", 8192), ("128k", 131072), ("128K", 131072), ("1m", 1 << 20), ("8192", 8192), (" 1k ", 1024), ("1", 1)],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "k", "0", "0k", "-1", "-1k", "1.5k", "8kb", "eight", "1e3", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)
