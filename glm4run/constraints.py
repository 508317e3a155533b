"""What an answer must be: JSON that fits a schema, or text that matches a regular expression.

A constraint is checked before any model is asked: what cannot be honoured while decoding is refused by name. The
grammar engine is llguidance (the extra `structured`), imported when it is needed. Knows no tokens: see `token_rules`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from glm4run.errors import Glm4RunError, UsageError
from glm4run.schemas import check_schema, problems

EXTRA = "structured"
# Between tokens of JSON: one blank, or one line end with an indentation. A weak model would write blanks for ever.
WHITESPACE = r"[ ]|\n[ \t]{0,40}"
_STYLE = {"whitespace_pattern": WHITESPACE, "json_allow_general_unicode_escapes": True}
MOST_SCHEMA_BYTES = 1 << 20

_ANNOTATIONS = frozenset(  # which say nothing that an answer could break
    (
        *("$schema", "$id", "id", "$anchor", "$comment", "title", "description", "default", "examples", "deprecated"),
        *("readOnly", "writeOnly", "contentEncoding", "contentMediaType", "discriminator"),
    )
)
_HONOURED = frozenset(
    (
        *("type", "enum", "const", "anyOf", "allOf", "oneOf", "$ref", "$defs", "definitions"),
        *("properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"),
        *("items", "prefixItems", "additionalItems", "minItems", "maxItems"),
        *("minLength", "maxLength", "pattern", "format"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    )
)
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")  # objects of schemas
_IN_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems", "items")
_ALONE = ("items", "additionalProperties", "additionalItems")


@dataclass(frozen=True)
class Constraint:
    """What an answer must be. Made by `from_schema`, `from_regex` or `from_dict`."""

    kind: Literal["json_schema", "regex"]
    source: str  # the schema as JSON, or the pattern
    grammar: str = field(repr=False)  # llguidance's

    @classmethod
    def from_schema(cls, schema: Any) -> Constraint:
        """JSON that fits `schema`, a JSON schema as Python values.

        Raises:
            UsageError: it is none, nothing can fit it, or it has a keyword that cannot be honoured, which is named.
            Glm4RunError: the extra `structured` is not installed.
        """
        engine = require_engine()
        try:
            check_schema(schema, extra=EXTRA)
        except UsageError as error:
            raise UsageError(f"this is no JSON schema: {error.message}", hint=error.hint) from error
        for where, what in _unsupported(schema, "#"):
            raise UsageError(
                f"the schema has {what} at {where}, which cannot be honoured while an answer is decoded",
                hint="take it out, or say it with what can be: " + ", ".join(sorted(_HONOURED - {"definitions"})),
            )
        plain = ({} if schema else {"enum": []}) if isinstance(schema, bool) else schema  # the engine takes objects
        grammar = engine.grammar_from_json_schema(json.dumps(plain), overrides=_STYLE)
        _require_valid(engine, grammar, "the schema")
        return cls("json_schema", json.dumps(schema, ensure_ascii=False), grammar)

    @classmethod
    def from_regex(cls, pattern: str) -> Constraint:
        """Text that `pattern` matches from its first character to its last (Rust's syntax, no look-around).

        Raises:
            UsageError: it is none, or cannot be honoured. Glm4RunError: the extra `structured` is not installed.
        """
        engine = require_engine()
        grammar = engine.grammar_from_regex(pattern)
        _require_valid(engine, grammar, f"the regular expression {pattern!r}")
        return cls("regex", pattern, grammar)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Constraint | None:
        """What `json_schema` or `regex` of a request ask for; None where it has neither.

        Raises: UsageError for both, or as `from_schema` and `from_regex`.
        """
        schema, pattern = data.get("json_schema"), data.get("regex")
        if schema is not None and pattern is not None:
            raise UsageError("json_schema and regex are both given", hint="use one of the two")
        if pattern is not None and not isinstance(pattern, str):
            raise UsageError(f"regex is {type(pattern).__name__}, expected a string")
        if pattern is not None:
            return cls.from_regex(pattern)
        return None if schema is None else cls.from_schema(schema)

    def as_dict(self) -> dict[str, Any]:
        """What `from_dict` makes the same constraint of."""
        return {self.kind: json.loads(self.source) if self.kind == "json_schema" else self.source}

    def problem(self, text: str) -> str | None:
        """What is wrong with a whole answer, or None if it is what was asked for."""
        if self.kind == "regex":
            return None if _matches(self.grammar, text) else "it does not match the regular expression"
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return f"it is not whole JSON: {error}"
        found = problems(json.loads(self.source), value, extra=EXTRA)
        return f"it does not fit the schema: {'; '.join(found)}" if found else None


def read_schema(given: str) -> Any:
    """The schema that `--json-schema` names: a file, or JSON itself where it begins with a brace.

    Raises: UsageError if the file cannot be read or is no JSON.
    """
    text, name = given, "the schema"
    if not given.lstrip().startswith("{"):
        path = Path(given).expanduser()
        name = str(path)
        try:
            if path.stat().st_size > MOST_SCHEMA_BYTES:
                raise UsageError(f"{path} has {path.stat().st_size} bytes; a schema has {MOST_SCHEMA_BYTES} at most")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the schema {path}: {error}", hint="a file, or the JSON itself") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not JSON: {error}") from error


def grammar_for_arguments(schema: Mapping[str, Any]) -> str:
    """The grammar of a tool's arguments: a JSON object that fits `schema` as far as the engine can honour it.

    What it cannot is left to the check of the whole call; a schema that is beyond it asks for any object.
    """
    engine = require_engine()
    lenient = {**_STYLE, "lenient": True, "coerce_one_of": True}
    asked = {**{key: value for key, value in schema.items() if key != "x-guidance"}, "type": "object"}
    for source in (asked, {"type": "object"}):
        try:
            grammar: str = engine.grammar_from_json_schema(json.dumps(source), overrides=lenient)
        except ValueError:
            continue
        if not engine.validate_grammar_with_warnings(grammar)[0]:
            return grammar
    raise AssertionError("any JSON object has a grammar")


def has_engine() -> bool:
    """Whether the extra `structured` is installed."""
    try:
        require_engine()
    except Glm4RunError:
        return False
    return True


def require_engine() -> Any:
    """llguidance's matcher class. Raises Glm4RunError where it is not installed."""
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise Glm4RunError(
            "answers of a given form need the package llguidance", hint=f"pip install 'glm4run[{EXTRA}]'"
        ) from error
    return LLMatcher


def _require_valid(engine: Any, grammar: str, name: str) -> None:
    is_error, messages = engine.validate_grammar_with_warnings(grammar)
    if is_error or messages:
        lines = "\n".join(messages).splitlines()
        said = [line for line in lines if line.startswith("error:")] or lines[:1]  # the rest draws where
        raise UsageError(f"{name} cannot be honoured: {said[0].removeprefix('error:').strip()[:300]}")


def _unsupported(schema: Any, where: str) -> Iterator[tuple[str, str]]:
    """(place, what) for everything in `schema` that decoding cannot honour."""
    if not isinstance(schema, Mapping):
        return
    for key, value in schema.items():
        inert = key in _ANNOTATIONS or (key.startswith("x-") and key != "x-guidance")
        if key not in _HONOURED and not inert and not (key == "uniqueItems" and value is False):
            yield where, f"the keyword {key!r}"
        # A validator divides in floating point, by which 0.3 is no multiple of 0.1.
        if key == "multipleOf" and value != int(value):
            yield where, f"'multipleOf' {value}"
        # Other names may come twice in JSON text, and count once in what is read from it.
        if key == "minProperties" and value > 1:
            yield where, f"'minProperties' {value}"
    for key in _BY_NAME:
        for name, inner in schema.get(key, {}).items():
            yield from _unsupported(inner, f"{where}/{key}/{name}")
    for key in _IN_LISTS:
        listed = schema.get(key)
        for number, inner in enumerate(listed if isinstance(listed, list) else []):
            yield from _unsupported(inner, f"{where}/{key}/{number}")
    for key in _ALONE:
        yield from _unsupported(schema.get(key), f"{where}/{key}")


class _Bytes:
    """A vocabulary of the single bytes, to match texts with; its last id ends a text."""

    tokens = (*(bytes([value]) for value in range(256)), b"<end>")
    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@lru_cache(maxsize=1)
def _byte_tokenizer() -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()), slices=[])


def _matches(grammar: str, text: str) -> bool:
    matcher = require_engine()(_byte_tokenizer(), grammar, log_level=0)
    return bool(matcher.consume_tokens(list(text.encode("utf-8", errors="replace"))) and matcher.is_accepting())
