"""What the machine says that is free, and what the process holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm4run.memory import available, available_ram_bytes, peak_resident_bytes, resident_bytes, total_ram_bytes

linux = pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not Linux")


def test_available_memory_is_the_smallest_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "_meminfo", lambda field: 5)
    monkeypatch.setattr(available, "_cgroup_available", lambda: iter([3, None]))
    assert available_ram_bytes() == 3
    monkeypatch.setattr(available, "_cgroup_available", lambda: iter([None, None]))
    assert available_ram_bytes() == 5
    monkeypatch.setattr(available, "_meminfo", lambda field: None)
    assert available_ram_bytes() is None


def cgroup(folder: Path, *, limit: str, usage: int, inactive: int) -> tuple[str, str]:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\nactive_file 7\n")
    return str(folder / "memory.max"), str(folder / "memory.current")


def test_cgroup_limit_counts_and_its_page_cache_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "_meminfo", lambda field: 10_000)
    monkeypatch.setattr(available, "_CGROUPS", (cgroup(tmp_path, limit="5000", usage=3000, inactive=1000),))
    assert available_ram_bytes() == 3000
    assert total_ram_bytes() == 5000
    monkeypatch.setattr(available, "_CGROUPS", (cgroup(tmp_path, limit="2000", usage=3000, inactive=0),))
    assert available_ram_bytes() == 0  # over its limit already, never negative
    monkeypatch.setattr(available, "_CGROUPS", (cgroup(tmp_path, limit="max", usage=3000, inactive=0),))
    assert (available_ram_bytes(), total_ram_bytes()) == (10_000, 10_000)


@linux
def test_this_machine_is_plausible() -> None:
    free, total = available_ram_bytes(), total_ram_bytes()
    assert free is not None and total is not None
    assert 16 << 20 < free <= total < 1 << 45
    assert 10 << 20 < resident_bytes() <= peak_resident_bytes() < total


@linux
def test_peak_keeps_what_was_given_back() -> None:
    before = peak_resident_bytes()
    block = b"x" * (before - resident_bytes() + (64 << 20))
    held = resident_bytes()
    del block
    slack = 4 << 20  # the kernel counts pages in batches
    assert peak_resident_bytes() >= held - slack
    assert held > before
    assert resident_bytes() < held - (32 << 20)
