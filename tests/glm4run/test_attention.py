"""Grouped-query attention against one head at a time in float64, and what it never allocates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glm4run import attention
from glm4run.attention import grouped_query_attention


def naive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[H, T, D] x [KVH, S, D] to [T, H * D] in float64, a head and a position at a time."""
    H, T, D = query.shape
    KVH, S, _ = key.shape
    out = torch.empty(T, H, D, dtype=torch.float64)
    for h in range(H):
        k, v = key[h // (H // KVH)].double(), value[h // (H // KVH)].double()
        for t in range(T):
            seen = S - T + t + 1
            weights = (k[:seen] @ query[h, t].double() / math.sqrt(D)).softmax(0)
            out[t, h] = weights @ v[:seen]
    return out.reshape(T, H * D)


def random_qkv(H: int, KVH: int, T: int, S: int, D: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((H, T, D), (KVH, S, D), (KVH, S, D))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


class Recorder(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


@pytest.mark.parametrize("past", [0, 1, 50])
@pytest.mark.parametrize("T", [1, 2, 7, 33])
@pytest.mark.parametrize("repeat", [1, 2, 16])
@pytest.mark.parametrize("KVH", [1, 2])
def test_equals_one_head_at_a_time(KVH: int, repeat: int, T: int, past: int) -> None:
    q, k, v = random_qkv(KVH * repeat, KVH, T, T + past)
    out = grouped_query_attention(q, k, v)
    assert out.shape == (T, KVH * repeat * 16)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), naive(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score_bytes", [1, 4 * 4 * 40, 4 * 4 * 40 * 5, 4 * 4 * 40 * 32])
def test_blocks_of_queries_equal_one_block(score_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks of 1, 1, 5 and 32 queries: 33 divide by none of the last two.
    q, k, v = random_qkv(4, 2, 33, 40)
    whole = grouped_query_attention(q, k, v)
    monkeypatch.setattr(attention, "MAX_SCORE_BYTES", score_bytes)
    torch.testing.assert_close(grouped_query_attention(q, k, v), whole, rtol=1e-5, atol=1e-6)


def test_leading_batch_dimensions_are_independent() -> None:
    samples = [random_qkv(4, 2, 7, 12, seed=seed) for seed in range(3)]
    q, k, v = (torch.stack(tensors) for tensors in zip(*samples, strict=True))
    batched = grouped_query_attention(q, k, v)
    assert batched.shape == (3, 7, 64)
    for got, sample in zip(batched, samples, strict=True):
        torch.testing.assert_close(got, grouped_query_attention(*sample), rtol=1e-5, atol=1e-6)


def test_no_query_sees_the_future() -> None:
    q, k, v = random_qkv(4, 2, 7, 12)
    before = grouped_query_attention(q, k, v)
    k[:, 9:], v[:, 9:] = 100.0, -100.0  # positions 9.. belong to queries 4..
    after = grouped_query_attention(q, k, v)
    assert torch.equal(after[:4], before[:4])
    assert not torch.isclose(after[4:], before[4:]).all(dim=-1).any()


def test_views_of_a_cache_are_taken_as_they_are() -> None:
    q, k, v = random_qkv(4, 2, 3, 10)
    cache = torch.full((2, 2, 64, 16), float("nan"))
    cache[0, :, :10], cache[1, :, :10] = k, v
    strided = q.transpose(0, 1).contiguous().transpose(0, 1)
    got = grouped_query_attention(strided, cache[0, :, :10], cache[1, :, :10])
    torch.testing.assert_close(got, grouped_query_attention(q, k, v), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_huge_inputs_in_half_precision_stay_finite(dtype: torch.dtype) -> None:
    q, k, v = (tensor.clamp(-2, 2) * 3e4 for tensor in random_qkv(32, 2, 7, 20, D=128))
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    # The products pass fp16's 65504 by five orders of magnitude.
    assert float((q.double()[0] @ k.double()[0].T).abs().max()) > 65504 * 1e5
    out = grouped_query_attention(q, k, v)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    # So far apart, softmax picks one key: the answer is that key's value, exactly.
    torch.testing.assert_close(out.double(), naive(q, k, v), rtol=float(torch.finfo(dtype).eps), atol=0.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_rounds_only_the_answer(dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = (tensor.to(dtype) for tensor in random_qkv(8, 2, 7, 20))
    out = grouped_query_attention(q, k, v)
    torch.testing.assert_close(out.double(), naive(q, k, v), rtol=tolerance / 2, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_never_expands_keys_and_values_to_all_heads(dtype: torch.dtype) -> None:
    H, KVH, S, D = 32, 2, 4096, 64
    q, k, v = (tensor.to(dtype) for tensor in random_qkv(H, KVH, 1, S, D))
    with Recorder() as recorder:
        grouped_query_attention(q, k, v)
    expanded = H * S * D
    assert recorder.largest >= H * S  # the scores were seen at all
    assert recorder.largest <= KVH * S * D < expanded / 8


def test_prefill_keeps_scores_within_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    H, KVH, T, D = 32, 2, 256, 16
    q, k, v = random_qkv(H, KVH, T, T, D)
    budget = 1 << 18
    monkeypatch.setattr(attention, "MAX_SCORE_BYTES", budget)
    with Recorder() as recorder:
        grouped_query_attention(q, k, v)
    assert H * T * T > 4 * H * T * D  # unblocked scores would stand out
    assert recorder.largest <= max(budget // 4, H * T * D)
