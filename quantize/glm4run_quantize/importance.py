"""How large the inputs of each linear are, channel by channel, without any text: from random tokens.

What makes an input channel matter (the large channels of the residual, the gains of the norms, the heads and gates
that are often open) hardly depends on what is read. So a few windows of tokens drawn at random go through the source, a
layer ahead of the packing. docs/quality.md has what that is worth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4run.checkpoint.reader import CheckpointReader
from glm4run.config import ModelConfig
from glm4run.ops import Ops
from glm4run_quantize.calibration import Calibration
from glm4run_quantize.layerwise import STAGES, Layerwise
from glm4run_quantize.recipes import HEAD

WINDOWS, TOKENS = 2, 256


class InputMoments:
    """Means of the squares of what each linear is fed with. Holds one layer of the source at a time, in float32.

    `ids` [W, T] are the tokens that go through the model; random ones where none are given.
    """

    def __init__(self, reader: CheckpointReader, config: ModelConfig, ids: Tensor | None = None) -> None:
        if ids is None:
            draw = torch.Generator().manual_seed(0)
            ids = torch.randint(0, config.vocab_size, (WINDOWS, TOKENS), generator=draw)
        calibration = Calibration("random tokens", "", ids, held_out=0)
        self._reader = reader
        self._layers = config.num_hidden_layers
        self._run = Layerwise(reader, config, {}, "rtn", calibration, torch.float32, torch.device("cpu"))
        self._next = 0
        self._found: dict[str, Tensor] = {}

    def of(self, module: str) -> Tensor:
        """Second moments [K] of the inputs of `module`, float32. Layers are computed as they are asked for."""
        wanted = self._layers if module == HEAD else int(module.split(".")[2]) + 1
        while self._next < wanted:
            self._advance()
        return head_moments(self._run) if module == HEAD else self._found[module]

    @torch.no_grad()
    def _advance(self) -> None:
        run, index = self._run, self._next
        if index == 0:
            run.source = self._embedded(run.calibration.ids)
        sums: dict[str, Tensor] = {}

        def visit(stage: str, x: Tensor) -> None:
            sums[stage] = sums.get(stage, torch.zeros(())) + x.flatten(0, 1).square().sum(0)

        run.source = run.forward(run.layer(index, self._reader.read), run.source, visit)
        for stage, names in STAGES.items():
            for name in names:
                self._found[f"model.layers.{index}.{name}"] = sums[stage] / run.calibration.ids.numel()
        self._next = index + 1

    def _embedded(self, ids: Tensor) -> Tensor:
        """Rows of the embedding [W, T, hidden], one by one: the whole table may be larger than all else."""
        rows = [self._reader.read_rows("model.embed_tokens.weight", i, i + 1) for i in ids.flatten().tolist()]
        embedded: Tensor = torch.cat(rows).float().unflatten(0, tuple(ids.shape))
        return embedded


@torch.no_grad()
def head_moments(run: Layerwise) -> Tensor:
    """Second moments [hidden] of lm_head's inputs, from the source's stream behind all layers."""
    norm = run.reader.read("model.norm.weight").float().to(run.device)
    normed: Tensor = Ops().rms_norm(run.source, norm, run.config.rms_norm_eps)
    moments: Tensor = normed.flatten(0, 1).square().mean(0).cpu()
    return moments
