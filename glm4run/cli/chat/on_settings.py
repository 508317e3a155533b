"""The commands about how answers are made and shown: /system, /set, /show, /think, /tools."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

from glm4run.cli.chat.state import Chat
from glm4run.cli.chat.view import inert
from glm4run.cli.console import note, talk
from glm4run.errors import UsageError

OFF = "off"
_OF_THE_SESSION = ("overflow", "format")
RENAMED = {"max_tokens": "max_new_tokens"}  # the option's name -> the parameter's


def _switch(text: str) -> bool:
    if text.lower() in ("on", "true", "yes"):
        return True
    if text.lower() in ("off", "false", "no"):
        return False
    raise ValueError


def _optional(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text.lower() in (OFF, "none") else parse(text)


_PARSERS: dict[str, Callable[[str], Any]] = {
    "max_new_tokens": _optional(int),
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "seed": _optional(int),
    "stop": lambda text: () if text.lower() == OFF else (text.encode().decode("unicode_escape"),),
    "stop_on_repetition": _switch,
    "recover": _switch,
}


def parse_setting(name: str, text: str) -> tuple[str, Any]:
    """The parameter that a user means, and its value. Raises UsageError."""
    name = name.replace("-", "_")
    name = RENAMED.get(name, name)
    if name not in _PARSERS:
        raise UsageError(f"there is no setting {name!r}", hint=f"one of: {', '.join([*_PARSERS, *_OF_THE_SESSION])}")
    try:
        return name, _PARSERS[name](text)
    except ValueError:
        raise UsageError(f"{name} cannot be {text!r}", hint="/show lists the settings and their values") from None


def set_value(chat: Chat, argument: str) -> None:
    """`/set NAME VALUE`."""
    name, _, text = argument.replace("=", " ", 1).partition(" ")
    text = text.strip()
    if not name or not text:
        raise UsageError("/set takes a name and a value", hint="/set temperature 0.8; /show lists all")
    if name == "overflow":
        from glm4run.session import require_overflow

        chat.session.overflow = require_overflow(text)
    elif name == "format":
        _set_format(chat, text)
    else:
        key, value = parse_setting(name, text)
        chat.session.set_params(**{key: value})
        name = key
    chat.record_settings()
    note(f"{name} is {text}")


def _set_format(chat: Chat, text: str) -> None:
    """A schema (a file, or JSON itself), `regex PATTERN`, or off."""
    from glm4run.constraints import Constraint, read_schema

    kind, _, pattern = text.partition(" ")
    if text.lower() == OFF:
        chat.session.constraint = None
    elif kind == "regex" and pattern:
        chat.session.constraint = Constraint.from_regex(pattern.strip())
    else:
        chat.session.constraint = Constraint.from_schema(read_schema(text))
    if chat.session.constraint is not None and chat.tools:
        note("answers have this format while there are no tools: /tools off takes them away")


def set_words(chat: Chat) -> Iterable[str]:
    """What Tab offers behind /set."""
    return [f"{name} " for name in (*_PARSERS, "overflow error", "overflow drop-oldest-turns", "format")]


def show(chat: Chat, argument: str) -> None:
    """`/show`."""
    session = chat.session
    params = session.params
    for item in fields(params):
        value = getattr(params, item.name)
        shown = "off" if value is None or value == () else value
        talk(f"{item.name:20} {', '.join(map(repr, shown)) if isinstance(shown, tuple) else shown}")
    talk(f"{'overflow':20} {session.overflow}")
    form = session.constraint
    talk(f"{'format':20} {'off' if form is None else inert(f'{form.kind} {form.source}')}")
    talk(f"{'system':20} {'off' if session.system is None else inert(session.system)}")
    talk(f"{'tools':20} {', '.join(chat.tools) or 'off'}")
    talk(f"{'model':20} {session.model.name} ({session.model.backend_detail})")
    if chat.files is not None:
        talk(f"{'session':20} {chat.files.name} ({chat.files.folder})")
    else:
        talk(f"{'session':20} not kept; /save keeps it")


def system(chat: Chat, argument: str) -> None:
    """`/system [TEXT|off]`."""
    if argument:
        chat.session.set_system(None if argument.lower() == OFF else argument)
        note("there is no system message now" if chat.session.system is None else "the system message is set")
    elif chat.session.system is None:
        note("there is no system message; /system TEXT sets one")
    else:
        talk(inert(chat.session.system))


def think(chat: Chat, argument: str) -> None:
    """`/think [show|hide]`; alone it toggles."""
    if argument not in ("", "show", "hide"):
        raise UsageError(f"/think cannot be {argument!r}", hint="/think show or /think hide")
    chat.shows_thoughts = argument == "show" if argument else not chat.shows_thoughts
    dialect = chat.session.model.dialect
    without = "" if dialect is not None and dialect.opens_thinking else " (this model has none)"
    note(f"thoughts are {'shown' if chat.shows_thoughts else 'hidden'}{without}")


def tools(chat: Chat, argument: str) -> None:
    """`/tools [FILE|examples|off]`."""
    from glm4run.tool_runner import load_tools

    if argument:
        chat.use_tools([] if argument.lower() == OFF else load_tools(argument))
    if not chat.tools:
        note("no tools; /tools FILE takes them from a JSON file, /tools examples shows how")
    for tool in chat.tools.values():
        function = tool.declaration.get("function") or tool.declaration
        talk(f"{tool.name}  {inert(str(function.get('description', '')))}")
        note(f"  runs: {inert(tool.command)}")
