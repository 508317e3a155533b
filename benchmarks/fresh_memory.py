#!/usr/bin/env python3
"""How soon a new process answers, and what it cannot be faster than.

    python benchmarks/fresh_memory.py MODEL_DIR [--rounds 3] [--pause 5] [--tokens 24] [--mmap]

In turns, each in a process of its own: one writes a byte to every page of as much new memory as the weights take, from
every core, and nothing else; one loads the model and decodes a first token, goes on decoding while the weights move
into memory, waits until they have moved and decodes again. With `--mmap` another one leaves the weights in their files.
The pause between two lets the system take back what the last one freed.

first_token_s is from before the first import, import_s and load_s are parts of it. prompt: 16 tokens.
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
import json, sys, time, torch
memory = torch.empty(int(sys.argv[1]), dtype=torch.uint8)
started = time.perf_counter()
memory[::4096] = 1
print(json.dumps({"touch_s": time.perf_counter() - started}))
"""
LOAD = """
import json, sys, time
started = time.perf_counter()
from glm4run import load_model
imported = time.perf_counter()
model = load_model(sys.argv[1], context_len=2048, mmap=sys.argv[3] == "mmap")
loaded = time.perf_counter()
ids = model.tokenizer.usable_ids()[:16]
next(iter(model.stream(ids)))
found = {"import_s": imported - started, "load_s": loaded - imported, "first_token_s": time.perf_counter() - started}

import statistics, torch
from glm4run.memory import peak_resident_bytes, resident_bytes

found["first_token_resident_gb"] = resident_bytes() / 1e9

def decode_s():
    context, seconds = model.new_context(), []
    with torch.inference_mode():
        model.model(model.tensor(ids), context.cache)
        for _ in range(int(sys.argv[2])):
            began = time.perf_counter()
            model.model(model.tensor(ids[:1]), context.cache)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), sum(seconds) / len(seconds)

found["token_s"], found["token_mean_s"] = decode_s()
began = time.perf_counter()
model.settle()
found["settle_s"] = time.perf_counter() - began
found["token_settled_s"], found["token_settled_mean_s"] = decode_s()
found["peak_resident_gb"], found["planned_gb"] = peak_resident_bytes() / 1e9, model.plan.peak_bytes / 1e9
print(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=5.0, help="seconds between two processes")
    parser.add_argument("--tokens", type=int, default=24, help="decoded before and after the weights have moved")
    parser.add_argument("--mmap", action="store_true", help="also with the weights left in their files")
    args = parser.parse_args()
    nbytes = sum(entry.nbytes for entry in read_index(args.model).values())
    ways = ("default", "mmap") if args.mmap else ("default",)
    rounds = []
    for _ in range(args.rounds):
        found = run(TOUCH, [str(nbytes)], args.pause)
        for way in ways:
            load = run(LOAD, [str(args.model), str(args.tokens), way], args.pause)
            found |= {f"{way}_{key}": value for key, value in load.items()}
        rounds.append(found)
        print(json.dumps(found), file=sys.stderr, flush=True)
    medians = {key: round(statistics.median(row[key] for row in rounds), 3) for key in rounds[0]}
    facts = {"machine": cpu_name(), "commit": commit(), "model": args.model.name, "bytes": nbytes}
    print(json.dumps(facts | {"medians": medians, "rounds": rounds}, indent=2))


def run(code: str, arguments: list[str], pause: float) -> dict[str, float]:
    """The numbers that a process prints."""
    time.sleep(pause)
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    return {key: round(value, 3) for key, value in json.loads(done.stdout).items()}


if __name__ == "__main__":
    main()
