#!/usr/bin/env python3
"""What rounding activations on the fly adds to what packed weights cost, in KL divergence to the unpacked model.

    python benchmarks/activation_loss.py SOURCE_DIR PACKED_DIR... --text FILE [--windows 16] [-o RESULT.json]

SOURCE_DIR is the model that PACKED_DIR were made from. The text's first 700,000 bytes are cut into windows of 512
tokens, of which the second half is scored. Every packed model runs on the reference backend, then on the native one
with each form of activations. `added` is the divergence beyond the reference's own, as a share of it; `apart` is the
divergence between the reference backend and the native one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from glm4run import LoadedModel, load_model
from glm4run.kernels import Activations
from glm4run.machine import commit, cpu_name

TEXT_BYTES = 700_000
WINDOW = 512
NATIVE: tuple[Activations, ...] = ("int8", "int16", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("packed", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    source = load_model(args.source, dtype="fp32", context_len=WINDOW)
    windows = _windows(source, args.text, args.windows)
    rows = [row for folder in args.packed for row in _compare(source, folder, windows)]
    result = {"machine": cpu_name(), "commit": commit(), "windows": len(windows), "rows": rows}
    text = json.dumps(result, indent=2)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")


def _windows(model: LoadedModel, text: Path, count: int) -> list[list[int]]:
    raw = text.read_bytes()[:TEXT_BYTES].decode("utf-8", errors="ignore")
    ids = model.tokenizer.encode(raw)
    step = len(ids) // count
    return [ids[i * step : i * step + WINDOW] for i in range(count)]


def _compare(source: LoadedModel, folder: Path, windows: list[list[int]]) -> list[dict[str, object]]:
    reference = load_model(folder, dtype="fp32", context_len=WINDOW, backend="reference")
    native = {
        form: load_model(folder, dtype="fp32", context_len=WINDOW, backend="native", activations=form)
        for form in NATIVE
    }
    own: list[float] = []
    total: dict[Activations, list[float]] = {form: [] for form in NATIVE}
    apart: dict[Activations, list[float]] = {form: [] for form in NATIVE}
    same: dict[Activations, list[float]] = {form: [] for form in NATIVE}
    for window in windows:
        exact, packed = _log_probabilities(source, window), _log_probabilities(reference, window)
        own.append(_divergence(exact, packed))
        for form, model in native.items():
            ours = _log_probabilities(model, window)
            total[form].append(_divergence(exact, ours))
            apart[form].append(_divergence(packed, ours))
            same[form].append(float((packed.argmax(-1) == ours.argmax(-1)).double().mean()))
    weights = _mean(own)
    return [
        {
            "model": folder.name,
            "activations": form,
            "kld_of_weights": weights,
            "kld": _mean(total[form]),
            "added": _mean(total[form]) / weights - 1,
            "apart": _mean(apart[form]) / weights,
            "same_top1_as_reference": _mean(same[form]),
        }
        for form in NATIVE
    ]


def _log_probabilities(model: LoadedModel, ids: list[int]) -> Tensor:
    """Of the tokens that follow the window's second half: float64 [WINDOW / 2, V]."""
    return F.log_softmax(model.logits(ids)[WINDOW // 2 - 1 : -1].double(), dim=-1)


def _divergence(exact: Tensor, ours: Tensor) -> float:
    return float((exact.exp() * (exact - ours)).sum(-1).mean())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
