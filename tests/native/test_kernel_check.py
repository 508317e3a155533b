"""The library's portable path against plain loops in double precision, with every undefined step an error.

`kernel_check.cpp` says what is compared. Here it is compiled for this machine; CONTRIBUTING.md has the commands for
instruction sets that only an emulator has.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPO

SOURCES = REPO / "glm4run" / "kernels" / "cpu" / "src"
CHECK = Path(__file__).parent / "kernel_check.cpp"
NAMES = ("dispatch", "kernels_scalar", "layer_ops", "linear", "pool", "stack")
FLAGS = ("-std=c++17", "-O1", "-pthread", "-DG4_PORTABLE")
# Stops at what C++ leaves undefined; needs no library, unlike the reports of the sanitizers.
TRAPS = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")


def test_the_portable_path_computes_what_plain_loops_do(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "kernel_check"
    files = [str(CHECK), *(str(SOURCES / f"{name}.cpp") for name in NAMES)]
    command = [compiler, *FLAGS, *TRAPS, f"-I{SOURCES}", "-o", str(program), *files]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    run = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["pool", "scalar"]
    assert "right" in lines[-1]
