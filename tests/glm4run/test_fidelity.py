"""The figures are what their definitions say, over distributions that come in pieces."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from glm4run.fidelity import POSITION_BUCKETS, Summary, Tally, reference_rows

ROWS, COLUMNS = 100, 17


def distributions(seed: int, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)).log_softmax(-1)


MODEL, REFERENCE = distributions(1), distributions(2)
TARGETS = torch.randint(COLUMNS, (ROWS,), generator=torch.Generator().manual_seed(3))


def tally(pieces: int, reference: Tensor | None = REFERENCE) -> Summary:
    result, size = Tally(), ROWS // pieces
    for first in range(0, ROWS, size):
        rows = slice(first, first + size)
        exact = None if reference is None else reference_rows(reference[rows], TARGETS[rows])
        result.add(MODEL[rows], TARGETS[rows], 20 + first, exact)
    return result.summary()


def test_by_hand() -> None:
    """Two tokens over two outcomes: all figures on paper."""
    ours = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64).log()
    exact = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64).log()
    targets, result = torch.tensor([0, 1]), Tally()
    result.add(ours, targets, 5, reference_rows(exact, targets))
    summary = result.summary()
    assert summary.tokens == 2
    assert summary.perplexity.value == pytest.approx(math.sqrt(2 / 0.75))
    found = summary.divergence
    assert found is not None
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found.kl_mean.value == pytest.approx(kl / 2)
    assert found.kl_mean.error == pytest.approx(kl / 2)  # of two values, 0 and kl
    assert found.kl_max == found.kl_p99 == pytest.approx(kl)
    assert found.kl_median == 0
    assert found.reference_perplexity.value == pytest.approx(1 / 0.75)
    assert found.perplexity_ratio.value == pytest.approx(math.sqrt(0.75 / 0.5))
    assert found.same_top1.value == 1.0  # of two that are equal the first counts
    assert [(b.first, b.last, b.tokens, b.kl_mean) for b in found.by_position] == [
        (5, 6, 1, pytest.approx(kl)),
        (6, 7, 1, 0.0),
    ]


def test_many_tokens_equal_the_definitions() -> None:
    found = tally(1).divergence
    assert found is not None
    kl = (REFERENCE.exp() * (REFERENCE - MODEL)).sum(-1)
    assert found.kl_mean.value == pytest.approx(float(kl.mean()))
    assert found.kl_mean.error == pytest.approx(float(kl.std()) / 10)
    assert found.kl_p99 == float(kl.sort().values[98])
    assert found.kl_median == float(kl.sort().values[49])
    same = (MODEL.argmax(-1) == REFERENCE.argmax(-1)).double()
    assert found.same_top1.value == pytest.approx(float(same.mean()))
    assert 0 < found.same_top1.value < 1
    share = found.same_top1.value
    assert found.same_top1.error == pytest.approx(math.sqrt(share * (1 - share) / 99))
    difference = (REFERENCE - MODEL).gather(1, TARGETS[:, None])
    assert found.perplexity_ratio.value == pytest.approx(math.exp(float(difference.mean())))
    assert len(found.by_position) == POSITION_BUCKETS
    assert sum(bucket.tokens for bucket in found.by_position) == ROWS
    assert found.by_position[0].kl_mean == pytest.approx(float(kl[:12].mean()))
    assert (found.by_position[0].first, found.by_position[-1].last) == (20, 120)


@pytest.mark.parametrize("pieces", [2, 20, 100])
def test_pieces_give_the_same(pieces: int) -> None:
    assert tally(pieces) == tally(1)


def test_without_a_reference() -> None:
    summary = tally(4, None)
    assert summary.divergence is None
    assert summary.perplexity == tally(1).perplexity
