#!/usr/bin/env python3
"""Writes a synthetic member of the family: true shapes, random weights, for speed and memory measurements.

    python benchmarks/synthesize.py glm-4-9b-chat --bits 4 -o DIR [--layers N] [--tokenizer MODEL_DIR]

The weights are written packed, with no bf16 detour: random packed words and scales that give the weights a sensible
spread, so that activations stay finite. Without --tokenizer the embedded demo's tokenizer is used, whose ids are the
first rows of the vocabulary. The text that such a model generates means nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import torch

from glm4run.cards import demo_folder, load_cards
from glm4run.checkpoint.layouts import linear_shapes, parameter_shapes
from glm4run.config import ModelConfig
from glm4run.qformat import PACKED, SCALE, SHAPE, packed_tensor_shapes
from glm4run.quant_config import QuantScheme
from glm4run_quantize.folder_files import COPIED, hf_config
from glm4run_quantize.recipes import Recipe, choose_recipe
from glm4run_quantize.writer import FolderWriter, TensorSpec, replacing_folder, write_json

POOL_BYTES = 64 << 20
WEIGHT_STD = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("member", choices=sorted(load_cards()))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), default=4)
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128))
    parser.add_argument("--lm-head-bits", type=int, choices=(4, 8, 16), default=8)
    parser.add_argument("--layers", type=int, help="fewer layers than the member has")
    parser.add_argument("--tokenizer", type=Path, default=demo_folder(), help="a folder to take the tokenizer from")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    config = load_cards()[args.member].config
    if args.layers is not None:
        config = dataclasses.replace(config, num_hidden_layers=args.layers)
    recipe = None
    if args.bits < 16:
        recipe, _ = choose_recipe(config, args.bits, group_size=args.group_size, head_bits=args.lm_head_bits)
    size = synthesize(config, recipe, args.output, args.tokenizer, overwrite=args.overwrite)
    print(f"{args.output}: {size / 1e9:.3f} GB")


def synthesize(
    config: ModelConfig, recipe: Recipe | None, output: Path, tokenizer: Path, *, overwrite: bool = False
) -> int:
    """Writes the folder, dense bf16 where `recipe` is None; returns the bytes of all tensors."""
    schemes = {} if recipe is None else recipe.schemes(config)
    specs = _plan(config, schemes)
    source = _Random(config)
    with replacing_folder(output, overwrite=overwrite) as working:
        with FolderWriter(working, specs, {"synthetic": "true"}) as writer:
            for spec in specs:
                source.write(writer, spec, schemes)
        data = hf_config({}, config, recipe or Recipe("bf16", (), ()), "BF16")
        if recipe is None:
            del data["quantization_config"]
        write_json(working / "config.json", data)
        for name in (*COPIED, "tokenizer_config.json"):
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, working / name)
    return sum(spec.nbytes for spec in specs)


def _plan(config: ModelConfig, schemes: dict[str, QuantScheme]) -> list[TensorSpec]:
    specs = []
    shapes = linear_shapes(config)
    for name, shape in parameter_shapes(config).items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in schemes:
            parts = packed_tensor_shapes(*shapes[module], schemes[module])
            specs += [TensorSpec(f"{module}.{suffix}", dtypes[0], part) for suffix, (part, dtypes) in parts.items()]
        else:
            specs.append(TensorSpec(name, "BF16", shape))
    return specs


class _Random:
    """Random bytes and normal numbers, from pools that are cut at random places: writing is then bound by the disk."""

    def __init__(self, config: ModelConfig) -> None:
        self.shapes = linear_shapes(config)
        self.generator = np.random.default_rng(0)
        self.words = torch.from_numpy(np.frombuffer(self.generator.bytes(POOL_BYTES), dtype=np.int32).copy())
        normal = self.generator.standard_normal(POOL_BYTES // 4, dtype=np.float32)
        self.normal = torch.from_numpy(normal).to(torch.bfloat16)

    def write(self, writer: FolderWriter, spec: TensorSpec, schemes: dict[str, QuantScheme]) -> None:
        module, _, suffix = spec.name.rpartition(".")
        if suffix == SHAPE:
            writer.add(spec.name, torch.tensor(self.shapes[module], dtype=torch.int64))
        elif suffix == PACKED:
            self._stream(writer, spec, self.words)
        elif suffix == SCALE:
            steps = (1 << schemes[module].bits) / 12**0.5  # standard deviation of a uniform q
            jitter = torch.rand(spec.shape, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.8
            writer.add(spec.name, (jitter * (_std(module) / steps)).to(torch.bfloat16))
        elif module.endswith("norm"):
            writer.add(spec.name, torch.ones(spec.shape, dtype=torch.bfloat16))
        else:
            self._stream(writer, spec, self.normal * _std(module))

    def _stream(self, writer: FolderWriter, spec: TensorSpec, pool: torch.Tensor) -> None:
        """Fills a tensor from pieces of the pool."""
        left = spec.nbytes // pool.element_size()
        while left:
            count = min(left, pool.numel())
            first = int(self.generator.integers(0, pool.numel() - count + 1))
            writer.add(spec.name, pool[first : first + count])
            left -= count


def _std(module: str) -> float:
    """The branches' last projections are smaller, so that forty of them leave the residual in range."""
    return WEIGHT_STD / 4 if module.endswith(("o_proj", "down_proj")) else WEIGHT_STD


if __name__ == "__main__":
    main()
