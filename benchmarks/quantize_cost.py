#!/usr/bin/env python3
"""Memory and time of `glm4run quantize` by method, on layers of a member's full width; the whole model extrapolated.

    python benchmarks/quantize_cost.py --work DIR [--member GLM-4-9B-0414] [--methods rtn mse hqq awq gptq]
        [--calibration-tokens 4096] [--target-bpw X] [--layers 1 [2]] [--repeat 1] [-o JSON]

Makes synthetic bf16 checkpoints of the member with so many layers, packs each by each method in a process of its own,
and reads that process's largest resident size. A layer takes the difference of the two processor times; with one number
of layers (for methods that take minutes) what the method takes there beyond `rtn`, which is a little too much: the
search for the head is in it. The whole model takes the first run, and its other layers. Processor time is that of all
cores, hashing the source and starting Python included. A calibrated method's time grows with its tokens: give as many
as will be used.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from glm4run.cards import load_cards
from glm4run.machine import commit, cpu_name

CALIBRATED = ("awq", "gptq")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--member", choices=sorted(load_cards()), default="GLM-4-9B-0414")
    parser.add_argument("--methods", nargs="*", default=["rtn", "mse", "hqq", "awq", "gptq"])
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument("--target-bpw", type=float, help="have bits chosen for this size, which is measured as well")
    parser.add_argument("--layers", type=int, nargs="+", default=(1, 2), help="one number, or two that differ")
    parser.add_argument(
        "--repeat", type=int, default=1, help="runs of each, of which the median by processor time counts"
    )
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if len(args.layers) > 2 or len(set(args.layers)) < len(args.layers):
        parser.error("--layers takes one number, or two that differ")
    args.work.mkdir(parents=True, exist_ok=True)
    sources = [synthesize(args.member, layers, args.work) for layers in args.layers]
    whole = load_cards()[args.member].config.num_hidden_layers
    base_s = pack(sources[0], args.work / "packed", ["--method", "rtn"])["processor_s"] if len(sources) == 1 else 0.0
    rows = []
    for method in args.methods:
        options = ["--method", method]
        if args.target_bpw is not None:
            options += ["--target-bpw", str(args.target_bpw)]
        if method in CALIBRATED or args.target_bpw is not None:
            options += ["--calibration-tokens", str(args.calibration_tokens)]
        # In turns, so that a change in the machine's load meets both sizes.
        runs = [[pack(source, args.work / "packed", options) for source in sources] for _ in range(args.repeat)]
        medians = [
            sorted(of_size, key=lambda run: run["processor_s"])[args.repeat // 2] for of_size in zip(*runs, strict=True)
        ]
        few_s, more_s = medians[0]["processor_s"], medians[-1]["processor_s"]
        if len(medians) == 1:
            layer_s = (few_s - base_s) / args.layers[0]
        else:
            layer_s = (more_s - few_s) / (args.layers[1] - args.layers[0])
        row: dict[str, Any] = {"method": method, "peak_rss_bytes": max(run["peak_rss_bytes"] for run in medians)}
        row |= {"runs": medians, "processor_s_per_layer": round(layer_s, 1)}
        row["processor_s_whole_model"] = round(few_s + (whole - args.layers[0]) * layer_s)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    facts = {"machine": cpu_name(), "commit": commit(), "member": args.member, "layers": list(args.layers)}
    facts |= {"calibration_tokens": args.calibration_tokens, "target_bpw": args.target_bpw, "rows": rows}
    if args.output is not None:
        args.output.write_text(json.dumps(facts, indent=2) + "\n")
    print(table(rows))


def synthesize(member: str, layers: int, work: Path) -> Path:
    """A bf16 checkpoint of random weights; made once."""
    folder = work / f"source-{layers}"
    if not folder.is_dir():
        script = Path(__file__).with_name("synthesize.py")
        command = [sys.executable, str(script), member, "--bits", "16", "--layers", str(layers), "-o", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def pack(source: Path, target: Path, options: list[str]) -> dict[str, Any]:
    """Seconds, MB of the source a second of the clock and of a processor, and peak resident bytes of one run."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "glm4run", "quantize", str(source), "-o", str(target), *options]
    started = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    nbytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    processor_s = usage.ru_utime + usage.ru_stime
    return {
        "seconds": round(seconds, 1),
        "processor_s": round(processor_s, 1),
        "source_mb_per_s": round(nbytes / seconds / 1e6),
        "source_mb_per_processor_s": round(nbytes / processor_s / 1e6),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| method | peak resident | source, by the clock | by processor time | a layer | the whole model |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{r['method']}` | {r['peak_rss_bytes'] / 1e9:.2f} GB | {r['runs'][-1]['source_mb_per_s']} MB/s "
        f"| {r['runs'][-1]['source_mb_per_processor_s']} MB/s | {r['processor_s_per_layer']:.1f} s "
        f"| {r['processor_s_whole_model'] / 60:.0f} min |"
        for r in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
