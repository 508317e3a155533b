"""Calibrated methods, one layer at a time: a layer's weights and the calibration tokens' residuals are in memory.

Three streams of residuals go through the model side by side: the source's own; that of the layers as they are packed,
so that every linear is rounded for the inputs that it will really see; and, over the held-out windows, that of plain
rounding to nearest, which every method has to beat. A linear whose method does worse than rounding on the held-out
windows is rounded instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm4run.checkpoint.reader import CheckpointReader
from glm4run.config import ModelConfig
from glm4run.model import DecoderLayer
from glm4run.qformat import scale_groups
from glm4run.quant_config import QuantScheme
from glm4run_quantize.calibration import Calibration
from glm4run_quantize.methods import gptq
from glm4run_quantize.methods.awq import fold_layer
from glm4run_quantize.methods.mse import quantize_mse
from glm4run_quantize.methods.rtn import quantize_rtn
from glm4run_quantize.source_layers import (
    HEAD_TOKENS,
    STAGES,
    SourceLayers,
    gated,
    linear_of,
    log_probabilities,
    parts,
)

CALIBRATED = ("awq", "gptq")
Rounding = Callable[[Tensor, QuantScheme], tuple[Tensor, Tensor]]
SAMPLE_TOKENS = 512  # on which awq searches its scales


@dataclass(frozen=True)
class Rounded:
    """A linear as it will be stored: q int8 [N, K] and scale [N, G]; which method it is from; the held-out errors."""

    q: Tensor
    scale: Tensor
    kept: str
    error: float  # ||y - y_source||^2 / ||y_source||^2 over the held-out windows, with what is kept
    error_rtn: float
    signal: float  # sums of squares: of the weights that were rounded, and of what rounding changed
    noise: float


@dataclass(frozen=True)
class LayerResult:
    """One packed layer: linears by module name, dense parameters that folding changed, held-out error of its output."""

    linears: dict[str, Rounded]
    dense: dict[str, Tensor]
    error: float
    error_rtn: float


class Layerwise:
    """One calibrated run. `embed` once, then `run_layer` for each layer in order, then `held_out_divergence`."""

    def __init__(
        self,
        reader: CheckpointReader,
        config: ModelConfig,
        schemes: dict[str, QuantScheme],
        method: str,
        calibration: Calibration,
        scale_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self.schemes, self.method = config, schemes, method
        self.calibration, self.scale_dtype, self.device = calibration, scale_dtype, device
        self.windows = calibration.ids.shape[0]
        self.fitted = self.windows - calibration.held_out  # the windows before this one are calibrated on
        self.layers = SourceLayers(reader, config, calibration.ids.shape[1], device)
        self.source, self.ours, self.rounded = (torch.empty(0) for _ in range(3))

    def embed(self) -> None:
        """Starts the streams at the embedding."""
        self.source = self.layers.embed(self.calibration.ids)
        self.ours = self.source.clone()
        self.rounded = self.source[self.fitted :].clone()

    def state(self) -> dict[str, Tensor]:
        """The streams, to go on from after an interruption."""
        return {"source": self.source, "ours": self.ours, "rounded": self.rounded}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes on from a `state`."""
        self.source, self.ours, self.rounded = (state[k].to(self.device) for k in ("source", "ours", "rounded"))

    @torch.no_grad()
    def run_layer(self, index: int, read: Callable[[str], Tensor]) -> LayerResult:
        """Packs layer `index` and moves the streams behind it. `read` gives the source's tensors by name."""
        source, ours = (self.layers.layer(index, read) for _ in range(2))
        if self.method == "awq":
            self._fold(index, ours)
        linears: dict[str, Rounded] = {}
        for stage in STAGES:
            self._advance_to(stage, source, ours)
            linears |= self._round_stage(index, stage, source, ours)
        self._finish(source, ours)
        error = _relative(self.ours[self.fitted :], self.source[self.fitted :])
        self._round_stream(index, source)
        error_rtn = _relative(self.rounded, self.source[self.fitted :])
        return LayerResult(linears, self._dense(index, ours), error, error_rtn)

    @torch.no_grad()
    def held_out_divergence(self) -> tuple[float, float]:
        """Mean KL divergence to the source over the held-out windows: of what was packed, and of plain rounding."""
        norm, head = self.layers.final_norm(), self.layers.head()
        totals = [0.0, 0.0]
        streams = [s.flatten(0, 1) for s in (self.source[self.fitted :], self.ours[self.fitted :], self.rounded)]
        for first in range(0, streams[0].shape[0], HEAD_TOKENS):
            exact, *others = (log_probabilities(norm(s[first : first + HEAD_TOKENS]), head) for s in streams)
            for i, other in enumerate(others):
                totals[i] += float((exact.exp() * (exact - other)).sum(dtype=torch.float64))
        count = streams[0].shape[0]
        return totals[0] / count, totals[1] / count

    # --- the steps of a layer

    def _fold(self, index: int, layer: DecoderLayer) -> None:
        """Collects inputs of every linear from the source's stream, over tokens spread evenly, and scales the layer."""
        samples: dict[str, list[Tensor]] = {stage: [] for stage in STAGES}
        every = max(1, self.fitted * self.calibration.ids.shape[1] // SAMPLE_TOKENS)

        for part in parts(self.fitted):
            x = self.source[part]
            normed = layer.input_layernorm(x)
            samples["qkv"].append(normed.flatten(0, 1)[::every])
            attended = self.layers.attend(layer, normed)
            samples["o_proj"].append(attended.flatten(0, 1)[::every])
            x = x + layer.post_self_attn_layernorm(layer.self_attn.o_proj(attended))
            normed = layer.post_attention_layernorm(x)
            samples["gate_up_proj"].append(normed.flatten(0, 1)[::every])
            samples["down_proj"].append(gated(layer, normed.flatten(0, 1)[::every]))
        fold_layer(
            layer,
            {stage: torch.cat(rows) for stage, rows in samples.items()},
            {
                name.rpartition(".")[2]: s
                for name, s in self.schemes.items()
                if name.startswith(f"model.layers.{index}.")
            },
            self.scale_dtype,
            self.config.num_attention_heads // self.config.num_key_value_heads,
        )

    def _advance_to(self, stage: str, source: DecoderLayer, ours: DecoderLayer) -> None:
        """Brings both streams to where `stage` reads: attention's results beside them, then attention's sum."""
        if stage == "o_proj":
            self.attended = [
                torch.cat([self.layers.attend(layer, layer.input_layernorm(x[part])) for part in parts(self.windows)])
                for layer, x in ((source, self.source), (ours, self.ours))
            ]
        if stage == "gate_up_proj":
            for layer, x, attended in zip((source, ours), (self.source, self.ours), self.attended, strict=True):
                for part in parts(self.windows):
                    x[part] += layer.post_self_attn_layernorm(layer.self_attn.o_proj(attended[part]))
            del self.attended

    def _inputs(self, stage: str, source: DecoderLayer, ours: DecoderLayer, part: slice) -> tuple[Tensor, Tensor]:
        """What the linears of `stage` are fed with in the windows `part`, [T, K] each: the source's, and ours."""
        if stage == "o_proj":
            return self.attended[0][part].flatten(0, 1), self.attended[1][part].flatten(0, 1)
        pair = []
        for layer, stream in ((source, self.source), (ours, self.ours)):
            x = stream[part].flatten(0, 1)
            x = layer.input_layernorm(x) if stage == "qkv" else layer.post_attention_layernorm(x)
            pair.append(gated(layer, x) if stage == "down_proj" else x)
        return pair[0], pair[1]

    def _round_stage(self, index: int, stage: str, source: DecoderLayer, ours: DecoderLayer) -> dict[str, Rounded]:
        modules = [f"model.layers.{index}.{name}" for name in STAGES[stage]]
        modules = [module for module in modules if module in self.schemes]
        if not modules:
            return {}
        pairs = {module: (linear_of(source, module), linear_of(ours, module)) for module in modules}
        rounding = self._rounding(stage, source, ours)
        candidates = {}
        for module in modules:
            weight, scheme = pairs[module][1].weight, self.schemes[module]
            candidates[module] = (rounding(weight, scheme), quantize_rtn(weight, scheme, self.scale_dtype))
        del rounding  # and what it knows of the inputs
        errors = self._held_out_errors(stage, source, ours, pairs, candidates)
        results = {}
        for module in modules:
            signal, ours_error, rtn_error = errors[module]
            better = ours_error <= rtn_error
            q, scale = candidates[module][0 if better else 1]
            weight = pairs[module][1].weight
            restored = scale_groups(q, scale)
            results[module] = Rounded(
                q,
                scale,
                self.method if better else "rtn",
                min(ours_error, rtn_error) / max(signal, 1e-30),
                rtn_error / max(signal, 1e-30),
                float(weight.square().sum(dtype=torch.float64)),
                float((weight - restored).square_().sum(dtype=torch.float64)),
            )
            weight.copy_(restored)
        return results

    def _rounding(self, stage: str, source: DecoderLayer, ours: DecoderLayer) -> Rounding:
        """The method, with what it has to know of the inputs of `stage`: weight [N, K] and scheme to (q, scale)."""
        if self.method == "awq":
            squares = self._squares(stage, source, ours)
            return lambda weight, scheme: quantize_mse(weight, scheme, self.scale_dtype, squares)
        hessian, cross = self._moments(stage, source, ours)

        def second_order(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
            damped = gptq.prepare(hessian.clone())
            target = gptq.moved_target(weight, hessian, cross, damped)
            return gptq.quantize_gptq(target, damped, scheme, self.scale_dtype)

        return second_order

    def _squares(self, stage: str, source: DecoderLayer, ours: DecoderLayer) -> Tensor:
        """Means over the calibration tokens of the squares of our inputs: [K]."""
        sums = [
            self._inputs(stage, source, ours, part)[1].square().sum(0, dtype=torch.float64)
            for part in parts(self.fitted)
        ]
        return torch.stack(sums).sum(0).div_(self.fitted * self.calibration.ids.shape[1]).float()

    def _moments(self, stage: str, source: DecoderLayer, ours: DecoderLayer) -> tuple[Tensor, Tensor]:
        """Means over the calibration tokens of x x^T and of x_source x^T, where x are our inputs: [K, K] each."""
        hessian = cross = torch.empty(0)
        for part in parts(self.fitted):
            theirs, mine = self._inputs(stage, source, ours, part)
            if not hessian.numel():
                hessian, cross = (mine.new_zeros(mine.shape[1], mine.shape[1]) for _ in range(2))
            hessian.addmm_(mine.t(), mine)
            cross.addmm_(theirs.t(), mine)
        count = self.fitted * self.calibration.ids.shape[1]
        return hessian.div_(count), cross.div_(count)

    def _held_out_errors(
        self,
        stage: str,
        source: DecoderLayer,
        ours: DecoderLayer,
        pairs: dict[str, tuple[nn.Linear, nn.Linear]],
        candidates: dict[str, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]],
    ) -> dict[str, tuple[float, float, float]]:
        """Sums of squares over the held-out windows: of the source's outputs, and of what each candidate is off."""
        sums = {module: [0.0, 0.0, 0.0] for module in pairs}
        restored = {m: [scale_groups(q, scale) for q, scale in candidates[m]] for m in pairs}
        for part in parts(self.windows, self.fitted):
            theirs, mine = self._inputs(stage, source, ours, part)
            for module, (linear, mine_linear) in pairs.items():
                # A folded linear gives other numbers than the source's: it is measured against itself, unrounded.
                folded = self.method == "awq"
                exact = F.linear(mine, mine_linear.weight) if folded else F.linear(theirs, linear.weight)
                sums[module][0] += float(exact.square().sum(dtype=torch.float64))
                for i, weight in enumerate(restored[module]):
                    sums[module][i + 1] += float((F.linear(mine, weight) - exact).square_().sum(dtype=torch.float64))
        return {module: (values[0], values[1], values[2]) for module, values in sums.items()}

    def _finish(self, source: DecoderLayer, ours: DecoderLayer) -> None:
        for layer, stream in ((source, self.source), (ours, self.ours)):
            for part in parts(self.windows):
                x = stream[part]
                x += layer.post_mlp_layernorm(layer.mlp.down_proj(gated(layer, layer.post_attention_layernorm(x))))

    def _round_stream(self, index: int, layer: DecoderLayer) -> None:
        """Rounds the source's layer to nearest, and moves the third stream through it."""
        for module, scheme in self.schemes.items():
            if module.startswith(f"model.layers.{index}."):
                weight = linear_of(layer, module).weight
                weight.copy_(scale_groups(*quantize_rtn(weight, scheme, self.scale_dtype)))
        self.rounded = self.layers.forward(layer, self.rounded)

    def _dense(self, index: int, layer: DecoderLayer) -> dict[str, Tensor]:
        """The layer's dense parameters where folding may have changed them."""
        if self.method != "awq":
            return {}
        prefix = f"model.layers.{index}."
        changed = ("input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.v_proj.bias")
        state: dict[str, Any] = layer.state_dict()
        return {prefix + name: state[name] for name in changed if name in state}


def _relative(got: Tensor, expected: Tensor) -> float:
    off = float((got - expected).square().sum(dtype=torch.float64))
    return off / max(float(expected.square().sum(dtype=torch.float64)), 1e-30)
