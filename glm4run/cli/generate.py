"""`glm4run generate`: one answer, or a batch of them."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glm4run.cli import options
from glm4run.cli.console import count_progress, note, read_stdin, stderr_console, token_progress, write_json, write_text
from glm4run.cli.groups import with_groups
from glm4run.errors import EXIT_INTERRUPTED, Glm4RunError, UsageError

if TYPE_CHECKING:
    from glm4run.answer import Answer
    from glm4run.constraints import Constraint
    from glm4run.generate import LoadedModel
    from glm4run.sampling import SamplingParams


@with_groups
def generate(
    *,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; `-` or a pipe reads it from stdin")] = None,
    model: Annotated[str | None, typer.Option("-m", "--model", help="A folder or the name of a model")] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="Ask as a chat user (default of chat models), or continue bare text"),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message (with chat)")] = None,
    sampling: options.Sampling,
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, max=20, help="In JSON, how likely each token was, and so many of the likeliest"),
    ] = None,
    input_file: Annotated[
        Path | None, typer.Option("--input", help="JSON lines with `prompt` or `messages`, one request a line")
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", help="Where answers of --input go; what is there is not done again")
    ] = None,
    batch: Annotated[
        str, typer.Option(help="How many requests of --input are decoded together: auto, or a number; 1 is one by one")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text")] = False,
    loading: options.Loading,
    ctx: options.Ctx = None,
    prompt_cache: options.PromptCache = None,
    check_plan: options.CheckPlan = False,
) -> int:
    """Generate an answer to PROMPT, or answers to every line of a file."""
    if (input_file is None) != (output_file is None):
        raise UsageError("--input and --output go together", hint="glm4run generate --input FILE --output FILE")
    if input_file is not None and prompt is not None:
        raise UsageError("a PROMPT and --input were given", hint="use one of the two")
    kept_bytes = options.prompt_cache_bytes(prompt_cache)
    constraint = options.given_constraint(json_schema, regex)
    sequences = _parse_batch(batch)
    if sequences is not None and input_file is None:
        raise UsageError("--batch is for --input", hint="glm4run generate --input FILE --output FILE --batch 8")
    if logprobs is not None and not as_json and input_file is None:
        raise UsageError("--logprobs needs JSON", hint="add --json, or use --input and --output")
    text = None if input_file is not None else _read_prompt(prompt)
    _, loaded = options.load(model, loading, ctx=ctx, needs_chat=chat is True)
    loaded = options.with_kept_prompts(loaded, kept_bytes)
    given = sampling.given()
    options.require_speculation(loaded, sampling.speculate)
    params = dataclasses.replace(loaded.default_params(), **given)
    params = dataclasses.replace(params, logprobs=logprobs)
    if as_json:  # nothing is shown before it is whole, so a loop can still be taken back
        params = dataclasses.replace(params, recover=True)
    if input_file is not None and output_file is not None:
        return _run_batch(
            loaded,
            params,
            constraint,
            input_file,
            output_file,
            chat=chat,
            system=system,
            sequences=sequences,
            check_plan=check_plan,
        )
    assert text is not None
    _say_how_prompts_are_taken(loaded, chat=chat)
    prompt_ids = _as_prompt(loaded, text, chat=chat, system=system)
    return _run_one(loaded, params, constraint, prompt_ids, as_json=as_json, check_plan=check_plan)


def _parse_batch(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--batch is {text!r}", hint="auto, or a number of requests")
    return int(text)


def _read_prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise UsageError("no PROMPT", hint='glm4run generate "Why is the sky blue?", or pipe it into stdin')
    text = read_stdin() if prompt in (None, "-") else prompt
    assert text is not None
    if not text.strip():
        raise UsageError("the prompt is empty")
    return text


def _as_prompt(loaded: LoadedModel, text: str, *, chat: bool | None, system: str | None) -> Any:
    """Messages for a chat, prefixed text for a base model, bare ids with --raw."""
    from glm4run.chat_format import Message

    if chat is False:
        if system is not None:
            raise UsageError("--system needs a chat", hint="leave out --raw")
        return loaded.tokenizer.encode(text)
    if chat is None and loaded.dialect is None:
        if system is not None:
            raise UsageError(f"--system needs a chat model, and {loaded.name} has no chat format")
        return text
    return [*([] if system is None else [Message("system", system)]), Message("user", text)]


def _say_how_prompts_are_taken(loaded: LoadedModel, *, chat: bool | None) -> None:
    """Whatever is not the usual chat is said aloud."""
    if chat is False:
        note("raw: no chat format and no [gMASK]<sop> prefix")
    elif loaded.dialect is None:
        note("no chat template: continuing the text behind the [gMASK]<sop> prefix")


def _run_one(
    loaded: LoadedModel,
    params: SamplingParams,
    constraint: Constraint | None,
    prompt: Any,
    *,
    as_json: bool,
    check_plan: bool,
) -> int:
    from glm4run.answer import collect

    # What is not known to be valid yet goes to a reader, who sees how it ends; a program gets it when it is.
    is_held = constraint is not None and not sys.stdout.isatty()

    def show(text: str, thought: str) -> None:
        if thought:
            stderr_console().print(thought, end="", style="dim", markup=False)
        if text and not is_held:
            write_text(text)

    with token_progress("reading the prompt") as on_prefill:
        answer = collect(
            loaded, prompt, params, on_text=None if as_json else show, on_prefill=on_prefill, constraint=constraint
        )
    if as_json:
        write_json(answer.as_json())
    elif is_held and answer.problem is not None:
        note(f"not printed, because it is not what was asked for: {answer.text}")
        _say_how_it_ended(answer)
    else:
        write_text(answer.text + "\n" if is_held else "\n")
        _say_how_it_ended(answer)
    _keep_prompts(loaded)
    if check_plan:
        options.say_plan_check(loaded, answer.prompt_tokens + answer.completion_tokens)
    if answer.error is not None:
        raise Glm4RunError(answer.error.message, hint=answer.error.hint, exit_code=answer.error.exit_code)
    if answer.finish_reason == "interrupted":
        return EXIT_INTERRUPTED
    if answer.problem is not None:
        raise _not_valid(answer)
    return 0


def _not_valid(answer: Answer) -> Glm4RunError:
    hints = {
        "max_tokens": "a larger --max-tokens lets it end",
        "context_full": "a larger --ctx lets it end",
        "repetition": "--repetition-penalty 1.1 or a stricter schema (maxItems, maxLength) keep it from going round",
    }
    return Glm4RunError(
        f"the answer ended by {answer.finish_reason} and is not valid: {answer.problem}",
        hint=hints.get(answer.finish_reason),
    )


def _keep_prompts(loaded: LoadedModel) -> None:
    """Writes what was read, now that its answer is shown."""
    if loaded.kept_prompts is not None:
        loaded.kept_prompts.keep()


def _say_how_it_ended(answer: Answer) -> None:
    from glm4run.generation import COMPLETE

    timings = answer.timings.as_json(0.0)
    is_whole = answer.constraint is not None and answer.stopped_by == COMPLETE
    stopped = "" if answer.stopped_by is None else ", as it is whole" if is_whole else f" at {answer.stopped_by!r}"
    note(
        f"{answer.prompt_tokens} + {answer.completion_tokens} tokens, {timings['decode_tok_per_s']} tok/s"
        f"{options.describe_drafts(answer.timings)}, ended by {answer.finish_reason}{stopped}"
    )


def _run_batch(
    loaded: LoadedModel,
    params: SamplingParams,
    constraint: Constraint | None,
    source: Path,
    target: Path,
    *,
    chat: bool | None,
    system: str | None,
    sequences: int | None,
    check_plan: bool,
) -> int:
    from glm4run.batch import Batch, read_requests
    from glm4run.plan_check import check_plan as compare_plan

    requests = read_requests(source)
    if any(request.prompt is not None for request in requests):
        _say_how_prompts_are_taken(loaded, chat=chat)
    work = Batch(
        loaded,
        requests,
        params,
        target,
        as_prompt=lambda text: _as_prompt(loaded, text, chat=chat, system=system),
        constraint=constraint,
        sequences=sequences,
    )
    if work.answered:
        note(f"{work.answered} of {work.total} answers are in {target} already")
    if work.plan.sequences > 1:
        note(f"{work.plan.sequences} requests together, each with a context of {work.plan.capacity} tokens")
    started, tokens, most, asked, shared = time.perf_counter(), 0, 0, 0, 0
    with count_progress("answering", work.answered, work.total) as update:
        for item in work.run():
            answer = item.answer
            _keep_prompts(loaded)
            if answer.finish_reason == "interrupted":
                note(f"interrupted: run the same command again to go on after {item.done} answers")
                return EXIT_INTERRUPTED
            tokens += answer.completion_tokens
            asked, shared = asked + answer.prompt_tokens, shared + answer.timings.shared_tokens
            most = max(most, answer.prompt_tokens + answer.completion_tokens)
            problem = "" if answer.problem is None else f", not valid: {answer.problem}"
            problem += "" if answer.error is None else f": {answer.error.message}"
            note(f"{item.request.id!r}: {answer.completion_tokens} tokens, ended by {answer.finish_reason}{problem}")
            update(item.done)
    elapsed = time.perf_counter() - started
    if shared:
        note(f"{shared} of {asked} prompt tokens had been read for another request")
    note(f"{work.total} answers are in {target}; {tokens} tokens, {tokens / max(elapsed, 1e-9):.1f} tok/s in all")
    if check_plan:
        loaded.settle()
        note(compare_plan(work.plan.run, work.plan.plan, loaded.device, most).describe())
    return 0
