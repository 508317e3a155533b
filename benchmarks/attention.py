#!/usr/bin/env python3
"""Validates native attention over every kind of cache against torch, then times them in turns at depth.

    python benchmarks/attention.py [--depths 8k,32k] [--kinds 16,8,4,8:4] [--chunk 512] [--rounds 9]

The shape is the family's: 32 query heads, 2 KV heads, heads of 128. One decoded token runs over so many layers' caches
that together they pass any cache of the processor; `chunk` new tokens (0 for none) run over one. The kinds take turns
within a round, so that a busy machine is as unfair to one as to the other: compare ratios. JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from glm4run import machine
from glm4run.benchmark import ReadProbe
from glm4run.kernels.cpu import ops as native
from glm4run.kernels.cpu.library import active_isa
from glm4run.kv_format import parse_kv_bits, rows_for
from glm4run.kv_order import cpu_orders
from glm4run.kv_rows import KVLayer, new_rows
from glm4run.memory import parse_size
from glm4run.ops import Ops

HEADS, KV_HEADS, HEAD_DIM = 32, 2, 128
SPREAD_BYTES = 160 << 20
CPU = torch.device("cpu")
# Of the largest result. Queries and weights that meet integers are rounded to 8 bits, and random values cancel out.
TOLERANCE, ROUNDED_TOLERANCE = 0.01, 0.04


def filled(kind: str, positions: int) -> KVLayer:
    kept = parse_kv_bits(kind)
    keys, values = (
        new_rows(KV_HEADS, rows_for(positions), HEAD_DIM, bits, dtype=torch.bfloat16, device=CPU, order=order)
        for bits, order in zip((kept.key_bits, kept.value_bits), cpu_orders(HEAD_DIM), strict=True)
    )
    layer = KVLayer(keys, values)
    for first in range(0, positions, 4096):
        count = min(4096, positions - first)
        key, value = (torch.randn(count, KV_HEADS, HEAD_DIM).bfloat16().transpose(0, 1) for _ in range(2))
        native.append(layer, first, key, value)
    return layer


def layer_bytes(layer: KVLayer) -> int:
    return sum(t.numel() * t.element_size() for t in layer.tensors().values())


def validate(kind: str) -> float:
    """The largest difference from torch over an odd depth, for one token and for many; exits where it is too large."""
    layer, worst = filled(kind, 1031), 0.0
    for tokens in (1, 5, 40):
        query = torch.randn(HEADS, tokens, HEAD_DIM).bfloat16()
        expected = Ops().attend(query, layer, 1031).float()
        error = (native.attention(query, layer, 1031).float() - expected).abs().max() / expected.abs().max()
        worst = max(worst, float(error))
    if not worst <= (TOLERANCE if kind == "16" else ROUNDED_TOLERANCE):
        raise SystemExit(f"cache of {kind} bits: wrong by {worst:.4f} of the largest result")
    return worst


def once(layers: Sequence[KVLayer], query: torch.Tensor, depth: int) -> float:
    started = time.perf_counter()
    for layer in layers:
        native.attention(query, layer, depth)
    return (time.perf_counter() - started) / len(layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="8k,32k")
    parser.add_argument("--kinds", default="16,8,4,8:4", help="the first is what the others are compared with")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.manual_seed(0)
    kinds = args.kinds.split(",")
    errors = {kind: validate(kind) for kind in kinds}
    rows = []
    with ReadProbe() as probe, torch.inference_mode():
        for depth in map(parse_size, args.depths.split(",")):
            caches = {}
            for kind in kinds:
                first = filled(kind, depth)
                caches[kind] = [first, *(filled(kind, depth) for _ in range(SPREAD_BYTES // layer_bytes(first)))]
            for tokens in (1, args.chunk) if args.chunk else (1,):
                query = torch.randn(HEADS, tokens, HEAD_DIM).bfloat16()
                reading: list[float] = []
                times: dict[str, list[float]] = {kind: [] for kind in kinds}
                for _ in range(args.rounds):
                    best = probe.best()
                    reading.append(best.best_gb_per_s)
                    for kind in kinds:
                        layers = caches[kind] if tokens == 1 else caches[kind][:1]
                        times[kind].append(once(layers, query, depth))
                for kind in kinds:
                    seconds, nbytes = statistics.median(times[kind]), layer_bytes(caches[kind][0])
                    ratios = [a / b for a, b in zip(times[kinds[0]], times[kind], strict=True)]
                    rows.append(
                        {
                            "kv_bits": kind,
                            "depth": depth,
                            "tokens": tokens,
                            "ms_per_layer": round(seconds * 1e3, 3),
                            "gb_per_s": round(nbytes / seconds / 1e9, 1),
                            "read_gb_per_s": round(statistics.median(reading), 1),
                            "gflop_per_s": round(4 * tokens * HEADS * HEAD_DIM * depth / seconds / 1e9, 1),
                            f"times_{kinds[0]}": round(statistics.median(ratios), 2),
                            "error": round(errors[kind], 5),
                        }
                    )
                    print(rows[-1], file=sys.stderr, flush=True)
    print(json.dumps({"machine": machine.cpu_name(), "isa": active_isa(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
