"""The plan of a run against what the run really took: `--check-plan`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from glm4run.memory import GIB, MemoryPlan, Run, peak_resident_bytes, plan_run


@dataclass(frozen=True)
class PlanCheck:
    """In bytes: the whole plan, what it says for the tokens that were really fed, and the measured peak."""

    planned_bytes: int
    expected_bytes: int
    peak_bytes: int
    measure: str

    @property
    def error(self) -> float:
        """The peak above the expected bytes, as a share of them; negative where the plan was generous."""
        return self.peak_bytes / self.expected_bytes - 1

    def describe(self) -> str:
        """One line for the user."""
        return (
            f"plan {self.planned_bytes / GIB:.3f} GiB, of which the tokens of this run need "
            f"{self.expected_bytes / GIB:.3f}; {self.measure} at the peak {self.peak_bytes / GIB:.3f} GiB "
            f"({self.error:+.1%})"
        )


def check_plan(run: Run, plan: MemoryPlan, device: torch.device, tokens_held: int) -> PlanCheck:
    """Compares a plan with this process's peak. `tokens_held`: the most that a cache held.

    On the CPU a page of the cache exists once it is written. On a GPU the whole cache is there from the start, and the
    allocator's peak counts tensors only: neither the CUDA context nor its own slack.
    """
    chunked = dataclasses.replace(run, chunk=plan.chunk)
    used = plan_run(chunked, max(1, min(tokens_held, plan.context_len)))
    if device.type == "cuda":
        others = ("device_context", "allocator_slack")
        expected = used.peak_bytes - used.bytes_of("kv_cache", *others) + plan.bytes_of("kv_cache")
        planned = plan.peak_bytes - plan.bytes_of(*others)
        return PlanCheck(planned, expected, torch.cuda.max_memory_allocated(device), "allocated by torch")
    whole = plan_run(chunked, plan.context_len)  # of `run` as it is now, which may have more than was planned
    return PlanCheck(whole.peak_bytes, used.peak_bytes, peak_resident_bytes(), "resident")
