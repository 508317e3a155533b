#!/usr/bin/env python3
"""Times this runtime beside llama.cpp on one machine, in turns, so that a change in the machine's load meets both.

    python -m venv PEER_ENV
    CMAKE_ARGS="-DGGML_NATIVE=ON" PEER_ENV/bin/pip install --no-binary llama-cpp-python llama-cpp-python gguf numpy
    PEER_ENV/bin/python benchmarks/llama_cpp_peer.py write --type q4_0 -o PEER.gguf
    python benchmarks/synthesize.py glm-4-9b-chat --bits 4 -o MODEL_DIR
    python benchmarks/versus_llama_cpp.py MODEL_DIR PEER.gguf --peer-python PEER_ENV/bin/python \\
        [--threads N] [--rounds 5] [--tests decode:16,prefill:128,prefill:512] [--depth 0] [--busy] [-o RESULT.json]

A test may name a depth of its own: decode:8@1024,decode:8@2048. Behind the table then stands what decoding would take
deeper, at `--extrapolate`, if the time of a token grew there as between the shallowest and the deepest of them.

Both models stay loaded. In each round the read bandwidth is measured, then each test runs on both sides, one after the
other; the round after it turns the order round. The side that waits must not use a core: the largest share of one that
it used is in the result. With --busy each round also takes every sample while another process keeps one core busy, and
reads memory with the same threads for a while in both conditions: no decoding can keep more of its speed than that. The
table has the medians; GB/s is what a decoded token must read times the tokens per second, and its share is of the best
read bandwidth of all rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch

from glm4run import load_model
from glm4run.benchmark import Bandwidth, ReadProbe, bytes_per_token, filled, time_decode, time_prefill
from glm4run.machine import commit, cpu_name, default_threads

SETTLE_S = 0.3  # before each sample: OpenMP's threads spin for a while after their last work
IDLE_SHARE_WARNING = 0.05
READ_S = 1.5  # a busy process and we take turns of milliseconds
UNTIMED = 2  # positions: a first token to decode behind, a first step that is not timed
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

Condition = Literal["quiet", "busy"]


@dataclass(frozen=True, slots=True)
class Test:
    """So many positions, evaluated in one prefill or decoded one by one, behind `depth` others."""

    kind: Literal["prefill", "decode"]
    tokens: int
    depth: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.tokens}" + (f"@{self.depth}" if self.depth else "")


class Side(Protocol):
    """One of the two runtimes, with its model loaded."""

    name: str

    def seconds(self, test: Test) -> float:
        """Runs the test once."""

    def bytes_per_token(self, depth: int) -> int:
        """What decoding one token behind `depth` others must read."""

    def cpu_s(self) -> float:
        """CPU time that the side's process has used so far."""


@dataclass(frozen=True, slots=True)
class Sample:
    round: int
    condition: Condition
    test: str
    side: str
    tokens_per_s: float
    other_side_idle_share: float  # CPU seconds that the waiting side used, per second


class Ours:
    name = "glm4run"

    def __init__(self, folder: Path, context_len: int, threads: int) -> None:
        self.model = load_model(folder, context_len=context_len, threads=threads)
        self.model.settle()  # nothing moves while the other side is timed

    def seconds(self, test: Test) -> float:
        timed = time_prefill if test.kind == "prefill" else time_decode
        return timed(self.model, filled(self.model, test.depth, test.tokens + 1), test.tokens)

    def bytes_per_token(self, depth: int) -> int:
        return bytes_per_token(self.model, depth)

    def cpu_s(self) -> float:
        return time.process_time()


class Peer:
    """`llama_cpp_peer.py serve` in its own process and environment."""

    name = "llama.cpp"

    def __init__(self, python: Path, file: Path, context_len: int, threads: int) -> None:
        script = Path(__file__).with_name("llama_cpp_peer.py")
        options = ["--ctx", str(context_len), "--threads", str(threads)]
        self.command = ["python", script.name, "serve", file.name, *options]
        command = [str(python), str(script), "serve", str(file), *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._read()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def seconds(self, test: Test) -> float:
        assert self.process.stdin is not None
        request = {"test": test.kind, "tokens": test.tokens, "depth": test.depth}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return float(self._read()["seconds"])

    def bytes_per_token(self, depth: int) -> int:
        return int(self.about["weight_bytes_per_token"] + depth * self.about["kv_bytes_per_position"])

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        user, system = fields[11:13]  # proc(5): utime and stime are the 14th and 15th, counted with the name
        return (int(user) + int(system)) / TICKS_PER_S

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp's process ended, exit status {self.process.wait()}")
        return cast(dict[str, Any], json.loads(line))


def main() -> None:
    args = _parse_args()
    tests = args.tests
    conditions: list[Condition] = ["quiet", "busy"] if args.busy else ["quiet"]
    with Peer(args.peer_python, args.peer, args.ctx, args.threads) as peer:
        ours = Ours(args.model, args.ctx, args.threads)
        sides: list[Side] = [ours, peer]
        bandwidths: list[float] = []
        reads: dict[Condition, list[float]] = {condition: [] for condition in conditions}
        samples: list[Sample] = []
        for number in range(args.rounds):
            time.sleep(SETTLE_S)
            with ReadProbe() as probe:
                best = probe.best()
                bandwidths.append(best.best_gb_per_s)
                if args.busy:
                    reads["quiet"].append(_read(probe, args.threads, best))
                    with _busy_core():
                        reads["busy"].append(_read(probe, args.threads, best))
            print(f"round {number + 1}: {bandwidths[-1]:.1f} GB/s", file=sys.stderr)
            order = sides if number % 2 == 0 else sides[::-1]
            for condition in conditions:
                with _busy_core() if condition == "busy" else contextlib.nullcontext():
                    for sample in _one_round(number, condition, tests, order):
                        print(
                            f"  {sample.test} {condition} {sample.side}: {sample.tokens_per_s:.2f} tok/s",
                            file=sys.stderr,
                        )
                        samples.append(sample)
        rows = _summarize(tests, conditions, sides, samples, max(bandwidths))
        extrapolated = [line for depth in args.extrapolate for line in _extrapolated(rows, tests, depth)]
        idle_share = max(sample.other_side_idle_share for sample in samples)
        result = {
            "machine": {"cpu": cpu_name(), "threads": args.threads, "torch": torch.__version__},
            "nice": os.nice(0),
            "commit": commit(),
            "commands": [_own_command(args), shlex.join(peer.command)],
            "model": ours.model.name,
            "backend": ours.model.backend_detail,
            "peer": {"file": args.peer.name, **peer.about},
            "bandwidth_gb_per_s": {
                "best": max(bandwidths),
                "median": statistics.median(bandwidths),
                "rounds": bandwidths,
            },
            "read_gb_per_s": reads,
            "largest_idle_share": idle_share,
            "medians": rows,
            "extrapolated": extrapolated,
            "samples": [asdict(sample) for sample in samples],
        }
    _print_table(rows, bandwidths)
    if args.busy:
        quiet, busy = statistics.median(reads["quiet"]), statistics.median(reads["busy"])
        print(f"a bare read with one core busy: {busy:.1f} of {quiet:.1f} GB/s, {busy / quiet:.0%} of quiet")
    for line in extrapolated:
        text = "decode at {depth}: {side} {tokens_per_s:.2f} tok/s, extrapolated from {shallow} and {deep}"
        print(text.format(**line))
    if idle_share > IDLE_SHARE_WARNING:
        print(f"warning: a waiting side used {idle_share:.0%} of a core", file=sys.stderr)
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder of ours")
    parser.add_argument("peer", type=Path, help="a GGUF")
    parser.add_argument("--peer-python", type=Path, required=True, help="the interpreter that has llama_cpp and gguf")
    parser.add_argument("--threads", type=int, default=default_threads(), help="for both sides; all cores by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tests", type=_parse_tests, default="decode:16,prefill:128,prefill:512")
    parser.add_argument("--depth", type=int, default=0, help="positions in the cache before each test")
    parser.add_argument("--extrapolate", type=_parse_depths, default=[], help="depths, such as 8192,32768")
    parser.add_argument("--ctx", type=int, default=4096)
    parser.add_argument("--busy", action="store_true", help="measure also with one core kept busy")
    parser.add_argument("-o", "--output", type=Path, help="write everything as JSON")
    args = parser.parse_args()
    args.tests = [Test(kind, tokens, args.depth if depth is None else depth) for kind, tokens, depth in args.tests]
    longest = max(test.depth + test.tokens for test in args.tests) + UNTIMED
    if longest > args.ctx:
        parser.error(f"{longest} positions do not fit --ctx {args.ctx}")
    return args


def _parse_depths(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parse_tests(text: str) -> list[tuple[str, int, int | None]]:
    tests = []
    for part in text.split(","):
        kind, _, numbers = part.partition(":")
        tokens, at, depth = numbers.partition("@")
        known = kind in ("prefill", "decode") and tokens.isdecimal() and (depth.isdecimal() or not at)
        if not known or int(tokens) == 0:
            raise argparse.ArgumentTypeError(f"{part!r} is not prefill:N or decode:N, nor one of them with @DEPTH")
        tests.append((kind, int(tokens), int(depth) if at else None))
    return tests


def _extrapolated(rows: list[dict[str, Any]], tests: list[Test], depth: int) -> Iterator[dict[str, Any]]:
    """Of each side, from the quiet medians of decoding at the shallowest and the deepest depth."""
    decodes = sorted((test for test in tests if test.kind == "decode"), key=lambda test: test.depth)
    if not decodes or decodes[0].depth == decodes[-1].depth:
        return
    for side in (Ours.name, Peer.name):
        first, last = (
            next(
                1 / row[side]["tokens_per_s"] for row in rows if (row["test"], row["condition"]) == (str(test), "quiet")
            )
            for test in (decodes[0], decodes[-1])
        )
        slope = (last - first) / (decodes[-1].depth - decodes[0].depth)
        yield {
            "depth": depth,
            "side": side,
            "tokens_per_s": 1 / (last + slope * (depth - decodes[-1].depth)),
            "ms_per_1024_positions": slope * 1024e3,
            "shallow": decodes[0].depth,
            "deep": decodes[-1].depth,
        }


def _own_command(args: argparse.Namespace) -> str:
    """The command line, with files by their names: where they lie belongs to the machine."""
    paths = {str(path): path.name for path in (args.model, args.peer, args.peer_python, args.output) if path}
    return shlex.join(["python", "benchmarks/versus_llama_cpp.py", *(paths.get(arg, arg) for arg in sys.argv[1:])])


def _one_round(number: int, condition: Condition, tests: list[Test], order: list[Side]) -> Iterator[Sample]:
    for test in tests:
        for side, other in zip(order, order[::-1], strict=True):
            time.sleep(SETTLE_S)
            cpu_before, started = other.cpu_s(), time.perf_counter()
            seconds = side.seconds(test)
            idle_share = (other.cpu_s() - cpu_before) / (time.perf_counter() - started)
            yield Sample(number, condition, str(test), side.name, test.tokens / seconds, idle_share)


def _read(probe: ReadProbe, threads: int, best: Bandwidth) -> float:
    """GB/s over a second or so, every moment of it counted."""
    started, passes = time.perf_counter(), 0
    while time.perf_counter() - started < READ_S:
        probe.gb_per_s(threads, best.prefetch_bytes)
        passes += 1
    return passes * probe.nbytes / (time.perf_counter() - started) / 1e9


@contextlib.contextmanager
def _busy_core() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _summarize(
    tests: list[Test], conditions: list[Condition], sides: list[Side], samples: list[Sample], bandwidth: float
) -> list[dict[str, Any]]:
    """One row for each test and condition: of each side the median and what follows from it."""

    def median(test: Test, condition: Condition, side: Side) -> float:
        key = (str(test), condition, side.name)
        return statistics.median(s.tokens_per_s for s in samples if (s.test, s.condition, s.side) == key)

    rows: list[dict[str, Any]] = []
    for test in tests:
        for condition in conditions:
            row: dict[str, Any] = {"test": str(test), "condition": condition}
            for side in sides:
                speed = median(test, condition, side)
                figures = {"tokens_per_s": speed, "share_of_quiet": speed / median(test, "quiet", side)}
                if test.kind == "decode":
                    gb_per_s = side.bytes_per_token(test.depth + test.tokens // 2) * speed / 1e9
                    figures |= {"gb_per_s": gb_per_s, "share_of_bandwidth": gb_per_s / bandwidth}
                row[side.name] = figures
            row["ratio"] = row[Ours.name]["tokens_per_s"] / row[Peer.name]["tokens_per_s"]
            rows.append(row)
    return rows


def _print_table(rows: list[dict[str, Any]], bandwidths: list[float]) -> None:
    print(f"read bandwidth: best {max(bandwidths):.1f} GB/s, median {statistics.median(bandwidths):.1f} GB/s")
    print(f"{'':<18}{'':<7}{Ours.name + ' / ' + Peer.name}")
    print(f"{'test':<18}{'':<7}{'tok/s':>15}{'ratio':>8}{'GB/s':>15}{'of bandwidth':>15}{'of quiet':>15}")
    for row in rows:
        ours, peer = row[Ours.name], row[Peer.name]
        cells = [f"{ours['tokens_per_s']:.2f} / {peer['tokens_per_s']:.2f}".rjust(15), f"{row['ratio']:.2f}".rjust(8)]
        for key, form in (("gb_per_s", ".1f"), ("share_of_bandwidth", ".0%"), ("share_of_quiet", ".0%")):
            known = key in ours and not (key == "share_of_quiet" and row["condition"] == "quiet")
            cells.append((f"{ours[key]:{form}} / {peer[key]:{form}}" if known else "").rjust(15))
        print(f"{row['test']:<18}{row['condition']:<7}{''.join(cells)}".rstrip())


if __name__ == "__main__":
    main()
