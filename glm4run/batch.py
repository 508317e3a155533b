"""Many requests from a file of JSON lines, answered one after the other into another, so that a stop loses nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4run.answer import Answer, collect
from glm4run.chat_format import Message, parse_messages
from glm4run.constraints import Constraint
from glm4run.errors import UsageError
from glm4run.generate import LoadedModel
from glm4run.sampling import SamplingParams

ANSWER_START = b'{"id": '  # how each line of the output begins


@dataclass(frozen=True)
class Request:
    """One line of the input: `prompt` or `messages`, and an `id` that the answer carries."""

    id: str | int
    prompt: str | None
    messages: tuple[Message, ...]
    constraint: Constraint | None = None  # its own; `json_schema` or `regex` of the line


def read_requests(path: Path) -> list[Request]:
    """Every request of a file. Raises UsageError that names the first line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON texts may hold U+2028 and the like
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    requests = [_parse(line, number, path) for number, line in enumerate(lines, 1) if line.strip()]
    ids = [request.id for request in requests]
    twice = next((i for i in ids if ids.count(i) > 1), None)
    if twice is not None:
        raise UsageError(f"{path}: id {twice!r} is given twice", hint="ids tell which answers are done already")
    return requests


def _parse(line: str, number: int, path: Path) -> Request:
    where = f"{path}, line {number}"
    try:
        data = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}") from error
    if not isinstance(data, dict) or ("prompt" in data) == ("messages" in data):
        raise UsageError(f"{where}: expected an object with either `prompt` or `messages`")
    prompt = data.get("prompt")
    if "prompt" in data and not isinstance(prompt, str):
        raise UsageError(f"{where}: prompt is {type(prompt).__name__}, expected a string")
    request_id = data.get("id", number)
    if not isinstance(request_id, str | int):
        raise UsageError(f"{where}: id is {type(request_id).__name__}, expected a string or a whole number")
    try:
        messages = tuple(parse_messages(data["messages"])) if "messages" in data else ()
        constraint = Constraint.from_dict(data)
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", hint=error.hint) from error
    if "messages" in data and not messages:
        raise UsageError(f"{where}: messages is empty")
    return Request(request_id, prompt, messages, constraint)


def run_batch(
    model: LoadedModel,
    requests: list[Request],
    params: SamplingParams,
    target: Path,
    *,
    as_prompt: Callable[[str], Any],
    constraint: Constraint | None = None,
) -> Iterator[tuple[int, int, Answer]]:
    """Answers what `target` does not hold yet; yields (requests done, requests in all, answer) after each.

    `constraint` is for requests that have none of their own. A line is written when its answer is complete; an
    interrupted one is not written, and done again next time.

    Raises:
        DoesNotFitError: a request leaves no room in the context. Before the first answer.
    """
    done = _finished(target)
    prompts: list[tuple[int, Request, Any]] = []
    for number, request in enumerate(requests, 1):
        if request.id not in done:
            prompt = list(request.messages) or as_prompt(request.prompt or "")
            model.check_prompt(model.encode_prompt(prompt), name=f"request {request.id!r}")
            prompts.append((number, request, prompt))
    with target.open("a", encoding="utf-8") as file:
        for number, request, prompt in prompts:
            answer = collect(model, prompt, params, constraint=request.constraint or constraint)
            if answer.finish_reason != "interrupted":
                file.write(json.dumps({"id": request.id, **answer.as_json()}, ensure_ascii=False) + "\n")
                file.flush()
            yield number, len(requests), answer


def _finished(target: Path) -> set[str | int]:
    """Ids that are answered already. A last line without its end (a killed run) is cut off."""
    if not target.exists():
        return set()
    raw = target.read_bytes()
    *lines, rest = raw.split(b"\n")
    done = {_answered_id(line, number, target) for number, line in enumerate(lines, 1)}
    if rest:
        if not ANSWER_START.startswith(rest[: len(ANSWER_START)]):  # not ours to cut
            raise _no_answer(target, len(lines) + 1)
        with target.open("r+b") as file:
            file.truncate(len(raw) - len(rest))
    return done


def _answered_id(line: bytes, number: int, target: Path) -> str | int:
    try:
        found = json.loads(line)["id"]
    except (ValueError, KeyError, TypeError) as error:
        raise _no_answer(target, number) from error
    if not isinstance(found, str | int):
        raise _no_answer(target, number)
    return found


def _no_answer(target: Path, number: int) -> UsageError:
    return UsageError(f"{target}, line {number} is not an answer of a batch", hint="choose another --output")
