#!/usr/bin/env python3
"""Validates one product of each kind against float32, then times it beside the memory and beside dense bf16.

    python benchmarks/kernels.py [--tokens 1,8,128,512] [--kinds int4-g128,...] [--rows 27392] [--columns 4096]

Each kind runs over copies of the weight that together pass any cache (at least 512 MB), so that few tokens meet the
memory and many meet the arithmetic. GB/s are bytes of prepacked weight, GOP/s count a multiply and an add. Read
bandwidth and dense bf16 (torch) are measured around each figure: compare within a line only. JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from glm4run import machine
from glm4run.benchmark import ReadProbe
from glm4run.kernels import Activations, Backend, LinearSpec, Prepacked, load_backend
from glm4run.kernels.cpu.library import active_isa
from glm4run.qformat import PackedWeight, dequantize, num_groups, pack, pack_zero_points
from glm4run.quant_config import QuantScheme

SPREAD_BYTES = 512 << 20
KINDS: dict[str, tuple[QuantScheme, Activations]] = {
    "int4-g128": (QuantScheme(bits=4, group_size=128), "int8"),
    "int4-g32": (QuantScheme(bits=4, group_size=32), "int8"),
    "int4-g64-asym": (QuantScheme(bits=4, group_size=64, symmetric=False), "int8"),
    "int4-g128-int16": (QuantScheme(bits=4, group_size=128), "int16"),
    "int8-g128": (QuantScheme(bits=8, group_size=128), "int16"),
    "int8-g128-int8": (QuantScheme(bits=8, group_size=128), "int8"),
    "int4-g128-bf16": (QuantScheme(bits=4, group_size=128), "bf16"),
}
# Of the largest output: rounding of activations, and of the output to bf16.
TOLERANCE: dict[str, float] = {"int8": 0.02, "int16": 0.004, "bf16": 0.004}


def seconds(call: Callable[[int], object], repeat: int) -> float:
    samples = []
    for i in range(repeat + 1):
        started = time.perf_counter()
        call(i)
        samples.append(time.perf_counter() - started)
    return statistics.median(samples[1:])


def random_weight(rows: int, columns: int, scheme: QuantScheme) -> PackedWeight:
    groups, half = num_groups(columns, scheme), 1 << (scheme.bits - 1)
    values = torch.randint(-half, half, (rows, columns), dtype=torch.int8)
    zero_points = None
    if not scheme.symmetric:
        zero_points = pack_zero_points(torch.randint(-half, half, (rows, groups), dtype=torch.int8), scheme.bits)
    scale = (torch.rand(rows, groups) * 0.01 + 0.001).bfloat16()
    return PackedWeight(pack(values, scheme.bits), scale, zero_points, rows, columns, scheme)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,8,128,512")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rows", type=int, default=27392)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(machine.default_threads())
    native = load_backend("native")
    dense = (torch.randn(args.rows, args.columns) * 0.02).bfloat16()
    rows = []
    with ReadProbe() as probe, torch.inference_mode():
        for kind in args.kinds.split(","):
            scheme, activations = KINDS[kind]
            for row in measure(kind, scheme, activations, args, native, dense, probe):
                print(row, file=sys.stderr)
                rows.append(row)
    print(json.dumps({"machine": machine.cpu_name(), "isa": active_isa(), "rows": rows}, indent=2))


def one_of(native: Backend, x: torch.Tensor, copies: list[Prepacked], run: int) -> None:
    native.linear(x, copies[run % len(copies)])


def one_dense(x: torch.Tensor, dense: torch.Tensor, _: int) -> None:
    F.linear(x, dense)


def measure(
    kind: str,
    scheme: QuantScheme,
    activations: Activations,
    args: argparse.Namespace,
    native: Backend,
    dense: torch.Tensor,
    probe: ReadProbe,
) -> list[dict[str, object]]:
    packed = random_weight(args.rows, args.columns, scheme)
    spec = LinearSpec(args.rows, args.columns, scheme, torch.device("cpu"), torch.bfloat16, activations)
    first = native.prepack(packed, spec)
    copies = [first, *(native.prepack(packed, spec) for _ in range(SPREAD_BYTES // first.nbytes))]
    exact = dequantize(packed, torch.float32)
    found: list[dict[str, object]] = []
    for tokens in (int(t) for t in args.tokens.split(",")):
        x = torch.randn(tokens, args.columns).bfloat16()
        truth = x.float() @ exact.T
        error = ((native.linear(x, first).float() - truth).abs().max() / truth.abs().max()).item()
        if not error <= TOLERANCE[activations]:
            raise SystemExit(f"{kind}, {tokens} tokens: wrong by {error:.4f} of the largest output")
        best = probe.best()
        elapsed = seconds(partial(one_of, native, x, copies), args.repeat)
        again = probe.gb_per_s(best.threads, best.prefetch_bytes)
        dense_elapsed = seconds(partial(one_dense, x, dense), args.repeat)
        found.append(
            {
                "kind": kind,
                "activations": activations,
                "tokens": tokens,
                "gb_per_s": round(first.nbytes / elapsed / 1e9, 1),
                "read_gb_per_s": [round(best.best_gb_per_s, 1), round(again, 1)],
                "gop_per_s": round(2 * tokens * args.rows * args.columns / elapsed / 1e9, 1),
                "times_bf16": round(dense_elapsed / elapsed, 2),
                "error": round(error, 5),
            }
        )
    return found


if __name__ == "__main__":
    main()
