"""Each cut of the sampler keeps exactly the tokens it should, and nothing is drawn from logits that are not finite."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from glm4run import sampling
from glm4run.errors import GenerationError, UsageError
from glm4run.sampling import Sampler, SamplingParams

ALL = torch.ones(8, dtype=torch.bool)
# Probabilities 0.4, 0.2, 0.15, 0.1, 0.06, 0.05, 0.03, 0.01 at ids in this order
ORDER = [5, 2, 7, 0, 3, 1, 6, 4]
PROBABILITIES = [0.4, 0.2, 0.15, 0.1, 0.06, 0.05, 0.03, 0.01]


def known_logits() -> Tensor:
    logits = torch.empty(8)
    for token, probability in zip(ORDER, PROBABILITIES, strict=True):
        logits[token] = math.log(probability)
    return logits


def drawn(count: int = 400, allowed: Tensor = ALL, context: list[int] | None = None, **params: Any) -> set[int]:
    """Every token that comes in `count` draws."""
    sampler = Sampler(SamplingParams(**{"temperature": 1.0, "seed": 0} | params), allowed)
    return {sampler.sample(known_logits(), context or []) for _ in range(count)}


@pytest.fixture(params=[(256, 4096), (1, 3), (2, 7), ()])
def first_candidates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few of the likeliest are looked at first, the filters leave the same."""
    monkeypatch.setattr(sampling, "FEW_CANDIDATES", request.param)


def test_greedy_takes_the_largest() -> None:
    assert drawn(5, temperature=0.0) == {5}
    assert drawn(5, temperature=0.0, seed=None, top_k=3, top_p=0.1, min_p=0.5) == {5}


def test_without_cuts_every_token_comes() -> None:
    assert drawn(2000) == set(range(8))


@pytest.mark.parametrize("k", [1, 2, 5, 8, 100])
def test_top_k_keeps_exactly_k(k: int) -> None:
    assert drawn(2000, top_k=k) == set(ORDER[:k])


@pytest.mark.usefixtures("first_candidates")
@pytest.mark.parametrize(("p", "kept"), [(0.01, 1), (0.39, 1), (0.41, 2), (0.59, 2), (0.61, 3), (0.76, 4), (1.0, 8)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(p: float, kept: int) -> None:
    assert drawn(2000, top_p=p) == set(ORDER[:kept])


@pytest.mark.usefixtures("first_candidates")
@pytest.mark.parametrize(("p", "kept"), [(0.0, 8), (0.05, 7), (0.13, 5), (0.3, 3), (0.4, 2), (0.6, 1), (0.99, 1)])
def test_min_p_keeps_what_is_likely_relative_to_the_likeliest(p: float, kept: int) -> None:
    assert drawn(2000, min_p=p) == set(ORDER[:kept])


@pytest.mark.usefixtures("first_candidates")
@pytest.mark.parametrize(("top_p", "min_p", "kept"), [(0.7, 0.3, 3), (0.9, 0.4, 2), (0.7, 0.01, 3), (0.999, 0.01, 8)])
def test_top_p_and_min_p_cut_where_the_first_of_them_does(top_p: float, min_p: float, kept: int) -> None:
    assert drawn(2000, top_p=top_p, min_p=min_p) == set(ORDER[:kept])


def test_cuts_work_together() -> None:
    # top-k 4 leaves 0.4 0.2 0.15 0.1 of 0.85; top-p 0.75 of these keeps three; min-p 0.45 of the first keeps two.
    assert drawn(2000, top_k=4) == set(ORDER[:4])
    assert drawn(2000, top_k=4, top_p=0.75) == set(ORDER[:3])
    assert drawn(2000, top_k=4, top_p=0.75, min_p=0.45) == set(ORDER[:2])


def test_temperature_sharpens_and_flattens() -> None:
    assert drawn(200, temperature=0.05) == {5}
    counts = [0] * 8
    sampler = Sampler(SamplingParams(temperature=100.0, seed=0), ALL)
    for _ in range(4000):
        counts[sampler.sample(known_logits(), [])] += 1
    assert min(counts) > 350


def test_frequencies_are_the_probabilities() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=1), ALL)
    tokens = [sampler.sample(known_logits(), []) for _ in range(5000)]
    for token, probability in zip(ORDER, PROBABILITIES, strict=True):
        assert tokens.count(token) / 5000 == pytest.approx(probability, abs=0.03)


def test_seed_gives_the_same_tokens_and_no_seed_others() -> None:
    def run(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), ALL)
        return [sampler.sample(known_logits(), []) for _ in range(50)]

    assert run(7) == run(7)
    assert run(7) != run(8)
    assert run(None) != run(None)


def test_repetition_penalty_as_published() -> None:
    """Positive logits are divided, negative ones multiplied. Source: arXiv 1909.05858."""
    logits = torch.tensor([2.0, 1.5, -1.0, -1.2])
    allowed = torch.ones(4, dtype=torch.bool)
    sampler = Sampler(SamplingParams(repetition_penalty=1.5), allowed)
    assert sampler.sample(logits, []) == 0
    assert sampler.sample(logits, [0, 0, 0]) == 1  # 2 / 1.5 once, however often it was seen
    negative = Sampler(SamplingParams(repetition_penalty=1.5), torch.tensor([False, False, True, True]))
    assert negative.sample(logits, []) == 2
    assert negative.sample(logits, [2]) == 3  # -1 x 1.5


@given(st.sets(st.integers(0, 7), min_size=1), st.integers(0, 2**31), st.sampled_from([0.0, 0.3, 1.0, 50.0]))
def test_forbidden_rows_never_come(permitted: set[int], seed: int, temperature: float) -> None:
    allowed = torch.zeros(8, dtype=torch.bool)
    allowed[list(permitted)] = True
    assert drawn(20, allowed, list(range(8)), temperature=temperature, seed=seed, repetition_penalty=1.3) <= permitted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_no_token(value: float, temperature: float) -> None:
    logits = known_logits()
    logits[3] = value
    with pytest.raises(GenerationError, match="not finite") as caught:
        Sampler(SamplingParams(temperature=temperature), ALL).sample(logits, [])
    assert caught.value.hint


def test_all_minus_infinity_gives_no_token() -> None:
    with pytest.raises(GenerationError, match="not finite"):
        Sampler(SamplingParams(), ALL).sample(torch.full((8,), float("-inf")), [])


def test_nan_in_a_padding_row_does_no_harm() -> None:
    logits = known_logits()
    logits[4] = float("nan")
    allowed = ALL.clone()
    allowed[4] = False
    assert Sampler(SamplingParams(), allowed).sample(logits, []) == 5


def test_the_logits_of_the_caller_are_not_changed() -> None:
    logits = known_logits()
    Sampler(SamplingParams(repetition_penalty=2.0, temperature=1.0), ALL).sample(logits, [5])
    assert torch.equal(logits, known_logits())


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
        {"stop": ("",)},
        {"stop": ("a", "")},
    ],
    ids=str,
)
def test_wrong_values_are_usage_errors(wrong: dict[str, Any]) -> None:
    name = next(iter(wrong))
    with pytest.raises(UsageError, match=f"{name} is .*expected"):
        SamplingParams(**wrong)


def test_defaults_of_a_generation_config() -> None:
    generation = {"temperature": 0.8, "top_p": 0.7, "eos_token_id": [1], "top_k": None, "do_sample": True, "seed": 3}
    assert SamplingParams().with_defaults(generation) == SamplingParams(temperature=0.8, top_p=0.7)
    assert SamplingParams().with_defaults({**generation, "do_sample": False}) == SamplingParams()
    kept = SamplingParams(max_new_tokens=5, seed=2, stop=("x",))
    assert kept.with_defaults({"top_k": 9}) == replace(kept, top_k=9)
