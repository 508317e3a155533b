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
from glm4run.batch_decoding import (
    MOST_TOGETHER,
    SHARED_BLOCK,
    Job,
    SharedContexts,
    answer_together,
    choose_batch,
    sharing_order,
)
from glm4run.cards import demo_folder
from glm4run.chat_format import Message
from glm4run.errors import DoesNotFitError, UsageError
from glm4run.generation import Generation
from glm4run.prompt_cache import PromptCache
from glm4run.steps import Timings
from tests.builders import write_packed
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


# --- prompts that begin alike


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model with heads as GLM-4's, whose prompts may be cut anywhere and whose keys lie as products take them."""
    heads = {"num_attention_heads": 16, "head_dim": 64, "max_position_embeddings": 1024, "dtype": torch.bfloat16}
    yield write_packed(tmp_path_factory.mktemp("wide") / "m", source=heads, bits=4)


def family_of_prompts() -> list[list[int]]:
    """Two documents, questions about them in turn, one question asked twice; and what shares nothing."""
    source = random.Random(5)
    first, second = ([source.randrange(40, 250) for _ in range(length)] for length in (150, 210))
    questions = [[source.randrange(40, 250) for _ in range(length)] for length in (9, 30, 1, 17)]
    prompts = [document + question for question in questions for document in (first, second)]
    return [[7], *prompts, second, [*first[:100], 41], prompts[3], [250, 249]]


def distinct_tokens(prompts: list[list[int]]) -> int:
    """What must be computed: every branch of the tree once, and a prompt's last token always."""
    nodes = {tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1)}
    repeated = len(prompts) - len({tuple(prompt) for prompt in prompts})
    longer = [prompt for prompt in prompts if any(p[: len(prompt)] == prompt for p in prompts if p != prompt)]
    inner = {tuple(prompt) for prompt in longer}
    return len(nodes) + repeated + len(inner)


@needs_library
@pytest.mark.parametrize("kv_bits", ["16", "8:4"])
@pytest.mark.parametrize("sequences", [1, 3, 16])
def test_what_prompts_share_is_read_once_and_changes_no_bit(
    wide: Path, tmp_path: Path, sequences: int, kv_bits: str
) -> None:
    model = load_model(wide, backend="native", context_len=400, threads=1, kv_bits=kv_bits)
    assert model.cut_unit == 1
    prompts = family_of_prompts()
    params = SamplingParams(max_new_tokens=6, logprobs=3, temperature=0.8, seed=3, stop_on_repetition=False)
    jobs = [Job(ids, dataclasses.replace(params, seed=n), chat=False) for n, ids in enumerate(prompts)]
    order = sharing_order(prompts)
    plan = choose_batch(model, jobs, sequences)
    if sequences == 1:
        contexts = SharedContexts(model)
        answers = {}
        for number in order:
            held, shared = contexts.take(jobs[number].ids)
            answers[number] = collect(model, jobs[number].ids, jobs[number].params, context=held.context, chat=False)
            answers[number].timings.shared_tokens = shared
            contexts.give_back(held)
    else:
        ordered = [jobs[number] for number in order]
        answers = {order[place]: answer for place, answer in answer_together(model, ordered, plan)}
    computed = sum(answer.timings.prefill_tokens for answer in answers.values())
    assert computed + sum(answer.timings.shared_tokens for answer in answers.values()) == sum(map(len, prompts))
    least = distinct_tokens(prompts)  # where every cache is kept; few caches lose what is shared by less than a block
    assert computed == least if sequences >= len(jobs) else least <= computed < least + 150 < sum(map(len, prompts)) / 2
    for number, job in enumerate(jobs):
        alone = plain(collect(model, job.ids, job.params, chat=False))
        assert plain(answers[number]) == {**alone, "cached_tokens": answers[number].timings.shared_tokens}, number


@needs_library
def test_where_chunks_show_only_whole_ones_are_shared(demo: LoadedModel) -> None:
    model = dataclasses.replace(demo, plan=dataclasses.replace(demo.plan, chunk=32))
    assert model.cut_unit == 32
    ids = demo.encode_prompt([Message("user", QUESTIONS[2] * 30)])
    prompts = [[*ids[:100], *ids[n:40]] for n in range(1, 6)]
    jobs = [Job(prompt, SamplingParams(max_new_tokens=8, logprobs=5), chat=True) for prompt in prompts]
    for sequences in (2, 5):
        together = dict(answer_together(model, jobs, choose_batch(model, jobs, sequences)))
        assert [together[n].timings.shared_tokens for n in range(5)] == [0, 96, 96, 96, 96]
        for number, job in enumerate(jobs):
            alone = plain(collect(model, job.ids, job.params, chat=True))
            assert plain(together[number]) == {**alone, "cached_tokens": 96 * (number > 0)}, number


@needs_library
def test_nobody_begins_with_what_broke_or_was_generated(wide: Path) -> None:
    contexts = SharedContexts(load_model(wide, backend="native", context_len=100, threads=1), 100)
    prompt = list(range(40, 80))
    held, shared = contexts.take(prompt)
    contexts.model.prefill([*prompt, 81, 82], held.context)  # two tokens of an answer
    other, more = contexts.take([*prompt, 81, 82, 83])
    assert (shared, more) == (0, 40) and other is not held
    contexts.model.prefill([*prompt, 81, 82, 83], other.context)
    contexts.give_back(held, is_sound=False)
    again, more = contexts.take([*prompt, 81, 82, 99])
    assert again is held and more == 42  # of the other, which is still being answered
    contexts.give_back(other, is_sound=False)
    contexts.give_back(again, is_sound=False)
    assert contexts.take([*prompt, 81, 82, 83, 84]) == (other, 0)


def test_prompts_that_begin_alike_follow_each_other_and_the_rest_stays() -> None:
    block = [n % 250 for n in range(SHARED_BLOCK)]
    a, b, c = ([first, *block, 1] for first in range(3))
    assert sharing_order([[1], [2], [1]]) == [0, 1, 2]
    assert sharing_order([a, b, [5], a, [*b, *block], c, b]) == [0, 3, 1, 4, 6, 2, 5]
    assert sharing_order([[*a, *a], [*a, *b], [*a, *a, 9]]) == [0, 2, 1]
    assert sharing_order([]) == []


@needs_library
@pytest.mark.parametrize("chunk", [64, 200, 512])
def test_a_long_prompt_gives_the_same_bits_however_it_is_cut(wide: Path, chunk: int) -> None:
    """Its last tokens alone would be attended as a decoded token is, by stretches, which rounds differently."""
    loaded = load_model(wide, backend="native", context_len=700, threads=1)
    model = dataclasses.replace(loaded, plan=dataclasses.replace(loaded.plan, chunk=chunk))
    source = random.Random(7)
    for length in (250, 257, 261, chunk + 1, chunk + 8, 513, 600):
        prompt = [source.randrange(40, 250) for _ in range(length)]
        whole = logits_behind(model, prompt, SharedContexts(model))
        for cut in (1, 100, length - 9, length - 8, length - 1):
            contexts = SharedContexts(model)
            logits_behind(model, prompt[:cut], contexts)
            assert torch.equal(logits_behind(model, prompt, contexts), whole), (length, cut)


def logits_behind(model: LoadedModel, prompt: list[int], contexts: SharedContexts) -> torch.Tensor:
    """[V] behind a prompt that begins with what the contexts hold."""
    held, _ = contexts.take(prompt)
    generation = Generation(model, SamplingParams(), held.context, Timings())
    logits = generation.prefill(prompt, None)
    contexts.give_back(held)
    return logits


@needs_library
@pytest.mark.parametrize("sequences", [1, 2])
def test_a_file_says_what_was_shared_and_keeps_it_on_disk_once(wide: Path, tmp_path: Path, sequences: int) -> None:
    loaded = load_model(wide, backend="native", context_len=700, threads=1)
    kept = PromptCache(loaded, root=tmp_path / "prompts")
    model = dataclasses.replace(loaded, kept_prompts=kept)
    document = "".join(chr(97 + n * n % 23) for n in range(600))
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"id": n, "prompt": f"{document}{n}" if n % 2 else f"{n}"} for n in range(14)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    work = Batch(
        model, read_requests(source), SamplingParams(max_new_tokens=4), target, as_prompt=str, sequences=sequences
    )
    for item in work.run():
        kept.keep()
        alone = plain(collect(loaded, item.request.prompt or "", SamplingParams(max_new_tokens=4)))
        assert plain(item.answer) == {**alone, "cached_tokens": item.answer.timings.shared_tokens}
    found = {line["id"]: line for line in map(json.loads, target.read_text(encoding="utf-8").splitlines())}
    assert list(found) == [0, *range(1, 14, 2), *range(2, 14, 2)] or sequences > 1
    assert all(found[n]["cached_tokens"] == found[n]["prompt_tokens"] - 9 for n in range(3, 14, 2))
    assert len(list((tmp_path / "prompts").glob("*/*.safetensors"))) == 3
