"""Every failure that a user can cause or meet, as exceptions that say what to do.

The library raises these and never prints or exits; `glm4run.cli` has the one boundary that renders them.
This module imports nothing.
"""

from __future__ import annotations

EXIT_ERROR = 1
EXIT_USAGE = 2  # wrong usage, or the request does not fit
EXIT_INTERRUPTED = 130


class Glm4RunError(Exception):
    """An expected failure: `message` says what was got and expected, `hint` what to do about it."""

    exit_code = EXIT_ERROR

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if exit_code is not None:
            self.exit_code = exit_code


class UsageError(Glm4RunError):
    """The request itself is wrong: an option, a value, a combination."""

    exit_code = EXIT_USAGE


class DoesNotFitError(Glm4RunError):
    """The request is well formed but exceeds the context, the memory or the disk."""

    exit_code = EXIT_USAGE


class CheckpointError(Glm4RunError):
    """The files of a model are missing, damaged, contradictory or of an unknown kind."""


class BackendError(Glm4RunError):
    """A backend that was asked for by name cannot run this layer on this machine."""


class GenerationError(Glm4RunError):
    """The model produced something that must not be shown (for example NaN logits)."""
