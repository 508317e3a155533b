"""The stream of tensors of one run: read rows, round, pack, write, in the order of the model, on all cores.

Methods that need no calibration work block by block: a few megabytes of a tensor at a time on every core. Calibrated
ones work layer by layer. Either way the journal says what is on disk.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm4run.checkpoint.layouts import linear_shapes, parameter_shapes
from glm4run.checkpoint.reader import TORCH_DTYPES, CheckpointReader
from glm4run.config import ModelConfig
from glm4run.errors import CheckpointError
from glm4run.kernels.cpu.rounding import round_and_pack, search_and_pack, takes_rounding
from glm4run.machine import default_threads
from glm4run.qformat import PACKED, SCALE, SHAPE, num_groups, pack, packed_tensor_shapes, scale_groups
from glm4run.quant_config import QuantScheme
from glm4run_quantize.importance import InputMoments, head_moments
from glm4run_quantize.journal import Journal
from glm4run_quantize.layerwise import LayerResult, Layerwise
from glm4run_quantize.methods.hqq import quantize_hqq
from glm4run_quantize.methods.mse import STEPS, quantize_mse
from glm4run_quantize.methods.rtn import quantize_rtn
from glm4run_quantize.recipes import HEAD
from glm4run_quantize.report import LayerReport, TensorReport
from glm4run_quantize.writer import FolderWriter, TensorSpec

Progress = Callable[[int, int], None]  # source bytes done, source bytes in all
# weight, scheme, dtype of scales, second moments of the inputs
Rounding = Callable[[Tensor, QuantScheme, torch.dtype, Tensor | None], tuple[Tensor, Tensor]]

UNCALIBRATED: dict[str, Rounding] = {"rtn": quantize_rtn, "mse": quantize_mse, "hqq": quantize_hqq}
NATIVE = (quantize_rtn, quantize_mse)  # what the native library does as well
BLOCK_BYTES = 1 << 20  # of source weights at once on a core; temporaries take some fifteen times as much
COMMIT_BYTES = 64 << 20  # written bytes, or seconds, after which the journal is brought up to date
COMMIT_SECONDS = 10.0
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class _Block:
    """Rows of a tensor, ready to write."""

    data: Tensor
    scale: Tensor | None
    signal: float
    noise: float
    source_bytes: int


class Job:
    """What is written, in which order."""

    def __init__(
        self,
        reader: CheckpointReader,
        config: ModelConfig,
        schemes: dict[str, QuantScheme],
        rounding: Rounding,
        progress: Progress | None,
    ) -> None:
        self.reader, self.config, self.schemes, self.progress = reader, config, schemes, progress
        self.rounding = rounding
        self.shapes = linear_shapes(config)
        self.names = _in_model_order(config)
        self.specs = [spec for name in self.names for spec in self._specs_of(name)]
        self.total_bytes = sum(spec.nbytes for spec in self.specs)
        self.source_bytes = sum(s.nbytes for s in reader.sources.values())
        self.done_bytes = 0
        self._lock = threading.Lock()
        self._moments: InputMoments | None = None
        self._head_moments: Tensor | None = None  # once for all blocks of the head
        self._layerwise: Layerwise | None = None
        self._scales, self._sums = torch.empty(0), list[tuple[float, float]]()  # of the tensor that is being written

    @property
    def model_dtype(self) -> str:
        """The dtype of the source's own weights, in which scales and dense tensors are stored."""
        return self.reader.sources[EMBEDDING].entry.dtype

    def write(
        self, folder: Path, metadata: dict[str, str], journal: Journal, layerwise: Layerwise | None = None
    ) -> tuple[list[TensorReport], list[LayerReport]]:
        """Writes what the journal does not list; returns what packing cost each linear, and each calibrated layer."""
        reports, layers = self._known(journal)
        self._layerwise = layerwise
        done = journal.entries[-1]["specs"] if journal.entries else 0
        with FolderWriter(folder, self.specs, metadata, done) as writer:
            log = _Log(writer, journal, done)
            names = self._names_behind(done)
            if layerwise is None:
                self._stream(names, log, reports)
                return reports, layers
            outside = [name for name in names if _layer_of(name) is None]
            self._stream([name for name in outside if name == EMBEDDING], log, reports)
            self._layers(layerwise, names, log, reports, layers)
            self._stream([name for name in outside if name != EMBEDDING], log, reports)
        return reports, layers

    def _known(self, journal: Journal) -> tuple[list[TensorReport], list[LayerReport]]:
        reports = [TensorReport.from_json(data) for entry in journal.entries for data in entry["reports"]]
        layers = [LayerReport(**data) for entry in journal.entries for data in entry["layers"]]
        return reports, layers

    def _names_behind(self, done: int) -> list[str]:
        """The source's tensors that are not among the first `done` tensors of the output."""
        names = []
        for name in self.names:
            if done <= 0:
                names.append(name)
            else:
                self.done_bytes += self.reader.sources[name].nbytes
            done -= len(self._specs_of(name))
        return names

    def _specs_of(self, name: str) -> list[TensorSpec]:
        source = self.reader.sources[name]
        module = self._packed_module(name)
        if module is None:
            return [TensorSpec(name, source.entry.dtype, source.shape)]
        parts = packed_tensor_shapes(*self.shapes[module], self.schemes[module])
        return [
            TensorSpec(f"{module}.{suffix}", source.entry.dtype if suffix == SCALE else dtypes[0], shape)
            for suffix, (shape, dtypes) in parts.items()
        ]

    def _packed_module(self, name: str) -> str | None:
        module = name.removesuffix(".weight")
        return module if name.endswith(".weight") and module in self.schemes else None

    # --- block by block

    def _stream(self, names: list[str], log: _Log, reports: list[TensorReport]) -> None:
        """Writes `names` by the uncalibrated method, with every core at a block of its own."""
        cores = default_threads()
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            blocks = self._blocks(names)
            ahead: deque[tuple[str, int, int, Future[_Block]]] = deque()
            try:
                while True:
                    while len(ahead) < 2 * cores and (piece := next(blocks, None)) is not None:
                        ahead.append((*piece, pool.submit(self._work, *piece)))
                    if not ahead:
                        break
                    name, first, last, future = ahead.popleft()
                    self._write_block(name, first, last, future.result(), log, reports)
            finally:
                for *_, future in ahead:
                    future.cancel()

    def _blocks(self, names: list[str]) -> Iterator[tuple[str, int, int]]:
        for name in names:
            shape = self.reader.sources[name].shape
            row_bytes = self.reader.sources[name].nbytes // shape[0]
            rows = max(1, BLOCK_BYTES // max(1, row_bytes))
            for first in range(0, shape[0], rows):
                yield name, first, min(first + rows, shape[0])

    def _work(self, name: str, first: int, last: int) -> _Block:
        stored = self.reader.read_rows(name, first, last)
        nbytes = stored.numel() * stored.element_size()
        module = self._packed_module(name)
        if module is not None and self.rounding in NATIVE and takes_rounding(stored, self.schemes[module]):
            scheme = self.schemes[module]
            if self.rounding is quantize_rtn:
                done = round_and_pack(stored, scheme)
            else:
                done = search_and_pack(stored, scheme, self._importance(module), STEPS[scheme.bits])
            if done is None:
                raise self._damaged(name)
            return _Block(*done, nbytes)
        if not _is_finite(stored):
            raise self._damaged(name)
        if module is None:
            return _Block(stored, None, 0.0, 0.0, nbytes)
        scheme = self.schemes[module]
        weight = stored.float()
        importance = None if self.rounding is quantize_rtn else self._importance(module)
        q, scale = self.rounding(weight, scheme, stored.dtype, importance)
        signal = float(weight.square().sum(dtype=torch.float64))
        noise = float((weight.sub_(scale_groups(q, scale))).square_().sum(dtype=torch.float64))
        return _Block(pack(q, scheme.bits), scale, signal, noise, nbytes)

    def _write_block(
        self, name: str, first: int, last: int, block: _Block, log: _Log, reports: list[TensorReport]
    ) -> None:
        module = self._packed_module(name)
        whole = last == self.reader.sources[name].shape[0]
        if module is None:
            log.writer.add(name, block.data)
            if whole:
                log.note(1, self.reader.sources[name].nbytes)
        else:
            log.writer.add(f"{module}.{PACKED}", block.data)
            assert block.scale is not None
            if first == 0:
                # Allocated once: small results kept between large temporaries would scatter the heap.
                self._scales = torch.empty(self.shapes[module][0], block.scale.shape[1], dtype=block.scale.dtype)
                self._sums = []
            self._scales[first:last] = block.scale
            self._sums.append((block.signal, block.noise))
            if whole:
                signal, noise = (math.fsum(values) for values in zip(*self._sums, strict=True))
                report = TensorReport(module, self.schemes[module], *self.shapes[module], signal, noise)
                self._write_rest(log.writer, module, self._scales)
                reports.append(report)
                log.note(3, sum(spec.nbytes for spec in self._specs_of(name)), report)
        self._count(block.source_bytes)

    def _write_rest(self, writer: FolderWriter, module: str, scales: Tensor) -> None:
        scheme, (out_features, in_features) = self.schemes[module], self.shapes[module]
        assert scales.shape == (out_features, num_groups(in_features, scheme))
        writer.add(f"{module}.{SCALE}", scales)
        writer.add(f"{module}.{SHAPE}", torch.tensor([out_features, in_features], dtype=torch.int64))

    # --- layer by layer

    def _layers(
        self,
        layerwise: Layerwise,
        names: list[str],
        log: _Log,
        reports: list[TensorReport],
        layers: list[LayerReport],
    ) -> None:
        done = len(layers)
        if done:
            layerwise.restore(log.journal.load_state(done))
        else:
            layerwise.embed()
        for index in range(done, self.config.num_hidden_layers):
            members = [name for name in names if _layer_of(name) == index]
            result = layerwise.run_layer(index, lambda name: self.read(name, 0, self.reader.sources[name].shape[0]))
            fresh = self._write_layer(members, result, log)
            reports += fresh
            layers.append(LayerReport(index, result.error, result.error_rtn))
            log.writer.commit()
            log.journal.save_state(index + 1, layerwise.state())
            log.commit_layer(sum(len(self._specs_of(name)) for name in members), fresh, layers[-1])
            log.journal.drop_state(index)
            for name in members:
                self._count(self.reader.sources[name].nbytes)

    def _write_layer(self, members: list[str], result: LayerResult, log: _Log) -> list[TensorReport]:
        reports = []
        for name in members:
            module = self._packed_module(name)
            dtype = TORCH_DTYPES[self.reader.sources[name].entry.dtype]
            if module is None:
                changed = result.dense.get(name)
                stored = self.read(name, 0, self.reader.sources[name].shape[0])
                log.writer.add(name, stored if changed is None else changed.to(dtype).cpu())
                continue
            rounded = result.linears[module]
            scheme = self.schemes[module]
            log.writer.add(f"{module}.{PACKED}", pack(rounded.q.cpu(), scheme.bits))
            self._write_rest(log.writer, module, rounded.scale.cpu())
            shape = self.shapes[module]
            held_out = (rounded.error, rounded.error_rtn)
            reports.append(TensorReport(module, scheme, *shape, rounded.signal, rounded.noise, rounded.kept, *held_out))
        return reports

    def read(self, name: str, first: int, last: int) -> Tensor:
        """Rows of a source tensor. Raises CheckpointError where they hold NaN or infinity."""
        tensor = self.reader.read_rows(name, first, last)
        if not _is_finite(tensor):
            raise self._damaged(name)
        return tensor

    def _importance(self, module: str) -> Tensor:
        """Second moments of the inputs of the linear at hand."""
        with self._lock:
            if self._layerwise is not None:
                assert module == HEAD  # the layers are not streamed
                if self._head_moments is None:
                    self._head_moments = head_moments(self._layerwise.layers, self._layerwise.source)
                return self._head_moments
            if self._moments is None:
                self._moments = InputMoments(self.reader, self.config)
            return self._moments.of(module)

    def _damaged(self, name: str) -> CheckpointError:
        file = self.reader.sources[name].entry.file.name
        return CheckpointError(f"{file}: {name} holds NaN or infinity", hint="the file is damaged: get it again")

    def _count(self, nbytes: int) -> None:
        self.done_bytes += nbytes
        if self.progress is not None:
            self.progress(self.done_bytes, self.source_bytes)


class _Log:
    """Brings the journal up to date now and then: `note` what was added, in whole tensors."""

    def __init__(self, writer: FolderWriter, journal: Journal, specs: int) -> None:
        self.writer, self.journal = writer, journal
        self.specs = specs
        self._nbytes, self._since = 0, time.monotonic()
        self._fresh: list[TensorReport] = []

    def note(self, specs: int, nbytes: int, report: TensorReport | None = None) -> None:
        """So many tensors of the output were added whole."""
        self.specs += specs
        self._nbytes += nbytes
        if report is not None:
            self._fresh.append(report)
        if self._nbytes >= COMMIT_BYTES or time.monotonic() - self._since >= COMMIT_SECONDS:
            self.writer.commit()
            self._append([])

    def commit_layer(self, specs: int, reports: list[TensorReport], layer: LayerReport) -> None:
        """A layer was added, and is on disk."""
        self.specs += specs
        self._fresh += reports
        self._append([layer])

    def _append(self, layers: list[LayerReport]) -> None:
        entry: dict[str, Any] = {
            "specs": self.specs,
            "reports": [report.to_json() for report in self._fresh],
            "layers": [layer.as_json() for layer in layers],
        }
        self.journal.append(entry)
        self._nbytes, self._since, self._fresh = 0, time.monotonic(), []


def _is_finite(tensor: Tensor) -> bool:
    """Twenty times as fast as isfinite: the extremes carry every NaN and infinity."""
    low, high = torch.aminmax(tensor)
    return math.isfinite(low) and math.isfinite(high)


def _layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else None


def _in_model_order(config: ModelConfig) -> list[str]:
    """The parameters as a forward pass meets them, so that those of a layer lie side by side."""

    def key(name: str) -> tuple[int, int]:
        layer = _layer_of(name)
        if layer is not None:
            return (1, layer)
        return ((EMBEDDING, "", "model.norm.weight", "lm_head.weight").index(name), 0)

    return sorted(parameter_shapes(config), key=key)
