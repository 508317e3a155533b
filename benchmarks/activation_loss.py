#!/usr/bin/env python3
"""What rounding activations on the fly adds to what packed weights cost, in KL divergence to the unpacked model.

    python benchmarks/activation_loss.py SOURCE_DIR PACKED_DIR... --text FILE [--windows 16] [-o RESULT.json]

SOURCE_DIR is the model that PACKED_DIR were made from. Every packed model runs on the reference backend, then on the
native one with each form of activations, over windows of 512 tokens whose second halves are scored (`glm4run eval`).
`added` is the divergence beyond the reference backend's own, as a share of it; `apart` is the divergence between the
reference backend and the native one, as the same share.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from glm4run import LoadedModel, load_model
from glm4run.evaluation import compare
from glm4run.fidelity import Divergence
from glm4run.kernels import Activations
from glm4run.machine import commit, cpu_name
from glm4run.text_windows import DEFAULT_CONTEXT, Cut, Text, read_text

NATIVE: tuple[Activations, ...] = ("int8", "int16", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("packed", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    source = load_model(args.source, dtype="fp32", context_len=DEFAULT_CONTEXT)
    content, cut = read_text(args.text), Cut(windows=args.windows)
    rows = [row for folder in args.packed for row in _rows(source, folder, content, cut)]
    result = {"machine": cpu_name(), "commit": commit(), "windows": args.windows, "rows": rows}
    text = json.dumps(result, indent=2)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")


def _rows(source: LoadedModel, folder: Path, text: Text, cut: Cut) -> list[dict[str, object]]:
    reference = load_model(folder, dtype="fp32", context_len=cut.context, backend="reference")
    weights = _divergence(reference, source, text, cut).kl_mean.value
    rows: list[dict[str, object]] = []
    for form in NATIVE:
        model = load_model(folder, dtype="fp32", context_len=cut.context, backend="native", activations=form)
        whole, apart = (_divergence(model, other, text, cut) for other in (source, reference))
        rows.append(
            {
                "model": folder.name,
                "activations": form,
                "kld_of_weights": weights,
                "kld": whole.kl_mean.value,
                "added": whole.kl_mean.value / weights - 1,
                "apart": apart.kl_mean.value / weights,
                "same_top1_as_reference": apart.same_top1.value,
            }
        )
    return rows


def _divergence(model: LoadedModel, reference: LoadedModel, text: Text, cut: Cut) -> Divergence:
    found = compare(model, reference, text, cut).summary.divergence
    assert found is not None
    return found


if __name__ == "__main__":
    main()
