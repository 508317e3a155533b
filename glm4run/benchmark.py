"""How fast a loaded model runs, beside what the machine's memory allows.

Decoding reads every weight once for each token, so that the read bandwidth divided by the bytes of a token bounds it.
The bandwidth is measured in the same run: on a shared machine a figure of another day means little.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm4run.errors import DoesNotFitError, UsageError
from glm4run.generate import LoadedModel
from glm4run.kernels.cpu.library import native, why_missing
from glm4run.kv_format import rows_for
from glm4run.layers import QuantizedLinear
from glm4run.loading import available_bytes
from glm4run.machine import cpu_name, default_threads
from glm4run.memory import available_ram_bytes
from glm4run.model import DecoderLayer
from glm4run.steps import Context
from glm4run.torch_threads import one_torch_thread
from glm4run.user_files import replace_file, user_path

READ_BYTES = 1 << 30  # far beyond any cache
PREFETCH_DISTANCES = (0, 256, 512, 1024, 2048, 4096)  # bytes ahead
READ_REPEATS = 3
COPIED_BYTES, LEAST_COPIED_BYTES = 4 << 30, 8 << 20  # on a GPU, at most a quarter of what is free
COPIES, COPY_READINGS = 10, 5
DENSE_PROBE_ROWS = 8192
FILLED_AT_ONCE = 1024  # tokens of a cache
UNTIMED = 1  # steps before those that are timed: the first one behind other work is not typical
STEADY = 0.9  # two readings of the bandwidth agree if their ratio is at least this


@dataclass(frozen=True)
class Bandwidth:
    """Reading memory in one stream per thread: the best of all thread counts and prefetch distances, each a median.

    On a GPU that of copying, whose threads and distance are 0.
    """

    best_gb_per_s: float
    threads: int
    prefetch_bytes: int


@dataclass(frozen=True)
class Row:
    """One measurement. `bytes_per_token` is what a token must read: weights (shared by a chunk's tokens) and cache."""

    test: str  # pp128: prefill of 128 tokens, tg32: 32 decoded tokens
    depth: int  # tokens in the cache before it
    tok_per_s: float
    bytes_per_token: int
    backend: str
    fraction_of_bandwidth: float | None  # None where there is nothing to compare with

    @property
    def gb_per_s(self) -> float:
        return self.tok_per_s * self.bytes_per_token / 1e9


class ReadProbe:
    """Memory to read through, and how fast that goes. A context manager: the memory is given back at its end."""

    def __init__(self) -> None:
        free = available_ram_bytes()
        self.nbytes = READ_BYTES if free is None or free > 4 * READ_BYTES else READ_BYTES // 8
        self.library = native() if why_missing() is None else None
        self.tensor: Tensor | None = None
        self.address = 0
        if self.library is None:
            self.tensor = torch.ones(self.nbytes // 8, dtype=torch.int64)
            return
        self.address = self.library.g4_allocate(self.nbytes) or 0
        if not self.address:
            raise DoesNotFitError(f"{self.nbytes} bytes to read through were refused", hint="close other programs")
        ctypes.memset(self.address, 1, self.nbytes)  # pages that were never written share one page of zeros

    def __enter__(self) -> ReadProbe:
        return self

    def __exit__(self, *_: object) -> None:
        if self.library is not None:
            self.library.g4_free(self.address, self.nbytes)

    def best(self) -> Bandwidth:
        """The best of all thread counts and prefetch distances. Takes a second or two."""
        if self.library is None:
            return Bandwidth(self._median_gb_per_s(torch.get_num_threads(), 0), torch.get_num_threads(), 0)
        most = max(default_threads(), self.library.g4_threads())
        found = [
            Bandwidth(self._median_gb_per_s(threads, distance), threads, distance)
            for threads in range(1, most + 1)
            for distance in PREFETCH_DISTANCES
        ]
        return max(found, key=lambda bandwidth: bandwidth.best_gb_per_s)

    def gb_per_s(self, threads: int, prefetch_bytes: int) -> float:
        """One pass over the memory."""
        started = time.perf_counter()
        if self.tensor is not None:
            self.tensor.max()
        else:
            assert self.library is not None
            before = self.library.g4_threads()
            self.library.g4_set_threads(threads)
            started = time.perf_counter()
            self.library.g4_read(self.address, self.nbytes, prefetch_bytes)
            elapsed = time.perf_counter() - started
            self.library.g4_set_threads(before)
            return self.nbytes / elapsed / 1e9
        return self.nbytes / (time.perf_counter() - started) / 1e9

    def _median_gb_per_s(self, threads: int, prefetch_bytes: int) -> float:
        return statistics.median(self.gb_per_s(threads, prefetch_bytes) for _ in range(READ_REPEATS))


class CopyProbe:
    """A GPU's memory, copied from one half of a buffer to the other: bytes read and bytes written count.

    What is copied is as long as a few milliseconds, beside which the launch of a kernel does not show.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        nbytes = min(COPIED_BYTES, (available_bytes(device) or 0) // 4) // 2
        if nbytes < LEAST_COPIED_BYTES:
            raise DoesNotFitError(f"no memory is left on {device} to copy", hint="use a smaller context")
        self.halves = torch.ones(2, nbytes, dtype=torch.uint8, device=device)

    def best(self) -> Bandwidth:
        """Takes a fraction of a second. Threads and prefetching are the card's own matter."""
        self.gb_per_s(0, 0)
        return Bandwidth(statistics.median(self.gb_per_s(0, 0) for _ in range(COPY_READINGS)), 0, 0)

    def gb_per_s(self, threads: int, prefetch_bytes: int) -> float:
        """One reading."""
        torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        for _ in range(COPIES):
            self.halves[1].copy_(self.halves[0])
        torch.cuda.synchronize(self.device)
        return COPIES * self.halves.numel() / (time.perf_counter() - started) / 1e9


def measure_read_bandwidth() -> Bandwidth:
    """The read bandwidth of this machine, in decimal GB/s."""
    with ReadProbe() as probe:
        return probe.best()


def bandwidth_file() -> Path:
    """Where the read bandwidth of this machine is kept once it has been measured (XDG)."""
    return user_path("cache", "bandwidth.json")


def remember_bandwidth(bandwidth: Bandwidth) -> None:
    """Keeps a measurement for the status line of `chat`. Where nothing can be written, nothing is kept."""
    path = bandwidth_file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({cpu_name(): bandwidth.best_gb_per_s}).encode())


def remembered_bandwidth() -> float | None:
    """The read bandwidth in GB/s that `bench` last measured on this processor; None where it never did."""
    try:
        found = json.loads(bandwidth_file().read_text(encoding="utf-8"))[cpu_name()]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(found) if isinstance(found, int | float) and found > 0 else None


def bytes_per_token(model: LoadedModel, depth: int = 0, tokens: int = 1) -> int:
    """Bytes that a token must read behind `depth` others: all weights but the embedding's other rows, and the cache.

    With `tokens` above one the weights are shared by the tokens of a prefill's chunk.
    """
    total = 0
    for module in model.model.modules():
        if isinstance(module, QuantizedLinear):
            total += module.nbytes
        elif isinstance(module, nn.Linear):
            total += sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
    cache = model.plan.bytes_of("kv_cache") // rows_for(model.plan.context_len)
    return total // min(tokens, model.plan.chunk) + depth * cache


def filled(model: LoadedModel, depth: int, room: int) -> Context:
    """A context with `depth` tokens in it, and room for more.

    The keys and values are random: how long they take does not depend on what they are, and computing tens of thousands
    of them would take longer than all that is measured.

    Raises:
        UsageError: that does not fit the model's context.
    """
    if depth + room > model.plan.context_len:
        raise UsageError(f"{depth} + {room} tokens do not fit a context of {model.plan.context_len}")
    model.settle()
    context = model.new_context()
    cache, config = context.cache, model.config
    ops = cast(DecoderLayer, model.model.model.layers[0]).self_attn.ops
    draw = torch.Generator().manual_seed(0)
    shape = (2, config.num_key_value_heads, min(depth, FILLED_AT_ONCE), config.head_dim)
    with torch.inference_mode():
        rows = torch.randn(shape, generator=draw).to(model.model.dtype).to(model.device)
        for first in range(0, depth, FILLED_AT_ONCE):
            count = min(FILLED_AT_ONCE, depth - first)
            for layer in cache.layers:
                ops.append(layer, first, rows[0, :, :count], rows[1, :, :count])
            cache.advance(count)
    _synchronize(model)
    return context


def time_prefill(model: LoadedModel, context: Context, tokens: int) -> float:
    """Seconds to feed `tokens` behind what the context holds and to have the last one's logits.

    Afterwards the context holds what it held.
    """
    depth = context.cache.position
    with torch.inference_mode():
        started = time.perf_counter()
        _feed(model, context, _ids(model, tokens))
        _synchronize(model)
        elapsed = time.perf_counter() - started
    context.cache.truncate(depth)
    return elapsed


def time_decode(model: LoadedModel, context: Context, tokens: int) -> float:
    """Seconds to decode `tokens`, greedily, behind what the context holds and one token more.

    Afterwards the context holds what it held.
    """
    depth = context.cache.position
    with torch.inference_mode():
        token = _feed(model, context, _ids(model, UNTIMED))
        started = time.perf_counter()
        for _ in range(tokens):
            token = _feed(model, context, token)
        _synchronize(model)
        elapsed = time.perf_counter() - started
    context.cache.truncate(depth)
    return elapsed


def measure(
    model: LoadedModel,
    *,
    prompts: tuple[int, ...],
    generate: int,
    depths: tuple[int, ...],
    repeat: int,
    probe: ReadProbe | CopyProbe | None,
    bandwidth: Bandwidth | None,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """All prefills, then decoding, at every depth: medians of `repeat` runs.

    Each run stands between two readings of the bandwidth, with which it is compared: on a shared machine both change
    from second to second. Runs within which the bandwidth changed say nothing about the share of it, and do not count
    towards that unless all are such.

    Raises:
        UsageError: a test does not fit the model's context.
    """
    longest = max(depths) + max((*prompts, generate + 2))
    if longest > model.plan.context_len:
        raise UsageError(
            f"the tests need a context of {longest} tokens, this one has {model.plan.context_len}",
            hint="use smaller --prompt, --generate or --depth",
        )
    tests = [(f"pp{tokens}", tokens, tokens, time_prefill) for tokens in prompts]
    if generate:
        tests.append((f"tg{generate}", generate, generate + UNTIMED, time_decode))
    for depth in depths:
        for name, tokens, room, run in tests:
            progress(f"{name} at depth {depth}")
            nbytes = bytes_per_token(model, depth, tokens if run is time_prefill else 1)
            speeds = []
            context = filled(model, depth, room)
            readings = [_reading(probe, bandwidth)]
            for _ in range(repeat):
                speeds.append(tokens / run(model, context, tokens))
                readings.append(_reading(probe, bandwidth))
            del context  # before the next one: the plan has room for one
            share = share_of_bandwidth([speed * nbytes / 1e9 for speed in speeds], readings)
            yield Row(name, depth, statistics.median(speeds), nbytes, model.backend_detail, share)


def share_of_bandwidth(reached: Sequence[float], readings: Sequence[float | None]) -> float | None:
    """The median share of the bandwidth that runs between these readings reached, all in GB/s.

    Only runs around which two readings agree count, or all where none is such. A run that read faster than the memory
    did before and behind it met another memory, as happens on shared machines: it never counts. None without readings,
    or where no run is left.
    """
    around = [(before, after) for before, after in itertools.pairwise(readings) if before and after]
    if len(around) < len(reached):
        return None
    runs = list(zip(reached, around, strict=True))
    possible = [(gb_per_s, pair) for gb_per_s, pair in runs if STEADY * gb_per_s <= max(pair)]
    steady = [(gb_per_s, pair) for gb_per_s, pair in possible if min(pair) >= STEADY * max(pair)]
    shares = [gb_per_s / statistics.mean(pair) for gb_per_s, pair in steady or possible]
    return statistics.median(shares) if shares else None


def _reading(probe: ReadProbe | CopyProbe | None, bandwidth: Bandwidth | None) -> float | None:
    """The read bandwidth at this moment, in the way that was found best."""
    if probe is None or bandwidth is None:
        return None
    return probe.gb_per_s(bandwidth.threads, bandwidth.prefetch_bytes)


def slower_than_bf16(model: LoadedModel, tokens: int) -> float | None:
    """How many times longer the layers' largest packed linear takes than the same one in bf16, over `tokens` tokens.

    None where nothing in the layers is packed (the head meets one token of a prefill only). Above 1 the packed format
    is slower here. Both are timed on up to 8192 rows' worth.
    """
    packed = [m for m in model.model.model.layers.modules() if isinstance(m, QuantizedLinear)]
    if not packed:
        return None
    largest = max(packed, key=lambda linear: linear.nbytes)
    spec = largest.prepacked.spec
    rows = min(spec.out_features, DENSE_PROBE_ROWS)
    x = torch.randn(tokens, spec.in_features).to(model.device, torch.bfloat16)
    weight = torch.zeros(rows, spec.in_features, dtype=torch.bfloat16, device=model.device)
    given = x.to(spec.dtype)
    ours = _median_seconds(model, lambda: largest(given)) / spec.out_features
    dense = _median_seconds(model, lambda: F.linear(x, weight)) / rows
    return ours / dense


def _median_seconds(model: LoadedModel, call: Callable[[], object], repeat: int = 5) -> float:
    samples = []
    with torch.inference_mode():
        for _ in range(repeat):
            started = time.perf_counter()
            call()
            _synchronize(model)
            samples.append(time.perf_counter() - started)
    return statistics.median(samples)


def _feed(model: LoadedModel, context: Context, ids: Tensor) -> Tensor:
    """Feeds at least one id, in chunks; returns the likeliest token behind the last, [1]."""
    for first in range(0, len(ids) - model.plan.chunk, model.plan.chunk):
        model.model.hidden_states(ids[first : first + model.plan.chunk], context.cache)
    rest = (len(ids) - 1) // model.plan.chunk * model.plan.chunk
    logits: Tensor = model.model(ids[rest:], context.cache)
    with one_torch_thread():  # as the sampler does
        return logits[-1:].argmax(dim=-1)


def _ids(model: LoadedModel, count: int) -> Tensor:
    """Ordinary tokens, a different one at each place."""
    usable = model.ordinary_tokens.nonzero().flatten()
    return usable[torch.arange(count) * 7 % len(usable)].to(model.device)


def _synchronize(model: LoadedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
