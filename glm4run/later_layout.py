"""A model that answers from its files at once, and moves into its kernels' own order while it is used.

Laying weights out takes as long as the system needs to supply fresh memory of their size, several seconds for 9B. So a
large model starts with its packed values mapped from their files, and a thread lays out one weight after the other.
Products are the same to the bit before and after, so that it does not matter when a weight moves. In the end nothing of
the files is left in the process.
"""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from glm4run.checkpoint.reader import FileMapping, empty
from glm4run.kernels.cpu.backend import NativeWeight
from glm4run.kernels.cpu.library import native
from glm4run.layers import Embedding

# Up to here a model loads in about a second, and moving would gain nothing.
SMALLEST_BYTES = 1 << 30
FIRST_REST_SECONDS = 1.0  # the first prompt most often comes right behind loading, and its answer is waited for
IDLE_SECONDS = 0.1  # without a product: nobody waits for one
SHARE_BESIDE = 1 / 8  # of the time, while products run
COPY_BYTES = 4 << 20


@dataclass(frozen=True)
class MappedEmbedding:
    """A table that is still in its file, and the file."""

    module: Embedding
    mapping: FileMapping


class LaterLayout:
    """Moves weights in a thread of its own. The thread ends with its work, with the model, and with the process.

    weights: in the order in which they move; the embedding, which only a few rows are read of, goes last. So the
    process never holds more than it does in the end, as long as the embedding is no smaller than the largest weight.
    """

    def __init__(self, model: nn.Module, weights: Sequence[NativeWeight], embedding: MappedEmbedding | None) -> None:
        self._weights = deque(weights)
        self._embedding = embedding
        self._hurries = self._stops = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="glm4run-layout", daemon=True)
        weakref.finalize(model, self.stop)  # also where the interpreter ends

    def start(self) -> None:
        """Begins. Once only."""
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether everything has moved."""
        return not self._weights and self._embedding is None

    def wait(self) -> bool:
        """Has everything moved as fast as possible; False where there is no room: the rest is used from its file."""
        self._hurries = True
        if self._thread.is_alive():
            self._thread.join()
        if isinstance(self._failure, MemoryError):
            return False
        if self._failure is not None:
            raise self._failure
        if not self._stops:  # nothing is left, but in a process that was forked off and has no such thread
            self._move_all()
        return self.is_done

    def stop(self) -> None:
        """Ends the thread, within milliseconds. What has not moved is used from its file."""
        self._stops = True
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._rest(time.perf_counter() + FIRST_REST_SECONDS, whatever=True)
            self._move_all()
        except BaseException as error:
            self._failure = error
            if not isinstance(error, MemoryError):  # without room for it the model works as before
                raise

    def _move_all(self) -> None:
        for worked in self._slices():
            if self._stops:
                return
            # What runs beside it has most of the processor.
            self._rest(time.perf_counter() + worked * (1 / SHARE_BESIDE - 1))

    def _slices(self) -> Iterator[float]:
        """Does the work; yields the seconds that each slice took."""
        started = time.perf_counter()
        while self._weights:
            for _ in self._weights[0].move():
                yield time.perf_counter() - started
                started = time.perf_counter()
            self._weights.popleft()
        if self._embedding is not None:
            for _ in _copy(self._embedding):
                yield time.perf_counter() - started
                started = time.perf_counter()
            self._embedding = None

    def _rest(self, until: float, *, whatever: bool = False) -> None:
        """Waits until then, or until nobody computes."""
        while not (self._stops or self._hurries) and (left := until - time.perf_counter()) > 0:
            if not whatever and native().g4_idle_seconds() > IDLE_SECONDS:
                return
            time.sleep(min(left, IDLE_SECONDS / 4))


def _copy(embedding: MappedEmbedding) -> Iterator[None]:
    """Copies the table into memory, and makes the module take it."""
    old = embedding.module.weight
    new = empty(tuple(old.shape), old.dtype)
    for first in range(0, old.nbytes, COPY_BYTES):
        count = min(COPY_BYTES, old.nbytes - first)
        ctypes.memmove(new.data_ptr() + first, old.data_ptr() + first, count)  # without the interpreter's lock
        embedding.mapping.drop(old.data_ptr() + first, count)
        yield
    embedding.module.weight = nn.Parameter(new, requires_grad=False)  # a forward that runs holds the old one
