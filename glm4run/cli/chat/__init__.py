"""`glm4run chat`: a conversation in the terminal. Append-only: nothing that was printed is ever redrawn.

`commands` is the table of what a line that starts with a slash does, `prompt` where lines come from, `answering` what
happens to a message, `view` and `markdown` how an answer looks. What a conversation is, on disk too, is the library's.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from glm4run.cli import options
from glm4run.cli.console import note, talk
from glm4run.cli.groups import with_groups
from glm4run.errors import UsageError

if TYPE_CHECKING:
    from glm4run.cli.chat.state import Chat
    from glm4run.generate import LoadedModel

FORCED_DIALECTS = {"chatglm": "chat-2024", "glm": "chat-2024", "glm4": "0414"}
RESUME_FLAG, LAST_SESSION = "--resume", ""


@with_groups
def chat(
    *,
    model: Annotated[str | None, typer.Argument(help="A folder or the name of a model")] = None,
    system: Annotated[str | None, typer.Option(help="A system message")] = None,
    resume: Annotated[
        str | None,
        typer.Option(RESUME_FLAG, help="Go on with a saved session, by name; without a name with the last one"),
    ] = None,
    save: Annotated[
        str | None, typer.Option(help="Keep the session on disk under this name; default at a terminal: under the date")
    ] = None,
    no_save: Annotated[
        bool, typer.Option("--no-save", help="Keep nothing on disk, the prompt's history neither")
    ] = False,
    tools: Annotated[str | None, typer.Option(help="Tools that the model may call: a JSON file, or `examples`")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Run tools without asking")] = False,
    overflow: Annotated[
        str | None,
        typer.Option(help="When the context is full: error (default), or drop-oldest-turns, which says what goes"),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Show answers as they come, Markdown unrendered")] = False,
    hide_thoughts: Annotated[
        bool, typer.Option("--hide-thoughts", help="Do not show what a reasoning model thinks")
    ] = False,
    sampling: options.Sampling,
    force: Annotated[bool, typer.Option("--force", help="Chat with a base model all the same")] = False,
    loading: options.Loading,
    ctx: options.Ctx = None,
    prompt_cache: options.PromptCache = None,
    check_plan: options.CheckPlan = False,
) -> int:
    """Chat with a model. /help lists the commands; Ctrl-C stops an answer."""
    from glm4run.cli.chat import opening
    from glm4run.tool_runner import load_tools

    declared = [] if tools is None else load_tools(tools)  # whatever is wrong shows before a model is loaded
    if no_save and (save is not None or resume is not None):
        raise UsageError("--no-save keeps nothing, and a session was named", hint="leave one of the two out")
    if save is not None and resume is not None:
        raise UsageError("--save and --resume were given", hint="/save NAME gives a resumed session another name")
    kept_bytes = None if no_save else options.prompt_cache_bytes(prompt_cache)
    if resume is not None:
        resume, folder = opening.resolve_resumed(resume)
        model = model or folder
        if model is None:
            raise UsageError(
                f"the model of session {resume!r} is no longer there", hint="name one: chat MODEL --resume"
            )
    _, loaded = options.load(model, loading, ctx=ctx, needs_chat=not force)
    given = sampling.given()
    options.require_speculation(loaded, sampling.speculate)
    params = dataclasses.replace(loaded.default_params(), recover=True, **given)
    if force and loaded.dialect is None:
        loaded = _with_forced_dialect(loaded)
    loaded = options.with_kept_prompts(loaded, kept_bytes)
    from glm4run.benchmark import remembered_bandwidth
    from glm4run.cli.chat.commands import complete
    from glm4run.cli.chat.prompt import choose_reader, history_file
    from glm4run.cli.chat.state import Chat
    from glm4run.session import Session, require_overflow

    reader = choose_reader(lambda text: complete(going, text), None if no_save else history_file())
    session = Session(loaded, params, system=system, overflow=require_overflow(overflow or "error"))
    going = Chat(
        session,
        reader,
        is_raw=raw,
        shows_thoughts=not hide_thoughts,
        runs_without_asking=yes,
        bandwidth_gb_per_s=remembered_bandwidth() if loaded.device.type == "cpu" else None,
    )
    going.use_tools(declared)
    if resume is not None:
        opening.resume(going, resume, given=given, system=system)
        if overflow is not None:
            going.session.overflow = require_overflow(overflow)
    else:
        opening.begin(going, save, is_kept=save is not None or (reader.is_interactive and not no_save))
    code = _converse(going)
    if check_plan:
        options.say_plan_check(loaded, going.session.most_context_used)
    return code


def _with_forced_dialect(loaded: LoadedModel) -> LoadedModel:
    from glm4run.dialects import DIALECTS

    name = FORCED_DIALECTS[loaded.config.model_type]
    talk(f"notice: a base model, asked in the {name} dialect because of --force", style="yellow", only="notice:")
    return dataclasses.replace(loaded, dialect=DIALECTS[name])


def _converse(going: Chat) -> int:
    """Until the input ends or the user leaves."""
    from glm4run.cli.chat.commands import handle
    from glm4run.cli.chat.state import ChatEnded

    note("/help lists the commands, /exit leaves")
    try:
        while True:
            try:
                handle(going, going.reader.message())
            except KeyboardInterrupt:
                note("Ctrl-C stops an answer; /exit or Ctrl-D leaves")
    except (EOFError, ChatEnded):
        return 0
    finally:
        if going.files is not None:
            if going.reader.is_interactive and going.session.conversation.turns:
                note(f"kept as session {going.files.name}: `glm4run chat --resume` goes on with it")
            going.files.close()


def name_resumed(words: list[str]) -> list[str]:
    """The command line with the name that a bare `--resume` leaves out: the option's value may be missing."""
    named = []
    for number, word in enumerate(words):
        named.append(word)
        following = words[number + 1] if number + 1 < len(words) else None
        if word == RESUME_FLAG and (following is None or following.startswith("-")):
            named.append(LAST_SESSION)
    return named
