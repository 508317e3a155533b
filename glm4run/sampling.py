"""From logits to a token: the parameters a user sets, and the sampler.

Order of the steps as in Hugging Face: repetition penalty, temperature, top-k, top-p, min-p. Draws come from one CPU
generator, so that a seed gives the same text on every device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from glm4run.errors import GenerationError, UsageError
from glm4run.speculative import MOST_DRAFTED, Speculate
from glm4run.torch_threads import one_torch_thread

MOST_LOGPROBS = 20
# So many of the likeliest are looked at first, then so many, before all are sorted: that takes 12 ms for this family's
# vocabulary, as long as three layers of a 9B. A model that is sure of itself leaves top-p a few dozen.
FEW_CANDIDATES = (256, 4096)


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a token was to the model (natural logarithm, before temperature, penalties and filters)."""

    token_id: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]  # ids with theirs, the likeliest first

    @staticmethod
    @one_torch_thread()
    def of(token: int, logits: Tensor, count: int) -> TokenLogprobs:
        """From logits [V] as the model gave them."""
        all_of_them = logits.float().log_softmax(dim=-1)
        values, ids = all_of_them.topk(count)
        return TokenLogprobs(token, float(all_of_them[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    max_new_tokens: int | None = None  # None: until the context is full
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_on_repetition: bool = True  # end with `repetition` when the tail is one n-gram over and over
    speculate: Speculate = "auto"  # drafts verified several at once; the text is the same, see `speculative`
    logprobs: int | None = None  # each step says how likely its token was, and so many of the likeliest
    recover: bool = False  # first take such a tail back, once, and write on from before it (`GenerationStep.rollback`)

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": self.max_new_tokens is None or self.max_new_tokens > 0,
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "min_p": 0 <= self.min_p < 1,
            "repetition_penalty": self.repetition_penalty > 0,
            "stop": all(self.stop),
            "logprobs": self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
            "speculate": self.speculate in ("auto", "off", *range(1, MOST_DRAFTED + 1)),
        }
        ranges = {
            "max_new_tokens": "a positive number",
            "temperature": "0 (greedy) or more",
            "top_p": "above 0, at most 1",
            "top_k": "0 (off) or more",
            "min_p": "0 (off) or more, below 1",
            "repetition_penalty": "above 0 (1 is off)",
            "stop": "texts that are not empty",
            "logprobs": f"0 to {MOST_LOGPROBS} of the likeliest tokens",
            "speculate": f"auto, off, or drafts of 1 to {MOST_DRAFTED} tokens",
        }
        for name, good in checks.items():
            if not good:
                raise UsageError(f"{name} is {getattr(self, name)!r}, expected {ranges[name]}")

    def with_defaults(self, generation: Mapping[str, Any]) -> SamplingParams:
        """These parameters with the keys of a `generation_config` (or a card) that this class knows."""
        if generation.get("do_sample") is False:
            return replace(self, temperature=0.0)
        known = {field.name for field in fields(self)} & {
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
        }
        return replace(self, **{key: generation[key] for key in known if isinstance(generation.get(key), int | float)})


class Sampler:
    """Draws one token after the other. `allowed` is a bool [V]: False rows (padding, control tokens) never come."""

    def __init__(self, params: SamplingParams, allowed: Tensor) -> None:
        self.params = params
        self.forbidden = ~allowed
        self.generator = torch.Generator(device="cpu")
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    @one_torch_thread()
    def sample(self, logits: Tensor, context: list[int]) -> int:
        """One token from logits float32 [V]; `context` is every id so far, for the repetition penalty.

        Raises:
            GenerationError: a logit is NaN or infinite. A token chosen from such logits would be meaningless.
        """
        if self.forbidden.device != logits.device:
            self.forbidden = self.forbidden.to(logits.device)  # once, not at every token
        logits = logits.masked_fill(self.forbidden, float("-inf"))
        if not bool(torch.isfinite(logits.amax())):  # of which NaN is the largest of all
            raise GenerationError(
                "the model's output is not finite (NaN or infinity), so no token can be chosen",
                hint="use --dtype bf16 or fp32; if it stays, check the files with `glm4run check`",
            )
        params = self.params
        if params.repetition_penalty != 1.0 and context:
            seen = torch.tensor(sorted(set(context)), device=logits.device)
            values = logits[seen]
            penalty = params.repetition_penalty
            logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if params.temperature == 0:
            return int(logits.argmax())
        return self._draw(logits.cpu() / params.temperature)

    def _draw(self, logits: Tensor) -> int:
        params = self.params
        probabilities, ids = self._candidates(logits)
        if params.top_p < 1:
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.masked_fill(before >= params.top_p, 0.0)
        if params.min_p > 0:
            probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities[0], 0.0)
        # One number a token, whatever the filters; torch.multinomial draws one for each candidate, 8 ms for all.
        sums = probabilities.cumsum(dim=-1, dtype=torch.float64)
        total = float(sums[-1])
        point = total * float(torch.rand((), dtype=torch.float64, generator=self.generator))
        point = min(point, math.nextafter(total, 0.0))  # below the last sum, also where the product is rounded up
        return int(ids[int(torch.searchsorted(sums, point, right=True))])

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and ids that the filters choose from: the likeliest first, at least as many as they leave.

        Without filters all of them, in the order of their ids.
        """
        params, size = self.params, logits.numel()
        if params.top_k:
            values, ids = logits.topk(min(params.top_k, size))
            return values.softmax(dim=-1), ids
        every = logits.softmax(dim=-1)
        if params.top_p == 1 and params.min_p == 0:
            return every, torch.arange(size)
        for count in FEW_CANDIDATES:
            if count >= size:
                break
            probabilities, ids = every.topk(count)
            beyond_top_p = params.top_p < 1 and bool(probabilities.cumsum(dim=-1)[-1] >= params.top_p)
            if beyond_top_p or bool(probabilities[-1] < params.min_p * probabilities[0]):
                return probabilities, ids
        probabilities, ids = every.sort(descending=True)
        return probabilities, ids
