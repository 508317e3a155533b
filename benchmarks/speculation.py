"""What drafting from the context wins where a text repeats itself, and costs where it does not.

Answers with and without drafts, in turns within one run, order flipped every round; each pair must be the same tokens.
`copy` repeats a passage of the prompt (a model that copies is needed: random weights do not), `random` continues
random tokens, sampled at temperature 1. `--costs` times forwards of 1 to 8 tokens instead, which is what drafts stand
on. JSON on stdout.

    python benchmarks/speculation.py MODEL [--tokens 128] [--rounds 3] [--costs]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from glm4run import LoadedModel, SamplingParams, load_model
from glm4run.machine import commit, cpu_name
from glm4run.speculative import MOST_DRAFTED
from glm4run.steps import Timings

PASSAGE = (
    "Item 1: a brass lamp with a green shade, found in the attic. Item 2: three maps of the northern coast, one torn. "
    "Item 3: a letter from Ada to her brother, dated May 4. Item 4: a box of 19 glass marbles, two of them blue. "
)


def clock() -> float:
    """Wall time, or with --cpu-time this process's own."""
    return time.process_time() if "--cpu-time" in sys.argv else time.perf_counter()


def prompts(model: LoadedModel, tokens: int) -> dict[str, tuple[list[int], SamplingParams]]:
    greedy = SamplingParams(max_new_tokens=tokens, stop_on_repetition=False)
    usable = model.ordinary_tokens.nonzero().flatten().tolist()
    source = random.Random(1)
    noise = [source.choice(usable) for _ in range(300)]
    sampled = dataclasses.replace(greedy, temperature=1.0, seed=1)
    return {"copy": (model.encode_prompt(PASSAGE * 2 + PASSAGE[:70]), greedy), "random": (noise, sampled)}


def answer(model: LoadedModel, ids: list[int], params: SamplingParams) -> tuple[list[int], Timings, float]:
    """The tokens, and the seconds from the first to the last of them: choosing and drafting included."""
    timings, tokens, started = Timings(), list[int](), 0.0
    for step in model.stream(ids, params, timings=timings):
        if step.token_id is not None:
            started = started or clock()
            tokens.append(step.token_id)
    return tokens, timings, clock() - started


def compare(model: LoadedModel, name: str, ids: list[int], params: SamplingParams, rounds: int) -> dict[str, Any]:
    ratios, drafted, accepted, same = [], 0, 0, True
    without = dataclasses.replace(params, speculate="off")
    for number in range(rounds + 1):
        runs = {}
        for way in (params, without) if number % 2 else (without, params):
            runs[way.speculate] = answer(model, ids, way)
        same = same and runs["auto"][0] == runs["off"][0]
        if number:  # the first round warms up
            ratios.append(runs["off"][2] / runs["auto"][2])
            drafted += runs["auto"][1].drafted_tokens
            accepted += runs["auto"][1].accepted_tokens
        print(f"{name} {number}: {runs['off'][2] / runs['auto'][2]:.2f}", file=sys.stderr)
    return {
        "text": name,
        "same_tokens": same,
        "speed_with_drafts": round(statistics.median(ratios), 3),
        "rounds": [round(ratio, 3) for ratio in ratios],
        "drafted": drafted,
        "accepted": accepted,
        "costs": [round(cost, 2) for cost in model.step_costs.ratios],
    }


@torch.inference_mode()
def costs(model: LoadedModel, rounds: int) -> dict[str, Any]:
    """Forwards of 1 to 8 tokens behind 64 others, logits of all of them, in turns."""
    context = model.new_context()
    ids = model.ordinary_tokens.nonzero().flatten()[:64]
    model.model(ids, context.cache)
    seconds: dict[int, list[float]] = {count: [] for count in range(1, MOST_DRAFTED + 2)}
    for _ in range(rounds):
        for count, samples in seconds.items():
            context.cache.truncate(64)
            started = clock()
            model.model(ids[:count], context.cache, logits="all")
            samples.append(clock() - started)
    one = statistics.median(seconds[1])
    return {
        "one_token_ms": round(1000 * one, 2),
        "costs": {count: round(statistics.median(s) / one, 3) for count, s in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--cpu-time", action="store_true", help="the process's own seconds: with --threads 1, where others run"
    )
    parser.add_argument("--costs", action="store_true", help="only time forwards of 1 to 8 tokens")
    given = parser.parse_args()
    loaded = load_model(given.model, context_len=1024, threads=given.threads)
    loaded.settle()
    model = dataclasses.replace(loaded, stop_ids=frozenset())  # answers of equal length
    if model.why_no_speculation is not None:
        parser.error(model.why_no_speculation)
    result: dict[str, Any] = {"machine": cpu_name(), "commit": commit(), "model": model.name, "tokens": given.tokens}
    if given.costs:
        result |= costs(model, given.rounds)
    else:
        cases = prompts(model, given.tokens)
        result["texts"] = [compare(model, name, *case, given.rounds) for name, case in cases.items()]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
