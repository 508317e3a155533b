"""glibc gives large blocks back, in a process of its own each time: the setting stays for a process's life."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from glm4run.memory.heap import kept_block_bytes

REPO = Path(__file__).resolve().parents[3]
MIB = 1 << 20
# A freed block of 16 MiB teaches glibc to keep such blocks; then small blocks hold the heap's end in its place.
KEPT = """
import ctypes
from glm4run.memory import resident_bytes
from glm4run.memory.heap import return_large_blocks
done = return_large_blocks()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def block(size):
    address = libc.malloc(size)
    ctypes.memset(address, 1, size)
    return address
for _ in range(100):
    block(100_000)  # so that no hole that importing has left is large enough for those below
libc.free(block(16 << 20))
before = resident_bytes()
large = []
for _ in range(4):
    large.append(block(8 << 20))
    block(100_000)
for address in large:
    libc.free(address)
print(done, resident_bytes() - before)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is glibc's")


def kept(**variables: str) -> tuple[bool, int]:
    """Whether the setting was made, and the bytes that a process still holds of the 32 MiB that it freed."""
    environment = {key: value for key, value in os.environ.items() if "MALLOC" not in key and key != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", KEPT],
        env=environment | {"PYTHONPATH": str(REPO)} | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    made, nbytes = done.stdout.split()
    return made == "True", int(nbytes)


def test_what_a_running_model_s_heap_keeps_is_under_a_percent_of_it() -> None:
    sizes = [kept_block_bytes(weights) for weights in (0, 100 * MIB, 2048 * MIB, 6 << 30, 20 << 30)]
    assert sizes == [MIB, MIB, 8 * MIB, 24 * MIB, 32 * MIB]
    assert 2 * kept_block_bytes(6 << 30) < 0.01 * (6 << 30)


@glibc
def test_large_blocks_go_back() -> None:
    made, nbytes = kept()
    assert made
    assert nbytes < MIB


@glibc
@pytest.mark.parametrize(
    "variables",
    [{"MALLOC_MMAP_THRESHOLD_": "33554432"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432"}],
    ids=lambda variables: next(iter(variables)),
)
def test_what_the_user_configured_stays(variables: dict[str, str]) -> None:
    made, nbytes = kept(**variables)
    assert not made
    assert nbytes > 16 * MIB  # glibc keeps them, as it was asked to
