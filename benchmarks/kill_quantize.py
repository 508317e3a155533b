#!/usr/bin/env python3
"""Kills `glm4run quantize` with SIGKILL at random moments, starts it again each time, and compares the final bytes.

    python benchmarks/kill_quantize.py SOURCE_DIR --work DIR [--kills 20] [--method rtn] [-- OPTIONS OF quantize]

Once undisturbed, then again and again: each attempt is killed at a random moment within the time that the undisturbed
one took, until the asked number of kills is reached; the last attempt may finish. A run that finishes before its kill
is started over. Nothing is flushed or told beforehand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="rtn")
    own, _, others = " ".join(sys.argv[1:]).partition(" -- ")
    args = parser.parse_args(own.split())
    options = ["--method", args.method, *others.split()]
    started = time.monotonic()
    whole, target = args.work / "whole", args.work / "killed"
    for folder in (whole, target):
        shutil.rmtree(folder, ignore_errors=True)
    start(args.source, whole, options).wait()
    duration = time.monotonic() - started
    expected = digests(whole)
    draw = random.Random(args.seed)
    kills = finished = resumed = 0
    while kills < args.kills:
        process = start(args.source, target, options)
        try:
            process.wait(draw.uniform(0.2, duration))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            if target.exists():  # it had just become whole
                assert digests(target) == expected, "the bytes differ"
                shutil.rmtree(target)
                continue
            resumed += any(len(path.read_text().splitlines()) > 1 for path in args.work.glob(".killed.*/resume.jsonl"))
            continue
        assert process.returncode == 0, f"quantize failed: {process.returncode}"
        assert digests(target) == expected, "the bytes differ"
        shutil.rmtree(target)
        finished += 1
    assert start(args.source, target, options).wait() == 0
    same = digests(target) == expected
    result = {"kills": kills, "kills_with_progress_kept": resumed, "finished_between": finished, "identical": same}
    print(json.dumps(result | {"undisturbed_s": round(duration, 1), "options": options}))
    sys.exit(0 if same and not list(args.work.glob(".killed*")) else 1)


def start(source: Path, target: Path, options: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "glm4run", "quantize", str(source), "-o", str(target), *options]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


if __name__ == "__main__":
    main()
