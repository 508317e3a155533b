"""`glm4run chat`: a conversation in the terminal. Append-only: nothing that was printed is ever redrawn."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from glm4run.cli import options
from glm4run.cli.console import note, read_stdin_line, say_error, stderr_console, talk, token_progress, write_text
from glm4run.errors import DoesNotFitError, GenerationError

if TYPE_CHECKING:
    from glm4run.generate import LoadedModel
    from glm4run.session import Session

HELP = """/help   show this
/clear  forget the conversation and start anew
/exit   leave (so does Ctrl-D)
A message that starts with a slash is sent with two: //like this. Ctrl-C stops an answer and keeps the conversation."""
FORCED_DIALECTS = {"chatglm": "chat-2024", "glm": "chat-2024", "glm4": "0414"}


def chat(
    model: Annotated[str | None, typer.Argument(help="A folder or the name of a model")] = None,
    system: Annotated[str | None, typer.Option(help="A system message")] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    penalty: options.Penalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    force: Annotated[bool, typer.Option("--force", help="Chat with a base model all the same")] = False,
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    activations: options.Activations = "auto",
    quantize_on_load: options.QuantizeOnLoad = None,
    dtype: options.Dtype = "auto",
    ctx: options.Ctx = None,
    threads: options.Threads = None,
    rope_theta: options.RopeTheta = None,
    yarn: options.Yarn = "auto",
    check_plan: options.CheckPlan = False,
) -> None:
    """Chat with a model. /help lists the commands; Ctrl-C stops an answer."""
    _, loaded = options.load(
        model,
        device=device,
        backend=backend,
        activations=activations,
        quantize_on_load=quantize_on_load,
        dtype=dtype,
        ctx=ctx,
        threads=threads,
        rope_theta=rope_theta,
        yarn=yarn,
        needs_chat=not force,
    )
    params = options.sampling_params(
        loaded,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        penalty=penalty,
        seed=seed,
        stop=stop,
    )
    if force and loaded.dialect is None:
        loaded = _with_forced_dialect(loaded)
    from glm4run.session import Session

    session = Session(loaded, params, system=system)
    _converse(session, _line_reader())
    if check_plan:
        options.say_plan_check(loaded, session.most_context_used)


def _with_forced_dialect(loaded: LoadedModel) -> LoadedModel:
    from glm4run.dialects import DIALECTS

    name = FORCED_DIALECTS[loaded.config.model_type]
    talk(f"notice: a base model, asked in the {name} dialect because of --force", style="yellow", only="notice:")
    return dataclasses.replace(loaded, dialect=DIALECTS[name])


def _line_reader() -> Callable[[], str]:
    """Reads one message; raises EOFError at the end. On a terminal with editing and history, CJK-safe."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return _read_piped_line
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    # The prompt is talk, not text: it goes to stderr, so that stdout can be piped.
    session: PromptSession[str] = PromptSession(output=create_output(stdout=sys.stderr))
    return lambda: session.prompt("> ")


def _read_piped_line() -> str:
    line = read_stdin_line()
    if not line:
        raise EOFError
    return line


def _converse(session: Session, read_line: Callable[[], str]) -> None:
    note("/help lists the commands, /exit leaves")
    while True:
        try:
            text = read_line().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            note("Ctrl-C stops an answer; /exit or Ctrl-D leaves")
            continue
        if text == "/exit":
            return
        if text == "/help":
            talk(HELP)
        elif text == "/clear":
            session.clear()
            note("the conversation is forgotten")
        elif text.startswith("//"):
            _answer(session, text[1:])
        elif text.startswith("/"):
            talk(f"unknown command {text.split()[0]}: /help lists them; // sends a message that starts with a slash")
        elif text:
            _answer(session, text)


def _answer(session: Session, text: str) -> None:
    """Streams one answer. Whatever ends it, the conversation goes on."""
    from glm4run.steps import Timings

    timings = Timings()
    reason: str | None = None
    try:
        with token_progress("reading") as on_prefill:
            for step in session.say(text, timings=timings, on_prefill=on_prefill):
                if step.thought:
                    stderr_console().print(step.thought, end="", style="dim", markup=False)
                write_text(step.text)
                reason = step.finish_reason
    except KeyboardInterrupt:
        reason = "interrupted"
    except DoesNotFitError as error:
        say_error(error.message, error.hint)
        return
    except GenerationError as error:
        talk(f"\nerror: {error.message}", style="bold red", only="\nerror:")
        return
    write_text("\n")
    speed = timings.decode_tokens / timings.decode_s if timings.decode_s else 0.0
    ending = "" if reason == "stop" else f", ended by {reason}"
    used, limit = session.context_used, session.model.plan.context_len
    note(f"{timings.decode_tokens} tokens, {speed:.1f} tok/s, context {used}/{limit}{ending}")
