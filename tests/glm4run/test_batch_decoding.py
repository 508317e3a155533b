"""Several sequences decoded together are the sequences decoded alone."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4run import LoadedModel, SamplingParams, batch_decoding, load_model
from glm4run.answer import Answer, collect
from glm4run.batch import Batch, read_requests, seeded
from glm4run.batch_decoding import MOST_TOGETHER, Job, answer_together, choose_batch
from glm4run.cards import demo_folder
from glm4run.chat_format import Message
from glm4run.errors import DoesNotFitError, UsageError
from glm4run.steps import Timings
from tests.native_library import each_isa, needs_library, running
from tests.scripted import loaded_model

QUESTIONS = ("What is glm4run?", "hello", "How do I quantize a model?", "What does vram do?", "Count to ten.", "bye")


@pytest.fixture(scope="module")
def demo() -> Iterator[LoadedModel]:
    with running(threads=1):
        yield load_model(demo_folder(), backend="native", context_len=300, threads=1)


def jobs_of(model: LoadedModel, params: SamplingParams, count: int) -> list[Job]:
    """Prompts of very different lengths, and answers too."""
    source = random.Random(3)
    jobs = []
    for number in range(count):
        ids = model.encode_prompt([Message("user", QUESTIONS[number % len(QUESTIONS)] * (1 + number % 4))])
        tokens = source.choice((1, 5, 20, 40))
        jobs.append(Job(ids, seeded(dataclasses.replace(params, max_new_tokens=tokens), number), chat=True))
    return jobs


def plain(answer: Answer) -> dict[str, Any]:
    """All of an answer but its times and its drafts."""
    return {k: v for k, v in answer.as_json().items() if k not in ("timings", "speculation")}


@needs_library
@pytest.mark.parametrize("sequences", [2, 3, 8, 11])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.9, top_p=0.9, seed=4),
        SamplingParams(repetition_penalty=1.2, stop=("el", " the ")),
    ],
    ids=["greedy", "sampled", "penalty and stops"],
)
def test_each_answer_is_what_it_is_alone(demo: LoadedModel, params: SamplingParams, sequences: int) -> None:
    jobs = jobs_of(demo, params, 13)
    together = dict(answer_together(demo, jobs, choose_batch(demo, jobs, sequences)))
    assert sorted(together) == list(range(len(jobs)))
    for number, job in enumerate(jobs):
        assert plain(together[number]) == plain(collect(demo, job.ids, job.params, chat=True)), number


@needs_library
@each_isa
def test_logits_and_caches_are_the_same_bits_on_every_instruction_set(demo: LoadedModel, isa: str) -> None:
    prompts = [list(range(10, 10 + length)) for length in (1, 40, 7, 263, 12, 3, 5, 29, 2, 18)]
    with torch.inference_mode(), running(isa):
        alone, together = [demo.new_context().cache for _ in prompts], [demo.new_context().cache for _ in prompts]
        for prompt, one, other in zip(prompts, alone, together, strict=True):
            demo.model(torch.tensor(prompt), one)
            demo.model(torch.tensor(prompt), other)
        tokens = torch.arange(50, 50 + len(prompts))
        for count in (len(prompts), 3, 8):
            rows = demo.model.decode_together(tokens[:count], together[:count])
            for number in range(count):
                expected = demo.model(tokens[number : number + 1], alone[number])[0]
                assert torch.equal(rows[number], expected), (count, number)
        for one, other in zip(alone, together, strict=True):
            assert one.position == other.position
            for layer in range(demo.config.num_hidden_layers):
                for name, kept in one.rows(layer, 0, one.position).items():
                    assert torch.equal(kept, other.rows(layer, 0, other.position)[name])


@needs_library
def test_whoever_ends_makes_room_for_the_next_and_never_more_run(
    demo: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    forward = type(demo.model).decode_together

    def counted(self: Any, ids: Any, caches: Any) -> Any:
        sizes.append(len(caches))
        assert len({id(cache) for cache in caches}) == len(caches)
        return forward(self, ids, caches)

    monkeypatch.setattr(type(demo.model), "decode_together", counted)
    jobs = [
        dataclasses.replace(job, params=SamplingParams(max_new_tokens=9)) for job in jobs_of(demo, SamplingParams(), 10)
    ]
    endless = dataclasses.replace(demo, stop_ids=frozenset())
    answers = dict(answer_together(endless, jobs, choose_batch(endless, jobs, 4)))
    assert [len(answers[number].token_ids) for number in range(10)] == [9] * 10
    # A token comes of the prompt, eight of forwards: 80 forwards' worth, four at a time while there are as many.
    assert sum(sizes) == 80 and max(sizes) == 4 and sizes.count(4) >= 16
    assert all(answer.timings.decode_tokens == 8 for answer in answers.values())


@needs_library
def test_one_broken_answer_leaves_the_others_alone(demo: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [
        dataclasses.replace(job, params=SamplingParams(max_new_tokens=6)) for job in jobs_of(demo, SamplingParams(), 4)
    ]
    expected = [plain(collect(demo, job.ids, job.params, chat=True)) for job in jobs]
    forward = type(demo.model).decode_together

    def broken(self: Any, ids: Any, caches: Any) -> Any:
        logits = forward(self, ids, caches)
        for row, cache in enumerate(caches):
            if cache.position > len(jobs[2].ids) and cache is caches[2 if len(caches) > 2 else -1]:
                logits[row] = float("nan")
                cache.layers[0].values.data[:, : cache.position] = float("nan")
        return logits

    monkeypatch.setattr(type(demo.model), "decode_together", broken)
    answers = dict(answer_together(demo, jobs[:3], choose_batch(demo, jobs[:3], 3)))
    assert answers[2].finish_reason == "error" or answers[2].recovered
    for number in (0, 1):
        assert plain(answers[number]) == expected[number]


@needs_library
def test_a_file_of_requests_together_is_the_file_one_by_one(demo: LoadedModel, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [{"id": f"q{n}", "messages": [{"role": "user", "content": q * (n + 1)}]} for n, q in enumerate(QUESTIONS)]
    lines.append({"id": "long", "messages": [{"role": "user", "content": "x " * 400}]})
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    requests = read_requests(source)
    params = SamplingParams(max_new_tokens=12, temperature=0.8, seed=2)
    files = {}
    for sequences in (1, 4):
        target = tmp_path / f"out{sequences}.jsonl"
        work = Batch(demo, requests, params, target, as_prompt=lambda text: text, sequences=sequences)
        assert work.plan.sequences == sequences
        assert [item.done for item in work.run()] == list(range(1, 8))
        found = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
        files[sequences] = {
            line["id"]: {k: v for k, v in line.items() if k not in ("timings", "speculation")} for line in found
        }
    assert files[1] == files[4]
    assert "400" not in files[4]["long"]["error"] and files[4]["long"]["finish_reason"] == "error"
    # The seed in a line gives the same answer alone.
    line = files[4]["q2"]
    alone = dataclasses.replace(params, seed=line["seed"])
    assert collect(demo, requests[2].messages, alone).token_ids == line["token_ids"]


@needs_library
def test_a_batch_that_is_stopped_goes_on_where_it_was(demo: LoadedModel, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"id": n, "prompt": q}) + "\n" for n, q in enumerate(QUESTIONS)), "utf-8")
    requests, params = read_requests(source), SamplingParams(max_new_tokens=8)

    def work() -> Batch:
        return Batch(demo, requests, params, target, as_prompt=lambda text: text, sequences=3)

    steps = work().run()
    for _ in range(2):
        next(steps)
    steps.close()  # type: ignore[attr-defined]
    target.write_bytes(target.read_bytes() + b'{"id": 5, "te')  # as a kill leaves it
    rest = work()
    assert rest.answered == 2
    assert len(list(rest.run())) == 4
    ids = [json.loads(line)["id"] for line in target.read_text(encoding="utf-8").splitlines()]
    assert sorted(ids) == list(range(6))
    assert list(work().run()) == []


@needs_library
def test_ctrl_c_ends_a_batch_and_keeps_what_is_done(
    demo: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"id": n, "prompt": q}) + "\n" for n, q in enumerate(QUESTIONS)), "utf-8")
    forward, calls = type(demo.model).decode_together, [0]

    def interrupted(self: Any, ids: Any, caches: Any) -> Any:
        calls[0] += 1
        if calls[0] == 12:
            raise KeyboardInterrupt
        return forward(self, ids, caches)

    monkeypatch.setattr(type(demo.model), "decode_together", interrupted)
    endless = dataclasses.replace(demo, stop_ids=frozenset())
    work = Batch(
        endless,
        read_requests(source),
        SamplingParams(max_new_tokens=8, stop_on_repetition=False),
        target,
        as_prompt=lambda text: text,
        sequences=2,
    )
    reasons = [item.answer.finish_reason for item in work.run()]
    assert reasons == ["max_tokens", "max_tokens", "interrupted"]
    assert len(target.read_text(encoding="utf-8").splitlines()) == 2


# --- how many


@needs_library
def test_the_plan_counts_every_cache(demo: LoadedModel) -> None:
    jobs = jobs_of(demo, SamplingParams(), 13)
    one, eight = (choose_batch(demo, jobs, sequences) for sequences in (1, 8))
    longest = max(job.most_tokens(300) for job in jobs)
    assert eight.capacity == longest
    cache = demo.new_context(longest).cache.nbytes
    assert one.plan.bytes_of("kv_cache") == cache
    assert eight.plan.bytes_of("kv_cache", "kv_of_others") == 8 * cache
    assert eight.plan.peak_bytes >= one.plan.peak_bytes + 7 * cache


@needs_library
def test_auto_takes_what_fits(demo: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = jobs_of(demo, SamplingParams(), 13)
    assert choose_batch(demo, jobs, None).sequences == 13
    assert choose_batch(demo, jobs[:5], None).sequences == 5
    assert choose_batch(demo, [], None).sequences == 1
    names = ("kv_cache", "kv_of_others", "prefill_activations", "attention", "logits")
    needed = {sequences: choose_batch(demo, jobs, sequences).plan.bytes_of(*names) for sequences in (1, 4)}
    for sequences, free in needed.items():
        monkeypatch.setattr(batch_decoding, "available_bytes", lambda _, free=free: free)
        assert choose_batch(demo, jobs, None).sequences == sequences
        with pytest.raises(DoesNotFitError, match="6 sequences"):
            choose_batch(demo, jobs, 6)


def test_models_that_round_differently_are_decoded_one_by_one(tmp_path: Path) -> None:
    model = loaded_model(tmp_path / "tiny")
    jobs = [Job([1, 2, 3], SamplingParams(max_new_tokens=3), chat=False) for _ in range(4)]
    assert choose_batch(model, jobs, None).sequences == 1
    with pytest.raises(UsageError, match="--batch 4 is not possible"):
        choose_batch(model, jobs, 4)


@needs_library
def test_more_than_the_most_are_refused(demo: LoadedModel) -> None:
    with pytest.raises(UsageError, match="--batch is"):
        choose_batch(demo, jobs_of(demo, SamplingParams(), 2), MOST_TOGETHER + 1)


def test_seeds_depend_on_the_request_alone() -> None:
    warm = SamplingParams(temperature=1.0, seed=3)
    assert seeded(warm, "a") == seeded(warm, "a") != seeded(warm, "b")
    assert seeded(warm, 1) != seeded(warm, "1")
    assert seeded(dataclasses.replace(warm, seed=4), "a") != seeded(warm, "a")
    assert seeded(SamplingParams(temperature=1.0), "a").seed is None
    assert Timings().decode_tokens == 0
