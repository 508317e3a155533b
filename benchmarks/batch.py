"""How many tokens a second sequences give that are decoded together, beside one of them alone.

Sequences of different prompts and lengths, greedily, in turns within one run: one alone, then each of `--sequences`
together, `--rounds` times. Ratios are of the same round. With `--same` the tokens of every sequence are compared with
those of its own run. JSON on stdout.

    python benchmarks/batch.py MODEL [--sequences 2,4,8,16] [--tokens 16] [--rounds 3] [--same]

With `--shared N` something else is timed: reading so many prompts of N tokens and a question each, all of the prompts
beginning alike, as a batch reads them, beside reading the first of them alone and copying it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from glm4run import LoadedModel, SamplingParams, load_model
from glm4run.batch_decoding import Job, SharedContexts
from glm4run.generation import OpenAnswer
from glm4run.machine import commit, cpu_name
from glm4run.steps import Timings


def clock() -> float:
    """Wall time, or with --cpu-time this process's own."""
    return time.process_time() if "--cpu-time" in sys.argv else time.perf_counter()


def jobs_of(model: LoadedModel, count: int, tokens: int) -> list[Job]:
    usable = model.ordinary_tokens.nonzero().flatten().tolist()
    params = SamplingParams(max_new_tokens=tokens, stop_on_repetition=False, speculate="off")
    return [
        Job([usable[(n * 977 + i * 31) % len(usable)] for i in range(9 + 5 * (n % 4))], params, False)
        for n in range(count)
    ]


def decode(model: LoadedModel, jobs: list[Job]) -> tuple[float, list[list[int]]]:
    """Tokens a second from all of them, the prompts' time left out, and the tokens of each."""
    opened: list[OpenAnswer] = []
    tokens: list[list[int]] = []
    for job in jobs:
        context = model.new_context(job.most_tokens(model.plan.context_len))
        answer = model.open_answer(job.ids, job.params, chat=False, context=context, timings=Timings())
        steps, _ = answer.proceed(None)
        opened.append(answer)
        tokens.append([step.token_id for step in steps if step.token_id is not None])
    going, started = list(range(len(jobs))), clock()
    while going:
        rows = model.decode_together([opened[number] for number in going])
        left = []
        for number, logits in zip(going, rows, strict=True):
            steps, goes_on = opened[number].proceed(logits)
            tokens[number] += [step.token_id for step in steps if step.token_id is not None]
            left += [number] if goes_on else []
        going = left
    count = sum(len(part) - 1 for part in tokens)
    return count / (clock() - started), tokens


def time_shared(model: LoadedModel, prompts: int, tokens: int) -> dict[str, Any]:
    """Seconds for the first prompt and for each of the others, which begin with its `tokens` tokens."""
    usable = model.ordinary_tokens.nonzero().flatten().tolist()
    document = [usable[i * 31 % len(usable)] for i in range(tokens)]
    contexts = SharedContexts(model, tokens + 64)
    seconds, copying = [], []
    for number in range(prompts):
        ids = [*document, *usable[number * 16 : number * 16 + 16]]
        started = clock()
        held, shared = contexts.take(ids)
        copying.append(clock() - started)
        model.prefill(ids, held.context)
        seconds.append(clock() - started)
        print(f"prompt {number}: {shared} tokens shared, {seconds[-1]:.3f} s", file=sys.stderr)
    return {
        "tokens": tokens,
        "first_s": round(seconds[0], 3),
        "each_other_s": round(statistics.median(seconds[1:]), 4),
        "of_which_copying_s": round(statistics.median(copying[1:]), 4),
        "cache_bytes_copied": held.context.cache.nbytes // held.context.cache.capacity * shared,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sequences", default="2,4,8,16")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--cpu-time", action="store_true", help="the process's own seconds: with --threads 1, where others run"
    )
    parser.add_argument("--shared", type=int, metavar="N", help="time prompts that share N tokens instead")
    parser.add_argument("--kv-bits", default="16")
    parser.add_argument("--same", action="store_true", help="compare every sequence's tokens with its run alone")
    given = parser.parse_args()
    context = (given.shared or 448) + 64
    loaded = load_model(given.model, context_len=context, threads=given.threads, kv_bits=given.kv_bits)
    loaded.settle()
    model = dataclasses.replace(loaded, stop_ids=frozenset())  # answers of equal length
    if model.why_no_speculation is not None:
        parser.error(model.why_no_speculation)
    sizes = [int(size) for size in given.sequences.split(",")]
    if given.shared:
        timed = time_shared(model, max(sizes), given.shared)
        print(json.dumps({"machine": cpu_name(), "commit": commit(), "model": model.name, **timed}, indent=2))
        return
    jobs = jobs_of(model, max(sizes), given.tokens + 1)
    speeds: dict[int, list[float]] = {size: [] for size in (1, *sizes)}
    together: list[list[int]] = []
    decode(model, jobs[:1])  # warms up
    for number in range(given.rounds):
        for size in speeds if number % 2 == 0 else reversed(speeds):
            speed, tokens = decode(model, jobs[:size])
            speeds[size].append(speed)
            together = max(together, tokens, key=len)
            print(f"{size}: {speed:.2f} tok/s", file=sys.stderr)
    result: dict[str, Any] = {
        "machine": cpu_name(),
        "commit": commit(),
        "model": model.name,
        "one_tok_per_s": round(statistics.median(speeds[1]), 3),
        "times_one": {
            size: {
                "median": round(statistics.median(a / b for a, b in zip(speeds[size], speeds[1], strict=True)), 2),
                "rounds": [round(a / b, 2) for a, b in zip(speeds[size], speeds[1], strict=True)],
            }
            for size in sizes
        },
    }
    if given.same:
        result["same_tokens"] = all(
            decode(model, [job])[1][0] == tokens for job, tokens in zip(jobs, together, strict=True)
        )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
