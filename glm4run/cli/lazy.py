"""A group that imports only the command that is asked for, and a start that does not wait for pydantic.

The group's own help needs one line for each command: those of its table. Newer versions of typer convert every option
through pydantic, whose import alone takes longer than most of what the light commands do; a default and a text are
what they should be already.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

# Name to module under `glm4run.cli` and to the line of `glm4run --help`, in its order. The function has the command's
# name and its docstring starts with that line.
COMMANDS = {
    "chat": ("chat", "Chat with a model. /help lists the commands; Ctrl-C stops an answer."),
    "generate": ("generate", "Generate an answer to PROMPT, or answers to every line of a file."),
    "quantize": (
        "quantize",
        "Pack the weights of SOURCE into int4 or int8, tensor by tensor; the folder appears when it is complete.",
    ),
    "vram": ("vram", "Say what fits in memory, the longest context, the speed to expect and what to run."),
    "bench": ("bench", "Measures prefill and decoding speed beside the machine's read bandwidth."),
    "eval": (
        "eval",
        "Perplexity over a text; with a reference also KL divergence and how often the likeliest token is the same.",
    ),
    "tokenize": ("tokenize", "Show the token ids of a text, or of a conversation as the model would see it."),
    "info": ("info", "Say what a model is: member of the family, shape, quantization, size, context, chat dialect."),
    "models": ("info", "List the models on this machine, and the members of the family."),
    "cache": ("cache", "List or remove the prompts that are kept on disk so that they are not read twice."),
    "check": (
        "check",
        "Check headers, config, scales and tokenizer of a model folder; takes seconds and loads no weights.",
    ),
}
CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"]}


class _FewConversions:
    """Before anything is parsed: only what is given, and is no text, is converted."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the parser's own. The help and completion options are among the parameters by now."""
        for parameter in self.get_params(ctx):  # type: ignore[attr-defined]  # of the parser's class beside this one
            _convert_only_what_must_be(parameter)
        rest: list[str] = super().parse_args(ctx, args)  # type: ignore[misc]  # likewise
        return rest


class _Command(_FewConversions, TyperCommand):
    pass


class LazyGroup(_FewConversions, TyperGroup):
    """`list_commands` and help go by the table; a command's module is imported when the command is resolved."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for name, (_, line) in COMMANDS.items():
            self.commands[name] = TyperCommand(name, help=line)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As the parser's own, with the real command for its line in the table."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            command = self.commands[name] = load_command(name)
        return name, command, rest


def load_command(name: str) -> Any:
    """The command of the table, with its options. Its module is imported here."""
    function = getattr(import_module(f"glm4run.cli.{COMMANDS[name][0]}"), name)
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=CONTEXT_SETTINGS)
    alone.command(name, cls=_Command)(function)
    return get_command(alone)


def _convert_only_what_must_be(parameter: Any) -> None:
    """Lets defaults, texts and paths pass, where typer would ask pydantic whether they are what they are."""
    descriptor: Any = getattr(parameter, "type_descriptor", None)
    kind = getattr(descriptor, "annotation", None)
    if kind is None or parameter.multiple or parameter.nargs != 1:
        return  # an older typer converts without pydantic
    convert, default, callback = parameter.process_value, parameter.default, parameter.callback

    def process_value(ctx: Any, value: Any) -> Any:
        is_default = value is default and not (value is None and parameter.required)
        is_text = type(value) is str and (kind is str or (kind is Path and _takes_any_path(descriptor.parameter_info)))
        if is_default or is_text:
            value = value if is_default else kind(value)
            return value if callback is None else callback(ctx, parameter, value)
        return convert(ctx, value)

    parameter.process_value = process_value


def _takes_any_path(info: Any) -> bool:
    return info.file_okay and info.dir_okay and not (info.exists or info.resolve_path or info.allow_dash)
