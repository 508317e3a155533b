"""Where the Triton kernels run and where they do not, in words; and that they compile for cards that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glm4run.kernels import triton as package
from glm4run.kernels.triton import overlap, why_missing
from tests.conftest import REPO

pytest.importorskip("triton")
CUDA = torch.device("cuda")


class FailingDriver:
    def get_current_device(self) -> int:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nMore of it.")


def why(
    monkeypatch: pytest.MonkeyPatch,
    *,
    capability: tuple[int, int] = (8, 9),
    triton: str = "3.6.0",
    starts: bool = True,
) -> str | None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("triton.__version__", triton)
    fake = SimpleNamespace(get_current_device=lambda: 0) if starts else FailingDriver()
    monkeypatch.setattr("triton.runtime.driver._active", fake)
    why_missing.cache_clear()
    try:
        return why_missing(CUDA)
    finally:
        why_missing.cache_clear()


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_missing(torch.device("cpu")) == "its kernels run on CUDA devices"
    assert why(monkeypatch) is None
    assert why(monkeypatch, triton="3.10.1+git0123") is None
    assert why(monkeypatch, triton="3.3.1") == "it needs triton 3.4, 3.3 is installed"
    too_old = "it needs compute capability 8.0, this device has 7.5"
    assert why(monkeypatch, capability=(7, 5)) == too_old
    compiler = str(why(monkeypatch, starts=False))
    assert "needs a C compiler and Python's headers: Failed to find C compiler" in compiler and "More" not in compiler
    monkeypatch.setattr(package, "find_spec", lambda name: None)
    assert why(monkeypatch) == "triton is not installed"


@pytest.mark.parametrize(("capability", "knows"), [((9, 0), True), ((9, 0), False), ((8, 9), True)])
def test_kernels_overlap_where_card_and_triton_can(
    capability: tuple[int, int], knows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(package, "knows_overlap", lambda: knows)
    overlap.cache_clear()
    found = overlap(CUDA)
    overlap.cache_clear()
    assert found == ({"OVERLAPS": True, "launch_pdl": True} if capability == (9, 0) and knows else {"OVERLAPS": False})


@pytest.mark.slow
def test_every_kernel_compiles_for_a_card(tmp_path: Path) -> None:
    """What the interpreter takes is not always what the compiler takes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'quantize'}", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compiling.py")
    done = subprocess.run([sys.executable, script, "90"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    kernels = {line.split()[1] for line in lines[:-1]}
    assert {"multiply_rows", "multiply_tiles", "dequantize_rows", "attend_rows", "combine", "write_rows"} <= kernels
    assert {"rms_norm", "add_rms_norm", "silu_mul"} <= kernels
