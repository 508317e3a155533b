#!/usr/bin/env python3
"""The methods of `quantize` on the demo model with weights that were never rounded, on text of its own kind.

    python benchmarks/fidelity_demo.py --work DIR [--steps 100] [--on-grid] [--rows NAME...] [-o JSON]

The demo ships packed, and the last part of its training saw rounded weights. So each weight is moved by up to half a
step of its grid, either way, at random, and the training goes on from there without any rounding, by so many steps of
`scripts/train_demo.py` (none with 0). Training alone moves weights by a fraction of a step: without the first, the grid
that they came from is still there to be found (`--on-grid` shows that). What that gives is the source. It is packed by
each method and measured as `fidelity.py` does, on conversations that neither training nor calibration has seen.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from fidelity import ROWS, Bench, dense, describe_inputs, table

from glm4run import load_model
from glm4run.kernels.reference import ReferenceWeight
from glm4run.layers import QuantizedLinear
from glm4run.machine import commit, cpu_name
from glm4run.qformat import scale_groups
from glm4run.quant_config import QuantScheme
from glm4run.tokenizer import load_tokenizer
from glm4run_quantize.methods.mse import quantize_mse
from glm4run_quantize.methods.rtn import quantize_rtn

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))  # before what lies there can be imported

import demo_corpus  # noqa: E402
import train_demo  # noqa: E402

DEMO = ROOT / "models" / "demo"
WINDOWS, CALIBRATION_TOKENS = 32, 32768
EVALUATED_SEED, CALIBRATION_SEED = 101, 102  # training draws its conversations from seed 2
EVALUATED_BYTES, CALIBRATION_BYTES = 120_000, 240_000
NAMES = [f"{method}-int4-g{size}" for size in (32, 64) for method in ("rtn", "mse", "hqq", "awq", "gptq")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--on-grid", action="store_true", help="train on from the packed weights as they are")
    parser.add_argument("--rows", nargs="*", choices=sorted(ROWS), default=NAMES, metavar="NAME")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.on_grid:
        args.work /= "on-grid"  # rows and texts are kept by name
    args.work.mkdir(parents=True, exist_ok=True)
    source = train_on(args.work / f"source-{args.steps}", args.steps, on_grid=args.on_grid)
    print(f"training moved the weights by {moved(source):.2g} of a step, root mean square", file=sys.stderr)
    print(describe_grid(source), describe_inputs(source), sep="\n", file=sys.stderr)
    evaluated = write_text(args.work / "evaluated.txt", EVALUATED_SEED, EVALUATED_BYTES)
    calibration = write_text(args.work / "calibration.txt", CALIBRATION_SEED, CALIBRATION_BYTES)
    bench = Bench(source, args.work, evaluated, calibration, WINDOWS, CALIBRATION_TOKENS)
    results = [bench.row(name) for name in args.rows]
    facts = {"machine": cpu_name(), "commit": commit(), "steps": args.steps, "rows": results}
    if args.output is not None:
        args.output.write_text(json.dumps(facts, indent=2) + "\n")
    print(table(results))


def grid_steps() -> dict[str, torch.Tensor]:
    """What a step of the packed demo's grid is, weight by weight: module name to [N, K]."""
    found = {}
    for name, module in load_model(DEMO, dtype="fp32", backend="reference").model.named_modules():
        if isinstance(module, QuantizedLinear):
            assert isinstance(module.prepacked, ReferenceWeight)
            scale = module.prepacked.weight.scale.float().abs()
            found[name] = scale.repeat_interleave(module.prepacked.spec.in_features // scale.shape[1], dim=1)
    return found


def moved(source: Path) -> float:
    """How far the layers' weights lie from those of the packed demo, in its steps."""
    trained, packed = load_model(source, dtype="fp32").model, dense(DEMO).model
    steps = {name: step for name, step in grid_steps().items() if "layers" in name}
    squares, count = 0.0, 0
    for name, step in steps.items():
        apart = (trained.get_parameter(f"{name}.weight") - packed.get_parameter(f"{name}.weight")) / step
        squares, count = squares + float(apart.detach().square().sum()), count + step.numel()
    return float((squares / count) ** 0.5)


def describe_grid(source: Path) -> str:
    """How much of the packed demo comes back when the source is rounded without knowing its inputs, at g32."""
    trained, packed = load_model(source, dtype="fp32").model, dense(DEMO).model
    lines = []
    for method, quantize in (("rtn", quantize_rtn), ("mse", quantize_mse)):
        same = count = 0
        product = error_square = undone_square = 0.0
        for name in (name for name in grid_steps() if "layers" in name):
            weight, old = (model.get_parameter(f"{name}.weight").detach() for model in (trained, packed))
            restored = scale_groups(*quantize(weight, QuantScheme(4, 32), torch.bfloat16))
            error, undone = restored - weight, old - weight
            same += int(((restored - old).abs() < 0.02 * old.abs().clamp(min=1e-6)).sum())
            count += old.numel()
            product += float((error * undone).sum())
            error_square += float(error.square().sum())
            undone_square += float(undone.square().sum())
        cosine = product / (error_square * undone_square) ** 0.5
        lines.append(f"{method}: {same / count:.0%} of the packed demo's weights, cosine with undoing {cosine:.2f}")
    return "\n".join(lines)


def train_on(folder: Path, steps: int, *, on_grid: bool) -> Path:
    """The demo in bf16 behind `steps` more steps of its training, without rounding; made once."""
    if not (folder / "model.safetensors").is_file():
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
        tokenizer = load_tokenizer(folder)
        train_demo.write_configs(folder, tokenizer)
        (folder / "chat_template.jinja").write_bytes((DEMO / "chat_template.jinja").read_bytes())
        model = dense(DEMO).model.requires_grad_(True)
        torch.manual_seed(0)
        if not on_grid:
            with torch.no_grad():
                for name, step in grid_steps().items():
                    model.get_parameter(f"{name}.weight").add_((torch.rand_like(step) - 0.5) * step)
        if steps:
            train_demo.train(model, tokenizer, 0.0, steps, rounded_from=1.0)
        train_demo.save(model, folder)
    return folder


def write_text(path: Path, seed: int, nbytes: int) -> Path:
    """Conversations as plain text, of so many bytes at least."""
    text: list[str] = []
    size = 0
    for turns in demo_corpus.conversations(seed=seed):
        text += [content for _, content in turns] + [""]
        size += sum(len(content.encode()) + 1 for _, content in turns)
        if size >= nbytes:
            break
    path.write_text("\n".join(text), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
