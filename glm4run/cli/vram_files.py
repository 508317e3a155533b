"""`glm4run vram` for machines and documents: JSON with stable keys, CSV, a Markdown table."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

from glm4run.memory import gib_text
from glm4run.vram.answers import (
    Card,
    Longest,
    Question,
    Row,
    cards_that_fit,
    ladder,
    longest_contexts,
    make_rows,
    recommend,
)
from glm4run.vram.runtimes import Theirs

SCHEMA_VERSION = 1


def as_json(question: Question, *, theirs: Sequence[Theirs] = (), with_cards: bool = False) -> dict[str, Any]:
    """Everything that the screens say, under keys that are added to and never renamed."""
    rows = make_rows(question)
    target = question.target
    device = {
        "name": target.name,
        "total_bytes": target.total_bytes,
        "free_bytes": target.free_bytes,
        "reserved_bytes": question.reserve.of(target.total_bytes),
        "source": target.source,
        "holders": [{"pid": h.pid, "name": h.name, "bytes": h.bytes} for h in target.holders],
        "notes": list(target.notes),
        "calibration": None if target.calibration is None else dataclasses.asdict(target.calibration),
    }
    short = None if any(row.fits for row in rows) else max(rows, key=lambda row: row.headroom_bytes)
    best = recommend(question)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": question.subject.name,
        "gpu": device if target.device == "cuda" else None,
        "device": device,
        "rows": [_row(row) for row in rows],
        "max_context": [_longest(item) for item in longest_contexts(question)],
        "recommendations": [] if not with_cards else _cards(question),
        "best": None if best is None else _longest(best),
        "remedies": [] if short is None else _remedies(question, short),
        "other_runtimes": [_theirs(row) for row in theirs],
    }


def _row(row: Row) -> dict[str, Any]:
    choice, plan, speed = row.choice, row.plan, row.speed
    return {
        "context_tokens": plan.context_len,
        "bits": choice.label if choice.bits in ("packed", "nf4") else int(choice.bits),
        "kv_bits": choice.kv_bits,
        "head_bits": 16 if choice.bits in ("16", "nf4") else choice.head_bits,
        "batch": choice.batch,
        "chunk": plan.chunk,
        "peak_bytes": plan.peak_bytes,
        "terms": [
            {"name": term.name, "bytes": term.bytes, "kind": term.kind, "formula": term.formula} for term in plan.terms
        ],
        "fits": row.fits,
        "is_tight": row.is_tight,
        "headroom_bytes": row.headroom_bytes,
        "decode_tok_per_s": None if speed is None else [round(value, 2) for value in speed.decode_tok_per_s],
        "prefill_s": None if speed is None or speed.prefill_s is None else [round(v, 3) for v in speed.prefill_s],
        "speed_class": None if speed is None else speed.device_class,
        "estimated": choice.estimated,
    }


def _longest(item: Longest) -> dict[str, Any]:
    choice = item.choice
    return {
        "bits": choice.label if choice.bits in ("packed", "nf4") else int(choice.bits),
        "kv_bits": choice.kv_bits,
        "context_tokens": item.tokens,
        "bounded_by": item.reason,
        "estimated": choice.estimated,
    }


def _remedies(question: Question, short: Row) -> list[dict[str, Any]]:
    steps = ladder(question, short.choice, short.plan.context_len)
    return [
        {
            "what": step.what,
            "option": step.option,
            "peak_bytes": step.plan_bytes,
            "saved_bytes": step.saved_bytes,
            "fits": step.fits,
            "runs_now": step.runs_now,
        }
        for step in steps
    ]


def _cards(question: Question) -> list[dict[str, Any]]:
    context_len = max(question.contexts)
    return [
        _card(card, context_len)
        for choice in question.choices
        for card in cards_that_fit(question, choice, context_len, per_vendor=3)
    ]


def _card(card: Card, context_len: int) -> dict[str, Any]:
    speed = card.speed
    return {
        "gpu": card.gpu.name,
        "vendor": card.gpu.vendor,
        "bits": card.choice.label,
        "kv_bits": card.choice.kv_bits,
        "context_tokens": context_len,
        "usable_bytes": card.gpu.usable_bytes,
        "peak_bytes": card.peak_bytes,
        "max_context_tokens": card.longest_tokens,
        "decode_tok_per_s": None if speed is None else [round(value, 2) for value in speed.decode_tok_per_s],
        "is_supported": card.gpu.is_supported,
    }


def _theirs(row: Theirs) -> dict[str, Any]:
    return {
        "runtime": row.runtime,
        "context_tokens": row.context_len,
        "bits": row.bits,
        "peak_bytes": row.peak_bytes,
        "parts": dict(row.parts),
        "note": row.note,
    }


def as_csv(question: Question) -> str:
    """One line for each row, a column for each term."""
    rows = make_rows(question)
    names = list(dict.fromkeys(term.name for row in rows for term in row.plan.terms))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    fixed = ("context_tokens", "bits", "kv_bits", "head_bits", "batch", "chunk", "peak_bytes", "fits", "headroom_bytes")
    writer.writerow([*fixed, *(f"{name}_bytes" for name in names)])
    for row in rows:
        data = _row(row)
        by_name = {term.name: term.bytes for term in row.plan.terms}
        writer.writerow([*(data[key] for key in fixed), *(by_name.get(name, 0) for name in names)])
    return out.getvalue()


def as_markdown(question: Question) -> str:
    """A table of the peaks in GiB, one row for each choice."""
    rows = make_rows(question)
    longest = {item.choice: item for item in longest_contexts(question)}
    head = ["weights", "KV bits", *(f"{n} tokens" for n in question.contexts), "longest context"]
    lines = [f"{question.subject.name} on {question.target.name}, peak in GiB", "", _cells(head)]
    lines.append(_cells(["---"] * len(head)))
    for choice in question.choices:
        cells = [choice.label, str(choice.kv_bits)]
        for row in rows:
            if row.choice == choice:
                verdict = "" if row.fits else " (does not fit)"
                cells.append(f"{gib_text(row.plan.peak_bytes)}{verdict}")
        lines.append(_cells([*cells, str(longest[choice].tokens)]))
    return "\n".join(lines) + "\n"


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
