"""`check`: are these files whole and consistent? Headers, config, scales and tokenizer; no weights, no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from glm4run.checkpoint.layouts import linear_shapes, locate, quantized_linears
from glm4run.checkpoint.safetensors_index import Problem, TensorEntry, scan_folder
from glm4run.config import ModelConfig, read_config
from glm4run.dialects import dialect_from_template, read_template
from glm4run.errors import Glm4RunError
from glm4run.model_folders import PROVENANCE_NAME, read_generation_config, read_provenance
from glm4run.qformat import SCALE, SHAPE
from glm4run.tokenizer import load_tokenizer

# The exponent bits of each float type: all of them set means infinity or NaN.
_EXPONENT_MASKS = {"BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00), "F32": (np.uint32, 0x7F800000)}


def check_folder(folder: Path) -> list[Problem]:
    """Everything that is wrong with a model folder; empty if it can be loaded."""
    entries, problems = scan_folder(folder)
    if not folder.is_dir():
        return problems
    try:
        config = read_config(folder)
    except Glm4RunError as error:
        return [*problems, _as_problem(error, "config.json")]
    if entries:
        sources, found = locate(config, entries)
        problems += found
        if not problems:  # values are worth reading only where the files are whole
            problems += _check_values(config, {name: source.entry for name, source in sources.items()})
    return problems + _check_text_files(folder, config)


def _check_values(config: ModelConfig, entries: dict[str, TensorEntry]) -> list[Problem]:
    problems = []
    shapes = linear_shapes(config)
    for module, scheme in quantized_linears(config).items():
        if scheme.kind != "int":
            continue  # its scales are vectors, see below
        stored = np.frombuffer(_read(entries[f"{module}.{SHAPE}"]), dtype="<i8").tolist()
        if stored != list(shapes[module]):
            what = f"says {stored}, config.json says {list(shapes[module])}"
            problems.append(_problem(entries[f"{module}.{SHAPE}"], what, "the folder mixes files of two models"))
        scale = entries[f"{module}.{SCALE}"]
        if not _is_finite(scale):
            problems.append(_problem(scale, "holds NaN or infinity", "the file is damaged: get it again"))
    vectors = (entry for entry in entries.values() if len(entry.shape) == 1 and entry.dtype in _EXPONENT_MASKS)
    for entry in vectors:
        if not _is_finite(entry):
            problems.append(_problem(entry, "holds NaN or infinity", "the file is damaged: get it again"))
    return problems


def _problem(entry: TensorEntry, what: str, hint: str) -> Problem:
    return Problem(what, hint, entry.file.name, entry.name)


def _read(entry: TensorEntry) -> bytes:
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        return file.read(entry.nbytes)


def _is_finite(entry: TensorEntry) -> bool:
    kind, mask = _EXPONENT_MASKS[entry.dtype]
    bits = np.frombuffer(_read(entry), dtype=kind)
    return not bool(((bits & mask) == mask).any())


def _check_text_files(folder: Path, config: ModelConfig) -> list[Problem]:
    problems = []
    try:
        tokenizer = load_tokenizer(folder)
        most = max(tokenizer.usable_ids(), default=0)
        if most >= config.vocab_size:
            what = f"its largest id is {most}, the model has {config.vocab_size} rows"
            problems.append(Problem(what, "the tokenizer is another model's", "tokenizer"))
    except Glm4RunError as error:
        problems.append(_as_problem(error, "tokenizer"))
    for file, read in (
        ("generation_config.json", read_generation_config),
        (PROVENANCE_NAME, read_provenance),
        ("chat template", _read_dialect),
    ):
        try:
            read(folder)
        except Glm4RunError as error:
            problems.append(_as_problem(error, file))
    return problems


def _read_dialect(folder: Path) -> None:
    template = read_template(folder)
    if template is not None:
        dialect_from_template(template)


def _as_problem(error: Glm4RunError, file: str) -> Problem:
    return Problem(error.message, error.hint or "", file)
