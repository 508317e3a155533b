"""Many requests from a file of JSON lines, answered into another, several at a time, so that a stop loses nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from glm4run.answer import Answer, collect
from glm4run.batch_decoding import Job, SharedContexts, answer_together, choose_batch, sharing_order
from glm4run.chat_format import Message, parse_messages
from glm4run.constraints import Constraint
from glm4run.errors import DoesNotFitError, UsageError
from glm4run.generate import LoadedModel, is_conversation
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


@dataclass(frozen=True)
class Done:
    """One answer of a batch: of which request, and how many are done of how many."""

    request: Request
    answer: Answer
    done: int
    total: int


class Batch:
    """The requests of a file that `target` does not answer yet, and how many of them are decoded together."""

    def __init__(
        self,
        model: LoadedModel,
        requests: list[Request],
        params: SamplingParams,
        target: Path,
        *,
        as_prompt: Callable[[str], Any],
        constraint: Constraint | None = None,
        sequences: int | None = None,
    ) -> None:
        """`constraint` is for requests that have none of their own; `sequences` None takes what is worth it and fits.

        Raises:
            UsageError: `target` is no output of a batch, or `sequences` cannot be. DoesNotFitError: so many do not fit.
        """
        self.model, self.target, self.total = model, target, len(requests)
        done = _finished(target)
        self.answered = len([request for request in requests if request.id in done])
        self.jobs: list[tuple[Request, Job]] = []
        self.refused: list[tuple[Request, Answer]] = []
        for request in requests:
            if request.id in done:
                continue
            prompt = list(request.messages) or as_prompt(request.prompt or "")
            ids = model.encode_prompt(prompt)
            try:
                model.check_prompt(ids, name=f"request {request.id!r}")
            except (DoesNotFitError, UsageError) as error:
                answer = Answer(model.name, model.backend, model.load_s, prompt_tokens=len(ids))
                answer.fail(error)
                self.refused.append((request, answer))
                continue
            job = Job(
                ids, seeded(params, request.id), is_conversation(prompt), constraint=request.constraint or constraint
            )
            self.jobs.append((request, job))
        order = sharing_order([job.ids for _, job in self.jobs])
        self.jobs = [self.jobs[number] for number in order]
        self.plan = choose_batch(model, [job for _, job in self.jobs], sequences)

    def run(self) -> Iterator[Done]:
        """Answers one request after the other, in the order in which they end; each is on disk before it is yielded.

        They begin in the order of the file, except that those whose prompts begin alike follow each other: what they
        share is read once.

        A request that cannot be answered (too long, or the model's output is broken) gets a line with `error`. An
        interrupted answer (Ctrl-C) is the last, is not written, and is done again next time; so is a cut line.
        """
        with self.target.open("a", encoding="utf-8") as file:
            for request, answer in self._answers():
                if answer.finish_reason != "interrupted":
                    seed = {} if request.id not in self._seeds else {"seed": self._seeds[request.id]}
                    file.write(json.dumps({"id": request.id, **answer.as_json(), **seed}, ensure_ascii=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                    self.answered += 1
                yield Done(request, answer, self.answered, self.total)

    @cached_property
    def _seeds(self) -> dict[str | int, int]:
        return {request.id: job.params.seed for request, job in self.jobs if job.params.seed is not None}

    def _answers(self) -> Iterator[tuple[Request, Answer]]:
        yield from self.refused
        if self.plan.sequences == 1:
            contexts = SharedContexts(self.model)
            for request, job in self.jobs:
                held, shared = contexts.take(job.ids)
                answer = collect(
                    self.model,
                    job.ids,
                    job.params,
                    chat=job.chat,
                    constraint=job.constraint,
                    context=held.context,
                )
                answer.timings.shared_tokens = shared
                contexts.give_back(held, is_sound=answer.error is None)
                yield request, answer
                if answer.finish_reason == "interrupted":
                    return
            return
        try:
            for number, answer in answer_together(self.model, [job for _, job in self.jobs], self.plan):
                yield self.jobs[number][0], answer
        except KeyboardInterrupt:
            model = self.model
            yield self.jobs[-1][0], Answer(model.name, model.backend, model.load_s, prompt_tokens=0)


def seeded(params: SamplingParams, request_id: str | int) -> SamplingParams:
    """With a seed of the request's own where one is given: what it draws depends on nothing else of the batch."""
    if params.seed is None or params.temperature == 0:
        return params
    digest = hashlib.sha256(json.dumps([params.seed, request_id]).encode()).digest()
    return replace(params, seed=int.from_bytes(digest[:4]))


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
