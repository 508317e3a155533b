"""Seconds of reading are predicted as attention grows with length, and from what was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4run.config import ModelConfig, parse_config
from glm4run.reading_speed import ATTENTION_COST, ReadingSpeed, reading_work
from tests.builders import raw_config

NINE_B: ModelConfig = parse_config(
    raw_config(
        hidden_size=4096,
        num_hidden_layers=40,
        num_attention_heads=32,
        head_dim=128,
        intermediate_size=13696,
        max_position_embeddings=131072,
    )
)
PER_LINEAR, PER_ATTENTION = 1 / 620e9, 1 / 118e9


def truth(tokens: int, before: int) -> float:
    """A machine with these two speeds."""
    work = reading_work(NINE_B, tokens, before)
    return work.linears * PER_LINEAR + work.attention * PER_ATTENTION


def test_work_is_the_weights_and_the_pairs_of_positions() -> None:
    layer = 4096 * (2 * 4096 + 2 * 2 * 128 + 3 * 13696)
    assert reading_work(NINE_B, 1).linears == 2 * 40 * layer
    # Scores and values: 2 operations each, for each head's 128 numbers, of a token with itself and all before it.
    pairs = sum(range(1, 101))
    assert reading_work(NINE_B, 100).attention == pytest.approx(4 * 40 * 32 * 128 * pairs, rel=0.01)


@given(st.integers(1, 60_000), st.integers(1, 60_000), st.integers(0, 60_000))
def test_parts_add_up_to_the_whole(first: int, second: int, before: int) -> None:
    parts = [reading_work(NINE_B, first, before), reading_work(NINE_B, second, before + first)]
    whole = reading_work(NINE_B, first + second, before)
    assert sum(part.linears for part in parts) == pytest.approx(whole.linears)
    assert sum(part.attention for part in parts) == pytest.approx(whole.attention)


def test_nothing_is_predicted_before_anything_was_measured() -> None:
    speed = ReadingSpeed(NINE_B)
    speed.note(0, 0, 1.0)
    speed.note(128, 0, 0.0)
    assert speed.seconds(1000) is None


def test_a_probe_is_enough_to_see_that_length_costs() -> None:
    speed = ReadingSpeed(NINE_B)
    speed.note(128, 0, truth(128, 0))
    for tokens in (512, 8192, 60_000):
        predicted = speed.seconds(tokens - 128, 128)
        assert predicted is not None
        assert predicted == pytest.approx(truth(tokens - 128, 128), rel=0.1), tokens
    linear = truth(128, 0) / 128 * 60_000
    assert speed.seconds(60_000, 0) > 4 * linear  # type: ignore[operator]  # what a mean speed would have promised


@pytest.mark.parametrize("cost", [0.5, 2.0, 20.0])
def test_measurements_replace_the_guess(cost: float) -> None:
    """On a machine whose attention costs something else than was guessed."""

    def there(tokens: int, before: int) -> float:
        work = reading_work(NINE_B, tokens, before)
        return (work.linears + cost * work.attention) * PER_LINEAR

    speed = ReadingSpeed(NINE_B)
    speed.note(128, 0, there(128, 0))
    at_first = speed.seconds(30_000, 128)
    for tokens, before in ((4000, 128), (512, 4128), (20_000, 5000), (300, 25_000)):
        speed.note(tokens, before, there(tokens, before))
    assert at_first is not None
    wrong = abs(at_first / there(30_000, 128) - 1)
    predicted = speed.seconds(30_000, 128)
    assert predicted == pytest.approx(there(30_000, 128), rel=0.1)
    assert wrong > 0.2 or cost == ATTENTION_COST


@given(st.lists(st.tuples(st.integers(128, 9000), st.integers(0, 9000), st.floats(0.01, 100)), min_size=1, max_size=8))
def test_whatever_was_measured_a_longer_prompt_takes_longer(measured: list[tuple[int, int, float]]) -> None:
    speed = ReadingSpeed(NINE_B)
    for tokens, before, seconds in measured:
        speed.note(tokens, before, seconds)
    predicted = [speed.seconds(tokens) for tokens in (100, 1000, 10_000)]
    assert all(value is not None and value > 0 for value in predicted)
    assert predicted == sorted(predicted)  # type: ignore[type-var]
