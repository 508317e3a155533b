"""Mixed precision: bits and group size per linear, from what rounding each one does to the model's predictions.

A few calibration windows go through the source forward, and the gradient of a drawn next token's log-likelihood goes
back through it, layer by layer. Rounding a linear changes its output at token t by d_t; where g_t is the gradient
there, the predictions move by half of sum over t of (g_t . d_t)^2, in nats of KL divergence: the second-order term, in
which g g^T stands for the Fisher information, and what rounding does to different tokens for unrelated. Source of the
measure: "Optimal Brain Damage" (LeCun and others, 1990), with the Fisher information for the Hessian; a token drawn
from the model's own prediction gives it without labels. Each linear is rounded to int4 at g32; what other schemes
would cost follows from their errors in the weights, which is what the cost is proportional to. Then bits are given
out one step at a time, each where a bit removes most of the measured cost.

A change of the residual, relative to it, would not do: a few tokens' residuals are a thousand times as large as the
others in the middle of many models, so that whole layers look as if they did not matter.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from glm4run.checkpoint.layouts import linear_shapes, parameter_shapes
from glm4run.checkpoint.reader import CheckpointReader
from glm4run.checkpoint.safetensors_index import DTYPE_BYTES
from glm4run.config import ModelConfig
from glm4run.errors import UsageError
from glm4run.model import DecoderLayer
from glm4run.qformat import GROUP_SIZES, packed_tensor_shapes, scale_groups
from glm4run.quant_config import QuantScheme
from glm4run_quantize.calibration import Calibration
from glm4run_quantize.methods.mse import quantize_mse
from glm4run_quantize.recipes import HEAD, Recipe, recipe_of
from glm4run_quantize.source_layers import HEAD_ROWS, HEAD_TOKENS, STAGES, SourceLayers, linear_of, log_probabilities

BASE = QuantScheme(4, 32)
LADDER = (QuantScheme(4, 128), QuantScheme(4, 64), QuantScheme(4, 32), QuantScheme(8, 128), QuantScheme(8, 32))
WINDOWS = 4
SAMPLE_ROWS = 256  # of each linear, on which the errors of the schemes are compared
ROWS_AT_ONCE = 2048  # of a linear, for which errors are held


@dataclass
class Unit:
    """Linears that share a scheme, and what each scheme costs them: bytes, and KL divergence."""

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
    cost = sum(unit.options[unit.taken][2] for unit in units)
    notice = f"mixed precision: {8 * used / weights:.3f} bits per weight ({shares}); predicted KL divergence {cost:.3g}"
    return recipe_of(name, schemes, config), [f"{notice} by mse, the better methods stay below it"]


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


def measure_units(reader: CheckpointReader, config: ModelConfig, calibration: Calibration) -> list[Unit]:
    """Every unit of the model with what its schemes cost, in the order of the model."""
    layers = SourceLayers(reader, config, calibration.ids.shape[1], torch.device("cpu"))
    stream = layers.embed(calibration.ids[:WINDOWS])
    residuals = []  # in front of each layer; of 40 layers they would be the largest part of the memory in float32
    for index in range(config.num_hidden_layers):
        residuals.append(stream.bfloat16())
        with torch.no_grad():
            stream = layers.forward(layers.layer(index), stream)
    gradient = _gradient_of_draws(layers, stream)
    del stream
    units: list[Unit] = []
    for index in reversed(range(config.num_hidden_layers)):
        layer = layers.layer(index)
        seen, gradient = _backward(layers, layer, residuals.pop().float(), gradient)
        units[:0] = [_unit(index, names, layer, seen) for names in STAGES.values()]
        del seen
    return units


@dataclass(frozen=True)
class _Seen:
    """A linear's inputs [T, K], and the gradients [T, N] of the log-likelihood with respect to its outputs."""

    inputs: Tensor
    gradients: Tensor


def _gradient_of_draws(layers: SourceLayers, stream: Tensor) -> Tensor:
    """Of the log-likelihood of one token drawn at each position, with respect to the residual behind all layers."""
    norm, head = layers.final_norm(), layers.head()
    draw = torch.Generator().manual_seed(0)
    parts = []
    for x in stream.flatten(0, 1).split(HEAD_TOKENS):
        x = x.clone().requires_grad_()
        normed = norm(x)
        with torch.no_grad():
            direction = log_probabilities(normed, head).exp_()
            drawn = torch.multinomial(direction, 1, generator=draw)
            direction.scatter_add_(1, drawn, torch.full(drawn.shape, -1.0))  # of -log p by the logits
            back = sum(
                direction[:, at : at + HEAD_ROWS] @ head[at : at + HEAD_ROWS].float()
                for at in range(0, head.shape[0], HEAD_ROWS)
            )
        normed.backward(back)
        assert x.grad is not None
        parts.append(x.grad)
    return torch.cat(parts).view_as(stream)


def _backward(
    layers: SourceLayers, layer: DecoderLayer, residual: Tensor, gradient: Tensor
) -> tuple[dict[str, _Seen], Tensor]:
    """What the linears of a layer saw, by their names in it; and the gradient in front of the layer."""
    held: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for stage in STAGES.values() for name in stage}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            output.register_hook(lambda gradient: held[name].append((inputs[0].detach()[0], gradient[0])))

        return hook

    hooks = [layer.get_submodule(name).register_forward_hook(keep(name)) for name in held]
    before = []
    for x, behind in zip(residual.split(1), gradient.split(1), strict=True):  # a window at a time: less is alive
        x = x.clone().requires_grad_()
        layer(x, layers.rope, None, torch.float32).backward(behind)
        assert x.grad is not None
        before.append(x.grad)
    for hook in hooks:
        hook.remove()
    seen = {name: _Seen(*(torch.cat(part) for part in zip(*held.pop(name), strict=True))) for name in tuple(held)}
    return seen, torch.cat(before)


@torch.no_grad()
def _unit(index: int, names: tuple[str, ...], layer: DecoderLayer, seen: dict[str, _Seen]) -> Unit:
    """The linears `names` of a layer with what each scheme costs them."""
    modules = tuple(f"model.layers.{index}.{name}" for name in names)
    weights = [linear_of(layer, module).weight for module in modules]
    moments = seen[names[0]].inputs.square().mean(0)  # they share their inputs
    change = torch.zeros(seen[names[0]].inputs.shape[0])
    for name, weight in zip(names, weights, strict=True):
        pieces = weight.split(ROWS_AT_ONCE), seen[name].gradients.split(ROWS_AT_ONCE, dim=-1)
        for rows, gradients in zip(*pieces, strict=True):
            error = rows - scale_groups(*quantize_mse(rows, BASE, torch.bfloat16, moments))
            change += ((seen[name].inputs @ error.t()) * gradients).sum(-1)
    tokens = seen[names[0]].inputs.shape[0]
    cost = float(change.square().sum(dtype=torch.float64)) / (2 * tokens)
    base = _weight_error(weights, BASE, moments)
    unit = Unit(modules, sum(weight.numel() for weight in weights))
    for scheme in LADDER:
        if weights[0].shape[1] % (scheme.group_size or 1) == 0:
            nbytes = sum(_packed_bytes(weight.shape[0], weight.shape[1], scheme) for weight in weights)
            share = _weight_error(weights, scheme, moments) / max(base, 1e-30)
            unit.options.append((scheme, nbytes, cost * share))
    return unit


def _weight_error(weights: list[Tensor], scheme: QuantScheme, moments: Tensor) -> float:
    """What rounding changes in the outputs, with inputs that are unrelated to each other: on a sample of the rows."""
    total = 0.0
    for weight in weights:
        rows = weight[:: max(1, weight.shape[0] // SAMPLE_ROWS)]
        restored = scale_groups(*quantize_mse(rows, scheme, torch.bfloat16, moments))
        error = float(((rows - restored).square() @ moments).sum(dtype=torch.float64))
        total += error * weight.shape[0] / rows.shape[0]
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
