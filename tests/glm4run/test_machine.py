"""How many threads a machine is worth, from made-up system files; how the native library is found or done without."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import glm4run.kernels.cpu as cpu_package
from glm4run import machine
from glm4run.cards import demo_folder
from glm4run.errors import BackendError, UsageError
from glm4run.generate import load_model
from glm4run.kernels.cpu import library
from glm4run.kernels.cpu.library import ISA_VARIABLE, LIBRARY_VARIABLE
from tests.native_library import ISAS, MISSING, needs_library

# A machine


class FakeMachine:
    """System files in a folder of the test's, and the processors that the process may use."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        monkeypatch.setattr(machine, "CPU_FOLDER", folder / "cpus")
        monkeypatch.setattr(machine, "CGROUP_QUOTA", folder / "cpu.max")
        monkeypatch.setattr(machine, "CGROUP_V1", folder / "v1")

    def allow(self, cpus: Iterable[int]) -> None:
        allowed = set(cpus)
        self.monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed, raising=False)

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    def siblings(self, *cores: tuple[int, ...]) -> None:
        for core in cores:
            for cpu in core:
                self.write(f"cpus/cpu{cpu}/topology/thread_siblings_list", ",".join(map(str, core)))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    return FakeMachine(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("cores", "allowed", "threads"),
    [
        ([(0,), (1,), (2,), (3,)], range(4), 4),
        ([(0, 4), (1, 5), (2, 6), (3, 7)], range(8), 4),  # hyper-threads of one core count once
        ([(0, 1), (2, 3)], range(4), 2),
        ([(0, 4), (1, 5), (2, 6), (3, 7)], [0, 4], 1),
        ([(0, 4), (1, 5), (2, 6), (3, 7)], [1, 4, 6], 3),
        ([(0,)], [0], 1),
    ],
)
def test_one_thread_per_core_that_may_be_used(
    fake: FakeMachine, cores: list[tuple[int, ...]], allowed: Iterable[int], threads: int
) -> None:
    fake.siblings(*cores)
    fake.allow(allowed)
    assert machine.default_threads() == threads


def test_without_topology_every_processor_is_a_core(fake: FakeMachine) -> None:
    fake.allow(range(6))
    assert machine.default_threads() == 6


def test_without_affinity_every_processor_counts(fake: FakeMachine) -> None:
    fake.monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    fake.monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert machine.default_threads() == 5
    fake.monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.default_threads() == 1


@pytest.mark.parametrize(
    ("quota", "threads"),
    [
        ("max 100000", 8),
        ("150000 100000", 2),
        ("200000 100000", 2),
        ("50000 100000", 1),
        ("1000 100000", 1),
        ("6400000 100000", 8),  # more than there are
        ("300000 50000", 6),
        ("0 100000", 8),
        ("-1 100000", 8),
        ("100000 0", 8),
        ("", 8),
        ("150000", 8),
        ("a b", 8),
    ],
)
def test_quota_of_a_container(fake: FakeMachine, quota: str, threads: int) -> None:
    fake.allow(range(8))
    fake.write("cpu.max", quota)
    assert machine.default_threads() == threads


@pytest.mark.parametrize(
    ("quota", "period", "threads"),
    [("150000", "100000", 2), ("-1", "100000", 8), ("400000", "100000", 4), ("x", "100000", 8), ("1", None, 8)],
)
def test_quota_of_an_older_container(fake: FakeMachine, quota: str, period: str | None, threads: int) -> None:
    fake.allow(range(8))
    fake.write("v1/cpu.cfs_quota_us", quota)
    if period is not None:
        fake.write("v1/cpu.cfs_period_us", period)
    assert machine.default_threads() == threads


def test_the_newer_quota_wins(fake: FakeMachine) -> None:
    fake.allow(range(8))
    fake.write("cpu.max", "300000 100000")
    fake.write("v1/cpu.cfs_quota_us", "100000")
    fake.write("v1/cpu.cfs_period_us", "100000")
    assert machine.default_threads() == 3


def test_names_of_this_machine_and_this_checkout() -> None:
    assert machine.cpu_name()
    commit = machine.commit()
    assert commit is None or commit.strip() == commit != ""


# The library


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The library is looked for again, in the environment that the test makes."""
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    isa, threads = (None, 1) if MISSING is not None else (library.active_isa(), library.native().g4_threads())
    library.native.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library.native.cache_clear()
    if isa is not None:
        library.set_isa(isa)
        library.native().g4_set_threads(threads)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_forces_an_instruction_set(isa: str, anew: pytest.MonkeyPatch) -> None:
    anew.setenv(ISA_VARIABLE, isa)
    assert library.why_missing() is None
    assert library.active_isa() == isa


@needs_library
@pytest.mark.parametrize("isa", ["sse9", "AVX2", "none "])
def test_an_unknown_instruction_set_is_a_usage_error_with_the_known_ones(isa: str, anew: pytest.MonkeyPatch) -> None:
    anew.setenv(ISA_VARIABLE, isa)
    with pytest.raises(UsageError, match=repr(isa)) as caught:
        library.native()
    assert caught.value.hint is not None
    assert all(known in caught.value.hint for known in (*ISAS, "none"))


@needs_library
def test_an_instruction_set_that_this_machine_lacks_is_refused(anew: pytest.MonkeyPatch) -> None:
    lacking = [name for name, runs in library.available_isas().items() if not runs]
    for name in lacking:
        with pytest.raises(UsageError, match=name):
            library.set_isa(name)


def test_the_library_can_be_turned_off(anew: pytest.MonkeyPatch) -> None:
    anew.setenv(ISA_VARIABLE, "none")
    assert library.why_missing() == f"it is turned off ({ISA_VARIABLE}=none)"


@needs_library
def test_the_threads_are_those_that_the_process_may_use(anew: pytest.MonkeyPatch) -> None:
    anew.setattr(library, "default_threads", lambda: 3)
    assert library.native().g4_threads() == 3


def test_a_library_that_is_not_there_or_no_library_is_named(anew: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    for path in (tmp_path / "absent.so", broken):
        anew.setenv(LIBRARY_VARIABLE, str(path))
        said = str(library.why_missing())
        assert str(path) in said
        assert "cannot be loaded" in said


def test_a_library_of_another_version_is_refused(anew: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, other = tmp_path / "old.c", tmp_path / library.FILE_NAME
    source.write_text("int g4_abi(void) { return 0; }\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(other), str(source)], check=True)
    anew.setenv(LIBRARY_VARIABLE, str(other))
    said = str(library.why_missing())
    assert "has interface 0" in said
    assert "install glm4run again" in said


def test_a_library_that_was_never_built_says_so(anew: pytest.MonkeyPatch, tmp_path: Path) -> None:
    anew.delenv(LIBRARY_VARIABLE, raising=False)
    anew.setattr(cpu_package, "__path__", [str(tmp_path)])
    assert "it was not built" in str(library.why_missing())
    (tmp_path / library.FILE_NAME).write_text("no library")
    assert str(tmp_path) in str(library.why_missing())


def test_auto_runs_without_the_library_and_says_why(anew: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The demo model with torch's kernels; the backend that was asked for by name is an error."""
    anew.setenv(LIBRARY_VARIABLE, str(tmp_path / "absent.so"))
    loaded = load_model(demo_folder(), dtype="fp32")
    assert loaded.backend == "torch"
    assert "native cannot" in loaded.backend_reason
    assert "absent.so cannot be loaded" in loaded.backend_reason
    assert loaded.model.stack is None
    assert len(loaded.logits([1, 2, 3])) == 3
    with pytest.raises(BackendError, match="'native' cannot run this model"):
        load_model(demo_folder(), backend="native")
