"""The cache holds what was appended, moves only when told, and never reallocates."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glm4run.config import ModelConfig
from glm4run.errors import UsageError
from glm4run.kernels.cpu import ops as native
from glm4run.kv_cache import KVCache
from glm4run.kv_format import CODES, KVFormat, group_of, parse_kv_bits, row_bytes
from glm4run.kv_rows import KVRows, dequantize_rows, quantize_rows, turn
from glm4run.ops import NativeOps, Ops
from tests.native_library import ISAS, in_bytes, needs_library, running

CONFIG = ModelConfig(
    model_type="glm4",
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=64,
    vocab_size=32,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
)


def new_cache(capacity: int = 8, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(CONFIG, capacity, dtype=dtype, device=torch.device("cpu"))


def tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, 16, generator=generator), torch.randn(2, count, 16, generator=generator)


def test_a_new_cache_is_empty_and_of_the_planned_size() -> None:
    cache = new_cache(8, torch.bfloat16)
    assert (cache.position, cache.capacity) == (0, 8)
    assert len(cache.layers) == 3
    assert cache.nbytes == 2 * 3 * 2 * 64 * 16 * 2  # a whole block of rows


def test_bytes_per_token_of_the_real_shape() -> None:
    config = dataclasses.replace(CONFIG, num_hidden_layers=40, head_dim=128)
    for capacity, rows in ((9, 64), (64, 64), (65, 128)):
        cache = KVCache(config, capacity, dtype=torch.bfloat16, device=torch.device("meta"))
        assert (cache.capacity, cache.nbytes, cache.bytes_per_token) == (capacity, rows * 40_960, 40_960)


def test_append_returns_everything_so_far() -> None:
    cache = new_cache()
    first, second = tokens(3, seed=1), tokens(2, seed=2)
    for layer in range(3):
        key, value = cache.append(layer, *first)
        assert torch.equal(key, first[0])
        assert torch.equal(value, first[1])
    cache.advance(3)
    key, value = cache.append(1, *second)
    assert key.shape == value.shape == (2, 5, 16)
    assert torch.equal(key, torch.cat((first[0], second[0]), dim=1))
    assert torch.equal(value, torch.cat((first[1], second[1]), dim=1))


def test_append_alone_does_not_move() -> None:
    cache = new_cache()
    cache.append(0, *tokens(3, seed=1))
    assert cache.position == 0
    key, _ = cache.append(0, *tokens(2, seed=2))
    assert torch.equal(key, tokens(2, seed=2)[0])


def test_layers_are_separate() -> None:
    cache = new_cache()
    key_0, _ = cache.append(0, *tokens(3, seed=1))
    cache.append(1, *tokens(3, seed=2))
    assert torch.equal(key_0, tokens(3, seed=1)[0])


def test_append_returns_views_of_memory_allocated_once() -> None:
    cache = new_cache()
    addresses = [t.data_ptr() for layer in range(3) for t in cache.tensors(layer).values()]
    for _ in range(4):
        for layer in range(3):
            key, value = cache.append(layer, *tokens(2))
            assert key.data_ptr() == cache.layers[layer].keys.data.data_ptr()
            assert value.data_ptr() == cache.layers[layer].values.data.data_ptr()
        cache.advance(2)
    assert [t.data_ptr() for layer in range(3) for t in cache.tensors(layer).values()] == addresses


def test_append_rounds_to_the_caches_dtype() -> None:
    cache = new_cache(dtype=torch.bfloat16)
    key, value = tokens(3)
    got_key, got_value = cache.append(0, key, value)
    assert torch.equal(got_key, key.bfloat16())
    assert torch.equal(got_value, value.bfloat16())


def test_a_full_cache_takes_no_more_and_says_so() -> None:
    cache = new_cache(8)
    cache.append(0, *tokens(8))
    cache.advance(8)
    with pytest.raises(ValueError, match=r"8 tokens, 9"):
        cache.append(0, *tokens(1))
    assert cache.position == 8
    with pytest.raises(ValueError, match="9 were asked for"):
        new_cache(8).append(0, *tokens(9))


def test_truncate_forgets_the_end_and_keeps_the_beginning() -> None:
    cache = new_cache()
    first, other = tokens(6, seed=1), tokens(2, seed=2)
    cache.append(0, *first)
    cache.advance(6)
    cache.truncate(4)
    assert cache.position == 4
    key, value = cache.append(0, *other)
    assert torch.equal(key, torch.cat((first[0][:, :4], other[0]), dim=1))
    assert torch.equal(value, torch.cat((first[1][:, :4], other[1]), dim=1))
    cache.truncate(0)
    assert cache.position == 0


@pytest.mark.parametrize("position", [-1, 4, 100])
def test_truncate_goes_back_only(position: int) -> None:
    cache = new_cache()
    cache.append(0, *tokens(3))
    cache.advance(3)
    with pytest.raises(ValueError, match="cannot truncate"):
        cache.truncate(position)
    assert cache.position == 3


# --- quantized rows


QUANTIZED = ["8", "4", "8:4", "16:8", "4:16"]
CPU = torch.device("cpu")


def quantized_cache(kept: str, capacity: int = 40, dtype: torch.dtype = torch.float32) -> KVCache:
    cache = KVCache(CONFIG, capacity, dtype=dtype, device=CPU, kv_format=parse_kv_bits(kept))
    for layer in range(3):
        for tensor in cache.tensors(layer).values():
            tensor.zero_()  # so that whole tensors can be compared
    return cache


def outlier_rows(count: int, head_dim: int, *, seed: int = 0, outlier: float = 0.0) -> Tensor:
    rows = torch.randn(2, count, head_dim, generator=torch.Generator().manual_seed(seed))
    rows[..., head_dim // 3] += outlier
    return rows


@pytest.mark.parametrize("text", ["3", "8:", ":8", "x", "8:4:4", "", "8:5", "-8"])
def test_bits_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_kv_bits(text)


def test_bits_of_keys_and_values() -> None:
    assert parse_kv_bits("8") == parse_kv_bits(8) == KVFormat(8, 8) and str(KVFormat(8, 8)) == "8"
    assert parse_kv_bits("8:4") == KVFormat(8, 4) and str(KVFormat(8, 4)) == "8:4"
    assert not KVFormat().is_quantized and KVFormat(16, 4).is_quantized


@pytest.mark.parametrize("head_dim", [128, 64, 32, 96, 48, 2])
def test_turning_is_orthogonal_and_its_own_inverse(head_dim: int) -> None:
    rows = outlier_rows(5, head_dim, outlier=30)
    assert torch.allclose(turn(turn(rows)), rows, atol=1e-4)
    assert torch.allclose(turn(rows).norm(dim=-1), rows.norm(dim=-1), rtol=1e-5)
    one = torch.zeros(head_dim)
    one[0] = 1.0
    spread = turn(one)
    size = head_dim & -head_dim
    assert torch.allclose(spread[:size], torch.full((size,), size**-0.5))


@pytest.mark.parametrize("head_dim", [128, 64, 96, 48, 2])
def test_a_row_of_8_bits_reads_back_within_half_a_step(head_dim: int) -> None:
    rows = outlier_rows(50, head_dim, outlier=20)
    data, scales = quantize_rows(rows, 8)
    turned, back = turn(rows), dequantize_rows(data, scales, 8)
    step = scales.float().repeat_interleave(group_of(8, head_dim), dim=-1)
    assert bool(((back - turned).abs() <= step * 0.51 + turned.abs().amax() * 2e-3).all())
    if head_dim > 2:  # two values may be the largest
        assert bool((back - turned).abs().mean() > step.mean() / 20)


def plainly(turned: Tensor) -> Tensor:
    """What a turned row [D] reads back as in 4 bits, by trying every code on every group; in float64."""
    scale = float((turned.abs().max() / 127).half())
    wanted, group = (turned.double() / scale * 16).round() / 16, group_of(4, len(turned))
    read = []
    for values in wanted.split(group):
        tried = [lowest + step * ((values - lowest) / step).round().clamp(0, 15) for step, lowest in CODES]
        errors = [float((levels - values).square().sum()) for levels in tried]
        read.append(tried[errors.index(min(errors))])
    return torch.cat(read) * scale


@pytest.mark.parametrize("head_dim", [128, 80, 64, 36, 8, 2])
@pytest.mark.parametrize("outlier", [0.0, 20.0])
def test_a_row_of_4_bits_reads_back_as_its_best_codes_have_it(head_dim: int, outlier: float) -> None:
    rows = outlier_rows(10, head_dim, outlier=outlier)
    rows[1] *= 1e-3
    rows[0, 3] = torch.arange(head_dim)
    data, scales = quantize_rows(rows, 4)
    turned, back = turn(rows), dequantize_rows(data, scales, 4)
    assert data.nbytes + scales.nbytes == 20 * row_bytes(head_dim, 4, 2)
    largest = turned.abs().amax(-1, keepdim=True)
    for row, read, most in zip(turned.flatten(0, 1), back.flatten(0, 1), largest.flatten(), strict=True):
        # Two codes may be as good; then what is left of a row is the same.
        expected = float((plainly(row) - row).square().sum())
        assert abs(float((read - row).double().square().sum()) - expected) <= 0.01 * expected + 1e-6 * float(most) ** 2
    assert bool(((back - turned).abs() <= largest * 12 / 127).all())


def test_codes_are_64_mirrored_and_reach_from_end_to_end() -> None:
    assert len(set(CODES)) == 64 and (16, -120) in CODES
    assert all((step, -lowest - 15 * step) in CODES for step, lowest in CODES)
    assert all(lowest >= -127 and lowest + 15 * step <= 127 for step, lowest in CODES)


def test_four_bits_of_normal_rows_lose_what_kv_codes_says() -> None:
    """Groups of 32 with a scale and a minimum each, as large a row, left 0.0058."""
    rows = torch.randn(400, 128, generator=torch.Generator().manual_seed(1))
    lost = dequantize_rows(*quantize_rows(rows, 4), 4) - turn(rows)
    assert float(lost.square().mean() / rows.square().mean()) < 0.00265


def test_one_large_channel_costs_the_others_little() -> None:
    """What turning is for: without it the group of the large channel would lose its small values."""
    plain, biased = outlier_rows(200, 128), outlier_rows(200, 128, outlier=60)
    for bits, most in ((8, 0.06), (4, 1.2)):
        rows = KVRows(*quantize_rows(biased, bits), bits)
        error = (rows.read(200) - biased).square().mean().sqrt()
        unturned_step = 60 / (127 if bits == 8 else 15)
        assert float(error) < most * float(plain.std()) and float(error) < unturned_step / 3


@pytest.mark.parametrize("kept", QUANTIZED)
def test_forgetting_tokens_is_as_if_they_had_never_come(kept: str) -> None:
    there, never = quantized_cache(kept), quantized_cache(kept)
    for cache in (there, never):
        cache.append(1, *tokens(11, seed=1))
        cache.advance(11)
    there.append(1, *tokens(9, seed=2))
    there.advance(9)
    there.truncate(7)
    never.truncate(7)
    for cache in (there, never):
        cache.append(1, *tokens(20, seed=3))
        cache.advance(20)
    for name, tensor in there.rows(1, 0, 27).items():
        assert torch.equal(tensor, never.rows(1, 0, 27)[name]), name


@pytest.mark.parametrize("kept", QUANTIZED)
def test_the_pieces_that_tokens_come_in_do_not_matter(kept: str) -> None:
    whole, pieces = quantized_cache(kept), quantized_cache(kept)
    key, value = tokens(23, seed=4)
    whole.append(0, key, value)
    for first, last in ((0, 1), (1, 14), (14, 23)):
        pieces.append(0, key[:, first:last], value[:, first:last])
        pieces.advance(last - first)
    for name, tensor in whole.tensors(0).items():
        assert torch.equal(tensor, pieces.tensors(0)[name]), name


@pytest.mark.parametrize("kept", QUANTIZED)
def test_rows_restore_to_the_bit_and_only_where_they_fit(kept: str) -> None:
    cache, other = quantized_cache(kept), quantized_cache(kept)
    cache.append(2, *tokens(15, seed=5))
    rows = {name: tensor.clone() for name, tensor in cache.rows(2, 3, 15).items()}
    other.restore(2, 3, rows)
    for name, tensor in other.rows(2, 3, 15).items():
        assert torch.equal(tensor, rows[name])
    floats = new_cache(40).rows(2, 3, 15)
    with pytest.raises((ValueError, KeyError)):
        other.restore(2, 3, floats)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reads_back_so_and_nothing_else(bits: int, bad: float) -> None:
    rows = outlier_rows(6, 64)
    rows[1, 2, 40] = bad
    kept = KVRows(*quantize_rows(rows, bits), bits)
    finite = torch.isfinite(kept.read(6)).all(-1)
    assert finite.sum() == 11 and not finite[1, 2]
    assert bool(kept.read(6)[1, 2].isnan().all())


def test_odd_heads_are_refused_in_four_bits() -> None:
    with pytest.raises(UsageError, match="heads of 15"):
        KVCache(dataclasses.replace(CONFIG, head_dim=15), 4, dtype=torch.float32, device=CPU, kv_format=KVFormat(16, 4))


# --- in the native library


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_library_keeps_the_same_bits(isa: str, dtype: torch.dtype) -> None:
    for head_dim, kept in itertools.product((128, 64, 96, 16, 36), QUANTIZED):
        config = dataclasses.replace(CONFIG, head_dim=head_dim, num_hidden_layers=1)
        offsets = [outlier_rows(1, head_dim, seed=2, outlier=25)[:, 0]] if head_dim in (128, 96) else []
        caches = [
            KVCache(config, 30, dtype=dtype, device=CPU, kv_format=parse_kv_bits(kept), key_offsets=offsets)
            for _ in range(2)
        ]
        key, value = (
            outlier_rows(19, head_dim, seed=seed, outlier=25 * (1 - seed)).to(dtype).transpose(0, 1).contiguous()
            for seed in (0, 1)
        )
        key, value = key.transpose(0, 1), value.transpose(0, 1)
        key[0, 3, 1] = 0
        key[1, 4] = 0  # a row of nothing
        value[1, 5, 2] = float("nan")
        value[0, 6, 3], value[0, 7] = -float("inf"), 1e-7  # the latter: scales of few bits
        value[0, 8] = torch.arange(head_dim)  # many codes are as good
        with running(isa, threads=1):
            Ops().append(caches[0].layers[0], 4, key, value)
            NativeOps().append(caches[1].layers[0], 4, key, value)
        for name, tensor in caches[0].rows(0, 4, 23).items():
            other = caches[1].rows(0, 4, 23)[name]
            assert torch.equal(tensor.nan_to_num(7.0), other.nan_to_num(7.0)), (head_dim, kept, name)


@needs_library
@pytest.mark.parametrize("kept", QUANTIZED)
def test_the_library_attends_as_torch_does(kept: str) -> None:
    """Over every kind of row, few tokens and many, with heads that fill the lanes and that do not."""
    shapes = ((32, 128, torch.float32), (6, 64, torch.bfloat16), (4, 96, torch.float32), (40, 16, torch.float16))
    for heads, head_dim, dtype in shapes:
        config = dataclasses.replace(CONFIG, head_dim=head_dim, num_hidden_layers=1)
        cache = KVCache(config, 160, dtype=dtype, device=CPU, kv_format=parse_kv_bits(kept))
        key, value = outlier_rows(131, head_dim, outlier=9).to(dtype), outlier_rows(131, head_dim, seed=1).to(dtype)
        Ops().append(cache.layers[0], 0, key, value)
        for count in (1, 3, 21):
            query = torch.randn(heads, count, head_dim, generator=torch.Generator().manual_seed(2)).to(dtype)
            expected = Ops().attend(query, cache.layers[0], 131)
            for isa in ISAS:
                layer = cache.layers[0]
                rounded = in_bytes(layer.keys, isa) or in_bytes(layer.values, isa)
                with running(isa, threads=1):
                    got = native.attention(query, layer, 131)
                error = float((got.float() - expected.float()).abs().max())
                allowed = 0.03 if rounded else 1e-3 if dtype == torch.float32 else 0.02
                assert error < allowed, (isa, heads, head_dim, count)


@needs_library
def test_a_value_that_is_not_finite_is_no_silent_number() -> None:
    for kept, which in itertools.product(("8", "4"), (0, 1)):
        cache = quantized_cache(kept)
        pair = [outlier_rows(20, 16), outlier_rows(20, 16, seed=1)]
        pair[which][1, 6, 2] = float("nan")
        cache.append(0, *pair)
        out = native.attention(torch.ones(4, 1, 16), cache.layers[0], 20).unflatten(-1, (4, 16))
        assert bool(torch.isfinite(out[0, :2]).all()) and bool(out[0, 2:].isnan().all()), (kept, which)


LONG = 131072


@needs_library
@pytest.mark.parametrize("kept", ["16", "8", "4"])
def test_the_last_position_of_a_long_context(kept: str) -> None:
    """One layer, 131,072 positions: native attention is torch's, for one token and for a chunk's last ones; and what a
    chunk gives does not depend on how the prompt was cut."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, num_key_value_heads=1, head_dim=16)
    cache = KVCache(config, LONG, dtype=torch.float32, device=CPU, kv_format=parse_kv_bits(kept))
    generator = torch.Generator().manual_seed(0)
    layer = cache.layers[0]
    for first in range(0, LONG, LONG // 2):
        key, value = (torch.randn(1, LONG // 2, 16, generator=generator) for _ in range(2))
        NativeOps().append(layer, first, 4 * key, value)
    query = 3 * torch.randn(16, 20, 16, generator=generator)
    whole = NativeOps().attend(query, layer, LONG)
    assert float((whole - Ops().attend(query, layer, LONG)).abs().max()) < 1e-3
    one = NativeOps().attend(query[:, -1:], layer, LONG)
    assert float((one - whole[-1:]).abs().max()) < 1e-4
    parts = [NativeOps().attend(query[:, a:b], layer, LONG - 20 + b) for a, b in ((0, 9), (9, 11), (11, 20))]
    assert float((torch.cat(parts) - whole).abs().max()) < 1e-4


# --- forks


@pytest.mark.parametrize("kv_bits", ["16", "8", "4", "8:4"])
def test_a_fork_has_the_same_bits_and_goes_its_own_way(kv_bits: str) -> None:
    def cache(capacity: int) -> KVCache:
        return KVCache(
            CONFIG, capacity, dtype=torch.bfloat16, device=torch.device("cpu"), kv_format=parse_kv_bits(kv_bits)
        )

    def held(cache: KVCache) -> list[Tensor]:
        return [t.clone() for n in range(3) for t in cache.rows(n, 0, cache.position).values()]

    def feed(cache: KVCache, count: int, seed: int) -> None:
        for layer in range(3):
            cache.append(layer, *(t.bfloat16() for t in tokens(count, seed=seed + layer)))
        cache.advance(count)

    first, fork, alone = cache(12), cache(9), cache(9)
    feed(first, 7, seed=1)
    feed(fork, 8, seed=50)  # what it held before is forgotten
    before = held(first)
    fork.copy_from(first, 5)
    assert fork.position == 5 and first.position == 7
    feed(fork, 4, seed=20)
    assert all(map(torch.equal, before, held(first)))
    feed(alone, 7, seed=1)
    alone.truncate(5)
    feed(alone, 4, seed=20)
    assert all(map(torch.equal, held(alone), held(fork)))
    first.copy_from(first, 3)
    assert first.position == 3


def test_a_fork_of_what_is_not_there_is_refused() -> None:
    first, small = new_cache(), new_cache(2)
    for layer in range(3):
        first.append(layer, *tokens(4))
    first.advance(4)
    for target, count in ((new_cache(), 5), (small, 3), (small, -1)):
        with pytest.raises(ValueError, match="do not go into a cache"):
            target.copy_from(first, count)
        assert target.position == 0


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has such pages")
def test_huge_pages_change_no_row_and_take_no_more_memory() -> None:
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, num_key_value_heads=2, head_dim=128)
    cache = KVCache(config, 40_000, dtype=torch.bfloat16, device=torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 2, 20_000, 128, generator=draw).bfloat16()
    before = resident_bytes()
    for first in range(0, 20_000, 5000):
        cache.append(0, *rows[:, :, first : first + 5000])
        cache.advance(5000)
    assert torch.equal(cache.layers[0].keys.read(20_000), rows[0])
    assert torch.equal(cache.layers[0].values.read(20_000), rows[1])
    assert resident_bytes() - before <= rows.numel() * 2 + (4 << 20)  # 2 MiB more for each of four heads would pass it


@pytest.mark.parametrize("kept", ["16", "8", "4", "8:4"])
def test_rows_on_a_cpu_are_one_run_of_memory(kept: str) -> None:
    """So that huge pages can be nearly all of it."""
    cache = KVCache(CONFIG, 50, dtype=torch.bfloat16, device=torch.device("cpu"), kv_format=parse_kv_bits(kept))
    tensors = [tensor for layer in range(len(cache.layers)) for tensor in cache.tensors(layer).values()]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors)
    assert all(0 <= start - end < 64 for (_, end), (start, _) in itertools.pairwise(spans))
    assert all(start % 64 == 0 for start, _ in spans)
    assert all(tensor.is_contiguous() for tensor in tensors)
    assert sum(end - start for start, end in spans) == cache.nbytes


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
