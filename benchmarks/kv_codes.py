#!/usr/bin/env python3
"""Chooses the 32 pairs of `kv_format.CODES`: how finely and where a group's 16 levels of 4 bits may lie.

    python benchmarks/kv_codes.py [--rows 1000] [--seed 5]

Turned rows are close to normally distributed, so normal rows of 64 and of 128 values are what they are chosen for. Of
all pairs of a step and a lowest level, each with its mirror image, the next is always the one that leaves the least
squared error; then each is exchanged for a better one until none is found. Four symmetric ones are there in any case:
one for a group that holds both ends of the row, and three for groups of rows that are not like that. JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
from torch import Tensor

from glm4run import kv_format

GROUP, LEVELS, END = kv_format.GROUPS[4], kv_format.LEVELS[4], kv_format.LEVELS[8]
CODES = 1 << kv_format.CODE_BITS
GIVEN = [(2, -15), (4, -30), (8, -60), (16, -120)]
POOL = [(step, lowest) for step in range(1, 17) for lowest in range(-END, END + 1 - LEVELS * step)]


def mirrored(pair: tuple[int, int]) -> tuple[int, int]:
    step, lowest = pair
    return step, -lowest - LEVELS * step


def normal_groups(rows: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Groups [N, 8] of normal rows whose largest magnitudes are 127, and their rows' mean squares [N]."""
    values = torch.randn(rows, width, generator=generator)
    scaled = values * (END / values.abs().amax(-1, keepdim=True))
    return scaled.reshape(-1, GROUP), scaled.square().mean(-1).repeat_interleave(width // GROUP)


def errors_of(groups: Tensor, energy: Tensor) -> Tensor:
    """Squared error [groups, pairs] of each pair and its mirror image together, beside the row's mean square."""
    step, lowest = (torch.tensor(column, dtype=torch.float32) for column in zip(*POOL, strict=True))
    error = torch.zeros(len(groups), len(POOL))
    for value in groups.unbind(-1):
        wanted = value[:, None]
        error += (((wanted - lowest) / step).round().clamp(0, LEVELS) * step + lowest - wanted).square()
    place = {pair: index for index, pair in enumerate(POOL)}
    other = error[:, [place[mirrored(pair)] for pair in POOL]]
    return torch.minimum(error, other) / energy[:, None]


def choose(errors: Tensor) -> list[int]:
    given = [POOL.index(pair) for pair in GIVEN]
    chosen = list(given)
    best = errors[:, chosen].amin(-1)
    for _ in range((CODES - len(given)) // 2):
        chosen.append(int(torch.minimum(best[:, None], errors).sum(0).argmin()))
        best = torch.minimum(best, errors[:, chosen[-1]])
    moved = True
    while moved:
        moved = False
        for index in range(len(given), len(chosen)):
            others = errors[:, chosen[:index] + chosen[index + 1 :]].amin(-1)
            better = int(torch.minimum(others[:, None], errors).sum(0).argmin())
            moved, chosen[index] = moved or better != chosen[index], better
        print(f"error {float(errors[:, chosen].amin(-1).mean()) / GROUP:.6f} of a row's", file=sys.stderr, flush=True)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000, help="of 64 values; half as many of 128")
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    parts = [normal_groups(args.rows, 64, generator), normal_groups(args.rows // 2, 128, generator)]
    groups, energy = (torch.cat(column) for column in zip(*parts, strict=True))
    errors = errors_of(groups, energy)
    chosen = choose(errors)
    pairs = sorted({max(POOL[index], mirrored(POOL[index])) for index in chosen})
    same = {*pairs, *map(mirrored, pairs)} == set(kv_format.CODES)
    error = float(errors[:, chosen].amin(-1).mean()) / GROUP
    print(json.dumps({"pairs": pairs, "those_of_kv_format": same, "error": error}))


if __name__ == "__main__":
    main()
