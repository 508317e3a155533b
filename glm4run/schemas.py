"""JSON schemas that users and tools bring: whether one is a schema, and what a value has against it.

The library (`jsonschema`) is imported when it is needed, as only some users have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm4run.errors import Glm4RunError, UsageError

MOST_PROBLEMS = 5  # that are named of one value


def check_schema(schema: Any, *, extra: str) -> None:
    """Raises UsageError where `schema` is no JSON schema (of the draft that it names, else 2020-12).

    Raises Glm4RunError where the library is missing; `extra` is what installs it.
    """
    library = _library(extra)
    try:
        _validator_class(library, schema).check_schema(schema)
    except library.SchemaError as error:
        where = "/".join(map(str, error.absolute_path))
        raise UsageError(f"{f'at {where}: ' if where else ''}{error.message}") from error


def problems(schema: Any, value: Any, *, extra: str) -> list[str]:
    """What `value` has against `schema`, a line each; at most `MOST_PROBLEMS`. Never reaches a network.

    Raises:
        UsageError: the schema refers to one that it does not hold.
    """
    library = _library(extra)
    from referencing import Registry  # without one, the library would fetch a remote `$ref`
    from referencing.exceptions import Unresolvable

    validator = _validator_class(library, schema)(schema, registry=Registry())
    try:
        found = [
            f"{'.'.join(map(str, error.absolute_path)) or 'the whole'}: {error.message}"
            for error in validator.iter_errors(value)
        ]
    except Unresolvable as error:
        raise UsageError(
            f"a reference of the schema leads nowhere: {error.ref}", hint="nothing is fetched; put it under $defs"
        ) from error
    return found[:MOST_PROBLEMS]


def _validator_class(library: Any, schema: Any) -> Any:
    named = schema if isinstance(schema, Mapping) else {}
    return library.validators.validator_for(named, default=library.Draft202012Validator)


def _library(extra: str) -> Any:
    try:
        import jsonschema
    except ImportError as error:
        raise Glm4RunError(
            "checking values against a JSON schema needs the package jsonschema",
            hint=f"pip install 'glm4run[{extra}]'",
        ) from error
    return jsonschema
