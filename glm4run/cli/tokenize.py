"""`glm4run tokenize`: the exact ids, control tokens marked."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from glm4run.chat_format import encode_chat, parse_messages
from glm4run.cli.console import read_stdin, stderr_console, write_json, write_text
from glm4run.cli.options import require_chat
from glm4run.dialects import Dialect
from glm4run.errors import UsageError
from glm4run.model_folders import find_model
from glm4run.tokenizer import Tokenizer, load_tokenizer


def tokenize(
    text: Annotated[str | None, typer.Argument(help="The text; `-` or a pipe reads it from stdin")] = None,
    model: Annotated[str | None, typer.Option("-m", "--model", help="A folder or the name of a model")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The input is a JSON list of messages, or an object with `messages`")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document")] = False,
) -> None:
    """Show the token ids of a text, or of a conversation as the model would see it."""
    if text is None and sys.stdin.isatty():
        raise UsageError("no TEXT", hint='glm4run tokenize "some text", or pipe it into stdin')
    given = read_stdin() if text in (None, "-") else text
    assert given is not None
    found = find_model(model)
    tokenizer = load_tokenizer(found.folder)
    ids = _encode_conversation(tokenizer, require_chat(found), given) if chat else tokenizer.encode(given)
    pieces = [tokenizer.piece(i) for i in ids]
    special = [i in tokenizer.special_ids for i in ids]
    if as_json:
        write_json({"ids": ids, "pieces": pieces, "special": special})
        return
    for token, piece, control in zip(ids, pieces, special, strict=True):
        write_text(f"{token:>7}  {piece if control else repr(piece)}{'  control' if control else ''}\n")
    stderr_console().print(f"{len(ids)} tokens of {found.name}", style="dim", highlight=False)


def _encode_conversation(tokenizer: Tokenizer, dialect: Dialect, text: str) -> list[int]:
    try:
        data: Any = json.loads(text)
    except ValueError as error:
        raise UsageError(
            f"--chat expects JSON: {error}", hint='for example [{"role": "user", "content": "Hello"}]'
        ) from error
    tools, generation_prompt = None, True
    if isinstance(data, dict):
        unknown = data.keys() - {"messages", "tools", "add_generation_prompt"}
        if unknown or "messages" not in data:
            raise UsageError(
                f"the object has the keys {sorted(data)}, expected messages, and optionally tools and "
                "add_generation_prompt"
            )
        tools, generation_prompt = data.get("tools"), bool(data.get("add_generation_prompt", True))
        data = data["messages"]
    return encode_chat(tokenizer, dialect, parse_messages(data), tools, generation_prompt)
