"""Answers that are held to a form: always valid, with sampling, penalties, stop strings, thoughts and loops."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm4run import LoadedModel, SamplingParams, load_model
from glm4run.answer import Answer, collect
from glm4run.cards import demo_folder
from glm4run.chat_format import Message
from glm4run.constraints import Constraint
from glm4run.dialects import DIALECTS
from glm4run.errors import UsageError
from glm4run.token_rules import AnswerRule, CallRule, GrammarVocabulary
from glm4run.tokenizer import Tokenizer, load_tokenizer
from tests.builders import FIRST_PADDING, SPECIAL_IDS, STOP_IDS, VOCAB, write_checkpoint
from tests.scripted import loaded_model, with_script

pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "绿", 'a "b"']}, "minItems": 1, "maxItems": 3},
        "more": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/pair"}]},
    },
    "required": ["name", "age", "tags", "more"],
    "additionalProperties": False,
    "$defs": {"pair": {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": 1.5}], "items": False}},
}
SHORT = r"(yes|no), [a-z]{3,9}\.|[一-龥]{2,4}"
ASKED = [Message("user", "hello")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_checkpoint(
        tmp_path_factory.mktemp("rules") / "tiny", dialect="chat-2024", max_position_embeddings=1024
    )
    return load_model(folder, dtype="fp32", context_len=1024)


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model(demo_folder(), context_len=1024)


def say(model: LoadedModel, asked: Any, constraint: Constraint, **params: Any) -> Answer:
    return collect(model, asked, SamplingParams(**params), constraint=constraint)


@pytest.mark.parametrize("seed", range(12))
def test_sampled_answers_of_the_demo_are_valid(demo: LoadedModel, seed: int) -> None:
    """Each seed with settings of its own; greedy, hot, filtered and penalized ones among them."""
    settings: dict[str, Any] = {
        "temperature": (0.0, 0.7, 1.0, 2.0)[seed % 4],
        "top_p": (1.0, 0.8)[seed % 2],
        "top_k": (0, 5, 1)[seed % 3],
        "min_p": (0.0, 0.1)[seed // 2 % 2],
        "repetition_penalty": (1.0, 1.3)[seed // 3 % 2],
        "seed": seed,
    }
    for constraint in (Constraint.from_schema(PERSON), Constraint.from_regex(SHORT)):
        for prompt in (ASKED, "Once"):
            answer = say(demo, prompt, constraint, **settings)
            assert (answer.finish_reason, answer.problem) == ("stop", None), answer.text
            assert constraint.kind == "regex" or set(json.loads(answer.text)) == set(PERSON["properties"])


def test_random_weights_give_valid_answers_too(tiny: LoadedModel) -> None:
    """Nothing of what comes is the model's merit: all 310 tokens are about as likely."""
    for seed in range(5):
        answer = say(tiny, ASKED, Constraint.from_schema(PERSON), temperature=1.0, seed=seed)
        assert (answer.finish_reason, answer.problem) == ("stop", None), answer.text
        assert set(answer.token_ids).isdisjoint(SPECIAL_IDS.values()) and max(answer.token_ids) < FIRST_PADDING


def test_the_newline_that_opens_a_chat_answer_is_not_part_of_it(tiny: LoadedModel) -> None:
    model, _ = with_script(tiny, "hello")
    answer = say(model, ASKED, Constraint.from_regex("hell|hello"))
    assert answer.token_ids[0] == ord("\n")
    assert answer.text in ("hell", "hello") and answer.problem is None
    raw = say(with_script(tiny, "hello")[0], "x", Constraint.from_regex("\n?hello"))
    assert raw.text == "hello"


def test_the_end_may_come_where_the_form_allows_it(tiny: LoadedModel) -> None:
    for script, after, reason in (("\nab", "<|user|>", "<|user|>"), ("\nabcd", "<|user|>", "constraint")):
        model, _ = with_script(tiny, script, SPECIAL_IDS[after])
        answer = say(model, ASKED, Constraint.from_regex("ab(cd)?"))
        assert (answer.text, answer.finish_reason, answer.stopped_by) == (script[1:], "stop", reason)
    early, _ = with_script(tiny, "\na", SPECIAL_IDS["<|user|>"])  # "b" is all that may come then
    assert say(early, ASKED, Constraint.from_regex("ab(cd)?")).text in ("ab", "abcd")


def test_what_is_cut_short_is_not_valid_and_says_so(tiny: LoadedModel) -> None:
    constraint = Constraint.from_schema({"type": "object", "properties": {"a": {"type": "string"}}})
    model, _ = with_script(tiny, '\n{"a": "hello, the one')
    answer = say(model, ASKED, constraint, max_new_tokens=8)
    assert answer.finish_reason == "max_tokens"
    assert "not whole JSON" in str(answer.problem)
    data = answer.as_json()
    assert data["valid"] is False and data["problem"] == answer.problem
    model, _ = with_script(tiny, '\n{"a": "hello')
    answer = say(model, ASKED, constraint, stop=("ell",))
    assert (answer.finish_reason, answer.stopped_by, answer.as_json()["valid"]) == ("stop", "ell", False)
    whole = say(with_script(tiny, '\n{"a": "hi"}')[0], ASKED, constraint).as_json()
    assert whole["valid"] is True and "problem" not in whole
    assert "valid" not in collect(with_script(tiny, "\nhi")[0], ASKED, SamplingParams()).as_json()


@pytest.mark.parametrize("end", ["</think>", "</think>\n", "</think>\n\n"])
def test_a_thought_is_free_and_the_form_begins_behind_it(tiny: LoadedModel, end: str) -> None:
    model = dataclasses.replace(tiny, dialect=DIALECTS["z1"])
    thought = "is it <b> or </thin? {3} </thi"
    model, _ = with_script(model, f"\n{thought}{end}42")
    answer = say(model, ASKED, Constraint.from_regex("[0-9]{2}"))
    assert (answer.thought, answer.text, answer.problem) == (thought, "42", None)


def test_a_thought_cannot_end_the_answer(tiny: LoadedModel) -> None:
    model = dataclasses.replace(tiny, dialect=DIALECTS["z1"])
    model, scripted = with_script(model, [ord("h"), STOP_IDS[1], *tiny.tokenizer.encode("m</think>\n7")])
    answer = say(model, ASKED, Constraint.from_regex("[0-9]"))
    assert answer.thought.startswith("h") and answer.text == "7"
    assert not set(STOP_IDS) & set(scripted.all_fed[len(scripted.fed[0]) :])


def test_the_token_that_closes_a_thought_carries_no_text(tiny: LoadedModel) -> None:
    """A vocabulary may hold one that does; what it carries would not have been chosen by the form."""
    vocabulary = GrammarVocabulary(tiny.tokenizer, tiny.ordinary_tokens, tiny.stop_ids)
    vocabulary.bytes[ord("x")], vocabulary.bytes[ord("y")] = b">{", b">\n"
    vocabulary.bytes[ord("z")] = b"so</think>{"
    rule = AnswerRule(vocabulary, Constraint.from_regex("1"), chat=True, thinking=True)
    first = rule.allowed()
    assert first is not None and first[ord("x")] and not first[ord("z")]
    for character in "hm</think":
        rule.push(ord(character))
    mask = rule.allowed()
    assert mask is not None
    assert not mask[ord("x")] and not mask[ord("z")] and mask[ord("y")] and mask[ord(">")]


def test_a_loop_is_taken_back_inside_a_form(tiny: LoadedModel) -> None:
    model, scripted = with_script(tiny, "\n" + "ab" * 80)
    scripted.after = ord("a")
    answer = say(model, ASKED, Constraint.from_regex("[ab]{150}[0-9]"), recover=True)
    assert answer.recovered
    # The other letter is no way out where only one fits: the loop ends the answer, and that is said.
    model, scripted = with_script(tiny, "\n" + "a" * 300)
    answer = say(model, ASKED, Constraint.from_regex("a{400}"), recover=True)
    assert answer.finish_reason == "repetition" and answer.problem is not None


def test_a_constraint_and_tools_exclude_each_other(tiny: LoadedModel) -> None:
    with pytest.raises(UsageError, match="constraint on the answer and tools"):
        tiny.stream(ASKED, tools=[{"name": "t"}], constraint=Constraint.from_regex("a"))


# --- the vocabulary


def masks_on_the_way(tokenizer: Tokenizer, rows: int, pattern: str, text: str) -> list[Tensor]:
    """The mask before each token of `text`, and behind it."""
    ordinary = torch.zeros(rows, dtype=torch.bool)
    ordinary[[i for i in tokenizer.usable_ids() if i not in tokenizer.special_ids]] = True
    matcher = GrammarVocabulary(tokenizer, ordinary, frozenset(STOP_IDS)).matcher(
        Constraint.from_regex(pattern).grammar
    )
    masks = [matcher.allowed()]
    for token in tokenizer.encode(text):
        assert masks[-1][token]
        matcher.push(token)
        masks.append(matcher.allowed())
    return masks


def test_both_kinds_of_tokenizer_files_give_the_same_masks(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    loaded_model(folder)
    from_model = load_tokenizer(folder)
    assert not (folder / "tokenizer.json").exists()
    (tmp_path / "json").mkdir()
    from_model.save(tmp_path / "json" / "tokenizer.json")
    from_json = load_tokenizer(tmp_path / "json")
    pattern, text = "(hello|你好) [a-z\n]+", "你好 the\none"
    for ours, theirs in zip(
        masks_on_the_way(from_model, VOCAB, pattern, text),
        masks_on_the_way(from_json, VOCAB, pattern, text),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_a_mask_is_what_every_token_s_bytes_say(tmp_path: Path) -> None:
    """Against the plain definition: a token may come if what is then written begins something that fits."""
    loaded_model(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    fitting = ["hello", "hell", "你好", "the", "then"]
    masks = masks_on_the_way(tokenizer, VOCAB, "|".join(fitting), "hell")
    written = b""
    for mask, token in zip(masks, [*tokenizer.encode("hell"), None], strict=True):
        for i in range(VOCAB):
            is_text = tokenizer.is_usable(i) and i not in tokenizer.special_ids
            starts = is_text and any(word.encode().startswith(written + tokenizer.token_bytes(i)) for word in fitting)
            assert bool(mask[i]) == starts, (written, i)
        written += b"" if token is None else tokenizer.token_bytes(token)


def test_the_real_vocabulary(shared: Path) -> None:
    """151,552 rows: neither padding nor control tokens; a character in several tokens is whole or does not come."""
    tokenizer = load_tokenizer(shared / "data/tokenizer")
    masks = masks_on_the_way(tokenizer, 151552, "[一-龥𠀀-𪛟a-z ]{1,9}", "天气 fine𠮷龘")
    for mask in masks:
        assert not mask[151329:].any() and mask.sum() >= 1
    assert masks[0].sum() > 40_000  # words of letters and of Chinese
    assert not masks[-1][ord("\n")]


# --- arguments of tools


def test_arguments_are_held_to_the_schema_of_the_tool_that_was_named(tiny: LoadedModel) -> None:
    schema = {"type": "object", "properties": {"n": {"const": 7}}, "required": ["n"], "additionalProperties": False}
    tools = [{"name": "seven", "parameters": schema}, {"name": "none", "parameters": {"type": "object"}}]

    def calls(script: list[int]) -> list[tuple[str, str]]:
        model, _ = with_script(tiny, script)
        steps = list(model.stream(ASKED, SamplingParams(max_new_tokens=300), tools=tools))
        return [(call.name, re.sub(r"\s", "", call.arguments)) for call in steps[-1].tool_calls]

    encode, role = tiny.tokenizer.encode, SPECIAL_IDS["<|assistant|>"]
    assert calls(encode('\nseven\n{"n": 8, "m": 1}')) == [("seven", '{"n":7}')]
    assert calls(encode('\nseven\n{"n": 7} and so on')) == [("seven", '{"n":7}')]
    assert calls(encode("\nseven\n")) == [("seven", '{"n":7}')]  # it may not go without arguments
    assert calls(encode("\nnone\n")) == [("none", "{}")]  # this one may
    assert calls([*encode("\nnone\n{}"), role, *encode('seven\n{"n": 9}')]) == [("none", "{}"), ("seven", '{"n":7}')]
    assert calls(encode('\nseven or eight\n{"n": 8}')) == []
    assert calls(encode('\n{"n": 8}')) == []


def test_a_line_that_ends_inside_a_token_goes_on_in_the_arguments(tiny: LoadedModel) -> None:
    vocabulary = GrammarVocabulary(tiny.tokenizer, tiny.ordinary_tokens, tiny.stop_ids)
    for rest, is_held in (("{", True), ("[", False)):
        rule = CallRule(vocabulary, {"t": {}}, thinking=False, separator=None)
        rule._decoder.push = lambda token, rest=rest: f"\nt\n{rest}"  # type: ignore[method-assign,misc]
        rule.push(ord("x"))
        assert (rule.allowed() is not None) == is_held
