#!/usr/bin/env python3
"""What each quantization method costs, at each size: KL divergence to the source, same-top-1 and perplexity.

    python benchmarks/fidelity.py SOURCE_DIR --text wiki.test.raw --work DIR [--windows 64] [--rows NAME...] [-o JSON]

SOURCE_DIR is an unpacked model, such as `make_real_checkpoint.py` makes. The text's first 700,000 bytes are cut into
windows of 512 tokens, of which the second half is scored; calibrated methods see only its last 400,000 bytes, or the
built-in text where the row says so. Embedding and head stay dense. Packed folders and figures are kept in DIR: a
second run, with more rows or more windows, computes only what is missing. The figures are those of the weights: the
packed model runs in float32 with its weights unpacked, so that no rounding of activations mixes in.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glm4run import LoadedModel, load_model
from glm4run.checkpoint.layouts import linear_shapes
from glm4run.checkpoint.reader import CheckpointReader
from glm4run.config import parse_config, read_json
from glm4run.evaluation import compare, evaluate
from glm4run.kernels.reference import ReferenceWeight
from glm4run.layers import Linear, QuantizedLinear
from glm4run.machine import commit, cpu_name
from glm4run.qformat import dequantize
from glm4run.reference_logits import SavedReference
from glm4run.text_windows import Cut, read_text
from glm4run_quantize import quantize_checkpoint
from glm4run_quantize.importance import InputMoments

EVALUATED_BYTES, CALIBRATION_BYTES = 700_000, 400_000
CONTEXT = 512
BUILT_IN = "built-in"  # the calibration text of a row, instead of the text's end


def _rows() -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for size in (32, 64):
        for method in ("rtn", "mse", "hqq", "awq", "gptq"):
            rows[f"{method}-int4-g{size}"] = {"method": method, "group_size": size}
    rows["gptq-int4-g32-built-in"] = {"method": "gptq", "group_size": 32, "calibration": BUILT_IN}
    for method in ("mse", "gptq"):
        rows[f"{method}-mixed-5.5"] = {"method": method, "target_bpw": 5.5}
    rows["int8-default"] = {"bits": 8}  # what `--bits 8` gives, but for the head
    rows["rtn-int8-g64"] = {"method": "rtn", "bits": 8, "group_size": 64}
    rows["mse-int8-g64"] = {"method": "mse", "bits": 8, "group_size": 64}
    rows["gptq-int8-g64"] = {"method": "gptq", "bits": 8, "group_size": 64}
    return rows


ROWS = _rows()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--rows", nargs="*", choices=sorted(ROWS), default=list(ROWS), metavar="NAME")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    evaluated, calibration = cut_texts(args.text, args.work)
    bench = Bench(args.source, args.work, evaluated, calibration, args.windows, args.calibration_tokens)
    print(describe_inputs(args.source), file=sys.stderr)
    results = [bench.row(name) for name in args.rows]
    facts = {"machine": cpu_name(), "commit": commit(), "windows": args.windows, "rows": results}
    if args.output is not None:
        args.output.write_text(json.dumps(facts, indent=2) + "\n")
    print(table(results))


def cut_texts(text: Path, work: Path) -> tuple[Path, Path]:
    """The files of what is evaluated and of what is calibrated on, made in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    raw = text.read_bytes()
    evaluated, calibration = work / "evaluated.txt", work / "calibration.txt"
    evaluated.write_bytes(raw[:EVALUATED_BYTES])
    calibration.write_text(raw[-CALIBRATION_BYTES:].decode("utf-8", errors="ignore"), encoding="utf-8")
    return evaluated, calibration


def describe_inputs(source: Path) -> str:
    """How much larger than the others some channels are that the linears read, which is what `awq` makes use of."""
    config = parse_config(read_json(source / "config.json"), where=str(source))
    ratios: dict[str, list[float]] = {}
    with CheckpointReader(source, config) as reader:
        moments = InputMoments(reader, config)
        for module in linear_shapes(config):
            sizes = moments.of(module).sqrt()
            ratios.setdefault(module.rpartition(".")[2], []).append(float(sizes.max() / sizes.median()))
    parts = ", ".join(f"{kind} {statistics.median(found):.1f}" for kind, found in ratios.items())
    return f"largest channel of the inputs over their median, in the median layer: {parts}"


@dataclasses.dataclass
class Bench:
    """Makes and measures rows, and remembers them in `work`."""

    source: Path
    work: Path
    evaluated: Path
    calibration: Path
    windows: int
    calibration_tokens: int
    _reference: SavedReference | None = None

    @property
    def cut(self) -> Cut:
        return Cut(CONTEXT, windows=self.windows)

    def row(self, name: str) -> dict[str, Any]:
        """The figures of one row; from an earlier run where it has the same options."""
        options = dict(ROWS[name])
        if options.get("method") in ("awq", "gptq") or "target_bpw" in options:
            options["calibration_tokens"] = self.calibration_tokens
            if options.get("calibration") == BUILT_IN:
                del options["calibration"]
            else:
                options["calibration"] = self.calibration
        key = hashlib.sha256(f"{name} {sorted(options.items())} {self.windows}".encode()).hexdigest()[:12]
        kept = self.work / f"{name}-{key}.json"
        if kept.is_file():
            found: dict[str, Any] = json.loads(kept.read_text())
            return found
        folder = self.work / name
        if not folder.is_dir():
            quantize_checkpoint(self.source, folder, head_bits=16, **options)
        record = json.loads((folder / "glm4run.json").read_text())
        row = self.measure(name, record["bits_per_weight"], record["method"], dense(folder))
        row["held_out"] = record.get("calibration", {}).get("held_out", {}).get("kl_mean")
        kept.write_text(json.dumps(row))
        return row

    def measure(self, name: str, bits_per_weight: float, method: str, model: LoadedModel) -> dict[str, Any]:
        """The figures of a dense model, as a row."""
        started = time.monotonic()
        measured = compare(model, self.reference(), read_text(self.evaluated), self.cut).as_report()
        row: dict[str, Any] = {"name": name, "bits_per_weight": bits_per_weight, "method": method}
        row |= {k: measured[k] for k in ("kl_mean", "kl_p99", "same_top1", "perplexity", "reference_perplexity")}
        print(json.dumps(row), f"{time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        return row

    def reference(self) -> SavedReference:
        """The source's distributions over the windows, computed once."""
        path = self.work / f"reference-{self.windows}.logits"
        if not path.is_file():
            model = load_model(self.source, dtype="fp32", context_len=CONTEXT)
            evaluate(model, read_text(self.evaluated), self.cut, save_logits=path)
        return SavedReference(path)


def dense(folder: Path) -> LoadedModel:
    """A packed model with its weights unpacked to float32."""
    loaded = load_model(folder, dtype="fp32", context_len=CONTEXT, backend="reference")
    for name, module in list(loaded.model.named_modules()):
        if isinstance(module, QuantizedLinear):
            assert isinstance(module.prepacked, ReferenceWeight)
            spec = module.prepacked.spec
            with torch.device("meta"):
                linear = Linear(spec.in_features, spec.out_features, bias=module.bias is not None)
            linear.weight = nn.Parameter(dequantize(module.prepacked.weight, torch.float32), requires_grad=False)
            if module.bias is not None:
                linear.bias = nn.Parameter(module.bias.float(), requires_grad=False)
            loaded.model.set_submodule(name, linear)
    return loaded


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| row | bits per weight | KL mean | KL p99 | same top-1 | perplexity |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['name']} | {r['bits_per_weight']:.2f} | {r['kl_mean']:.4f} | {r['kl_p99']:.2f} | {r['same_top1']:.1%} "
        f"| {r['perplexity']:.2f} |"
        for r in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
