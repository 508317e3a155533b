#!/usr/bin/env python3
"""Loads a model, prefills and decodes once, and reports speed and memory as JSON.

    python benchmarks/generate_speed.py MODEL_DIR [--prompt 64] [--generate 16] [--backend torch] [--ctx 2048]

`peak_rss_bytes` is the process's own high-water mark; `weights_bytes` is what the folder's tensors take.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path

import torch

from glm4run import SamplingParams, load_model
from glm4run.checkpoint.safetensors_index import read_index
from glm4run.machine import commit, cpu_name
from glm4run.steps import Timings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", type=int, default=64, help="tokens to prefill")
    parser.add_argument("--generate", type=int, default=16, help="tokens to decode")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--ctx", type=int, default=2048)
    args = parser.parse_args()
    model = load_model(args.model, backend=args.backend, dtype=args.dtype, context_len=args.ctx)
    model.settle()
    loaded_rss = _peak_rss()
    usable = model.tokenizer.usable_ids()
    prompt = [usable[(7 * i) % 256] for i in range(args.prompt)]
    timings = Timings()
    params = SamplingParams(max_new_tokens=args.generate + 1, stop_on_repetition=False)
    count = sum(step.token_id is not None for step in model.stream(prompt, params, timings=timings))
    weights = sum(entry.nbytes for entry in read_index(args.model).values())
    result = {
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "commit": commit(),
        "model": model.name,
        "backend": model.backend,
        "dtype": str(model.model.dtype),
        "weights_bytes": weights,
        "plan_bytes": model.plan.peak_bytes,
        "peak_rss_after_load_bytes": loaded_rss,
        "peak_rss_bytes": _peak_rss(),
        "peak_over_weights_bytes": _peak_rss() - weights,
        "tokens": count,
        **timings.as_json(model.load_s),
    }
    print(json.dumps(result, indent=2))


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
