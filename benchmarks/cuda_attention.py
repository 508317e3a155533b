"""Attention over a cache on a GPU: checked against float64, then timed. `PYTHONPATH=.:quantize python FILE [-o JSON]`.

Shapes of GLM-4-9B: 32 heads of 128 over 2 KV heads. Decoding runs as a CUDA graph over the caches of several layers,
so that what a layer reads is not in L2 from the time before. Kernels are compiled by several processes first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from glm4run.kernels.triton.attention import Tiles, attend
from glm4run.kernels.triton.cache import Queries, ready, rope_append
from glm4run.kv_format import parse_kv_bits
from glm4run.kv_rows import KVLayer, new_rows
from glm4run.rope import apply_rope

HEADS, KV_HEADS, D, ROTARY = 32, 2, 128, 64
KINDS = ("16", "8", "4")
DEPTHS = (64, 1024, 8192, 32768, 131072)
LAYERS = 8
PREFILLED = ("16", "8")
DECODE_TILES = (
    *(("16", tiles) for tiles in (Tiles(16, 32, 4, 4), Tiles(16, 128, 8, 2))),
    *(("8", tiles) for tiles in (Tiles(16, 64, 4, 3), Tiles(16, 128, 8, 3, 128))),
    *(("4", tiles) for tiles in (Tiles(16, 64, 4, 3), Tiles(16, 128, 8, 2))),
)
PREFILL_TILES = (
    *(("16", tiles) for tiles in (Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 3))),
    *(("8", tiles) for tiles in (Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2))),
)
RESULTS: dict[str, object] = {}


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def part(name: str) -> Iterator[None]:
    """A part that fails says so, and the others go on."""
    begin = time.perf_counter()
    try:
        yield
    except Exception:
        print(f"FAILED {name}:", traceback.format_exc(limit=-4))
    print(f"-- {name}: {time.perf_counter() - begin:.1f} s", flush=True)


def random_layer(kind: str, capacity: int) -> KVLayer:
    """A cache full of rows that could be any's."""
    formats = parse_kv_bits(kind)
    offset = torch.zeros(KV_HEADS, D, device=device())
    layer = KVLayer(
        *(
            new_rows(KV_HEADS, capacity, D, bits, dtype=torch.bfloat16, device=device(), offset=shift)
            for bits, shift in ((formats.key_bits, offset), (formats.value_bits, None))
        )
    )
    for kept in (layer.keys, layer.values):
        if kept.scales is None:
            kept.data.normal_()
        elif kept.bits == 8:
            kept.data.random_(-127, 128)
            kept.scales.fill_(0.01)
        else:
            kept.data.random_(0, 256)
            kept.scales.random_(0, 256)
            kept.scales[..., :2] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8).to(device())
    return layer


def queries(tokens: int, layer: KVLayer) -> Queries:
    return ready(torch.randn(HEADS, tokens, D, dtype=torch.bfloat16, device=device()), layer)


def timed(run: Callable[[], object], repeats: int = 5) -> float:
    """Seconds, the median."""
    run()
    times: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measured_copy_rate() -> float:
    """Bytes read and written a second."""
    source, target = (torch.zeros(1 << 30, dtype=torch.uint8, device=device()) for _ in range(2))
    return 2 * source.numel() / timed(lambda: target.copy_(source))


def token_bytes(kind: str) -> float:
    layer = random_layer(kind, 16)
    return sum(t.numel() * t.element_size() for t in layer.tensors().values()) / 16


def decode_time(
    kind: str,
    layers: list[KVLayer],
    depth: int,
    tiles: Tiles | None = None,
    splits: int | None = None,
    prefetch: bool = True,
) -> float:
    """Seconds a layer."""
    query, scratch = queries(1, layers[0]), torch.empty(4 << 20, device=device())
    start = torch.tensor([depth - 1], dtype=torch.int32, device=device())
    out = torch.empty(1, HEADS * D, dtype=torch.bfloat16, device=device())

    def run() -> None:
        for layer in layers:
            attend(query, layer, start, splits=splits, out=out, scratch=scratch, tiles=tiles, prefetch=prefetch)

    return timed(graphed(run), 7) / len(layers)


def prefill_flops(tokens: int, start: int) -> float:
    return 4 * HEADS * D * tokens * (start + (tokens + 1) / 2)


# Checks


def exact(query: Tensor, layer: KVLayer, end: int) -> Tensor:
    """[T, H, D] in float64 over what the cache says."""
    tokens = query.shape[1]
    keys, values = (kept.read(end).double() for kept in (layer.keys, layer.values))
    asked = query.double().unflatten(0, (KV_HEADS, -1))  # [KVH, R, T, D]
    scores = asked @ keys[:, None].transpose(-1, -2) / math.sqrt(D)
    scores.masked_fill_(torch.ones(tokens, end, device=device()).triu(end - tokens + 1).bool(), float("-inf"))
    out: Tensor = (scores.softmax(-1) @ values[:, None]).flatten(0, 1).transpose(0, 1)
    return out


def check(kind: str, tokens: int, start: int) -> None:
    torch.manual_seed(tokens)
    end, formats, capacity = start + tokens, parse_kv_bits(kind), -(-(start + tokens + 77) // 16) * 16
    offset = torch.randn(KV_HEADS, D, device=device())

    def fresh() -> KVLayer:
        layer = KVLayer(
            *(
                new_rows(KV_HEADS, capacity, D, bits, dtype=torch.bfloat16, device=device(), offset=shift)
                for bits, shift in ((formats.key_bits, offset), (formats.value_bits, None))
            )
        )
        for tensor in layer.tensors().values():  # what nobody may look at, behind the rows
            tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(126)
        return layer

    def heads_of(x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, D)).transpose(0, 1)
        return heads

    layer, wanted = fresh(), fresh()
    query, key, value = (
        torch.randn(end, heads * D, device=device()).bfloat16() for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    key.view(end, KV_HEADS, D)[..., 5::31] += 40  # what a bias leaves
    angles = torch.outer(torch.arange(end), 1e4 ** (-torch.arange(0, ROTARY, 2) / ROTARY)).to(device())
    cos, sin = angles.cos(), angles.sin()
    turned_key = apply_rope(heads_of(key), cos, sin)
    wanted.keys.write(0, turned_key)
    wanted.values.write(0, heads_of(value))
    layer.keys.write(0, turned_key[:, :start])
    layer.values.write(0, heads_of(value)[:, :start])
    position = torch.tensor([start], dtype=torch.int32, device=device())
    new = slice(start, end)
    asked = rope_append(query[new].clone(), key[new], value[new], cos[new], sin[new], layer, position)
    different = [
        float((ours[:, new] != theirs[:, new]).float().mean())
        for ours, theirs in zip(layer.tensors().values(), wanted.tensors().values(), strict=True)
    ]
    expected = exact(apply_rope(heads_of(query), cos, sin)[:, new], wanted, end)
    out = attend(asked, layer, position)
    assert torch.equal(out, attend(asked, layer, position)), "not the same twice"
    error = (out.double().unflatten(-1, (HEADS, D)) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    verdict = "ok" if float(error) < 0.01 and max(different) < 1e-3 else "WRONG"
    print(
        f"{verdict} {kind:>4} T {tokens} start {start} rms error {float(error):.5f}; bytes that differ",
        " ".join(f"{d:.0e}" for d in different),
        flush=True,
    )


# Compiling beforehand


def compile_cases(sweep: bool) -> list[Callable[[], object]]:
    """What compiles every kernel that is timed."""

    def decode(kind: str, tiles: Tiles | None, prefetch: bool = True) -> Callable[[], object]:
        def run() -> None:
            layer = random_layer(kind, 512)
            start = torch.tensor([300], dtype=torch.int32, device=device())
            attend(queries(1, layer), layer, start, tiles=tiles, prefetch=prefetch)

        return run

    def prefill(kind: str, tiles: Tiles | None) -> Callable[[], object]:
        def run() -> None:
            layer = random_layer(kind, 2048)
            attend(queries(2048, layer), layer, 0, splits=1, tiles=tiles)

        return run

    def checked(kind: str) -> Callable[[], object]:
        return lambda: check(kind, 1, 1500)

    cases = [checked(kind) for kind in KINDS] + [prefill(kind, None) for kind in PREFILLED]
    if sweep:
        cases += [decode(kind, tiles) for kind, tiles in DECODE_TILES]
        cases += [decode(kind, None, prefetch=False) for kind in ("16", "8")]
        cases += [prefill(kind, tiles) for kind, tiles in PREFILL_TILES]
    return cases


def compile_all(sweep: bool) -> None:
    """Several processes, each with its share of the cases; what fails there fails again where it is timed."""
    count = max(1, min(len(compile_cases(sweep)), (os.cpu_count() or 2) - 2))
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--compile", f"{i}/{count}", *(() if sweep else ("--no-sweep",))],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for i in range(count)
    ]
    limit = time.monotonic() + 40
    for worker in workers:
        try:
            worker.wait(max(0.1, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            print("a compiling process took too long")


# Timings


def time_decode(copy_rate: float) -> None:
    print("decode, one token, a layer: us, GB/s, share of the copy bandwidth")
    for kind in KINDS:
        layers, per_token = [random_layer(kind, DEPTHS[-1] + 64) for _ in range(LAYERS)], token_bytes(kind)
        line = []
        for depth in DEPTHS:
            with part_quiet(f"decode {kind} {depth}"):
                seconds = decode_time(kind, layers, depth)
                rate = depth * per_token / seconds
                RESULTS[f"decode {kind} {depth}"] = seconds
                line.append(f"{depth}: {seconds * 1e6:.1f} {rate / 1e9:.0f} {rate / copy_rate:.0%}")
        print(f"{kind:>4} ", " | ".join(line), flush=True)


@contextmanager
def part_quiet(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        print(f"FAILED {name}: {type(e).__name__}: {str(e)[:300]}")


def sweep_decode() -> None:
    for depth in (8192, 32768):
        print(f"decode at {depth} by splits, us")
        for kind in ("16", "8"):
            layers = [random_layer(kind, depth + 64) for _ in range(LAYERS)]
            line = []
            for splits in (16, 32, 64, 96, 128):
                with part_quiet(f"splits {kind} {splits}"):
                    line.append(f"{splits}: {decode_time(kind, layers, depth, None, splits) * 1e6:.1f}")
            with part_quiet(f"no prefetch {kind}"):
                line.append(f"without prefetch: {decode_time(kind, layers, depth, prefetch=False) * 1e6:.1f}")
            print(f"{kind:>4} ", "  ".join(line), flush=True)
    print("decode at 8k, 32k by tiles (rows, positions, warps, stages), us")
    for kind, tiles in DECODE_TILES:
        with part_quiet(f"{kind} {tiles}"):
            layers = [random_layer(kind, 32768 + 64) for _ in range(LAYERS)]
            times = [decode_time(kind, layers, depth, tiles, None) * 1e6 for depth in (8192, 32768)]
            shape = (tiles.rows, tiles.positions, tiles.warps, tiles.stages)
            RESULTS[f"decode tiles {kind} {shape}"] = times
            print(f"{kind:>4} {shape!s:18}", " ".join(f"{t:6.1f}" for t in times), flush=True)


def time_prefill() -> None:
    print("prefill: ms a layer, TFLOP/s")
    for tokens in (2048,):
        for start in (0, 32768):
            flops = prefill_flops(tokens, start)
            for kind in PREFILLED:
                with part_quiet(f"prefill {kind}"):
                    layer = random_layer(kind, 32768 + 2048)
                    query = queries(tokens, layer)
                    seconds = timed(graphed(partial(attend, query, layer, start)), 3)
                    RESULTS[f"prefill {kind} {tokens} {start}"] = seconds
                    print(
                        f"T {tokens:5} start {start:6} {kind:>4} {seconds * 1e3:7.3f} ms {flops / seconds / 1e12:5.0f}"
                    )
            if start == 0:
                with part_quiet("sdpa"):
                    q, k, v = (
                        torch.randn(1, heads, tokens, D, dtype=torch.bfloat16, device=device())
                        for heads in (HEADS, KV_HEADS, KV_HEADS)
                    )
                    run = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
                    seconds = timed(graphed(run), 3)
                    print(f"T {tokens:5} start {start:6} sdpa {seconds * 1e3:6.3f} ms {flops / seconds / 1e12:5.0f}")


def sweep_prefill() -> None:
    print("prefill of 2048 at 32k by tiles (rows, positions, warps, stages): TFLOP/s")
    flops = prefill_flops(2048, 32768)
    layers = {kind: random_layer(kind, 32768 + 2048) for kind in PREFILLED}
    for kind, tiles in PREFILL_TILES:
        with part_quiet(f"{kind} {tiles}"):
            query, layer = queries(2048, layers[kind]), layers[kind]
            seconds = timed(graphed(partial(attend, query, layer, 32768, splits=1, tiles=tiles)), 3)
            shape = (tiles.rows, tiles.positions, tiles.warps, tiles.stages)
            print(f"{kind:>4} {shape!s:18} {flops / seconds / 1e12:4.0f}", flush=True)


def in_turn(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def time_writing() -> None:
    line = []
    for kind in KINDS:
        with part_quiet(f"rope_append {kind}"):
            layers = [random_layer(kind, 4096) for _ in range(LAYERS)]
            start = torch.tensor([100], dtype=torch.int32, device=device())
            query, key, value = (
                torch.randn(1, heads * D, device=device()).bfloat16() for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            out = torch.empty(HEADS, 1, D, dtype=query.dtype if kind == "16" else torch.float16, device=device())
            cos = torch.ones(1, ROTARY // 2, device=device())

            writes = [partial(rope_append, query, key, value, cos, cos, layer, start, out) for layer in layers]
            seconds = timed(graphed(partial(in_turn, writes))) / LAYERS
            RESULTS[f"rope_append {kind}"] = seconds
            line.append(f"{kind} bits {seconds * 1e6:.1f} us")
    print("rope_append, one token, a layer:", ", ".join(line), flush=True)


def time_host() -> None:
    """What Python takes to launch, which a short prompt waits for."""
    for kind in ("16", "8"):
        layer, tokens = random_layer(kind, 256), 64
        query, key, value = (
            torch.randn(tokens, heads * D, device=device()).bfloat16() for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        cos = torch.ones(tokens, ROTARY // 2, device=device())
        out = torch.empty(tokens, HEADS * D, dtype=torch.bfloat16, device=device())
        for _ in range(3):
            asked = rope_append(query, key, value, cos, cos, layer, 64)
            attend(asked, layer, 64, out=out)
        torch.cuda.synchronize()
        times = []
        for call in (
            lambda q=query, k=key, v=value, c=cos, kept=layer: rope_append(q, k, v, c, c, kept, 64),
            lambda q=asked, kept=layer, o=out: attend(q, kept, 64, out=o),
        ):
            begin = time.perf_counter()
            for _ in range(100):
                call()
            times.append((time.perf_counter() - begin) * 1e4)
            torch.cuda.synchronize()
        print(f"host, {kind} bits, 64 tokens: rope_append {times[0]:.1f} us, attend {times[1]:.1f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", help="also write the timings, in seconds or as named, as JSON")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    parser.add_argument("--no-sweep", action="store_true", help="only the chosen tiles")
    options = parser.parse_args()
    if options.compile:
        mine, count = map(int, options.compile.split("/"))
        for case in compile_cases(not options.no_sweep)[mine::count]:
            try:
                case()
            except Exception:
                traceback.print_exc()
        return
    print(torch.cuda.get_device_name(), torch.__version__)
    with part("compiling"):
        compile_all(not options.no_sweep)
    copy_rate = measured_copy_rate()
    print(f"copy {copy_rate / 1e9:.0f} GB/s")
    RESULTS["copy bytes/s"] = copy_rate
    with part("decode"):
        time_decode(copy_rate)
    with part("prefill"):
        time_prefill()
    with part("checks"):
        for kind in KINDS:
            with part_quiet(f"check {kind}"):
                check(kind, 1, 1500)
    with part("writing"):
        time_writing()
    if not options.no_sweep:
        with part("host"):
            time_host()
        with part("decode sweep"):
            sweep_decode()
        with part("prefill sweep"):
            sweep_prefill()
    if options.output:
        from pathlib import Path

        Path(options.output).write_text(json.dumps(RESULTS, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
