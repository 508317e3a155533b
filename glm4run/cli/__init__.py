"""The commands, one file each: parse, one library call, render. And the one place where errors are printed.

Generated text and JSON go to stdout, everything else to stderr. Starting fast and without torch is part of the
contract: only the command that is asked for is imported (`lazy.COMMANDS` lists them), and what it runs it imports
inside its functions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from glm4run import __version__
from glm4run.cli.console import say_error
from glm4run.cli.lazy import CONTEXT_SETTINGS, LazyGroup
from glm4run.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE, Glm4RunError

DEBUG_FLAG = "--debug"
# Newer versions of typer carry a click of their own and do not name these two: wrong usage, any parser error.
_PARSER_USAGE_ERROR, _PARSER_ERROR = typer.BadParameter.__mro__[1:3]

app = typer.Typer(
    name="glm4run",
    cls=LazyGroup,
    help="Run the GLM-4-9B chat models on your own machine, quantized, in the terminal.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT_SETTINGS,
)


@app.callback(invoke_without_command=True)
def root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    debug: bool = typer.Option(False, DEBUG_FLAG, help="Show tracebacks of errors; may stand anywhere on the line."),
) -> None:
    """Options of every command. `--debug` is taken off the line before this runs; see `main`."""
    if version:
        sys.stdout.write(f"glm4run {__version__}\n")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: runs a command and exits with the contract's code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG_FLAG in given
    sys.exit(_run([word for word in given if word != DEBUG_FLAG], debug=debug))


def _run(arguments: list[str], *, debug: bool) -> int:
    try:
        if arguments[:1] == ["chat"]:
            from glm4run.cli.chat import name_resumed

            arguments = name_resumed(arguments)
        result = app(args=arguments, prog_name="glm4run", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except Glm4RunError as error:
        if debug:
            raise
        say_error(error.message, error.hint)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left; nothing to say to it
        return EXIT_ERROR
    except Exception as error:
        if isinstance(error, _PARSER_ERROR):
            return _print_parser_error(error)
        if debug:
            raise
        say_error(f"{type(error).__name__}: {error}", "this is a defect of glm4run; run again with --debug")
        return EXIT_ERROR


def _print_parser_error(error: Any) -> int:
    context = getattr(error, "ctx", None)
    command = "glm4run" if context is None else context.command_path
    message = error.format_message()
    if message:  # empty where the help has been shown because nothing was asked for
        say_error(message, f"`{command} --help` shows the options")
    return EXIT_USAGE if isinstance(error, _PARSER_USAGE_ERROR) else EXIT_ERROR
