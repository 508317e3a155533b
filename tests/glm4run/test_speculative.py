"""Drafts from the context: what is found, what it costs, and that no text ever changes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from glm4run import LoadedModel, SamplingParams, load_model
from glm4run.answer import collect
from glm4run.batch_decoding import Job, answer_together, choose_batch
from glm4run.cards import demo_folder
from glm4run.errors import GenerationError, UsageError
from glm4run.model import Glm4Model
from glm4run.speculative import (
    CANDIDATES,
    LEAST_GAIN,
    LONGEST_MATCH,
    MOST_DRAFTED,
    SHORTEST_MATCH,
    Acceptance,
    NgramIndex,
    Speculate,
    Speculation,
    StepCosts,
    parse_speculate,
)
from glm4run.steps import Context, GenerationStep, Timings
from tests.builders import VOCAB
from tests.native_library import needs_library, running
from tests.scripted import ScriptedModel, loaded_model

TEXT = "The log says: red fox, blue bird, green frog. Again: red fox, blue bird, green frog. And again: red fox, blue"


# --- the index


def longest_match(ids: list[int]) -> int:
    """How many tokens the end shares with an earlier place, by looking at all of them."""
    best = 0
    for at in range(len(ids) - 1):
        count = 0
        while count <= at and count < LONGEST_MATCH and ids[at - count] == ids[len(ids) - 1 - count]:
            count += 1
        best = max(best, count)
    return best if best >= SHORTEST_MATCH else 0


@given(st.lists(st.integers(0, 3), max_size=CANDIDATES), st.integers(0, 30), st.lists(st.integers(0, 3), max_size=9))
def test_the_longest_match_is_found_and_a_shorter_context_forgets(ids: list[int], kept: int, more: list[int]) -> None:
    index = NgramIndex()
    index.extend(ids)
    index.truncate(min(kept, len(ids)))
    index.extend(more)
    now = [*ids[:kept], *more]
    fresh = NgramIndex()
    fresh.extend(now)
    draft = index.draft(5)
    assert draft == fresh.draft(5)
    assert (draft.match if draft is not None else 0) == longest_match(now)
    if draft is not None:  # it stands behind the same words somewhere, or goes round from there
        whole = [*now, *draft.tokens]
        matches = [at for at in range(len(now) - 1) if whole[at + 1 : at + 6] == list(draft.tokens)]
        assert any(now[at] == now[-1] and now[at - 1] == now[-2] for at in matches)


def test_the_latest_of_equal_matches_is_taken_and_a_short_tail_goes_round() -> None:
    index = NgramIndex()
    index.extend([1, 2, 3, 9, 1, 2, 4, 9, 1, 2])
    assert index.draft(3) is not None and index.draft(3).tokens == (4, 9, 1)  # type: ignore[union-attr]
    index.extend([1, 2, 1, 2])
    assert index.draft(4).tokens == (1, 2, 1, 2)  # type: ignore[union-attr]


# --- what is drafted


def simulate(tokens: list[int], costs: list[float], mode: Speculate = "auto") -> tuple[float, int]:
    """Forwards of one token that a text takes, and tokens accepted, on a machine with these costs of 1 to 8 tokens."""
    speculation = Speculation(mode, StepCosts())
    spent, accepted, ahead = 0.0, 0, list[int]()
    for at, token in enumerate(tokens):
        speculation.chosen(token)
        if ahead and ahead[0] == token:
            ahead.pop(0)
            accepted += 1
            speculation.accepted()
            continue
        ahead = list(speculation.draft(tokens[:at], token, min(MOST_DRAFTED, len(tokens) - at - 1)))
        spent += costs[len(ahead)]
        speculation.fed(1 + len(ahead), costs[len(ahead)] * 0.01)
    return spent, accepted


CHEAP = [1.0, 1.02, 1.2, 1.3, 1.6, 1.7, 1.9, 2.0]
DEAR = [1.0, 1.9, 2.8, 3.7, 4.6, 5.5, 6.4, 7.3]  # as where arithmetic bounds a forward


@pytest.mark.parametrize("costs", [CHEAP, DEAR], ids=["cheap", "dear"])
@pytest.mark.parametrize("vocabulary", [2, 3, 10, 50000])
@pytest.mark.parametrize("length", [60, 1000])
def test_random_text_costs_at_most_three_percent(costs: list[float], vocabulary: int, length: int) -> None:
    """And a step: what is lost before anything is known of a text."""
    source = random.Random(vocabulary)
    for _ in range(5):
        spent, _ = simulate([source.randrange(vocabulary) for _ in range(length)], costs)
        assert spent <= length * 1.03 + (1.0 if costs is CHEAP else 3.0)


def test_copied_text_takes_less_than_half() -> None:
    source = random.Random(1)
    words = [source.randrange(1000) for _ in range(150)]
    for mode in ("auto", MOST_DRAFTED):
        spent, accepted = simulate(words * 4, CHEAP, mode)
        assert spent < 150 + 450 / 2.5
        assert accepted > 350


def test_where_drafts_do_not_pay_copied_text_is_not_drafted() -> None:
    words = list(range(100))
    spent, _ = simulate(words * 4, [1.0 + i for i in range(8)])
    assert spent <= 400 * 1.03 + 1.0


def test_costs_are_learned_and_a_stopped_process_changes_little() -> None:
    costs = StepCosts()
    for _ in range(200):
        costs.observe(1, 0.1)
        costs.observe(4, 0.15)
    assert costs.of(4) == pytest.approx(1.5, rel=0.05)
    costs.observe(4, 60.0)
    assert costs.of(4) < 1.75
    for _ in range(100):  # a slower machine is no dearer draft
        costs.observe(1, 0.2)
        costs.observe(4, 0.3)
    assert costs.of(4) < 1.9


def test_shares_are_learned_by_length_and_fade() -> None:
    acceptance = Acceptance()
    for _ in range(500):
        acceptance.observe(2, right=False)
        acceptance.observe(40, right=True)
    assert acceptance.likelihood(2) < 0.05 and acceptance.likelihood(LONGEST_MATCH) > 0.95
    for _ in range(100):
        acceptance.observe(2, right=True)
    assert acceptance.likelihood(2) > 0.8
    assert LEAST_GAIN > 1


@pytest.mark.parametrize("text", ["0", "8", "-1", "yes", ""])
def test_what_speculate_cannot_be(text: str) -> None:
    with pytest.raises(UsageError, match="speculate"):
        parse_speculate(text)


# --- the same text


@pytest.fixture(scope="module")
def demo() -> Iterator[LoadedModel]:
    with running(threads=1):
        loaded = load_model(demo_folder(), backend="native", context_len=300, threads=1)
        yield dataclasses.replace(loaded, stop_ids=frozenset())  # so that its answers go on


def steps_of(
    model: LoadedModel, params: SamplingParams, mode: Speculate
) -> tuple[list[GenerationStep], Timings, Context]:
    timings, context = Timings(), model.new_context()
    params = dataclasses.replace(params, speculate=mode)
    steps = list(model.stream(TEXT, params, context=context, timings=timings))
    assert context.cache.position == len(context.ids)
    return steps, timings, context


CASES = {
    "greedy": SamplingParams(max_new_tokens=60),
    "until the context is full": SamplingParams(stop_on_repetition=False),
    "sampled": SamplingParams(max_new_tokens=60, temperature=0.8, top_p=0.9, seed=5),
    "filters": SamplingParams(max_new_tokens=60, temperature=1.0, top_k=20, min_p=0.02, seed=6),
    "penalty": SamplingParams(max_new_tokens=60, repetition_penalty=1.2),
    "penalty, sampled": SamplingParams(max_new_tokens=60, temperature=0.5, repetition_penalty=1.3, seed=1),
    "logprobs": SamplingParams(max_new_tokens=30, logprobs=3, temperature=0.5, seed=2),
    "a loop": SamplingParams(max_new_tokens=200),
    "a loop taken back": SamplingParams(max_new_tokens=200, recover=True),
}


@needs_library
@pytest.mark.parametrize("case", CASES)
def test_every_step_is_the_same_with_drafts(demo: LoadedModel, case: str) -> None:
    params = CASES[case]
    expected, timings, context = steps_of(demo, params, "off")
    assert timings.drafted_tokens == 0
    for mode in ("auto", 1, 3, MOST_DRAFTED):
        steps, drafted, ours = steps_of(demo, params, mode)
        assert steps == expected, mode
        assert ours.ids == context.ids
        assert drafted.accepted_tokens <= drafted.drafted_tokens
        assert mode == "auto" or drafted.drafted_tokens > 0
        assert drafted.decode_tokens == timings.decode_tokens  # what was drafted in vain is no token
        for layer in range(demo.config.num_hidden_layers):
            for name, rows in ours.cache.rows(layer, 0, len(ours.ids)).items():
                assert torch.equal(rows, context.cache.rows(layer, 0, len(ours.ids))[name])


@needs_library
def test_stops_and_limits_inside_a_draft(demo: LoadedModel) -> None:
    """Wherever the answer ends, also in the middle of drafted tokens."""
    whole, _, _ = steps_of(demo, SamplingParams(max_new_tokens=40), "off")
    text = "".join(step.text for step in whole)
    ids = [step.token_id for step in whole if step.token_id is not None]
    stops = [text[at : at + 3] for at in range(5, len(text) - 3, 7)]
    cases = [SamplingParams(max_new_tokens=40, stop=(stop,)) for stop in stops]
    cases += [SamplingParams(max_new_tokens=count) for count in range(1, 40, 4)]
    for params in cases:
        assert steps_of(demo, params, MOST_DRAFTED)[0] == steps_of(demo, params, "off")[0], params
    for token in set(ids[4:24:3]):
        stopping = dataclasses.replace(demo, stop_ids=frozenset({token}))
        params = SamplingParams(max_new_tokens=40)
        assert steps_of(stopping, params, MOST_DRAFTED)[0] == steps_of(stopping, params, "off")[0], token


@needs_library
def test_an_answer_closed_at_any_step_leaves_a_context_to_go_on_with(demo: LoadedModel) -> None:
    params = SamplingParams(max_new_tokens=30, speculate=MOST_DRAFTED)
    expected = collect(demo, TEXT, dataclasses.replace(params, speculate="off")).token_ids
    for count in (3, 10, 17):
        context = demo.new_context()
        stream = demo.stream(TEXT, params, context=context)
        begun = [next(stream).token_id for _ in range(count)]
        stream.close()  # type: ignore[attr-defined]
        assert context.cache.position == len(context.ids)
        prompt = [*demo.encode_prompt(TEXT), *(i for i in begun if i is not None)]
        rest = demo.stream(prompt, dataclasses.replace(params, max_new_tokens=30 - count), context=context)
        assert [*begun, *(step.token_id for step in rest if step.token_id is not None)] == expected


def test_no_drafts_where_other_shapes_round_differently(tmp_path: Path) -> None:
    model = loaded_model(tmp_path / "tiny")
    assert model.why_no_speculation is not None
    answer = collect(model, "hello hello hello", SamplingParams(max_new_tokens=20, stop_on_repetition=False))
    assert answer.timings.drafted_tokens == 0


# --- the distribution, on a network whose logits are known


class Fixed(ScriptedModel):
    """The same logits behind every token."""

    def __init__(self, likely: dict[int, float], broken_at: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.row = torch.full((VOCAB,), -30.0)
        for token, probability in likely.items():
            self.row[token] = math.log(probability)
        self.broken_at = set(broken_at)  # forwards whose second row is not finite

    def __call__(self, ids: Tensor, cache: object = None, *, logits: str = "last") -> Tensor:
        self.hidden_states(ids, cache)  # type: ignore[arg-type]
        rows = self.row.repeat(len(ids) if logits == "all" else 1, 1)
        if len(self.fed) in self.broken_at and len(rows) > 1:
            rows[1] = float("nan")
        return rows


def with_drafts(loaded: LoadedModel, network: ScriptedModel) -> LoadedModel:
    model = dataclasses.replace(loaded, model=cast(Glm4Model, network))
    model.__dict__["why_no_speculation"] = None
    return model


def test_sampled_tokens_keep_their_distribution(tmp_path: Path) -> None:
    likely = {ord("a"): 0.55, ord("b"): 0.3, ord("c"): 0.15}
    model = with_drafts(loaded_model(tmp_path / "tiny", context_len=500), Fixed(likely))
    timings, ids = Timings(), list[int]()
    for seed in range(4):
        params = SamplingParams(max_new_tokens=400, temperature=1.0, seed=seed, speculate=3, stop_on_repetition=False)
        steps = model.stream("abcabc", params, timings=timings)
        ids += [step.token_id for step in steps if step.token_id is not None]
    assert timings.accepted_tokens > 200
    counts = Counter(ids)
    for token, probability in likely.items():
        sigma = math.sqrt(probability * (1 - probability) / len(ids))
        assert abs(counts[token] / len(ids) - probability) < 4 * sigma, chr(token)
    # Pairs too: that one was drafted behind the other must not show.
    pairs = Counter(itertools.pairwise(ids))
    for first, before in likely.items():
        for second, after in likely.items():
            sigma = math.sqrt(before * after / len(ids))
            assert abs(pairs[first, second] / len(ids) - before * after) < 5 * sigma


def test_an_answer_says_what_was_drafted_and_what_came(tmp_path: Path) -> None:
    model = with_drafts(loaded_model(tmp_path / "tiny"), Fixed({ord("a"): 0.9}))
    answer = collect(model, "aaaa", SamplingParams(max_new_tokens=40, speculate=3, stop_on_repetition=False))
    timings = answer.timings
    assert answer.as_json()["speculation"] == {"drafted": 29, "accepted": 29}  # the fortieth token is never fed
    assert (timings.decode_tokens, timings.drafted_tokens, timings.accepted_tokens) == (39, 29, 29)


def test_logits_of_a_draft_that_are_not_finite_are_computed_again(tmp_path: Path) -> None:
    network = Fixed({ord("a"): 0.9}, broken_at=frozenset({3}))
    model = with_drafts(loaded_model(tmp_path / "tiny"), network)
    params = SamplingParams(max_new_tokens=20, speculate=3, stop_on_repetition=False)
    steps = list(model.stream("aaaa", params))
    assert [step.token_id for step in steps if step.token_id is not None] == [ord("a")] * 20
    assert sum(step.rollback is not None for step in steps) == 1
    always = with_drafts(loaded_model(tmp_path / "again"), Fixed({ord("a"): 0.9}, broken_at=frozenset(range(99))))
    with pytest.raises(GenerationError, match="not finite"):
        list(always.stream("aaaa", params))


@needs_library
@pytest.mark.parametrize("kv_bits", [8, 4])
def test_drafts_and_batches_over_a_quantized_cache(kv_bits: int) -> None:
    with running(threads=1):
        loaded = load_model(demo_folder(), backend="native", context_len=300, threads=1, kv_bits=kv_bits)
        model = dataclasses.replace(loaded, stop_ids=frozenset())
        params = SamplingParams(max_new_tokens=40)
        expected = steps_of(model, params, "off")[0]
        assert steps_of(model, params, MOST_DRAFTED)[0] == expected
        jobs = [Job(model.encode_prompt(TEXT[: 20 + 9 * n]), params, chat=False) for n in range(4)]
        together = dict(answer_together(model, jobs, choose_batch(model, jobs, 4)))
        for number, job in enumerate(jobs):
            assert together[number].token_ids == collect(model, job.ids, params).token_ids
