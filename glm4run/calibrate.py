"""Measures what a plan otherwise assumes of this machine, on the embedded demo: `glm4run vram --calibrate`.

Each case runs in a process of its own, as a peak can only be read once. What a case held beyond the planned tensors is
what the machine's own libraries, driver and allocator take. `python -m glm4run.calibrate` is the child.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glm4run.cards import demo_folder
from glm4run.errors import Glm4RunError
from glm4run.memory.calibration import FILE_VARIABLE, Calibration, write_calibration

CASES = (128, 512, 2000)  # tokens; the demo's context holds 2048
CASE_TIMEOUT_S = 300


def calibrate(name: str, device: str, progress: Callable[[str], None]) -> Calibration:
    """Runs the cases on `device` (cpu or cuda), keeps the result under the device's `name` and returns it.

    Raises:
        Glm4RunError: a case failed, or the result cannot be written.
    """
    found = []
    for number, tokens in enumerate(CASES, 1):
        progress(f"case {number} of {len(CASES)}: the demo model over {tokens} tokens")
        found.append(_run_case(tokens, device))
    if device == "cpu":
        progress("the memory's read bandwidth")
    calibration = Calibration(
        name,
        datetime.date.today().isoformat(),
        found[0]["version"],
        # The most of all cases: a plan may be generous by a few MiB, and must not be short.
        context_bytes=max(case["context_bytes"] for case in found),
        later_bytes=max(0, *(case["later_bytes"] for case in found)),
        slack_bytes=max(0, *(case["slack_bytes"] for case in found)) if device == "cuda" else None,
        read_gb_per_s=round(_run_child(["bandwidth"])["read_gb_per_s"], 2) if device == "cpu" else None,
    )
    try:
        write_calibration(calibration)
    except OSError as error:
        raise Glm4RunError(
            f"cannot write the calibration: {error}", hint=f"set ${FILE_VARIABLE} to a file that can be written"
        ) from error
    return calibration


def _run_case(tokens: int, device: str) -> dict[str, Any]:
    return _run_child([str(tokens), device])


def _run_child(words: Sequence[str]) -> dict[str, Any]:
    """The child must plan without an earlier calibration: it measures what that one measured."""
    with tempfile.TemporaryDirectory() as nothing:
        environment = os.environ | {FILE_VARIABLE: str(Path(nothing) / "none.json")}
        command = [sys.executable, "-m", "glm4run.calibrate", *words]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=CASE_TIMEOUT_S, check=True
            )
            result: dict[str, Any] = json.loads(done.stdout)
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip().splitlines() or ["no message"])[-1]
            raise Glm4RunError(
                f"a run of the demo model failed: {last}", hint="`glm4run generate hello -m demo` shows more"
            ) from error
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            raise Glm4RunError(f"a run of the demo model failed: {error}") from error
    return result


# --- the child


def measure_case(tokens: int, device: str) -> dict[str, Any]:
    """One run of the demo that feeds `tokens`, in this process: what it held beyond the planned tensors, in bytes."""
    import rich.progress
    import torch
    import typer

    from glm4run import SamplingParams, load_model
    from glm4run.memory.overhead import CUBLAS_BYTES, LATER_BYTES
    from glm4run.plan_check import check_plan

    del rich, typer  # imported as a run of `generate` has them before it loads anything
    free_before = torch.cuda.mem_get_info()[0] if device == "cuda" else 0
    model = load_model(demo_folder(), device=device, context_len=tokens)
    ids = model.ordinary_tokens.nonzero().flatten()[:97].tolist()
    prompt = [ids[i % len(ids)] for i in range(tokens - 4)]
    for _ in model.stream(prompt, SamplingParams(temperature=0, max_new_tokens=4)):
        pass
    check = check_plan(model.memory_run, model.plan, model.device, tokens)
    if device == "cuda":
        # Free memory is asked with the context open: what cuBLAS and modules took since then comes on top of it.
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.max_memory_reserved()
        since = max(CUBLAS_BYTES, free_before - free - torch.cuda.memory_reserved())
        opened = max(0, _used_by_this_process(total, free) - torch.cuda.memory_reserved() - since)
        return {
            "version": torch.__version__,
            "context_bytes": opened + since,
            "later_bytes": 0,
            "slack_bytes": reserved - check.expected_bytes,
        }
    return {
        "version": torch.__version__,
        "context_bytes": model.memory_run.overhead.held_bytes,
        "later_bytes": LATER_BYTES + check.peak_bytes - check.expected_bytes,
        "slack_bytes": 0,
    }


def _used_by_this_process(total: int, free: int) -> int:
    """As the driver counts it; where it does not say, all that is in use on the device."""
    from glm4run.vram.detect import detect_gpus

    mine = [holder.bytes for gpu in detect_gpus() for holder in gpu.holders if holder.pid == os.getpid()]
    return max(mine, default=total - free)


def main(words: Sequence[str]) -> None:
    """`TOKENS DEVICE`, or `bandwidth`: prints a JSON object."""
    if list(words) == ["bandwidth"]:
        from glm4run.benchmark import measure_read_bandwidth

        result: dict[str, Any] = {"read_gb_per_s": measure_read_bandwidth().best_gb_per_s}
    else:
        result = measure_case(int(words[0]), words[1])
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
