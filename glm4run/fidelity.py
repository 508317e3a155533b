"""What a stream of next-token distributions says: perplexity, and how far it lies from a reference's.

`Tally` takes log-probabilities a few rows at a time and keeps a handful of numbers per token, so that the distributions
of a large vocabulary are never held. Knows tensors only; nothing of models, files or text.
Source of the definitions: llama.cpp's `perplexity` tool (`--kl-divergence`), whose figures these are comparable with.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POSITION_BUCKETS = 8


@dataclass(frozen=True)
class Measured:
    """A mean (or what follows from one) and its standard error, as if tokens were independent."""

    value: float
    error: float


@dataclass(frozen=True)
class Bucket:
    """Mean divergence of the scored tokens at positions [first, last) of their windows."""

    first: int
    last: int
    tokens: int
    kl_mean: float


@dataclass(frozen=True)
class Divergence:
    """How far a model is from its reference over the same tokens. KL(reference || model), in nats per token."""

    kl_mean: Measured
    kl_median: float
    kl_p99: float
    kl_max: float
    same_top1: Measured  # share of the tokens whose likeliest token is the same
    reference_perplexity: Measured
    perplexity_ratio: Measured  # perplexity over the reference's; the error knows that both saw the same tokens
    by_position: tuple[Bucket, ...]


@dataclass(frozen=True)
class Summary:
    """What was measured over `tokens` scored tokens."""

    tokens: int
    perplexity: Measured
    divergence: Divergence | None  # None without a reference


@dataclass(frozen=True)
class ReferenceRows:
    """A reference's R next-token distributions: log-probabilities float64 [R, C], losses [R], likeliest columns [R]."""

    log_probs: Tensor
    losses: Tensor
    top1: Tensor


class Tally:
    """Collects what a `Summary` needs: per scored token a loss, a position and, with a reference, a divergence.

    In one array each: small tensors that stay, made between large ones that go, would keep the C heap from using the
    room of the large ones again (it grew by a tenth of a gigabyte a window).
    """

    def __init__(self) -> None:
        self._losses = array("d")
        self._reference_losses = array("d")
        self._kl = array("d")
        self._same = array("d")
        self._positions = array("d")

    def add(
        self, log_probs: Tensor, targets: Tensor, first_position: int, reference: ReferenceRows | None = None
    ) -> ReferenceRows:
        """Adds the tokens at consecutive positions of one window; returns them as another model's reference.

        Args:
            log_probs: float64 [R, C] over the C tokens that a text can have. targets: int64 [R], columns of it.
            first_position: where in its window the first of these tokens stands.
        """
        rows = reference_rows(log_probs, targets)
        self._losses.extend(rows.losses.tolist())
        self._positions.extend(range(first_position, first_position + len(targets)))
        if reference is not None:
            self._reference_losses.extend(reference.losses.tolist())
            self._same.extend((rows.top1.cpu() == reference.top1.cpu()).tolist())
            self._kl.extend(kl_divergence(reference.log_probs.to(log_probs.device), log_probs).tolist())
        return rows

    def summary(self) -> Summary:
        """Of all that was added; at least two tokens."""
        losses = _tensor(self._losses)
        return Summary(len(losses), _exp(_mean(losses)), self._divergence(losses) if self._kl else None)

    def _divergence(self, losses: Tensor) -> Divergence:
        kl, reference_losses = _tensor(self._kl), _tensor(self._reference_losses)
        return Divergence(
            kl_mean=_mean(kl),
            kl_median=_percentile(kl, 50),
            kl_p99=_percentile(kl, 99),
            kl_max=float(kl.max()),
            same_top1=_mean(_tensor(self._same)),
            reference_perplexity=_exp(_mean(reference_losses)),
            perplexity_ratio=_exp(_mean(losses - reference_losses)),
            by_position=tuple(_buckets(_tensor(self._positions), kl)),
        )


def reference_rows(log_probs: Tensor, targets: Tensor) -> ReferenceRows:
    """What `Tally.add` compares with: log-probabilities [R, C], and int64 columns [R] of the tokens that came."""
    return ReferenceRows(log_probs, -log_probs.gather(1, targets[:, None])[:, 0], log_probs.argmax(-1))


def kl_divergence(reference: Tensor, log_probs: Tensor) -> Tensor:
    """KL(reference || model) of each row: log-probabilities [R, C] twice, in nats, to [R]."""
    difference = reference - log_probs
    return (reference.exp() * difference).sum(-1)


def _tensor(values: array[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _percentile(values: Tensor, percent: int) -> float:
    """The smallest value that at least `percent` of a hundred are not above."""
    return float(values.kthvalue(max(1, math.ceil(percent * len(values) / 100))).values)


def _mean(values: Tensor) -> Measured:
    return Measured(float(values.mean()), float(values.std()) / math.sqrt(len(values)))


def _exp(logarithm: Measured) -> Measured:
    """exp of a mean; its error to first order."""
    value = math.exp(logarithm.value)
    return Measured(value, value * logarithm.error)


def _buckets(positions: Tensor, kl: Tensor) -> Sequence[Bucket]:
    """Equal stretches of the positions that were scored."""
    first, last = int(positions.min()), int(positions.max()) + 1
    count = min(POSITION_BUCKETS, last - first)
    edges = [first + (last - first) * i // count for i in range(count + 1)]
    buckets = []
    for low, high in itertools.pairwise(edges):
        inside = kl[(positions >= low) & (positions < high)]
        if len(inside):
            buckets.append(Bucket(low, high, len(inside), float(inside.mean())))
    return buckets
