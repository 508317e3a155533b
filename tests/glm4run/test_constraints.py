"""A constraint is refused by name before anything is generated, or an answer can be held against it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from glm4run.constraints import Constraint, grammar_for_arguments, has_engine, read_schema
from glm4run.errors import Glm4RunError, UsageError

pytest.importorskip("llguidance", reason="the extra `structured` is not installed")


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        ({"type": "array", "uniqueItems": True}, r"'uniqueItems' at #,"),
        ({"properties": {"a": {"not": {"type": "null"}}}}, r"'not' at #/properties/a,"),
        ({"$defs": {"x": {"anyOf": [{}, {"if": {}}]}}}, r"'if' at #/\$defs/x/anyOf/1,"),
        ({"items": {"contains": {}}}, r"'contains' at #/items,"),
        ({"propertyNames": {"maxLength": 3}}, "'propertyNames' at #"),
        ({"dependentRequired": {"a": ["b"]}}, "'dependentRequired' at #"),
        ({"requierd": ["a"]}, "'requierd' at #"),
        ({"x-guidance": {"lenient": True}}, "'x-guidance' at #"),
        ({"type": "number", "multipleOf": 0.1}, "'multipleOf' 0.1 at #"),
        ({"type": "object", "minProperties": 2}, "'minProperties' 2 at #"),
        ({"type": "strin"}, "no JSON schema: at type: 'strin'"),
        ({"minLength": "3"}, "no JSON schema: at minLength"),
        ([1], "no JSON schema"),
        ({"type": "integer", "minimum": 4, "maximum": 3}, "cannot be honoured: Unsatisfiable"),
        ({"enum": []}, "cannot be honoured: Unsatisfiable"),
        (False, "cannot be honoured: Unsatisfiable"),
        ({"type": "string", "format": "regex"}, "cannot be honoured: Unknown format"),
        ({"type": "string", "pattern": "a(?=b)"}, "cannot be honoured: .*look-around"),
        ({"oneOf": [{"minimum": 2}, {"maximum": 5}]}, "cannot be honoured: oneOf"),
        ({"$ref": "http://localhost:9/x.json"}, "cannot be honoured: .*localhost"),
    ],
)
def test_schemas_that_are_refused_before_generation(schema: Any, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        Constraint.from_schema(schema)


@pytest.mark.parametrize("pattern", ["(a", "a(?=b)", r"\bfoo", r"(a)\1", "a$b"])
def test_patterns_that_are_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"the regular expression .* cannot be honoured: "):
        Constraint.from_regex(pattern)


@pytest.mark.parametrize(
    ("pattern", "text", "fits"),
    [
        ("a+", "aaa", True),
        ("a+", "aaab", False),
        ("a+", "", False),
        ("a*", "", True),
        ("^(yes|no)$", "no", True),
        ("[一-龥]{2,3}", "北京", True),
        ("[一-龥]{2,3}", "北", False),
        (".*", "a\nb", False),
    ],
)
def test_a_whole_text_is_matched(pattern: str, text: str, fits: bool) -> None:
    assert (Constraint.from_regex(pattern).problem(text) is None) == fits


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 3}', None),
        ('{"a": 3', "not whole JSON"),
        ("", "not whole JSON"),
        ('{"a": "3"}', "does not fit the schema: a: '3' is not of type 'integer'"),
        ("[]", "does not fit the schema"),
    ],
)
def test_an_answer_is_held_against_the_schema(text: str, problem: str | None) -> None:
    found = Constraint.from_schema({"type": "object", "properties": {"a": {"type": "integer"}}}).problem(text)
    assert (found is None) == (problem is None)
    assert problem is None or problem in str(found)


def test_the_draft_that_a_schema_names_is_the_one_it_is_read_by() -> None:
    pair = {"type": "array", "items": [{"type": "null"}], "additionalItems": False}
    Constraint.from_schema({**pair, "$schema": "http://json-schema.org/draft-07/schema#"})
    with pytest.raises(UsageError, match="no JSON schema"):  # 2020-12 has prefixItems for it
        Constraint.from_schema(pair)


def test_constraints_of_a_request_go_there_and_back() -> None:
    assert Constraint.from_dict({"prompt": "x"}) is None
    requests: list[dict[str, Any]] = [{"regex": "a+"}, {"json_schema": {"title": "无"}}, {"json_schema": True}]
    for given in requests:
        made = Constraint.from_dict(given)
        assert made is not None and made.as_dict() == given
    with pytest.raises(UsageError, match="both given"):
        Constraint.from_dict({"regex": "a", "json_schema": {}})
    with pytest.raises(UsageError, match="regex is int"):
        Constraint.from_dict({"regex": 3})


def test_a_schema_is_a_file_or_json_itself(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text('{"type": "null"}')
    assert read_schema(str(path)) == read_schema(' {"type": "null"}') == {"type": "null"}
    path.write_text("{")
    with pytest.raises(UsageError, match=r"s\.json is not JSON"):
        read_schema(str(path))
    with pytest.raises(UsageError, match="the schema is not JSON"):
        read_schema("{a")
    with pytest.raises(UsageError, match="cannot read the schema"):
        read_schema(str(tmp_path / "nothing.json"))


def test_arguments_have_a_grammar_whatever_the_schema_asks() -> None:
    any_object = grammar_for_arguments({})
    for schema in ({"uniqueItems": True, "x-guidance": {"lenient": False}}, {"type": ["object", "null"]}):
        assert json.loads(json.dumps(grammar_for_arguments(schema)))
    assert grammar_for_arguments({"$ref": "http://localhost:9/x"}) == any_object
    assert grammar_for_arguments({"properties": {"a": {"type": "null"}}}) != any_object


def test_without_the_extra_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert not has_engine()
    requests: list[dict[str, Any]] = [{"regex": "a"}, {"json_schema": {}}]
    for given in requests:
        with pytest.raises(Glm4RunError, match="need the package llguidance") as caught:
            Constraint.from_dict(given)
        assert caught.value.hint == "pip install 'glm4run[structured]'"
