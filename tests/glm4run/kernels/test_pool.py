"""The native library's threads: any number of them, callers from several threads, forks, weights that come and go.

How a sleeping thread is overtaken needs a look inside and is tested in `tests/native/kernel_check.cpp`.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glm4run.kernels import Activations
from glm4run.kernels.cpu.backend import NativeWeight
from glm4run.kernels.cpu.library import native
from glm4run.quant_config import QuantScheme
from tests.native_library import needs_library, prepacked, product, running, same_bits
from tests.packed_cases import inputs_with_outliers, make_case

pytestmark = needs_library

FORK_SECONDS = 30.0


@dataclass(frozen=True)
class Work:
    """A product and what one thread makes of it."""

    weight: NativeWeight
    x: Tensor
    expected: Tensor

    def right(self) -> bool:
        return same_bits(product(self.x, self.weight), self.expected)


def work(N: int, K: int, M: int, activations: Activations = "int8", seed: int = 0) -> Work:
    weight = prepacked(make_case(N, K, QuantScheme(4, 32), torch.bfloat16, seed), activations)
    x = inputs_with_outliers(M, K, torch.float32, seed)
    with running(threads=1):
        return Work(weight, x, product(x, weight))


@pytest.fixture(autouse=True)
def threads_restored() -> Iterator[None]:
    with running(threads=2):
        yield


@contextmanager
def meanwhile(step: Callable[[], None]) -> Iterator[None]:
    """Runs `step` again and again in another Python thread; its exceptions come out at the end."""
    stop, failures = threading.Event(), list[BaseException]()

    def loop() -> None:
        try:
            while not stop.is_set():
                step()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def test_random_jobs_over_changing_numbers_of_threads() -> None:
    generator = random.Random(0)
    every: tuple[Activations, ...] = ("int8", "int16", "bf16")
    jobs = [
        work(generator.choice((1, 40, 700)), 64 * generator.randint(1, 8), generator.choice((1, 2, 8, 9, 40)), a, seed)
        for seed, a in enumerate(every * 5)
    ]
    for i in range(600):
        if i % 7 == 0:
            native().g4_set_threads(generator.randint(1, 6))
        assert generator.choice(jobs).right(), i


def own_tasks() -> set[int]:
    """This process's threads, by the kernel's numbers."""
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinities on this system")
def test_a_helper_leaves_the_callers_core() -> None:
    """Where another process keeps a core busy, the system may leave caller and helper to share the other one."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("one core")
    one, core = work(700, 512, 1), min(allowed)
    native().g4_set_threads(1)
    before = own_tasks()
    native().g4_set_threads(2)
    assert one.right()
    (helper,) = own_tasks() - before
    deadline = time.monotonic() + FORK_SECONDS
    while os.getpriority(os.PRIO_PROCESS, helper) == os.getpriority(os.PRIO_PROCESS, 0):
        assert time.monotonic() < deadline, "it never started"
    time.sleep(0.05)  # what it does first of all, after this
    try:
        os.sched_setaffinity(0, {core})
        os.sched_setaffinity(helper, {core})
        while os.sched_getaffinity(helper) == {core}:
            assert one.right()
            assert time.monotonic() < deadline, "it stayed"
    finally:
        os.sched_setaffinity(0, allowed)
    assert os.sched_getaffinity(helper) == allowed - {core}
    assert one.right()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_several_python_threads_multiply_at_once(threads: int) -> None:
    native().g4_set_threads(threads)
    own, other, third = work(300, 128, 1), work(33, 512, 9, "bf16", 1), work(1000, 64, 3, "int16", 2)

    def right(one: Work) -> Callable[[], None]:
        def step() -> None:
            assert one.right()

        return step

    with meanwhile(right(other)), meanwhile(right(third)):
        for _ in range(200):
            assert own.right()


def test_the_number_of_threads_changes_while_another_thread_multiplies() -> None:
    one, counts = work(700, 128, 2), iter(range(10**9))
    with meanwhile(lambda: native().g4_set_threads(1 + next(counts) % 4)):
        for _ in range(300):
            assert one.right()


def test_weights_come_and_go_while_another_thread_multiplies() -> None:
    """Memory is given back at once: a thread that still read it would end the process."""
    one = work(700, 128, 1)

    def step() -> None:
        assert one.right()

    with meanwhile(step):
        for i in range(150):
            short = work(16 * (1 + i % 9), 256, 1 + i % 3, seed=i)
            assert short.right()
            del short
    gc.collect()
    assert one.right()


def in_child(check: Callable[[], bool]) -> bool:
    """Whether `check` holds in a forked child, which gets `FORK_SECONDS` for it."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            code = 0 if check() else 1
        finally:
            os._exit(code)
    for _ in range(int(FORK_SECONDS * 100)):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid == child:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def test_a_forked_child_works_alone_and_can_have_threads_of_its_own() -> None:
    one = work(700, 128, 1)
    assert one.right()  # the threads run now

    def check() -> bool:
        if native().g4_threads() != 1 or not one.right():
            return False
        native().g4_set_threads(3)
        return all(one.right() for _ in range(20))

    for _ in range(5):
        assert in_child(check)
        assert one.right()


def test_a_fork_in_the_middle_of_another_threads_product() -> None:
    """Whatever the other thread held then, nobody in the child will ever give it back."""
    busy, one = work(20000, 512, 8), work(700, 128, 1, seed=1)

    def step() -> None:
        product(busy.x, busy.weight)

    def check() -> bool:
        if not one.right():
            return False
        native().g4_set_threads(2)
        return all(one.right() for _ in range(5))

    with meanwhile(step):
        for i in range(20):
            time.sleep(i * 1e-4)  # nearly all of the other thread's time is in the library
            assert in_child(check), i
    assert busy.right()


def test_results_stay_right_while_a_core_is_taken_away() -> None:
    """Another process keeps one core busy: threads are put to sleep in the middle of their pieces."""
    one, prefill = work(16384, 512, 1), work(4096, 512, 20, seed=1)
    cores = sorted(os.sched_getaffinity(0))
    native().g4_set_threads(max(2, len(cores)))
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(busy.pid, {cores[-1]})
        for _ in range(300):
            assert one.right()
        for _ in range(30):
            assert prefill.right()
    finally:
        busy.kill()
        busy.wait()
