"""A checkpoint in any layout to a packed folder: which recipe, which method, whether it fits; then the job itself.

By `rtn` peak memory is a few tens of megabytes above the libraries, whatever the size of the model or of its largest
tensor; other methods hold layers in float32. A run that is killed goes on where it was when it is started again, to the
same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from glm4run import __version__
from glm4run.checkpoint.reader import TORCH_DTYPES, CheckpointReader
from glm4run.config import ModelConfig, parse_config, read_json
from glm4run.errors import CheckpointError, DoesNotFitError, UsageError
from glm4run.kernels.cpu.library import why_missing
from glm4run.tokenizer import load_tokenizer
from glm4run_quantize.calibration import DEFAULT_TOKENS, Calibration, read_calibration
from glm4run_quantize.folder_files import hf_config, write_text_files
from glm4run_quantize.job import UNCALIBRATED, Job, Progress
from glm4run_quantize.journal import Journal, remove_traces
from glm4run_quantize.layerwise import CALIBRATED, Layerwise
from glm4run_quantize.measured import Measure, measure
from glm4run_quantize.recipes import Recipe, choose_recipe, load_recipe
from glm4run_quantize.report import HeldOut, QuantizeReport
from glm4run_quantize.sensitivity import fit_recipe
from glm4run_quantize.writer import replacing_folder, resumable_bytes, write_json

FORMAT_VERSION = 1
METHODS = (*UNCALIBRATED, *CALIBRATED)
DEFAULT_METHOD = "mse"  # needs no text, takes minutes, and loses half of what rounding to nearest does
DISK_MARGIN_BYTES = 64 << 20


@dataclass(frozen=True)
class Options:
    """How to pack.

    bits: 4 or 8. group_size: 32, 64 or 128 for every linear; None takes the default recipe of `bits`. method: one of
    `METHODS`. head_bits: 8, 4, or 16 to keep lm_head dense.
    recipe: the name of a built-in recipe or a TOML file, instead of bits, group size and head. target_bpw, target_gib:
    bits per weight of the layers' linears, or the size of the whole file, that bits and group sizes are chosen for,
    tensor by tensor. calibration: a UTF-8 text instead of the built-in one, of which `calibration_tokens` are used.
    device: where calibrated methods compute.
    """

    bits: int = 4
    group_size: int | None = None
    method: str = DEFAULT_METHOD
    head_bits: int = 8
    recipe: str | None = None
    target_bpw: float | None = None
    target_gib: float | None = None
    calibration: str | Path | None = None
    calibration_tokens: int = DEFAULT_TOKENS
    device: str = "cpu"

    def check(self) -> None:
        """Raises UsageError where options exclude each other or are out of range."""
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}", hint=f"one of: {', '.join(METHODS)}")
        given = {"--recipe": self.recipe, "--target-bpw": self.target_bpw, "--target-gib": self.target_gib}
        given |= {"--group-size": self.group_size}
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise UsageError(f"{' and '.join(named)} exclude each other", hint="give one of them")
        if self.calibration_tokens < 1024:
            raise UsageError(f"{self.calibration_tokens} calibration tokens", hint="1024 at least")
        if self.calibration is not None and not self.needs_calibration:
            raise UsageError(
                f"--calibration has no use for method {self.method!r}",
                hint=f"choose --method {' or '.join(CALIBRATED)}, or a --target",
            )

    @property
    def has_target(self) -> bool:
        return self.target_bpw is not None or self.target_gib is not None

    @property
    def needs_calibration(self) -> bool:
        return self.method in CALIBRATED or self.has_target


class _WorseThanRounding(Exception):  # noqa: N818 (no error: a verdict)
    """A calibrated method lost against rounding to nearest on the held-out windows."""

    def __init__(self, held_out: HeldOut) -> None:
        super().__init__()
        self.held_out = held_out


def quantize_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    report: Measure | None = None,
    **options: Any,
) -> QuantizeReport:
    """Packs the checkpoint folder `source` into the folder `output`.

    Args:
        overwrite: replace `output` if it exists. progress: called with source bytes done and in all.
        report: measure the packed model against the source and keep the figures. options: those of `Options`.

    Raises:
        CheckpointError: the source is damaged, contradictory or packed already. DoesNotFitError: the disk is full.
        UsageError: an option does not fit the model or the format. `output` is then as it was before.
    """
    source, output, chosen = Path(source), Path(output), Options(**options)
    chosen.check()
    started = time.monotonic()
    raw = read_json(source / "config.json")
    config = parse_config(raw, where=str(source / "config.json"))
    if config.quantization is not None:
        raise CheckpointError(f"{source} is packed already", hint="quantize the unpacked model")
    _require_replaceable(output, source)
    calibration = None
    if chosen.needs_calibration:
        calibration = read_calibration(load_tokenizer(source), chosen.calibration, chosen.calibration_tokens)
    with CheckpointReader(source, config) as reader:
        recipe, notices = _choose_recipe(reader, config, chosen, calibration)
        run = _Run(source, reader, config, raw, chosen, recipe, calibration, progress)
        run.require_disk(output)
        with replacing_folder(output, overwrite=overwrite, fingerprint=run.fingerprint) as working:
            try:
                result = run.pack(working, report)
                result = replace(
                    result,
                    output=output,
                    seconds=time.monotonic() - started,
                    notices=(*config.notices, *notices, *result.notices),
                )
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise DoesNotFitError(
                    f"the disk of {output.parent} is full; nothing was written",
                    hint="free some space, or choose another -o",
                ) from error
    return result


def _choose_recipe(
    reader: CheckpointReader, config: ModelConfig, options: Options, calibration: Calibration | None
) -> tuple[Recipe, list[str]]:
    if options.recipe is not None:
        return load_recipe(options.recipe, config), []
    if options.has_target:
        assert calibration is not None
        gib = options.target_gib
        return fit_recipe(reader, config, calibration, bpw=options.target_bpw, gib=gib, head_bits=options.head_bits)
    return choose_recipe(config, options.bits, group_size=options.group_size, head_bits=options.head_bits)


def _require_replaceable(output: Path, source: Path) -> None:
    """Raises UsageError where replacing `output` would take more with it than an older model."""
    if output.resolve() == source.resolve():
        raise UsageError("the output is the source folder", hint="choose another -o")
    if output.resolve() in source.resolve().parents:
        raise UsageError(f"{output} holds the source folder", hint="choose another -o")
    if output.is_dir() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise UsageError(f"{output} exists and is no model folder", hint="choose another -o")


class _Run:
    """One folder to be written."""

    def __init__(
        self,
        source: Path,
        reader: CheckpointReader,
        config: ModelConfig,
        raw: Mapping[str, Any],
        options: Options,
        recipe: Recipe,
        calibration: Calibration | None,
        progress: Progress | None,
    ) -> None:
        self.source, self.reader, self.config, self.raw = source, reader, config, raw
        self.options, self.recipe, self.calibration = options, recipe, calibration
        self.files = sorted({s.entry.file for s in reader.sources.values()})
        schemes = recipe.schemes(config)
        # What a calibrated method leaves to others (the head) gets the best that needs no calibration.
        rounding = UNCALIBRATED[options.method if options.method in UNCALIBRATED else "mse"]
        self.job = Job(reader, config, schemes, rounding, progress)
        self.plain = Job(reader, config, schemes, UNCALIBRATED["rtn"], progress)

    @property
    def fingerprint(self) -> str:
        """What has to be the same for an interrupted run to be gone on with."""
        facts = {
            "version": __version__,
            "config": self.raw,
            "files": [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in self.files],
            "groups": self.recipe.config_groups(),
            "ignore": self.recipe.ignore,
            "method": self.options.method,
            "device": self.options.device,
            "native": why_missing() is None,  # its search of scales may differ from torch's where two are alike
            "threads": torch.get_num_threads() if self.options.method in CALIBRATED else 0,  # sums depend on it
            "calibration": None if self.calibration is None else self.calibration.as_json(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def require_disk(self, output: Path) -> None:
        """Raises DoesNotFitError before anything is computed if what is left to write cannot fit."""
        folder = output.parent
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        needed = max(0, self.job.total_bytes - resumable_bytes(output, self.fingerprint)) + DISK_MARGIN_BYTES
        if self.options.method in CALIBRATED and self.calibration is not None:
            # Two states of the streams, of three streams at most, while one replaces the other.
            needed += 2 * 3 * 4 * self.calibration.ids.numel() * self.config.hidden_size
        if free < needed:
            raise DoesNotFitError(
                f"the packed model needs {needed / 1e9:.2f} GB more, the disk of {folder} has {free / 1e9:.2f} GB",
                hint="free some space, or choose another -o",
            )

    def pack(self, working: Path, wanted: Measure | None) -> QuantizeReport:
        """Fills the folder `working`."""
        with ThreadPoolExecutor(1) as hasher:
            hashes = hasher.submit(hash_files, self.files)
            result = self._write_tensors(working)
            config_json = hf_config(self.raw, self.config, self.recipe, self.job.model_dtype)
            texts = write_text_files(self.source, working, config_json, self.config)
            if wanted is not None:
                result = replace(result, measured=measure(working, self.source, wanted))
            provenance = _provenance(self.source, hashes.result(), result) | texts
        write_json(working / "glm4run.json", provenance)
        return result

    def _write_tensors(self, working: Path) -> QuantizeReport:
        journal = Journal(working, self.fingerprint)
        method, notices = self.options.method, []
        held_out = None
        if method in CALIBRATED:
            try:
                tensors, held_out = self._calibrated(working, journal)
            except _WorseThanRounding as verdict:
                remove_traces(working)
                for path in working.glob("*.safetensors*"):
                    path.unlink()
                held_out = verdict.held_out
                tensors, _ = self.plain.write(
                    working, self._metadata("rtn"), Journal(working, f"{self.fingerprint} rtn")
                )
                notices.append(
                    f"{method} did worse than rounding to nearest on the held-out text (KL divergence "
                    f"{held_out.kl_mean:.4g} against {held_out.kl_mean_rtn:.4g}): the folder holds rtn"
                )
                method = "rtn"
        else:
            tensors, _ = self.job.write(working, self._metadata(method), journal)
        return QuantizeReport(
            output=working,
            recipe=self.recipe.name,
            method=method,
            tensors=tensors,
            total_bytes=self.job.total_bytes,
            seconds=0.0,
            notices=tuple(notices),
            held_out=held_out,
        )

    def _metadata(self, method: str) -> dict[str, str]:
        return {"glm4run": __version__, "recipe": self.recipe.name, "method": method}

    def _calibrated(self, working: Path, journal: Journal) -> tuple[list[Any], HeldOut]:
        assert self.calibration is not None
        layerwise = Layerwise(
            self.reader,
            self.config,
            self.recipe.schemes(self.config),
            self.options.method,
            self.calibration,
            TORCH_DTYPES[self.job.model_dtype],
            torch.device(self.options.device),
        )
        tensors, layers = self.job.write(working, self._metadata(self.options.method), journal, layerwise)
        held_out = HeldOut(self.calibration.as_json(), tuple(layers), *layerwise.held_out_divergence())
        if held_out.kl_mean > held_out.kl_mean_rtn:
            raise _WorseThanRounding(held_out)
        return tensors, held_out


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
