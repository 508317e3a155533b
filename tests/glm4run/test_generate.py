"""Every way an answer can end, what is fed to the model and what comes out of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm4run import LoadedModel, SamplingParams, load_model, ready_model
from glm4run.answer import collect
from glm4run.chat_format import Message, encode_chat
from glm4run.dialects import DIALECTS
from glm4run.errors import CheckpointError, DoesNotFitError, GenerationError, UsageError
from glm4run.memory import workspace
from glm4run.steps import GenerationStep, Timings
from tests.builders import (
    FIRST_PADDING,
    PREFIX,
    RANKS,
    SPECIAL_IDS,
    STOP_IDS,
    VOCAB,
    edit_json,
    write_checkpoint,
    write_json,
)
from tests.scripted import END, loaded_model, with_script

CONTEXT = 512
GREEDY = SamplingParams(max_new_tokens=20)
HELLO = [Message("user", "hello")]
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "", "parameters": {}}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A real network of random weights in the 2024 chat dialect, context 512."""
    return loaded_model(tmp_path_factory.mktemp("generate") / "tiny", context_len=CONTEXT)


def in_chunks(model: LoadedModel, chunk: int) -> LoadedModel:
    """The same model with a plan that feeds `chunk` tokens at once."""
    return dataclasses.replace(model, plan=dataclasses.replace(model.plan, chunk=chunk))


def text_of(steps: Iterable[GenerationStep]) -> str:
    return "".join(step.text for step in steps)


def ids_of(steps: Iterable[GenerationStep]) -> list[int]:
    return [step.token_id for step in steps if step.token_id is not None]


# --- how an answer ends


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|user|>", "<|observation|>"])
def test_stops_on_each_stop_token_and_says_which(tiny: LoadedModel, name: str) -> None:
    model, _ = with_script(tiny, "hello", after=SPECIAL_IDS[name])
    steps = list(model.stream(HELLO))
    assert text_of(steps) == "hello"
    assert (steps[-1].finish_reason, steps[-1].stopped_by, steps[-1].token_id) == ("stop", name, None)
    assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)


@pytest.mark.parametrize("listed", [None, STOP_IDS[1], [STOP_IDS[0]], -1, [-1]])
def test_stop_ids_are_all_that_anyone_names(tmp_path: Path, listed: Any) -> None:
    folder = write_checkpoint(tmp_path)
    edit_json(folder / "config.json", eos_token_id=listed)
    assert load_model(folder).stop_ids == frozenset(STOP_IDS)
    write_json(folder / "generation_config.json", {"eos_token_id": [5, 6]})
    loaded = load_model(folder)
    assert loaded.stop_ids == {*STOP_IDS, 5, 6}
    model, _ = with_script(loaded, "hello", after=6)
    assert list(model.stream("x"))[-1].stopped_by == "6"


def test_max_tokens(tiny: LoadedModel) -> None:
    model, scripted = with_script(tiny, "abcdefgh")
    steps = list(model.stream(HELLO, SamplingParams(max_new_tokens=3)))
    assert (text_of(steps), steps[-1].finish_reason) == ("abc", "max_tokens")
    assert len(scripted.fed) == 3  # the third token is not fed for nothing


@pytest.mark.parametrize("room", [1, 2, 10])
def test_context_full_at_its_very_end(tiny: LoadedModel, room: int) -> None:
    model, scripted = with_script(tiny, [ord("a") + n % 20 for n in range(300)])
    prompt = [65] * (CONTEXT - room)
    steps = list(model.stream(prompt, SamplingParams()))
    assert steps[-1].finish_reason == "context_full"
    assert len(ids_of(steps)) == room + 1  # the last token needs no place: nothing comes after it
    assert len(scripted.all_fed) == CONTEXT


def test_prompt_as_long_as_the_context_and_one_longer(tiny: LoadedModel) -> None:
    model, scripted = with_script(tiny, "abc")
    steps = list(model.stream([65] * CONTEXT, SamplingParams()))
    assert (ids_of(steps), steps[-1].finish_reason) == ([97], "context_full")
    scripted.fed.clear()
    with pytest.raises(DoesNotFitError, match="has 513 tokens, the context holds 512") as caught:
        model.stream([65] * (CONTEXT + 1), SamplingParams())
    assert scripted.fed == []
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_loops_end_with_repetition(tiny: LoadedModel) -> None:
    model, _ = with_script(tiny, "so on, " * 100)
    steps = list(model.stream("x", SamplingParams()))
    assert steps[-1].finish_reason == "repetition"
    assert len(ids_of(steps)) < 110
    model, _ = with_script(tiny, "so on, " * 30)
    assert list(model.stream("x", SamplingParams(stop_on_repetition=False)))[-1].finish_reason == "stop"


@pytest.mark.parametrize("stop", ["STOP", "好", "x S"])
def test_stop_string_is_never_shown(tiny: LoadedModel, stop: str) -> None:
    model, _ = with_script(tiny, f"some te{stop} more")
    steps = list(model.stream(HELLO, SamplingParams(stop=("unseen", stop))))
    assert text_of(steps) == "some te"
    assert (steps[-1].finish_reason, steps[-1].stopped_by) == ("stop", stop)


def test_beginning_of_a_stop_string_is_shown_at_the_end(tiny: LoadedModel) -> None:
    for params in (SamplingParams(stop=("STOP",)), SamplingParams(stop=("STOP",), max_new_tokens=10)):
        model, _ = with_script(tiny, "some te STO")
        assert text_of(model.stream(HELLO, params)) in ("some te STO", "some te ST")
    model, _ = with_script(tiny, "some te STO")
    assert text_of(model.stream(HELLO, SamplingParams(stop=("STOP",)))) == "some te STO"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_ends_with_an_error_and_no_token(tiny: LoadedModel, temperature: float) -> None:
    model, scripted = with_script(tiny, "hello")
    scripted.logits_for = lambda token: torch.full((VOCAB,), float("nan"))  # type: ignore[method-assign]
    with pytest.raises(GenerationError):
        list(model.stream(HELLO, SamplingParams(temperature=temperature)))
    answer = collect(model, HELLO, SamplingParams(temperature=temperature))
    assert (answer.finish_reason, answer.text, answer.token_ids) == ("error", "", [])
    assert "not finite" in answer.as_json()["error"]


def test_real_model_with_a_nan_weight_ends_with_an_error(tiny: LoadedModel, tmp_path: Path) -> None:
    broken = load_model(write_checkpoint(tmp_path), dtype="fp32")
    broken.model.lm_head.weight.data[7] = float("nan")
    with pytest.raises(GenerationError, match="not finite"):
        list(broken.stream("hello", GREEDY))


# --- which tokens may come


def test_padding_rows_never_come(tiny: LoadedModel) -> None:
    for row in range(FIRST_PADDING, VOCAB):
        model, _ = with_script(tiny, [row])
        assert ids_of(model.stream("x"))[0] == ord("?")  # the second choice


def test_control_tokens_other_than_stops_never_come(tiny: LoadedModel) -> None:
    for name, token in SPECIAL_IDS.items():
        model, _ = with_script(tiny, [token])
        steps = list(model.stream(HELLO))
        assert text_of(steps) == ("" if token in STOP_IDS else "?"), name


def test_hot_sampling_of_random_weights_stays_in_the_vocabulary(tiny: LoadedModel) -> None:
    params = SamplingParams(temperature=100.0, seed=1, max_new_tokens=200)
    steps = list(tiny.stream("x", params))
    assert len(set(ids_of(steps))) > 20
    assert max(ids_of(steps)) < len(RANKS)
    assert not any(name in text_of(steps) for name in SPECIAL_IDS)


def test_same_seed_same_text(tiny: LoadedModel) -> None:
    def run(seed: int) -> list[int]:
        return ids_of(tiny.stream(HELLO, SamplingParams(temperature=1.0, seed=seed, max_new_tokens=15)))

    assert run(3) == run(3) != run(4)


# --- what the model is fed


def test_text_is_continued_behind_one_prefix(tiny: LoadedModel) -> None:
    model, scripted = with_script(tiny, "")
    list(model.stream("hello [gMASK]<sop><|user|>"))
    assert scripted.fed[0][:2] == list(PREFIX)
    assert [i for i in scripted.fed[0] if i in model.tokenizer.special_ids] == list(PREFIX)


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_messages_have_one_prefix_in_every_dialect(tiny: LoadedModel, dialect: str) -> None:
    tiny = dataclasses.replace(tiny, dialect=DIALECTS[dialect])
    model, scripted = with_script(tiny, "")
    messages = [Message("system", "be brief"), *HELLO, Message("assistant", "yes"), *HELLO]
    list(model.stream(messages, tools=[WEATHER]))
    assert scripted.fed[0][:2] == list(PREFIX)
    assert sum(i in PREFIX for i in scripted.fed[0]) == 2
    assert scripted.fed[0] == encode_chat(tiny.tokenizer, DIALECTS[dialect], messages, [WEATHER])


def test_ids_are_fed_as_they_are(tiny: LoadedModel) -> None:
    model, scripted = with_script(tiny, "")
    list(model.stream([1, 2, 3]))
    assert scripted.fed[0] == [1, 2, 3]


@pytest.mark.parametrize("prompt", [[], [VOCAB], [-1], [1, 2, VOCAB + 5]], ids=str)
def test_wrong_ids_are_usage_errors(tiny: LoadedModel, prompt: list[int]) -> None:
    model, scripted = with_script(tiny, "")
    with pytest.raises(UsageError):
        model.stream(prompt)
    with pytest.raises(UsageError):
        model.logits(prompt)
    assert scripted.fed == []


def test_logits_come_in_blocks_and_are_the_same(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [*PREFIX, *range(60)]
    whole = tiny.model(torch.tensor(prompt), tiny.new_context().cache, logits="all")
    monkeypatch.setattr(workspace, "MAX_LOGITS_BYTES", 7 * 4 * VOCAB)
    assert torch.allclose(tiny.logits(prompt), whole, atol=1e-5)


def test_logits_without_room_are_refused_before_they_are_computed(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, scripted = with_script(tiny, "")
    monkeypatch.setattr(ready_model, "available_bytes", lambda device: 4 * VOCAB * 100)
    with pytest.raises(DoesNotFitError, match="logits of 200 positions"):
        model.logits([1] * 200)
    assert scripted.fed == []


def test_base_model_refuses_messages_and_names_chat_variants(tiny: LoadedModel) -> None:
    base = dataclasses.replace(tiny, dialect=None)
    with pytest.raises(CheckpointError, match="base model") as caught:
        base.stream(HELLO)
    assert caught.value.hint is not None and "glm-4-9b-chat" in caught.value.hint


def test_prefill_in_chunks_is_the_same(tiny: LoadedModel) -> None:
    prompt = [*PREFIX, *range(60)]
    whole, logits = ids_of(tiny.stream(prompt, GREEDY)), tiny.logits(prompt)
    model, scripted = with_script(tiny, "")
    for chunk in (1, 7, 31, 62, 100):
        assert ids_of(in_chunks(tiny, chunk).stream(prompt, GREEDY)) == whole
        assert torch.allclose(in_chunks(tiny, chunk).logits(prompt), logits, atol=1e-4)
        scripted.fed.clear()
        list(in_chunks(model, chunk).stream(prompt))
        assert scripted.all_fed == prompt
        assert max(len(part) for part in scripted.fed) == min(chunk, len(prompt))


def test_prefill_reports_its_progress(tiny: LoadedModel) -> None:
    calls: list[tuple[int, int]] = []
    list(in_chunks(tiny, 4).stream([1] * 10, GREEDY, on_prefill=lambda done, total: calls.append((done, total))))
    assert calls == [(0, 10), (4, 10), (8, 10), (10, 10)]


def test_head_runs_on_the_last_position_only(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    head = tiny.model.lm_head
    handle = head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[-2]))
    try:
        list(tiny.stream([1] * 50, SamplingParams(max_new_tokens=3)))
    finally:
        handle.remove()
    assert rows == [1, 1, 1]


def test_generation_is_what_the_logits_say(tiny: LoadedModel) -> None:
    ids = list(PREFIX)
    for token in ids_of(tiny.stream("", GREEDY)):
        logits: Tensor = tiny.logits(ids)[-1]
        allowed = [*range(len(RANKS)), *STOP_IDS]
        assert max(allowed, key=lambda i: float(logits[i])) == token
        ids.append(token)


# --- reuse of a context


def test_context_prefills_only_what_is_new(tiny: LoadedModel) -> None:
    model, scripted = with_script(tiny, "abc")
    context = model.new_context()
    list(model.stream([1, 2, 3, 4], context=context))
    assert scripted.all_fed == [1, 2, 3, 4, 97, 98, 99]
    assert context.ids == scripted.all_fed
    for prompt, new in (
        ([1, 2, 3, 4, 97, 98, 99, 5], [5]),
        ([1, 2, 3, 4, 97, 98, 99, 5], [5]),  # the last token is always needed, for its logits
        ([1, 2, 9, 9], [9, 9]),
        ([1, 2], [2]),
        ([7, 2], [7, 2]),
    ):
        scripted.fed.clear()
        list(model.stream(prompt, context=context))
        assert scripted.all_fed == new
        assert context.ids == prompt
        assert context.cache.position == len(prompt)


def test_reused_context_gives_the_same_answer(tiny: LoadedModel) -> None:
    context = tiny.new_context()
    prompt = [*PREFIX, *range(40)]
    first = ids_of(tiny.stream(prompt, GREEDY, context=context))
    for following in ([*prompt, *first, 7, 8], [*prompt[:20], 3], prompt):
        assert ids_of(tiny.stream(following, GREEDY, context=context)) == ids_of(tiny.stream(following, GREEDY))


@pytest.mark.parametrize("interrupt_at", range(5))
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupt_inside_a_forward_leaves_the_context_whole(
    tiny: LoadedModel, error: type[BaseException], interrupt_at: int
) -> None:
    tiny = in_chunks(tiny, 16)
    prompt = [*PREFIX, *range(40)]  # three chunks
    context = tiny.new_context()
    forwards = 0

    def interrupt(module: Any, inputs: Any) -> None:
        """Strikes in the second layer: the first has written its keys and values already."""
        nonlocal forwards
        if forwards == interrupt_at:
            raise error
        forwards += 1

    handle = tiny.model.model.layers[1].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(error):
            list(tiny.stream(prompt, GREEDY, context=context))
    finally:
        handle.remove()
    assert len(context.ids) == context.cache.position == min(16 * interrupt_at, 42) + max(0, interrupt_at - 3)
    other = [*prompt[:30], 99, 98]
    assert ids_of(tiny.stream(other, GREEDY, context=context)) == ids_of(tiny.stream(other, GREEDY))
    assert ids_of(tiny.stream(prompt, GREEDY, context=context)) == ids_of(tiny.stream(prompt, GREEDY))


def test_closing_the_iterator_leaves_the_context_whole(tiny: LoadedModel) -> None:
    context = tiny.new_context()
    steps = tiny.stream([1, 2, 3], GREEDY, context=context)
    first = next(steps).token_id
    steps.close()  # type: ignore[attr-defined]  # it is a generator
    assert context.ids == [1, 2, 3]
    assert ids_of(tiny.stream([1, 2, 3, 4], GREEDY, context=context)) == ids_of(tiny.stream([1, 2, 3, 4], GREEDY))
    assert first is not None


def test_timings_count_tokens(tiny: LoadedModel) -> None:
    timings = Timings()
    list(tiny.stream([1, 2, 3], SamplingParams(max_new_tokens=4), timings=timings))
    assert (timings.prefill_tokens, timings.decode_tokens) == (3, 3)
    assert timings.prefill_s > 0 and timings.decode_s > 0


# --- text


def test_streamed_text_is_whole_characters(tiny: LoadedModel) -> None:
    text = "héllo 你好 🚀 fin"
    model, _ = with_script(tiny, list(text.encode()))  # one byte a token
    steps = list(model.stream(HELLO))
    assert text_of(steps) == text
    assert all("\ufffd" not in step.text for step in steps)


def test_half_a_character_at_the_end_is_replaced(tiny: LoadedModel) -> None:
    model, _ = with_script(tiny, list("x🚀".encode())[:-1])
    assert text_of(model.stream(HELLO)) == "x\ufffd"


@pytest.mark.parametrize("answer", ["\nhello", "hello", "\n\nhello", "\n", ""])
def test_one_newline_is_taken_off_an_answer(tiny: LoadedModel, answer: str) -> None:
    model, _ = with_script(tiny, answer)
    assert text_of(model.stream(HELLO)) == answer.removeprefix("\n")
    model, _ = with_script(tiny, answer)
    assert text_of(model.stream("continue")) == answer
    model, _ = with_script(tiny, answer)
    assert text_of(model.stream([1, 2], chat=True)) == answer.removeprefix("\n")


def test_thought_is_apart_from_the_answer(tiny: LoadedModel) -> None:
    model, _ = with_script(dataclasses.replace(tiny, dialect=DIALECTS["z1"]), "\nhm, well\n</think>\n\nthe answer")
    steps = list(model.stream(HELLO))
    assert "".join(step.thought for step in steps) == "hm, well"
    assert text_of(steps) == "the answer"


def test_thought_that_never_ends_is_all_thought(tiny: LoadedModel) -> None:
    model, _ = with_script(dataclasses.replace(tiny, dialect=DIALECTS["z1"]), "hm, well </th")
    steps = list(model.stream(HELLO))
    assert ("".join(step.thought for step in steps), text_of(steps)) == ("hm, well </th", "")


# --- tools


def test_declared_tool_call_is_recognised(tiny: LoadedModel) -> None:
    model, _ = with_script(tiny, '\nget_weather\n{"city": "北京"}', after=SPECIAL_IDS["<|observation|>"])
    last = list(model.stream(HELLO, tools=[WEATHER]))[-1]
    assert (last.finish_reason, last.stopped_by) == ("tool_calls", "<|observation|>")
    assert [call.name for call in last.tool_calls] == ["get_weather"]
    assert json.loads(last.tool_calls[0].arguments) == {"city": "北京"}


def test_without_declared_tools_it_is_text(tiny: LoadedModel) -> None:
    model, _ = with_script(tiny, '\nget_weather\n{"city": "x"}', after=SPECIAL_IDS["<|observation|>"])
    steps = list(model.stream(HELLO))
    assert (steps[-1].finish_reason, steps[-1].tool_calls) == ("stop", ())
    assert text_of(steps).startswith("get_weather")


def test_end_token_is_the_stop_of_the_script() -> None:
    assert END in STOP_IDS


def test_logprobs_are_those_of_the_models_own_logits(tiny: LoadedModel) -> None:
    params = SamplingParams(max_new_tokens=6, temperature=0.7, repetition_penalty=1.3, seed=1, logprobs=4)
    answer = collect(tiny, "hello", params)
    assert len(answer.logprobs) == len(answer.token_ids) > 0
    whole = [*tiny.encode_prompt("hello"), *answer.token_ids]
    expected = tiny.logits(whole).log_softmax(dim=-1)
    first = len(whole) - len(answer.token_ids) - 1
    for place, (token, found) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        row = expected[first + place]
        assert found.token_id == token
        assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [value for _, value in found.likeliest] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
    assert set(answer.as_json()["logprobs"][0]) == {"token_id", "logprob", "top"}
    assert "logprobs" not in collect(tiny, "hello", GREEDY).as_json()
    with pytest.raises(UsageError, match="logprobs"):
        SamplingParams(logprobs=21)
