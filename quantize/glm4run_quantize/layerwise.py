"""Calibrated methods, one layer at a time: a layer's weights and the calibration tokens' residuals are in memory.

Three streams of residuals go through the model side by side: the source's own; that of the layers as they are packed,
so that every linear is rounded for the inputs that it will really see; and, over the held-out windows, that of plain
rounding to nearest, which every method has to beat. A linear whose method does worse than rounding on the held-out
windows is rounded instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm4run.checkpoint.reader import CheckpointReader
from glm4run.config import ModelConfig
from glm4run.model import DecoderLayer
from glm4run.ops import Ops, split_heads
from glm4run.qformat import scale_groups
from glm4run.quant_config import QuantScheme
from glm4run.rope import Rope
from glm4run_quantize.calibration import Calibration
from glm4run_quantize.methods import gptq
from glm4run_quantize.methods.awq import fold_layer
from glm4run_quantize.methods.mse import quantize_mse
from glm4run_quantize.methods.rtn import quantize_rtn

CALIBRATED = ("awq", "gptq")
# Linears that are fed with the same input, in the order in which a layer computes them.
STAGES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": ("mlp.gate_up_proj",),
    "down_proj": ("mlp.down_proj",),
}
WINDOWS_AT_ONCE = 4
SAMPLE_TOKENS = 512  # on which awq searches its scales
HEAD_ROWS, HEAD_TOKENS = 16384, 128


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
        self.reader, self.config, self.schemes, self.method = reader, config, schemes, method
        self.calibration, self.scale_dtype, self.device = calibration, scale_dtype, device
        self.windows = calibration.ids.shape[0]
        self.fitted = self.windows - calibration.held_out  # the windows before this one are calibrated on
        self.rope = Rope(config).cos_sin(0, calibration.ids.shape[1], device)
        self.source, self.ours, self.rounded = (torch.empty(0) for _ in range(3))

    def embed(self) -> None:
        """Starts the streams at the embedding."""
        table = self.reader.read("model.embed_tokens.weight")
        self.source = F.embedding(self.calibration.ids, table).float().to(self.device)
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
        source, ours = (self.layer(index, read) for _ in range(2))
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
        norm = self.reader.read("model.norm.weight").float().to(self.device)
        tied = self.config.tie_word_embeddings
        head = self.reader.read("model.embed_tokens.weight" if tied else "lm_head.weight").to(self.device)
        eps = self.config.rms_norm_eps
        totals = [0.0, 0.0]
        streams = [s.flatten(0, 1) for s in (self.source[self.fitted :], self.ours[self.fitted :], self.rounded)]
        for first in range(0, streams[0].shape[0], HEAD_TOKENS):
            exact, *others = (
                log_probabilities(Ops().rms_norm(s[first : first + HEAD_TOKENS], norm, eps), head) for s in streams
            )
            for i, other in enumerate(others):
                totals[i] += float((exact.exp() * (exact - other)).sum(dtype=torch.float64))
        count = streams[0].shape[0]
        return totals[0] / count, totals[1] / count

    # --- the steps of a layer

    def layer(self, index: int, read: Callable[[str], Tensor]) -> DecoderLayer:
        """Layer `index` of the source in float32."""
        with torch.device("meta"):
            layer = DecoderLayer(self.config, index, Ops())
        prefix = f"model.layers.{index}."
        state = {name: read(prefix + name).float().to(self.device) for name in layer.state_dict()}
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_(False)

    def _fold(self, index: int, layer: DecoderLayer) -> None:
        """Collects inputs of every linear from the source's stream, over tokens spread evenly, and scales the layer."""
        samples: dict[str, list[Tensor]] = {stage: [] for stage in STAGES}
        every = max(1, self.fitted * self.calibration.ids.shape[1] // SAMPLE_TOKENS)

        for part in self._parts(self.fitted):
            x = self.source[part]
            normed = layer.input_layernorm(x)
            samples["qkv"].append(normed.flatten(0, 1)[::every])
            attended = self._attend(layer, normed)
            samples["o_proj"].append(attended.flatten(0, 1)[::every])
            x = x + layer.post_self_attn_layernorm(layer.self_attn.o_proj(attended))
            normed = layer.post_attention_layernorm(x)
            samples["gate_up_proj"].append(normed.flatten(0, 1)[::every])
            samples["down_proj"].append(_gated(layer, normed.flatten(0, 1)[::every]))
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
                torch.cat([self._attend(layer, layer.input_layernorm(x[part])) for part in self._parts(self.windows)])
                for layer, x in ((source, self.source), (ours, self.ours))
            ]
        if stage == "gate_up_proj":
            for layer, x, attended in zip((source, ours), (self.source, self.ours), self.attended, strict=True):
                for part in self._parts(self.windows):
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
            pair.append(_gated(layer, x) if stage == "down_proj" else x)
        return pair[0], pair[1]

    def _round_stage(self, index: int, stage: str, source: DecoderLayer, ours: DecoderLayer) -> dict[str, Rounded]:
        modules = [f"model.layers.{index}.{name}" for name in STAGES[stage]]
        modules = [module for module in modules if module in self.schemes]
        if not modules:
            return {}
        hessian, cross = self._moments(stage, source, ours, with_cross=self.method == "gptq")
        pairs = {module: (linear_of(source, module), linear_of(ours, module)) for module in modules}
        candidates = {
            module: self._candidates(pairs[module][1].weight, self.schemes[module], hessian, cross)
            for module in modules
        }
        del hessian, cross
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

    def _moments(
        self, stage: str, source: DecoderLayer, ours: DecoderLayer, *, with_cross: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Means over the calibration tokens of x x^T and, for `with_cross`, of x_source x^T: [K, K].

        `awq` looks at nothing but the diagonal of the first, and gets it alone: [K].
        """
        hessian: Tensor | None = None
        cross: Tensor | None = None
        count = 0
        for part in self._parts(self.fitted):
            theirs, mine = self._inputs(stage, source, ours, part)
            if hessian is None:
                width = mine.shape[1]
                hessian = mine.new_zeros((width,) if self.method == "awq" else (width, width))
                cross = torch.zeros_like(hessian) if with_cross else None
            if hessian.ndim == 1:
                hessian += mine.square().sum(0)
            else:
                hessian.addmm_(mine.t(), mine)
            if cross is not None:
                cross.addmm_(theirs.t(), mine)
            count += mine.shape[0]
        assert hessian is not None
        return hessian.div_(count), None if cross is None else cross.div_(count)

    def _candidates(
        self, weight: Tensor, scheme: QuantScheme, hessian: Tensor, cross: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(q, scale) by the method, and by plain rounding."""
        plain = quantize_rtn(weight, scheme, self.scale_dtype)
        if self.method == "awq":
            return quantize_mse(weight, scheme, self.scale_dtype, hessian), plain
        assert cross is not None
        damped = gptq.prepare(hessian.clone())
        target = gptq.moved_target(weight, hessian, cross, damped)
        return gptq.quantize_gptq(target, damped, scheme, self.scale_dtype), plain

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
        for part in self._parts(self.windows, self.fitted):
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
            for part in self._parts(self.windows):
                x = stream[part]
                x += layer.post_mlp_layernorm(layer.mlp.down_proj(_gated(layer, layer.post_attention_layernorm(x))))

    def _round_stream(self, index: int, layer: DecoderLayer) -> None:
        """Rounds the source's layer to nearest, and moves the third stream through it."""
        for module, scheme in self.schemes.items():
            if module.startswith(f"model.layers.{index}."):
                weight = linear_of(layer, module).weight
                weight.copy_(scale_groups(*quantize_rtn(weight, scheme, self.scale_dtype)))
        self.rounded = self.forward(layer, self.rounded)

    def forward(
        self, layer: DecoderLayer, stream: Tensor, visit: Callable[[str, Tensor], None] = lambda _, __: None
    ) -> Tensor:
        """A stream [W, T, hidden] behind a layer, in new memory. `visit` gets each stage and its inputs [w, T, K]."""
        out = stream.clone()
        for part in self._parts(out.shape[0]):
            x = out[part]
            normed = layer.input_layernorm(x)
            visit("qkv", normed)
            attended = self._attend(layer, normed)
            visit("o_proj", attended)
            x += layer.post_self_attn_layernorm(layer.self_attn.o_proj(attended))
            normed = layer.post_attention_layernorm(x)
            visit("gate_up_proj", normed)
            gated = _gated(layer, normed)
            visit("down_proj", gated)
            x += layer.post_mlp_layernorm(layer.mlp.down_proj(gated))
        return out

    def _attend(self, layer: DecoderLayer, normed: Tensor) -> Tensor:
        """Attention without its output projection: [W, T, hidden] to [W, T, H * D]."""
        attention = layer.self_attn
        query = attention.ops.rope(attention.q_proj(normed), attention.head_dim, *self.rope)
        key = attention.ops.rope(attention.k_proj(normed), attention.head_dim, *self.rope)
        value = split_heads(attention.v_proj(normed), attention.head_dim)
        return attention.ops.attention(query, key, value)

    def _dense(self, index: int, layer: DecoderLayer) -> dict[str, Tensor]:
        """The layer's dense parameters where folding may have changed them."""
        if self.method != "awq":
            return {}
        prefix = f"model.layers.{index}."
        changed = ("input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.v_proj.bias")
        state: dict[str, Any] = layer.state_dict()
        return {prefix + name: state[name] for name in changed if name in state}

    def _parts(self, last: int, first: int = 0) -> Iterator[slice]:
        for at in range(first, last, WINDOWS_AT_ONCE):
            yield slice(at, min(at + WINDOWS_AT_ONCE, last))


def linear_of(layer: DecoderLayer, module: str) -> nn.Linear:
    """The linear of a layer that has this name in the model."""
    found = layer.get_submodule(".".join(module.split(".")[3:]))
    assert isinstance(found, nn.Linear)
    return found


def _gated(layer: DecoderLayer, normed: Tensor) -> Tensor:
    """What goes into down_proj."""
    return layer.mlp.ops.silu_mul(layer.mlp.gate_up_proj(normed))


def _relative(got: Tensor, expected: Tensor) -> float:
    off = float((got - expected).square().sum(dtype=torch.float64))
    return off / max(float(expected.square().sum(dtype=torch.float64)), 1e-30)


def log_probabilities(x: Tensor, head: Tensor) -> Tensor:
    """x [T, hidden] to [T, V], with a few rows of the head in float32 at a time."""
    parts = [x @ head[at : at + HEAD_ROWS].float().t() for at in range(0, head.shape[0], HEAD_ROWS)]
    return torch.cat(parts, dim=-1).log_softmax(-1)
