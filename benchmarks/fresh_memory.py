#!/usr/bin/env python3
"""What loading a model cannot be faster than: touching as much fresh memory as its weights take, and nothing else.

    python benchmarks/fresh_memory.py MODEL_DIR [--rounds 3] [--pause 5] [--mmap]

In turns, each in a process of its own: one writes a byte to every page of so much new memory, from every core; one
loads the model and decodes a first token. The pause between two lets the system take back what the last one freed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from glm4run.checkpoint.safetensors_index import read_index
from glm4run.machine import commit, cpu_name

TOUCH = """
import sys, time, torch
memory = torch.empty(int(sys.argv[1]), dtype=torch.uint8)
started = time.perf_counter()
memory[::4096] = 1
print(time.perf_counter() - started)
"""
LOAD = """
import sys, time
started = time.perf_counter()
from glm4run import load_model
model = load_model(sys.argv[1], context_len=2048, mmap=sys.argv[2:] == ["mmap"])
next(iter(model.stream(model.tokenizer.usable_ids()[:16])))
print(model.load_s, time.perf_counter() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=5.0, help="seconds between two processes")
    parser.add_argument("--mmap", action="store_true", help="load with the weights mapped from their files")
    args = parser.parse_args()
    nbytes = sum(entry.nbytes for entry in read_index(args.model).values())
    rounds = []
    for _ in range(args.rounds):
        (touch,) = run(TOUCH, [str(nbytes)], args.pause)
        load, first = run(LOAD, [str(args.model), *(["mmap"] if args.mmap else [])], args.pause)
        rounds.append({"touch_s": touch, "load_s": load, "first_token_s": first})
        print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    medians = {key: round(statistics.median(row[key] for row in rounds), 2) for key in rounds[0]}
    facts = {"machine": cpu_name(), "commit": commit(), "model": args.model.name, "bytes": nbytes, "mmap": args.mmap}
    print(json.dumps(facts | {"medians": medians, "rounds": rounds}, indent=2))


def run(code: str, arguments: list[str], pause: float) -> list[float]:
    """The numbers that a process prints, in seconds."""
    time.sleep(pause)
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    return [round(float(word), 2) for word in done.stdout.split()]


if __name__ == "__main__":
    main()
