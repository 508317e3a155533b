#!/usr/bin/env python3
"""Validates the Triton products with packed weights on this GPU, then times them beside its memory and its arithmetic.

    PYTHONPATH=. python benchmarks/cuda_linear.py [-o FILE] [--no-sweep] [--processes 12]

Each case is first compared with float64 on fresh inputs, its output poisoned before. Times are those of CUDA graphs
that run over copies of the weight which together pass the L2 cache several times; bandwidth is that of a copy, the peak
that of a large bf16 product, both measured here. Kernels are compiled by several processes first. Beside each time:
F.linear of the dense bf16 weight, and torch's own int4 kernel where it runs. A sweep of block sizes follows.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from glm4run.kernels import LinearSpec
from glm4run.kernels.torch_ops import TorchBackend
from glm4run.kernels.triton import linear as launchers
from glm4run.kernels.triton.linear import Few, Tiles, TritonWeight, multiply, prepack
from glm4run.qformat import PackedWeight, num_groups, packed_width
from glm4run.quant_config import QuantScheme

BF16 = torch.bfloat16
SPREAD_BYTES = 240 << 20
MOST_COPIES = 32
BATCHES = (1, 2, 4, 8, 16, 64, 128, 2048)
TOLERANCE = (4e-3, 8e-3)  # relative Frobenius error, max-abs error of the largest output
Config = Few | Tiles
Parts = list[tuple[TritonWeight, Tensor | None]]


@dataclass(frozen=True)
class Shape:
    """One product of the 9B: rows of each weight of the launch, columns, scheme."""

    name: str
    rows: tuple[int, ...]
    columns: int
    scheme: QuantScheme
    bias: bool = False


SHAPES = (
    Shape("qkv int4 g128", (4096, 256, 256), 4096, QuantScheme(4, 128), bias=True),
    Shape("o int4 g128", (4096,), 4096, QuantScheme(4, 128)),
    Shape("gate_up int4 g128", (27392,), 4096, QuantScheme(4, 128)),
    Shape("down int4 g32", (4096,), 13696, QuantScheme(4, 32)),
    Shape("gate_up int8 g128", (27392,), 4096, QuantScheme(8, 128)),
    Shape("head int8 g128", (151552,), 4096, QuantScheme(8, 128)),
)
# Rows, blocks, warps, unrolled steps: blocks are lanes of the warps.
FEW_SWEEP = {
    1: (
        (8, 32, 1, 4), (8, 32, 1, 2), (8, 32, 1, 1), (4, 32, 1, 4), (4, 32, 1, 2), (4, 32, 1, 1), (8, 64, 2, 2),
        (8, 64, 2, 1), (4, 64, 2, 2), (4, 64, 2, 1), (8, 128, 4, 1), (4, 128, 4, 1), (2, 128, 4, 1), (2, 64, 2, 2),
        (16, 32, 1, 1),
    ),
    2: ((4, 32, 1, 2), (8, 32, 1, 1), (4, 64, 2, 1), (2, 64, 2, 2)),
    4: ((4, 32, 1, 1), (2, 32, 1, 2), (4, 64, 2, 1), (2, 64, 2, 1), (2, 128, 4, 1)),
}  # fmt: skip
# Rows of x and of the weight, bytes, warps, stages.
TILES_SWEEP = {
    16: ((16, 32, 64, 4, 4), (16, 32, 64, 2, 4), (16, 32, 64, 1, 4), (16, 64, 64, 2, 4), (16, 16, 64, 1, 6)),
    64: ((32, 64, 64, 4, 3), (64, 64, 64, 4, 3), (64, 128, 64, 4, 3)),
}


@dataclass(frozen=True)
class Case:
    shape: Shape
    M: int
    config: Config | None = None


Held = dict[str, tuple[Shape, list[Parts]]]


@contextmanager
def configured(case: Case) -> Iterator[None]:
    """Runs a case with its own blocks."""
    clear = (launchers._few_kernel.cache_clear, launchers._tiles_kernel.cache_clear)
    choose_few, tiles, most_few = launchers._choose_few, dict(launchers.TILES), launchers.MOST_FEW
    most_tiled = launchers.most_tiled
    if isinstance(case.config, Few):
        few = case.config
        launchers.MOST_FEW = max(most_few, case.M)
        launchers._choose_few = lambda form, tokens, rows: few
    elif case.config is not None:
        launchers.MOST_FEW = min(most_few, case.M - 1)
        launchers.most_tiled = lambda out_features: case.M
        launchers.TILES.clear()
        launchers.TILES[case.config.tokens] = case.config
    try:
        for forget in clear if case.config is not None else ():
            forget()
        yield
    finally:
        for forget in clear if case.config is not None else ():
            forget()
        launchers._choose_few = choose_few
        launchers.most_tiled = most_tiled
        launchers.TILES.clear()
        launchers.TILES.update(tiles)
        launchers.MOST_FEW = most_few


def random_weights(shape: Shape, seed: int = 0) -> Parts:
    generator = torch.Generator("cuda").manual_seed(seed)
    K, scheme = shape.columns, shape.scheme
    parts = []
    for N in shape.rows:
        words = (N, packed_width(K, scheme.bits))
        packed = torch.randint(-(1 << 31), 1 << 31, words, device="cuda", generator=generator).int()
        scale = torch.rand(N, num_groups(K, scheme), device="cuda", generator=generator) * 0.01 + 0.001
        weight = PackedWeight(packed, scale.bfloat16(), None, N, K, scheme)
        bias = torch.randn(N, device="cuda", generator=generator).bfloat16() if shape.bias else None
        parts.append((prepack(weight, LinearSpec(N, K, scheme, packed.device, BF16)), bias))
    return parts


def exact_rows(weight: TritonWeight, rows: slice) -> Tensor:
    """What the weight stands for in float64, without `qformat`."""
    bits, packed, scale = weight.spec.scheme.bits, weight.packed[rows], weight.scale[rows].double()
    places = torch.arange(0, 32, bits, device="cuda", dtype=torch.int32)
    unsigned = (packed[:, :, None] >> places) & ((1 << bits) - 1)
    values = unsigned.flatten(1).double() - (1 << (bits - 1))
    dense: Tensor = (values.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1)
    return dense


def inputs(M: int, K: int, seed: int = 1) -> Tensor:
    x = torch.randn(M, K, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
    x[:, :: K // 40] *= 50
    return x.bfloat16()


def run(x: Tensor, parts: Parts, outs: list[Tensor] | None = None) -> list[Tensor]:
    return multiply(x, [weight for weight, _ in parts], [bias for _, bias in parts], outs)


def validate(case: Case, parts: Parts) -> float:
    """The relative Frobenius error. Raises where a result is off, differs when repeated, or is not written."""
    x = inputs(case.M, case.shape.columns, seed=case.M)
    outs = [torch.full((case.M, N), float("nan"), device="cuda", dtype=BF16) for N in case.shape.rows]
    worst = 0.0
    with configured(case):
        run(x, parts, outs)
        again = run(x, parts)
    joined = launchers.most_tiled(max(case.shape.rows)) < case.M and len(parts) > 1
    if joined:  # one product of all, where no results are given
        outs = again
    for out, repeated, (weight, bias) in zip(outs, again, parts, strict=True):
        assert torch.equal(out, repeated), "differs when repeated"
        error = largest = total = most = 0.0
        for first in range(0, out.shape[1], 8192):
            rows = slice(first, first + 8192)
            exact = x.double() @ exact_rows(weight, rows).T
            if bias is not None:
                exact += bias[rows].double()
            off = out[:, rows].double() - exact
            error, total = error + float(off.square().sum()), total + float(exact.square().sum())
            largest, most = max(largest, float(off.abs().max())), max(most, float(exact.abs().max()))
        frobenius = math.sqrt(error / total)
        assert frobenius < TOLERANCE[0], f"relative Frobenius error {frobenius:.2e}"
        assert largest / most < TOLERANCE[1], f"max-abs error {largest / most:.2e} of the largest output"
        worst = max(worst, frobenius)
    return worst


def graph_us(calls: Sequence[Callable[[], object]], replays: int = 9) -> float:
    """Microseconds of one call, in a graph of all."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        samples = []
        for i in range(replays + 2):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            if i > 1:
                samples.append(start.elapsed_time(end) * 1000 / len(calls))
    del graph
    return float(statistics.median(samples))


def copies_of(parts: Parts) -> list[Parts]:
    nbytes = sum(weight.nbytes for weight, _ in parts)
    count = min(MOST_COPIES, max(2, -(-SPREAD_BYTES // nbytes)))
    made = [parts]
    for _ in range(count - 1):
        made.append([(replace(w, packed=w.packed.clone(), scale=w.scale.clone()), bias) for w, bias in parts])
    return made


def time_case(case: Case, copies: list[Parts]) -> float:
    x = inputs(case.M, case.shape.columns)
    joined = launchers.most_tiled(max(case.shape.rows)) < case.M and len(case.shape.rows) > 1
    outs = None if joined else [torch.empty(case.M, N, device="cuda", dtype=BF16) for N in case.shape.rows]
    with configured(case):
        return graph_us([partial(run, x, c, outs) for c in copies[: 2 if case.M > 512 else None]])


def time_dense(shape: Shape, M: int, dense: list[Tensor]) -> float:
    x = inputs(M, shape.columns)
    return graph_us([partial(F.linear, x, w) for w in dense])


def time_torch(shape: Shape, M: int, parts: Parts) -> float:
    """torch's int4 kernel, the weights of one launch joined."""
    backend, x, made = TorchBackend(), inputs(M, shape.columns), []
    for _ in range(min(8, -(-SPREAD_BYTES // sum(weight.nbytes for weight, _ in parts)))):
        for weight, _ in parts:
            packed = PackedWeight(
                weight.packed, weight.scale, None, weight.spec.out_features, shape.columns, shape.scheme
            )
            made.append(backend.prepack(packed, weight.spec))
    calls = [partial(backend.linear, x, w) for w in made]
    return graph_us(calls) * len(parts)


def measured_copy() -> float:
    """Bytes a second, read and written: the better of a kernel and the device's own copy."""
    source = torch.ones(1 << 29, device="cuda")
    target = torch.empty_like(source)
    us = min(graph_us([partial(torch.mul, source, 2.0, out=target)]), graph_us([partial(target.copy_, source)]))
    return 2 * source.nbytes / us * 1e6


def measured_peak() -> float:
    """Operations a second of a bf16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return 2 * 8192**3 / graph_us([lambda: a @ b]) * 1e6


def cases(*, sweep: bool) -> list[Case]:
    found = [Case(shape, M) for shape in SHAPES for M in BATCHES if M < 2048 or "head" not in shape.name]
    return found + (sweep_cases() if sweep else [])


def sweep_cases() -> list[Case]:
    of = {shape.name: shape for shape in SHAPES}
    names = ("gate_up int4 g128", "o int4 g128", "down int4 g32")
    chosen: list[tuple[int, Config]] = [(M, Few(*few)) for M, swept in FEW_SWEEP.items() for few in swept]
    chosen += [(M, Tiles(*tiles)) for M, swept in TILES_SWEEP.items() for tiles in swept]
    return [Case(of[name], M, config) for M, config in chosen for name in names]


def host_us(shape: Shape, M: int) -> float:
    """Microseconds that a call takes the host, which does not wait for the device."""
    parts, x = random_weights(shape), inputs(M, shape.columns)
    run(x, parts)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(200):
        run(x, parts)
    taken = (time.perf_counter() - started) / 200
    torch.cuda.synchronize()
    return taken * 1e6


def failing(what: str, error: Exception) -> None:
    lines = "".join(traceback.format_exception(error)).strip().splitlines()
    print(f"FAILED {what}\n    " + "\n    ".join(lines[-6:]), flush=True)


def compile_share(share: int, shares: int, *, sweep: bool) -> None:
    """Compiles every n-th case into Triton's cache. Failures show when the case is timed."""
    seen: dict[str, Parts] = {}
    for case in cases(sweep=sweep)[share::shares]:
        parts = seen.setdefault(case.shape.name, random_weights(case.shape))
        with configured(case):
            try:
                run(inputs(case.M, case.shape.columns), parts)
            except Exception as error:  # shows later
                print(type(error).__name__, file=sys.stderr)
    torch.cuda.synchronize()


def compile_all(processes: int, *, sweep: bool) -> None:
    command = [sys.executable, __file__, *([] if sweep else ["--no-sweep"]), "--processes", str(processes)]
    started = [subprocess.Popen([*command, "--share", str(i)], stderr=subprocess.DEVNULL) for i in range(processes)]
    for process in started:
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--no-sweep", action="store_true")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device")
    if args.share is not None:
        compile_share(args.share, args.processes, sweep=not args.no_sweep)
        return
    started = time.perf_counter()
    compile_all(args.processes, sweep=not args.no_sweep)
    compiled = time.perf_counter() - started
    copy, peak = measured_copy(), measured_peak()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, compiled in {compiled:.0f} s")
    print(f"copy {copy / 1e12:.2f} TB/s, bf16 product {peak / 1e12:.0f} TFLOP/s")
    rows: list[dict[str, object]] = []
    with torch.inference_mode():
        for shape in SHAPES:
            rows += time_shape(shape, copy, peak)
        for M in (1, 16, 512):
            print(f"host, M={M}: " + ", ".join(f"{shape.name} {host_us(shape, M):.1f}" for shape in SHAPES[:2]) + " us")
        swept = [] if args.no_sweep else time_sweep(copy)
    print(f"{time.perf_counter() - started:.0f} s in all")
    if args.output is not None:
        result = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "copy_bytes_per_s": copy,
            "bf16_flop_per_s": peak,
            "products": rows,
            "sweep": swept,
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def time_shape(shape: Shape, copy: float, peak: float) -> list[dict[str, object]]:
    """One line for each number of rows of x; prints as it goes."""
    parts = random_weights(shape)
    copies = copies_of(parts)
    nbytes, N = sum(weight.nbytes for weight, _ in parts), sum(shape.rows)
    dense = [torch.randn(N, shape.columns, device="cuda", dtype=BF16) for _ in range(1 if N > 20000 else 4)]
    print(f"{shape.name}: {N} x {shape.columns}, {nbytes / 1e6:.1f} MB")
    print("     M       us    GB/s  %copy  TFLOP/s  %peak   dense us  torch int4 us    error")
    lines: list[dict[str, object]] = []
    for M in BATCHES:
        if M >= 2048 and "head" in shape.name:
            continue
        what = f"{shape.name} M={M}"
        try:
            error = validate(Case(shape, M), parts)
            us = time_case(Case(shape, M), copies)
            dense_us = time_dense(shape, M, dense)
        except Exception as failure:
            failing(what, failure)
            continue
        torch_us = None
        if shape.scheme.bits == 4:
            try:
                torch_us = time_torch(shape, M, parts)
            except Exception as failure:
                failing(f"torch's int4 kernel, {what}", failure)
        beside = "-" if torch_us is None else f"{torch_us:.1f}"
        rate, flops = nbytes / us * 1e6, 2 * M * N * shape.columns / us * 1e6
        print(
            f"{M:6d} {us:8.1f} {rate / 1e9:7.0f} {100 * rate / copy:5.0f}% {flops / 1e12:8.1f} "
            f"{100 * flops / peak:5.0f}% {dense_us:10.1f} {beside:>14} {error:8.1e}",
            flush=True,
        )
        lines.append(
            {"shape": shape.name, "M": M, "us": us, "bytes": nbytes, "flop_per_s": flops, "dense_us": dense_us,
             "torch_int4_us": torch_us, "error": error}
        )  # fmt: skip
    return lines


def time_dense_tiles(held: Held) -> None:
    """M = 2048 with dense tiles of several sizes."""
    before = launchers.TILE_BYTES
    for mib in (32, 64, 128, 256):
        launchers.TILE_BYTES = mib << 20
        columns = []
        for name, (shape, copies) in held.items():
            columns.append(f"{name} {time_case(Case(shape, 2048), copies):.1f}")
        print(f"  M=2048, dense tiles of {mib} MiB: {', '.join(columns)} us", flush=True)
    launchers.TILE_BYTES = before


def time_sweep(copy: float) -> list[dict[str, object]]:
    """Microseconds and share of the copy bandwidth for each configuration, a line each."""
    found = sweep_cases()
    held = {case.shape.name: (case.shape, copies_of(random_weights(case.shape))) for case in found}
    names = list(held)
    print("sweep: us (% of copy) of " + ", ".join(names))
    lines: list[dict[str, object]] = []
    for M, config in dict.fromkeys((case.M, case.config) for case in found):
        columns = []
        for name in names:
            shape, copies = held[name]
            case = Case(shape, M, config)
            try:
                validate(case, copies[0])
                us = time_case(case, copies)
            except Exception as failure:
                failing(f"{name} M={M} {config}", failure)
                columns.append("       -      ")
                continue
            nbytes = sum(weight.nbytes for weight, _ in copies[0])
            columns.append(f"{us:7.1f} ({100 * nbytes / us * 1e6 / copy:3.0f}%)")
            lines.append({"shape": name, "M": M, "config": str(config), "us": us})
        print(f"  M={M:<3d} {config!s:62} {'  '.join(columns)}", flush=True)
    try:
        time_dense_tiles(held)
    except Exception as failure:
        failing("dense tiles", failure)
    return lines


if __name__ == "__main__":
    main()
