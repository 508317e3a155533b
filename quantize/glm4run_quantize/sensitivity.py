"""Mixed precision: bits and group size per linear, from what rounding each one does to the residual behind its layer.

A few calibration windows go through the source, layer by layer. In each layer every group of linears that must share
a scheme is rounded alone, to int4 at g32, and the change of the layer's output is measured, relative to the residual.
What the other schemes would do follows from their errors in the weights, which is what the change is proportional to.
Then bits are given out one step at a time, each where a bit removes most of the measured change.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from glm4run.checkpoint.layouts import linear_shapes, parameter_shapes
from glm4run.checkpoint.reader import CheckpointReader
from glm4run.checkpoint.safetensors_index import DTYPE_BYTES
from glm4run.config import ModelConfig
from glm4run.errors import UsageError
from glm4run.qformat import GROUP_SIZES, packed_tensor_shapes, scale_groups
from glm4run.quant_config import QuantScheme
from glm4run_quantize.calibration import Calibration
from glm4run_quantize.layerwise import STAGES, Layerwise, linear_of
from glm4run_quantize.methods.mse import quantize_mse
from glm4run_quantize.recipes import HEAD, Recipe, recipe_of

BASE = QuantScheme(4, 32)
LADDER = (QuantScheme(4, 128), QuantScheme(4, 64), QuantScheme(4, 32), QuantScheme(8, 128), QuantScheme(8, 32))
WINDOWS = 4
SAMPLE_ROWS = 1024  # of each linear, on which the errors of the schemes are compared


@dataclass
class Unit:
    """Linears that share a scheme, and what each scheme costs them: bytes, and change of the layer's output."""

    modules: tuple[str, ...]
    weights: int
    options: list[tuple[QuantScheme, int, float]] = field(default_factory=list)
    taken: int = 0


def fit_recipe(
    reader: CheckpointReader,
    config: ModelConfig,
    calibration: Calibration,
    *,
    bpw: float | None,
    gib: float | None,
    head_bits: int,
) -> tuple[Recipe, list[str]]:
    """The recipe that meets `bpw` (bits per weight of the layers' linears) or `gib` (all tensors of the file).

    Raises UsageError where the target is below what the smallest schemes take.
    """
    shapes = linear_shapes(config)
    schemes: dict[str, QuantScheme] = {}
    if HEAD in shapes and head_bits != 16:
        schemes[HEAD] = QuantScheme(head_bits, max(g for g in GROUP_SIZES if shapes[HEAD][1] % g == 0))
    units = measure_units(reader, config, calibration)
    weights = sum(unit.weights for unit in units)
    if bpw is not None:
        budget = int(bpw * weights / 8)
    else:
        assert gib is not None
        budget = int(gib * 2**30) - _other_bytes(reader, config, schemes)
    least = sum(unit.options[0][1] for unit in units)
    if budget < least:
        smallest = (least + _other_bytes(reader, config, schemes)) / 2**30
        raise UsageError(
            f"the target is below {8 * least / weights:.3f} bits per weight, the least of the format "
            f"({smallest:.2f} GiB for this model with this head and a dense embedding)",
            hint="raise it, or give --lm-head-bits 4",
        )
    spend(units, budget)
    for unit in units:
        schemes |= dict.fromkeys(unit.modules, unit.options[unit.taken][0])
    used = sum(unit.options[unit.taken][1] for unit in units)
    name = f"mixed-{8 * used / weights:.2f}bpw"
    counts: dict[str, int] = {}
    for unit in units:
        scheme = unit.options[unit.taken][0]
        counts[scheme.describe()] = counts.get(scheme.describe(), 0) + unit.weights
    shares = ", ".join(f"{share / weights:.0%} {what}" for what, share in sorted(counts.items()))
    return recipe_of(name, schemes, config), [f"mixed precision: {8 * used / weights:.3f} bits per weight ({shares})"]


def spend(units: list[Unit], budget: int) -> None:
    """Raises schemes step by step while bytes are left, each time where a byte removes most. Sets `taken`."""
    left = budget - sum(unit.options[0][1] for unit in units)
    heap: list[tuple[float, int, int]] = []

    def offer(number: int) -> None:
        unit = units[number]
        _, size, change = unit.options[unit.taken]
        steps = [
            ((change - other) / (nbytes - size), i)
            for i, (_, nbytes, other) in enumerate(unit.options)
            if i > unit.taken and nbytes > size and other < change
        ]
        if steps:
            gain, step = max(steps)
            heapq.heappush(heap, (-gain, number, step))

    for number in range(len(units)):
        offer(number)
    while heap:
        _, number, step = heapq.heappop(heap)
        unit = units[number]
        price = unit.options[step][1] - unit.options[unit.taken][1]
        if price > left:
            # Too dear: a smaller step of the same linears may still be had.
            cheaper = [
                i for i in range(unit.taken + 1, step) if unit.options[i][1] - unit.options[unit.taken][1] <= left
            ]
            if not cheaper:
                continue
            step = max(cheaper)
            price = unit.options[step][1] - unit.options[unit.taken][1]
        left -= price
        unit.taken = step
        offer(number)


@torch.no_grad()
def measure_units(reader: CheckpointReader, config: ModelConfig, calibration: Calibration) -> list[Unit]:
    """Every unit of the model with what its schemes cost, in the order of the model."""
    few = replace(calibration, ids=calibration.ids[:WINDOWS], held_out=0)
    run = Layerwise(reader, config, {}, "rtn", few, torch.bfloat16, torch.device("cpu"))
    run.embed()
    units = []
    for index in range(config.num_hidden_layers):
        layer = run.layer(index, reader.read)
        before = run.source
        exact = run.forward(layer, before)
        size = float(exact.square().sum(dtype=torch.float64))
        for names in STAGES.values():
            modules = tuple(f"model.layers.{index}.{name}" for name in names)
            weights = [linear_of(layer, module).weight for module in modules]
            kept = [weight.clone() for weight in weights]
            fitting = [s for s in LADDER if weights[0].shape[1] % (s.group_size or 1) == 0]
            for weight in weights:
                weight.copy_(scale_groups(*quantize_mse(weight, BASE, torch.bfloat16)))
            change = float((run.forward(layer, before) - exact).square().sum(dtype=torch.float64)) / size
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)
            base = _weight_error(kept, BASE)
            unit = Unit(modules, sum(weight.numel() for weight in weights))
            for scheme in fitting:
                nbytes = sum(_packed_bytes(weight.shape[0], weight.shape[1], scheme) for weight in weights)
                unit.options.append((scheme, nbytes, change * _weight_error(kept, scheme) / max(base, 1e-30)))
            units.append(unit)
        run.source = exact
    return units


def _weight_error(weights: list[Tensor], scheme: QuantScheme) -> float:
    total = 0.0
    for weight in weights:
        rows = weight[:: max(1, weight.shape[0] // SAMPLE_ROWS)]
        restored = scale_groups(*quantize_mse(rows, scheme, torch.bfloat16))
        total += float((rows - restored).square().sum(dtype=torch.float64)) * weight.shape[0] / rows.shape[0]
    return total


def _packed_bytes(out_features: int, in_features: int, scheme: QuantScheme) -> int:
    parts = packed_tensor_shapes(out_features, in_features, scheme)
    return sum(torch.Size(shape).numel() * DTYPE_BYTES[_written(dtypes)] for shape, dtypes in parts.values())


def _written(dtypes: tuple[str, ...]) -> str:
    """Scales are counted at two bytes, as a bf16 or fp16 model has them."""
    return dtypes[0]


def _other_bytes(reader: CheckpointReader, config: ModelConfig, schemes: dict[str, QuantScheme]) -> int:
    """Of all tensors that are not the layers' linears."""
    total = 0
    for name in parameter_shapes(config):
        module = name.removesuffix(".weight")
        if module in schemes:
            total += _packed_bytes(*linear_shapes(config)[module], schemes[module])
        elif not name.endswith("proj.weight"):
            total += reader.sources[name].nbytes
    return total
