"""A batch answers every line once, whatever stops it in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glm4run import LoadedModel, SamplingParams
from glm4run.batch import Batch, read_requests
from glm4run.chat_format import Message
from glm4run.errors import UsageError
from tests.scripted import ScriptedModel, loaded_model, with_script

KEYS = {"id", "text", "token_ids", "prompt_tokens", "completion_tokens", "finish_reason", "stopped_by", "tool_calls"}
KEYS |= {"timings", "speculation", "model", "backend", "cached_tokens"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return loaded_model(tmp_path_factory.mktemp("batch") / "tiny")


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def run(model: LoadedModel, source: Path, target: Path) -> list[str]:
    """Runs a batch; the finish reasons of what it did."""
    params = SamplingParams(max_new_tokens=5)
    requests = read_requests(source)
    batch = Batch(model, requests, params, target, as_prompt=lambda text: text)
    return [item.answer.finish_reason for item in batch.run()]


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def echoing(tiny: LoadedModel) -> tuple[LoadedModel, ScriptedModel]:
    model, scripted = with_script(tiny, "")
    scripted.before_forward = lambda: scripted.script.append(ord("a") + len(scripted.fed) % 26)
    return model, scripted


def test_prompts_and_messages_are_answered_in_order(tiny: LoadedModel, tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "in.jsonl",
        {"prompt": "hello"},
        {"id": "b", "messages": [{"role": "user", "content": "你好"}]},
        {"id": 7, "prompt": ""},
    )
    model, scripted = echoing(tiny)
    assert run(model, source, tmp_path / "out.jsonl") == ["max_tokens"] * 3
    got = answers(tmp_path / "out.jsonl")
    assert [answer["id"] for answer in got] == [1, "b", 7]
    assert all(answer.keys() == KEYS for answer in got)
    assert scripted.fed[0] == model.encode_prompt("hello")
    assert scripted.fed[5] == model.encode_prompt([Message("user", "你好")])
    assert all(answer["completion_tokens"] == len(answer["token_ids"]) == 5 for answer in got)


def test_what_is_answered_is_not_done_again(tiny: LoadedModel, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    first = write_lines(tmp_path / "a.jsonl", {"id": "x", "prompt": "1"})
    both = write_lines(tmp_path / "b.jsonl", {"id": "y", "prompt": "2"}, {"id": "x", "prompt": "1"})
    model, _scripted = echoing(tiny)
    assert len(run(model, first, target)) == 1
    assert len(run(model, both, target)) == 1
    assert len(run(model, both, target)) == 0
    assert [answer["id"] for answer in answers(target)] == ["x", "y"]


@pytest.mark.parametrize("cut", [1, 2, 30, -1])
def test_truncated_last_line_is_done_again(tiny: LoadedModel, tmp_path: Path, cut: int) -> None:
    source = write_lines(tmp_path / "in.jsonl", *({"id": i, "prompt": f"{i} 你好"} for i in range(3)))
    target = tmp_path / "out.jsonl"
    run(echoing(tiny)[0], source, target)
    whole = target.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    target.write_bytes(whole[:last] + whole[last:][:cut])
    assert len(run(echoing(tiny)[0], source, target)) == 1
    assert [answer["id"] for answer in answers(target)] == [0, 1, 2]


def test_interrupted_answer_is_not_written_and_done_again(tiny: LoadedModel, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", *({"id": i, "prompt": "x"} for i in range(3)))
    target = tmp_path / "out.jsonl"
    model, scripted = echoing(tiny)
    echo = scripted.before_forward

    def strike() -> None:
        echo()
        if len(scripted.fed) == 7:
            raise KeyboardInterrupt

    scripted.before_forward = strike
    params, requests = SamplingParams(max_new_tokens=5), read_requests(source)
    steps = Batch(model, requests, params, target, as_prompt=lambda text: text).run()
    assert [next(steps).answer.finish_reason for _ in range(2)] == ["max_tokens", "interrupted"]
    del steps
    assert [answer["id"] for answer in answers(target)] == [0]
    assert len(run(echoing(tiny)[0], source, target)) == 2
    assert [answer["id"] for answer in answers(target)] == [0, 1, 2]


def test_each_line_is_on_disk_before_the_next_begins(tiny: LoadedModel, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", *({"prompt": "x"} for _ in range(3)))
    target = tmp_path / "out.jsonl"
    params, requests = SamplingParams(max_new_tokens=5), read_requests(source)
    for item in Batch(echoing(tiny)[0], requests, params, target, as_prompt=lambda text: text).run():
        assert len(answers(target)) == item.done <= item.total == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2 is not JSON"),
        ("[]", "line 2: expected an object"),
        ("{}", "line 2: expected an object with either"),
        ('{"prompt": "x", "messages": []}', "line 2: expected an object with either"),
        ('{"prompt": 5}', "line 2: prompt is int, expected a string"),
        ('{"prompt": null}', "line 2: prompt is NoneType"),
        ('{"messages": [{"role": "king", "content": "x"}]}', "role 'king'"),
        ('{"messages": "hello"}', "expected a list"),
        ('{"messages": []}', "line 2: messages is empty"),
        ('{"id": ["a"], "prompt": "x"}', "line 2: id is list"),
        ('{"id": null, "prompt": "x"}', "line 2: id is NoneType"),
    ],
)
def test_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_requests(path)
    assert message in caught.value.message
    assert "line 2" in caught.value.message


@pytest.mark.parametrize("second", [{"id": "a", "prompt": "y"}, {"id": 1, "prompt": "y"}])
def test_duplicate_ids_are_refused(tmp_path: Path, second: dict[str, Any]) -> None:
    first = {"prompt": "x"} if second["id"] == 1 else {"id": "a", "prompt": "x"}
    with pytest.raises(UsageError, match="is given twice"):
        read_requests(write_lines(tmp_path / "in.jsonl", first, second))


def test_blank_lines_do_not_count_but_line_numbers_do(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('\n{"prompt": "x"}\n  \n{"prompt": "y"}', encoding="utf-8")
    assert [request.id for request in read_requests(path)] == [2, 4]


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example(text="a\u2028b\x85c\x0bd\x1ce\r\nf")
def test_any_text_is_one_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    r"""JSON may hold U+2028, U+0085 and others that Python takes for line ends."""
    path = write_lines(tmp_path_factory.mktemp("lines") / "in.jsonl", {"prompt": text}, {"prompt": "x"})
    assert [request.prompt for request in read_requests(path)] == [text, "x"]


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b"])
def test_answers_with_odd_line_ends_are_found_again(tiny: LoadedModel, tmp_path: Path, text: str) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"id": text, "prompt": "x"}, {"id": 2, "prompt": "x"})
    target = tmp_path / "out.jsonl"
    model, _ = with_script(tiny, text)
    assert len(run(model, source, target)) == 2
    assert len(run(model, source, target)) == 0


def test_output_that_is_no_batch_is_left_alone(tiny: LoadedModel, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "x"})
    for content in (b"my diary\n", b"my diary", b'{"a', b"\n", b"[1]\n", b'{"text": 1}\n', b"\xff\xfe\n"):
        target = tmp_path / "out.jsonl"
        target.write_bytes(content)
        with pytest.raises(UsageError, match="is not an answer of a batch"):
            run(tiny, source, target)
        assert target.read_bytes() == content


def test_a_request_that_does_not_fit_is_a_line_and_the_others_are_answered(tiny: LoadedModel, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "y"}, {"id": "long", "prompt": "x" * 400}, {"prompt": "z"})
    target = tmp_path / "out.jsonl"
    model, _ = echoing(tiny)
    assert run(model, source, target) == ["error", "max_tokens", "max_tokens"]
    got = {answer["id"]: answer for answer in answers(target)}
    assert got["long"]["error"] == "request 'long' has 402 tokens, the context holds 256"
    assert got["long"]["text"] == "" and got[1]["completion_tokens"] == 5
    assert run(model, source, target) == []  # it would not fit the next time


def test_unreadable_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        read_requests(tmp_path / "nowhere")
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(UsageError, match="cannot read"):
        read_requests(tmp_path / "latin")
