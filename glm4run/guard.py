"""Signs that a model no longer makes sense: output that is not finite, ids that have no token, loops.

What can pass is computed once more; what stays is a diagnosis that names the layer or the files to look at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glm4run.errors import GenerationError
from glm4run.kv_cache import KVCache
from glm4run.sampling import SamplingParams
from glm4run.torch_threads import one_torch_thread

DEAD_IN_A_ROW = 8  # a model of random weights likes a padding row now and then, a broken one all the time
# How an answer goes on behind a loop: warm enough to leave it, and averse to what it has just said.
RECOVERY_TEMPERATURE, RECOVERY_TOP_P, RECOVERY_PENALTY = 0.7, 0.95, 1.1


@dataclass(frozen=True)
class Nonfinite:
    """The first key or value in a cache that is NaN or infinite."""

    layer: int
    position: int


class DeadTokens:
    """Counts how often in a row a model likes an id best that has no token."""

    def __init__(self, dead: Tensor) -> None:
        self.dead = dead  # bool [V]
        self.count = 0

    @one_torch_thread()
    def watch(self, logits: Tensor) -> None:
        """Looks at logits [V] as the model gave them.

        Raises:
            GenerationError: `DEAD_IN_A_ROW` times an id without a token was the best, or all logits are equal.
        """
        best = int(logits.argmax())
        if bool(self.dead[best]):
            self.count += 1
        else:
            self.count = 0
        if self.count >= DEAD_IN_A_ROW:
            raise GenerationError(
                f"{self.count} times in a row the model's likeliest id ({best}) is one that has no token",
                hint="its head and its tokenizer do not belong together, or its weights are damaged: "
                "run `glm4run check` on the folder and compare tokenizer.model with the source",
            )
        if bool(logits[best] == logits.min()):
            raise GenerationError(
                "all tokens are equally likely to the model: its output is dead",
                hint="the weights are damaged (all zero?): run `glm4run check` on the folder",
            )


def after_a_loop(params: SamplingParams) -> SamplingParams:
    """How to sample behind a loop that was taken back. A greedy run stays reproducible."""
    seed = 0 if params.seed is None and params.temperature == 0 else params.seed
    return replace(
        params,
        temperature=max(params.temperature, RECOVERY_TEMPERATURE),
        top_p=min(params.top_p, RECOVERY_TOP_P),
        repetition_penalty=max(params.repetition_penalty, RECOVERY_PENALTY),
        seed=seed,
    )


def first_nonfinite(cache: KVCache) -> Nonfinite | None:
    """The earliest token with a key or value that is not finite, and the first layer in which it has one."""
    found: Nonfinite | None = None
    for layer in range(len(cache.layers)):
        for rows in cache.rows(layer, 0, cache.position).values():
            bad = ~torch.isfinite(rows).all(dim=-1).all(dim=0)
            if bool(bad.any()):
                position = int(bad.int().argmax())
                if found is None or position < found.position:
                    found = Nonfinite(layer, position)
    return found


def diagnose(found: Nonfinite | None, tokens: int, generated: int) -> GenerationError:
    """What is known about output that stays NaN or infinite after it was computed again."""
    where = (
        "keys and values of all layers are finite, so it arises in the last layer's MLP, the final norm or the head"
        if found is None
        else f"the first key or value that is not finite is in layer {found.layer}, token {found.position} of {tokens}"
    )
    return GenerationError(
        f"the model's output is not finite (NaN or infinity) after {generated} tokens, so no token can be chosen; "
        f"{where}",
        hint="use --dtype bf16 or fp32; if it stays, check the files with `glm4run check`",
    )
