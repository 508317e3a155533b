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
from glm4run_quantize.recipes import HEAD
from glm4run_quantize.source_layers import STAGES, SourceLayers

WINDOWS, TOKENS = 2, 256


class InputMoments:
    """Means of the squares of what each linear is fed with. Holds one layer of the source at a time, in float32.

    `ids` [W, T] are the tokens that go through the model; random ones where none are given.
    """

    def __init__(self, reader: CheckpointReader, config: ModelConfig, ids: Tensor | None = None) -> None:
        if ids is None:
            draw = torch.Generator().manual_seed(0)
            ids = torch.randint(0, config.vocab_size, (WINDOWS, TOKENS), generator=draw)
        self._ids, self._count = ids, config.num_hidden_layers
        self._layers = SourceLayers(reader, config, ids.shape[1], torch.device("cpu"))
        self._stream = torch.empty(0)
        self._next = 0
        self._found: dict[str, Tensor] = {}

    def of(self, module: str) -> Tensor:
        """Second moments [K] of the inputs of `module`, float32. Layers are computed as they are asked for."""
        wanted = self._count if module == HEAD else int(module.split(".")[2]) + 1
        while self._next < wanted:
            self._advance()
        if module == HEAD and HEAD not in self._found:
            self._found[HEAD] = head_moments(self._layers, self._stream)
        return self._found[module]

    @torch.no_grad()
    def _advance(self) -> None:
        index = self._next
        if index == 0:
            self._stream = self._layers.embed(self._ids)
        sums: dict[str, Tensor] = {}

        def visit(stage: str, x: Tensor) -> None:
            sums[stage] = sums.get(stage, torch.zeros(())) + x.flatten(0, 1).square().sum(0)

        self._stream = self._layers.forward(self._layers.layer(index), self._stream, visit)
        for stage, names in STAGES.items():
            for name in names:
                self._found[f"model.layers.{index}.{name}"] = sums[stage] / self._ids.numel()
        self._next = index + 1


@torch.no_grad()
def head_moments(layers: SourceLayers, stream: Tensor) -> Tensor:
    """Second moments [hidden] of lm_head's inputs, from the stream behind all layers."""
    normed = layers.final_norm()(stream)
    return normed.flatten(0, 1).square().mean(0).cpu()
