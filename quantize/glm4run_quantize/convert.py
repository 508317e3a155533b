"""A checkpoint in any layout to a packed folder: read rows, quantize, pack, write, row block by row block.

Peak memory is a few tens of megabytes above the libraries, whatever the size of the model or of its largest tensor.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from glm4run import __version__
from glm4run.checkpoint.layouts import linear_shapes, parameter_shapes
from glm4run.checkpoint.reader import TORCH_DTYPES, CheckpointReader
from glm4run.config import ModelConfig, parse_config, read_json
from glm4run.errors import CheckpointError, DoesNotFitError, UsageError
from glm4run.qformat import PACKED, SCALE, SHAPE, num_groups, pack, packed_tensor_shapes, scale_groups
from glm4run.quant_config import QuantScheme
from glm4run_quantize.folder_files import hf_config, write_text_files
from glm4run_quantize.methods.rtn import quantize_rtn
from glm4run_quantize.recipes import Recipe, choose_recipe
from glm4run_quantize.report import QuantizeReport, TensorReport
from glm4run_quantize.writer import FolderWriter, TensorSpec, replacing_folder, write_json

FORMAT_VERSION = 1
METHODS = ("rtn",)
BLOCK_BYTES = 4 << 20  # of source weights at once; temporaries take some fifteen times as much
DISK_MARGIN_BYTES = 64 << 20

Progress = Callable[[int, int], None]  # source bytes done, source bytes in all


def quantize_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    bits: int = 4,
    group_size: int | None = None,
    method: str = "rtn",
    head_bits: int = 8,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Packs the checkpoint folder `source` into the folder `output`.

    Args:
        bits: 4 or 8. group_size: 32, 64 or 128 for every linear; None takes the default recipe of `bits`.
        method: "rtn". head_bits: 8, or 16 to keep lm_head dense. overwrite: replace `output` if it exists.
        progress: called with source bytes done and in all.

    Raises:
        CheckpointError: the source is damaged, contradictory or packed already. DoesNotFitError: the disk is full.
        UsageError: an option does not fit the model or the format. `output` is then as it was before.
    """
    source, output = Path(source), Path(output)
    started = time.monotonic()
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}", hint=f"one of: {', '.join(METHODS)}")
    raw = read_json(source / "config.json")
    config = parse_config(raw, where=str(source / "config.json"))
    if config.quantization is not None:
        raise CheckpointError(f"{source} is packed already", hint="quantize the unpacked model")
    _require_replaceable(output, source)
    recipe, notices = choose_recipe(config, bits, group_size=group_size, head_bits=head_bits)
    with CheckpointReader(source, config) as reader, replacing_folder(output, overwrite=overwrite) as working:
        job = _Job(reader, config, recipe, progress)
        job.require_disk(output.parent)
        try:
            with ThreadPoolExecutor(1) as hasher:
                hashes = hasher.submit(hash_files, sorted({s.entry.file for s in reader.sources.values()}))
                tensors = job.write(working, {"glm4run": __version__, "recipe": recipe.name, "method": method})
                texts = write_text_files(source, working, hf_config(raw, config, recipe, job.model_dtype), config)
                report = QuantizeReport(
                    output=output,
                    recipe=recipe.name,
                    method=method,
                    tensors=tensors,
                    total_bytes=job.total_bytes,
                    seconds=time.monotonic() - started,
                    notices=(*config.notices, *notices),
                )
                provenance = _provenance(source, hashes.result(), report) | texts
            write_json(working / "glm4run.json", provenance)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise DoesNotFitError(
                f"the disk of {output.parent} is full; nothing was written",
                hint="free some space, or choose another -o",
            ) from error
    return report


def _require_replaceable(output: Path, source: Path) -> None:
    """Raises UsageError where replacing `output` would take more with it than an older model."""
    if output.resolve() == source.resolve():
        raise UsageError("the output is the source folder", hint="choose another -o")
    if output.resolve() in source.resolve().parents:
        raise UsageError(f"{output} holds the source folder", hint="choose another -o")
    if output.is_dir() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise UsageError(f"{output} exists and is no model folder", hint="choose another -o")


class _Job:
    """The stream of tensors of one run."""

    def __init__(
        self, reader: CheckpointReader, config: ModelConfig, recipe: Recipe, progress: Progress | None
    ) -> None:
        self.reader, self.config, self.progress = reader, config, progress
        self.schemes = recipe.schemes(config)
        self.shapes = linear_shapes(config)
        self.specs = self._plan()
        self.total_bytes = sum(spec.nbytes for spec in self.specs)
        self.source_bytes = sum(s.nbytes for s in reader.sources.values())
        self.done = 0

    @property
    def model_dtype(self) -> str:
        """The dtype of the source's own weights, in which scales and dense tensors are stored."""
        return self.reader.sources["model.embed_tokens.weight"].entry.dtype

    def _plan(self) -> list[TensorSpec]:
        specs = []
        for name in parameter_shapes(self.config):
            source = self.reader.sources[name]
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and module in self.schemes:
                parts = packed_tensor_shapes(*self.shapes[module], self.schemes[module])
                for suffix, (shape, dtypes) in parts.items():
                    dtype = source.entry.dtype if suffix == SCALE else dtypes[0]
                    specs.append(TensorSpec(f"{module}.{suffix}", dtype, shape))
            else:
                specs.append(TensorSpec(name, source.entry.dtype, source.shape))
        return specs

    def require_disk(self, folder: Path) -> None:
        """Raises DoesNotFitError before anything is computed if the output cannot fit."""
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        needed = self.total_bytes + DISK_MARGIN_BYTES
        if free < needed:
            raise DoesNotFitError(
                f"the packed model needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on the disk of {folder}",
                hint="free some space, or choose another -o",
            )

    def write(self, folder: Path, metadata: dict[str, str]) -> list[TensorReport]:
        """Writes every tensor; returns what packing cost each linear."""
        reports = []
        with FolderWriter(folder, self.specs, metadata) as writer:
            for name in parameter_shapes(self.config):
                module = name.removesuffix(".weight")
                if name.endswith(".weight") and module in self.schemes:
                    reports.append(self._write_packed(writer, module, self.schemes[module]))
                else:
                    self._copy(writer, name)
        return reports

    def _blocks(self, name: str) -> list[tuple[int, int]]:
        shape = self.reader.sources[name].shape
        row_bytes = self.reader.sources[name].nbytes // shape[0]
        rows = max(1, BLOCK_BYTES // max(1, row_bytes))
        return [(first, min(first + rows, shape[0])) for first in range(0, shape[0], rows)]

    def _copy(self, writer: FolderWriter, name: str) -> None:
        for first, last in self._blocks(name):
            writer.add(name, self._read(name, first, last))

    def _write_packed(self, writer: FolderWriter, module: str, scheme: QuantScheme) -> TensorReport:
        name = f"{module}.weight"
        out_features, in_features = self.shapes[module]
        scale_dtype = TORCH_DTYPES[self.reader.sources[name].entry.dtype]
        # Allocated once: small results kept between large temporaries would scatter the heap.
        scales = torch.empty(out_features, num_groups(in_features, scheme), dtype=scale_dtype)
        signal, noise = 0.0, 0.0
        for first, last in self._blocks(name):
            weight = self._read(name, first, last).float()
            q, scale = quantize_rtn(weight, scheme, scale_dtype)
            writer.add(f"{module}.{PACKED}", pack(q, scheme.bits))
            scales[first:last] = scale
            restored = scale_groups(q, scale)
            signal += float(weight.square().sum(dtype=torch.float64))
            noise += float((weight - restored).square_().sum(dtype=torch.float64))
        writer.add(f"{module}.{SCALE}", scales)
        writer.add(f"{module}.{SHAPE}", torch.tensor([out_features, in_features], dtype=torch.int64))
        return TensorReport(module, scheme, out_features, in_features, signal, noise)

    def _read(self, name: str, first: int, last: int) -> torch.Tensor:
        tensor = self.reader.read_rows(name, first, last)
        if not bool(torch.isfinite(tensor).all()):
            file = self.reader.sources[name].entry.file.name
            raise CheckpointError(f"{file}: {name} holds NaN or infinity", hint="the file is damaged: get it again")
        self.done += tensor.numel() * tensor.element_size()
        if self.progress is not None:
            self.progress(self.done, self.source_bytes)
        return tensor


def hash_files(files: list[Path]) -> dict[str, str]:
    """File name to SHA-256 (hex)."""
    hashes = {}
    for path in files:
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _provenance(source: Path, hashes: dict[str, str], report: QuantizeReport) -> dict[str, Any]:
    """What `glm4run.json` holds: where the weights come from and what packing did to them."""
    upstream = read_json(source / "config.json").get("_name_or_path")
    return {
        "format_version": FORMAT_VERSION,
        "source": {"path_or_id": upstream or source.resolve().name, "files": hashes},
        **report.as_json(),
    }
