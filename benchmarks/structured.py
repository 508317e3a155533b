#!/usr/bin/env python3
"""Answers that are held to a form: how many of them are valid, and what share of a token's time the form takes.

    python benchmarks/structured.py [MODEL] [--samples 200] [--vocabulary DIR] [-o JSON]

MODEL is a folder; without one the embedded demo answers. Samples go round over the forms below, at temperature 1, each
with a seed of its own, and are held against the schema by `jsonschema`. A sample that a limit cuts short is counted
apart: it is not valid, and the answer says so. DIR has the tokenizer of a model (`tokenizer.model` or
`tokenizer.json`), over whose vocabulary, padded to 151,552 rows, masks are timed without a model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from glm4run import SamplingParams, load_model
from glm4run.answer import collect
from glm4run.cards import FAMILY_STOP_TOKENS, demo_folder
from glm4run.chat_format import Message
from glm4run.constraints import Constraint
from glm4run.machine import commit, cpu_name
from glm4run.token_rules import GrammarVocabulary, Matcher
from glm4run.tokenizer import load_tokenizer

ROWS = 151_552
MOST_TOKENS = 1000
QUESTION = "Who are you?"
_NAME = {"type": "string", "maxLength": 30}


def _part(inner: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": _NAME, "parts": {"type": "array", "items": inner, "maxItems": 2}},
        "required": ["name", "parts"],
        "additionalProperties": False,
    }


SCHEMAS: dict[str, Any] = {
    "person": {
        "type": "object",
        "properties": {
            "name": _NAME,
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "mail": {"type": "string", "pattern": r"^[a-z]{1,12}@[a-z]{2,10}\.(org|cn)$"},
            "born": {"type": "string", "format": "date"},
        },
        "required": ["name", "age", "mail", "born"],
        "additionalProperties": False,
    },
    "list": {"type": "array", "items": {"enum": ["red", "green", "蓝", 3, None]}, "minItems": 1, "maxItems": 6},
    "choice": {
        "anyOf": [
            {"const": {"kind": "none", "why": [1.5, True]}},
            {"type": "integer", "minimum": -500, "exclusiveMaximum": 500},
            {"type": "string", "minLength": 3, "maxLength": 20},
        ]
    },
    "tree": {"$defs": {"leaf": _NAME, "twig": _part({"$ref": "#/$defs/leaf"})}, **_part({"$ref": "#/$defs/twig"})},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}, {"type": "integer", "multipleOf": 5}],
        "items": False,
    },
    "map": {
        "type": "object",
        "patternProperties": {"^[a-z]{1,8}$": {"type": "null"}},
        "additionalProperties": False,
        "maxProperties": 4,
    },
}
PATTERNS = {
    "sentence": r"(Yes|No), [a-z ]{5,60}\.",
    "chinese": "[一-龥]{4,12}。",
    "date": r"20\d\d-(0\d|1[0-2])-[0-3]\d",
}


class Clock:
    """Seconds inside a rule, of all matchers."""

    def __init__(self) -> None:
        self.seconds, self.calls, self.longest = 0.0, 0, 0.0
        for name in ("allowed", "push"):
            setattr(Matcher, name, self._timed(getattr(Matcher, name)))

    def _timed(self, method: Any) -> Any:
        def call(*words: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*words)
            finally:
                spent = time.perf_counter() - started
                self.seconds, self.calls = self.seconds + spent, self.calls + 1
                self.longest = max(self.longest, spent)

        return call


def sample(folder: Path, samples: int, clock: Clock) -> dict[str, Any]:
    """Counts over all forms, and the share of time."""
    model = load_model(folder, context_len=2048)
    forms = {name: Constraint.from_schema(schema) for name, schema in SCHEMAS.items()}
    forms |= {name: Constraint.from_regex(pattern) for name, pattern in PATTERNS.items()}
    started = time.perf_counter()
    _ = model.grammar_vocabulary
    built_s = time.perf_counter() - started
    prompt: Any = [Message("user", QUESTION)] if model.dialect is not None else QUESTION
    counts: Counter[str] = Counter()
    invalid: list[str] = []
    tokens, decode_s = 0, 0.0
    for seed in range(samples):
        name, form = list(forms.items())[seed % len(forms)]
        params = SamplingParams(temperature=1.0, seed=seed, max_new_tokens=MOST_TOKENS)
        answer = collect(model, prompt, params, constraint=form)
        ended = "whole" if answer.finish_reason == "stop" else answer.finish_reason
        counts[ended if answer.problem is None or ended != "whole" else "invalid"] += 1
        if ended == "whole" and answer.problem is not None:
            invalid.append(f"{name}, seed {seed}: {answer.problem}")
        tokens += answer.completion_tokens
        decode_s += answer.timings.decode_s
    return {
        "model": model.name,
        "samples": samples,
        "ended": dict(counts),
        "invalid": invalid,
        "vocabulary_s": round(built_s, 3),
        "tokens": tokens,
        "form_us_per_token": round(1e6 * clock.seconds / tokens, 1),
        "forward_us_per_token": round(1e6 * decode_s / tokens, 1),
    }


def masks(folder: Path, clock: Clock) -> dict[str, Any]:
    """Microseconds of a mask and a step over a whole vocabulary, along a document that fits."""
    tokenizer = load_tokenizer(folder)
    ordinary = torch.zeros(ROWS, dtype=torch.bool)
    ordinary[[i for i in tokenizer.usable_ids() if i not in tokenizer.special_ids]] = True
    stops = frozenset(i for name in FAMILY_STOP_TOKENS if (i := tokenizer.special_id(name)) is not None)
    started = time.perf_counter()
    vocabulary = GrammarVocabulary(tokenizer, ordinary, stops)
    built_s = time.perf_counter() - started
    document = {"name": "Ada 北京", "age": 36, "mail": "ada@example.org", "born": "1815-12-10"}
    before, tokens = clock.seconds, 0
    clock.longest = 0.0
    for _ in range(20):
        matcher = vocabulary.matcher(Constraint.from_schema(SCHEMAS["person"]).grammar)
        for token in tokenizer.encode(json.dumps(document, ensure_ascii=False)):
            if not bool(matcher.allowed()[token]):
                raise AssertionError(f"{tokenizer.piece(token)!r} is not allowed")
            matcher.push(token)
            tokens += 1
    return {
        "tokens_in_vocabulary": tokenizer.vocab_size,
        "vocabulary_s": round(built_s, 3),
        "form_us_per_token": round(1e6 * (clock.seconds - before) / tokens, 1),
        "longest_us": round(1e6 * clock.longest, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=demo_folder())
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--vocabulary", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    clock = Clock()
    report: dict[str, Any] = {"machine": cpu_name(), "commit": commit()}
    if options.samples:
        report["answers"] = sample(options.model, options.samples, clock)
    if options.vocabulary is not None:
        report["masks"] = masks(options.vocabulary, clock)
    text = json.dumps(report, indent=2, ensure_ascii=False)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
