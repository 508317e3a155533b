#!/usr/bin/env python3
"""What share of the memory's bandwidth decoding reaches at depth, apart for each speed that the memory had.

    python benchmarks/decode_share.py MODEL_DIR [--depths 8k,32k] [--kv-bits 16,8] [--tokens 90] [--between 22,37,40,80]

On some machines the memory changes between two speeds every few seconds, and a median over both says little. Each token
is decoded between two readings of the bandwidth. Those count whose readings differ by at most a tenth and lie between
the same two of `--between`, in GB/s. A table on stdout: readings, what tokens read (weights and cache), and shares.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path

from glm4run import load_model
from glm4run.benchmark import STEADY, ReadProbe, bytes_per_token, filled, time_decode
from glm4run.memory import parse_size

LEAST = 5  # tokens, or a speed is not reported
ROOM = 2  # the token that is timed, and one before it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--depths", default="8k,32k")
    parser.add_argument("--kv-bits", default="16,8")
    parser.add_argument("--tokens", type=int, default=90)
    parser.add_argument("--between", default="22,37,40,80")
    args = parser.parse_args()
    edges = [float(edge) for edge in args.between.split(",")]
    for kept in args.kv_bits.split(","):
        for depth in map(parse_size, args.depths.split(",")):
            shares(args.model, kept, depth, args.tokens, edges)


def shares(folder: Path, kept: str, depth: int, tokens: int, edges: list[float]) -> None:
    model = load_model(folder, context_len=depth + ROOM, kv_bits=kept)
    nbytes = bytes_per_token(model, depth)
    with ReadProbe() as probe:
        best = probe.best()
        context = filled(model, depth, ROOM)
        readings, reached = [probe.gb_per_s(best.threads, best.prefetch_bytes)], []
        for _ in range(tokens):
            reached.append(nbytes / time_decode(model, context, 1) / 1e9)
            readings.append(probe.gb_per_s(best.threads, best.prefetch_bytes))
    around = list(zip(reached, itertools.pairwise(readings), strict=True))
    for low, high in zip(edges[::2], edges[1::2], strict=True):
        steady = [
            (gb_per_s, statistics.mean(pair))
            for gb_per_s, pair in around
            if low <= min(pair) and max(pair) < high and min(pair) >= STEADY * max(pair)
        ]
        if len(steady) < LEAST:
            print(f"kv {kept}, depth {depth}, {low:.0f} to {high:.0f} GB/s: {len(steady)} tokens")
            continue
        reach, read = (statistics.median(side) for side in zip(*steady, strict=True))
        quarters = statistics.quantiles([gb_per_s / memory for gb_per_s, memory in steady], n=4)
        print(
            f"kv {kept}, depth {depth}, {low:.0f} to {high:.0f} GB/s: {len(steady)} tokens, memory {read:.1f}, "
            f"tokens {reach:.1f} GB/s, share {quarters[1]:.3f} ({quarters[0]:.3f} to {quarters[2]:.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
