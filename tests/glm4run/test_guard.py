"""Degenerate answers: a loop is taken back once, what is not finite is computed again once, and then diagnosed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glm4run import LoadedModel, SamplingParams
from glm4run.answer import collect
from glm4run.chat_format import Message
from glm4run.errors import GenerationError
from glm4run.guard import DEAD_IN_A_ROW, Nonfinite, first_nonfinite
from glm4run.kv_cache import KVCache
from glm4run.session import Session
from glm4run.stopping import Loop, find_loop
from tests.builders import FIRST_PADDING, VOCAB
from tests.glm4run.test_kv_cache import CONFIG
from tests.scripted import loaded_model, with_script

RECOVERING = SamplingParams(recover=True)
HELLO = [Message("user", "hello")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return loaded_model(tmp_path_factory.mktemp("guard") / "tiny", context_len=512)


def test_where_a_loop_began() -> None:
    tail = [1, 2, 3] * 40
    assert find_loop([9, 8, *tail]) == Loop(2, 3)
    assert find_loop([3, *tail]) == Loop(0, 3)  # the round before it was cut
    assert find_loop([7] * 200) == Loop(0, 1)
    assert find_loop([*tail, 5]) is None


def test_a_loop_is_taken_back_once_and_written_on_from_its_first_round(tiny: LoadedModel) -> None:
    model, scripted = with_script(tiny, "\nstart" + " so on," * 30)
    after = tiny.tokenizer.encode("? done")  # what the script says once the model has gone back
    context = model.new_context()
    plain = scripted.logits_for

    def logits_for(token: int) -> Tensor:
        if len(scripted.all_fed) > context.cache.position and len(scripted.script) > len(after):
            scripted.script = after[1:]
            return plain(after[0])
        return plain(token)

    scripted.logits_for = logits_for  # type: ignore[method-assign]
    steps = list(model.stream(HELLO, RECOVERING, context=context))
    rollbacks = [step.rollback for step in steps if step.rollback is not None]
    assert len(rollbacks) == 1
    assert rollbacks[0].text == "start so on,"
    assert f"loop of {len(tiny.tokenizer.encode(' so on,'))} tokens" in rollbacks[0].why
    assert steps[-1].finish_reason == "stop"
    ids: list[int] = []
    for step in steps:
        if step.rollback is not None:
            del ids[len(ids) - step.rollback.tokens :]
        if step.token_id is not None:
            ids.append(step.token_id)
    assert tiny.tokenizer.decode(ids) == "\nstart so on,? done"
    assert context.ids[-len(ids) :] == ids  # the cache holds what is left, and nothing of the loop
    assert context.cache.position == len(context.ids)


def always_looping(tiny: LoadedModel) -> LoadedModel:
    model, scripted = with_script(tiny, "")
    scripted.after = ord("x")  # and never a stop
    return model


def test_a_second_loop_ends_the_answer(tiny: LoadedModel) -> None:
    steps = list(always_looping(tiny).stream(HELLO, RECOVERING))
    assert sum(step.rollback is not None for step in steps) == 1
    assert steps[-1].finish_reason == "repetition"
    again = list(always_looping(tiny).stream(HELLO, RECOVERING))
    assert [step.token_id for step in again] == [step.token_id for step in steps]  # greedy stays reproducible


def test_answers_and_conversations_hold_only_what_was_not_taken_back(tiny: LoadedModel) -> None:
    answer = collect(always_looping(tiny), HELLO, RECOVERING)
    assert "loop" in answer.recovered and answer.as_json()["recovered"] == answer.recovered
    assert tiny.tokenizer.decode(answer.token_ids) == answer.text
    session = Session(always_looping(tiny), RECOVERING)
    heard = list(session.say("hello"))
    turn = session.conversation.path()[-1]
    assert turn.finish_reason == "repetition"
    assert tiny.tokenizer.decode(turn.ids[1:]) == turn.message.content == answer.text
    assert len(turn.ids) - 1 < sum(step.token_id is not None for step in heard)


def test_without_recovery_the_first_loop_ends_it(tiny: LoadedModel) -> None:
    steps = list(always_looping(tiny).stream(HELLO, SamplingParams()))
    assert (steps[-1].finish_reason, [s for s in steps if s.rollback]) == ("repetition", [])


def test_a_fault_that_passes_is_computed_again(tiny: LoadedModel) -> None:
    """One key of the cache turns NaN in the middle of an answer; the answer is the same as without it."""
    expected = [s.token_id for s in tiny.stream(HELLO, SamplingParams(max_new_tokens=12))]
    context = tiny.new_context()
    got: list[int | None] = []
    said = []
    for step in tiny.stream(HELLO, SamplingParams(max_new_tokens=12), context=context):
        if step.rollback is not None:
            said.append(step.rollback.why)
        else:
            got.append(step.token_id)
        if len(got) == 5 and not said:
            context.cache.layers[1].keys.data[0, 3, 5] = float("nan")
    assert got == expected
    assert said == ["the output was not finite"]


def test_a_fault_that_stays_is_diagnosed(tiny: LoadedModel, tmp_path: Path) -> None:
    broken = loaded_model(tmp_path)
    broken.model.get_parameter("model.layers.1.self_attn.k_proj.weight").data[3] = float("nan")
    with pytest.raises(GenerationError, match=r"not finite.*first key or value.* in layer 1, token 0 of \d"):
        list(broken.stream(HELLO, SamplingParams()))
    broken = loaded_model(tmp_path)
    broken.model.lm_head.weight.data[7] = float("inf")
    with pytest.raises(GenerationError, match="of all layers are finite"):
        list(broken.stream(HELLO, SamplingParams()))


def test_the_first_that_is_not_finite_is_found(tiny: LoadedModel) -> None:
    context = tiny.new_context()
    tiny.prefill(list(range(40, 60)), context)
    assert first_nonfinite(context.cache) is None
    context.cache.layers[0].values.data[1, 9, 0] = float("inf")
    context.cache.layers[1].keys.data[0, 4, 7] = float("nan")
    assert first_nonfinite(context.cache) == Nonfinite(1, 4)
    context.cache.truncate(4)
    assert first_nonfinite(context.cache) is None


def test_only_what_a_cache_holds_must_be_finite() -> None:
    """Where bf16 lie as words of a block, that of rows which nobody wrote is anything."""
    shape = (2, 70, 64)
    config = dataclasses.replace(CONFIG, num_key_value_heads=2, head_dim=64)
    cache = KVCache(config, 128, dtype=torch.bfloat16, device=torch.device("cpu"), floats_for_cpu=True)
    for layer in range(len(cache.layers)):
        for tensor in cache.tensors(layer).values():
            tensor.fill_(float("nan"))
        cache.append(layer, torch.ones(shape).bfloat16(), torch.ones(shape).bfloat16())
    cache.advance(70)
    assert first_nonfinite(cache) is None
    bad = torch.ones(2, 1, 64).bfloat16()
    bad[1, 0, 3] = float("inf")
    cache.append(1, torch.ones_like(bad), bad)
    cache.advance(1)
    assert first_nonfinite(cache) == Nonfinite(0, 70)  # of layer 0 nothing was written there
    cache.truncate(70)
    cache.append(0, torch.ones_like(bad), torch.ones_like(bad))
    cache.advance(1)
    assert first_nonfinite(cache) == Nonfinite(1, 70)


def test_ids_without_a_token_are_a_diagnosis_when_they_come_again_and_again(tiny: LoadedModel) -> None:
    model, scripted = with_script(tiny, "")

    def dead(token: int) -> Tensor:
        logits = torch.zeros(VOCAB)
        logits[65 + len(scripted.fed)] = 10.0
        logits[FIRST_PADDING] = 20.0
        return logits

    scripted.logits_for = dead  # type: ignore[method-assign]
    answer = collect(model, HELLO, RECOVERING)
    assert answer.finish_reason == "error" and len(answer.token_ids) == DEAD_IN_A_ROW - 1
    assert answer.error is not None and "has no token" in answer.error.message


def test_output_that_prefers_nothing_is_dead(tiny: LoadedModel) -> None:
    model, scripted = with_script(tiny, "")
    scripted.logits_for = lambda token: torch.zeros(VOCAB)  # type: ignore[method-assign]
    with pytest.raises(GenerationError, match="its output is dead"):
        list(model.stream(HELLO, dataclasses.replace(RECOVERING, temperature=1.0)))
