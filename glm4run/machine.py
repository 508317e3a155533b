"""What this machine's processor is and how many threads may be used on it. No torch."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from pathlib import Path

CPU_FOLDER = Path("/sys/devices/system/cpu")
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # version 2: "quota period" or "max period"
CGROUP_V1 = Path("/sys/fs/cgroup/cpu")


def cpu_name() -> str:
    """The processor's name as the system spells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def has_cpu_flag(flag: str) -> bool:
    """Whether the processor lists an instruction set, in Linux' spelling (`avx512_bf16`); False where unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    return next((flag in line.split() for line in lines if line.startswith(("flags", "Features"))), False)


def commit() -> str | None:
    """The commit of the checkout that this package lies in (`-dirty` where files differ); None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return run.stdout.strip() or None


def default_threads() -> int:
    """Threads for work that is bound by memory or by arithmetic units: one per core that this process may use.

    A second hyper-thread of a core shares both with the first and only adds waiting. A container's quota of processor
    time counts like cores: more threads than that are put to sleep by turns.
    """
    cores = len({_core_of(cpu) for cpu in _allowed_cpus()})
    quota = _cgroup_cpus()
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def _allowed_cpus() -> list[int]:
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return list(range(os.cpu_count() or 1))


def _core_of(cpu: int) -> str:
    """The hyper-threads of one core give the same text; without that knowledge each is its own core."""
    try:
        return (CPU_FOLDER / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _cgroup_cpus() -> float | None:
    """Processors' worth of time that the container may use, None where it is not limited."""
    try:
        quota, period = CGROUP_QUOTA.read_text().split()
    except (OSError, ValueError):
        try:
            quota = (CGROUP_V1 / "cpu.cfs_quota_us").read_text().strip()
            period = (CGROUP_V1 / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    try:
        limit = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return limit if limit > 0 else None
