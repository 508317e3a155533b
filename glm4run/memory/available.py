"""What memory this process may still take, and what it has taken: RAM, cgroup limits, resident pages. No torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path


def available_ram_bytes() -> int | None:
    """Memory that this process may still take: the machine's, or less where a cgroup says so. None if unknown.

    The page cache counts as available: the system gives it back when a program asks.
    """
    found = [value for value in (_meminfo("MemAvailable"), *_cgroup_available()) if value is not None]
    return min(found) if found else None


def total_ram_bytes() -> int | None:
    """The machine's memory, or the cgroup's limit where that is less."""
    found = [value for value in (_meminfo("MemTotal"), *_cgroup_limits()) if value is not None]
    return min(found) if found else None


def page_cache_bytes() -> int:
    """Files that the system keeps in memory and gives back on demand; 0 where it does not say."""
    try:
        return _read_meminfo()["Cached"]
    except (OSError, ValueError, KeyError):
        return 0


def resident_bytes() -> int:
    """Memory that this process holds now (resident set), 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def peak_resident_bytes() -> int:
    """The most memory that this process has ever held, 0 where the system does not say.

    Of the process alone: `ru_maxrss` also counts the parent's pages between fork and exec.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes


def _read_meminfo() -> dict[str, int]:
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) * 1024
    return values


def _meminfo(field: str) -> int | None:
    try:
        return _read_meminfo()[field]
    except (OSError, ValueError, KeyError, IndexError):
        pass
    try:  # not Linux: what there is, not what is free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return None


_CGROUPS = (  # limit, usage: version 2, version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _cgroup_limits() -> Iterable[int | None]:
    for limit, _ in _CGROUPS:
        try:
            yield int(Path(limit).read_text())
        except (OSError, ValueError):  # no cgroup, or "max"
            yield None


def _cgroup_available() -> Iterable[int | None]:
    """The limit less the usage, of which inactive file pages are given back on demand."""
    for limit, usage in _CGROUPS:
        try:
            used = int(Path(usage).read_text()) - _inactive_file_bytes(Path(usage).parent)
            yield max(0, int(Path(limit).read_text()) - used)
        except (OSError, ValueError):
            yield None


def _inactive_file_bytes(cgroup: Path) -> int:
    try:
        for line in (cgroup / "memory.stat").read_text().splitlines():
            if line.startswith(("inactive_file ", "total_inactive_file ")):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return 0
