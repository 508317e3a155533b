"""The commands about tokens: /file, /ctx, /prompt, /tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.filesize import decimal
from rich.text import Text

from glm4run.cli.chat.answering import duration
from glm4run.cli.chat.state import Chat
from glm4run.cli.chat.view import inert
from glm4run.cli.console import note, stderr_console, talk
from glm4run.errors import UsageError

if TYPE_CHECKING:
    from glm4run.ledger import Ledger

MOST_FILE_BYTES = 64 << 20
BAR_COLUMNS = 30


def file(chat: Chat, argument: str) -> None:
    """`/file [PATH|off]`: attaches a text file to the next message, and says what it will cost."""
    if argument.lower() == "off":
        chat.attached.clear()
        note("no file is attached now")
        return
    if argument:
        path = Path(argument.strip("'\"")).expanduser()
        chat.attached.append((path.name, read_text_file(path)))
    if not chat.attached:
        note("no file is attached; /file PATH attaches one to the next message")
        return
    session = chat.session
    limit = session.model.plan.context_len
    for name, text in chat.attached:
        note(f"{name}: {len(session.model.tokenizer.encode(text))} tokens")
    reading = session.read_first("", chat.attached)
    takes = "" if reading.seconds is None else f" in about {duration(reading.seconds)}"
    note(
        f"with the next message {reading.new_tokens} tokens are read{takes}, {decimal(reading.kv_bytes)} of cache; "
        f"the context then holds {len(reading.prompt)}/{limit}"
    )
    if len(reading.prompt) >= limit:
        talk("notice: that is more than the context holds; /file off takes it back", style="yellow", only="notice:")


def read_text_file(path: Path) -> str:
    """A text file as UTF-8.

    Raises:
        UsageError: it is not there, too large, or no text.
    """
    try:
        if path.stat().st_size > MOST_FILE_BYTES:
            raise UsageError(f"{path} has {decimal(path.stat().st_size)}, at most {decimal(MOST_FILE_BYTES)} are read")
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text: byte 0x{raw[error.start]:02x} at position {error.start}",
            hint="convert it, for example with `iconv -t utf-8`",
        ) from error
    if "\0" in text:
        raise UsageError(f"{path} is no text: it holds zero bytes")
    return text


def ctx(chat: Chat, argument: str) -> None:
    """`/ctx`: the ledger."""
    from glm4run.ledger import KINDS, take_ledger

    ledger = take_ledger(chat.session)
    for kind in KINDS:
        share = ledger.tokens[kind] / ledger.limit
        bar = "█" * round(share * BAR_COLUMNS) if ledger.tokens[kind] else ""
        talk(f"{kind:8} {ledger.tokens[kind]:>8}  {bar}".rstrip())
    talk(f"{'free':8} {ledger.free:>8}  of {ledger.limit}")
    held = decimal(ledger.cached * ledger.kv_bytes_per_token)
    talk(f"cache: {ledger.cached} tokens, {held} of keys and values ({decimal(ledger.kv_bytes_per_token)} a token)")
    _list_turns(ledger)


def _list_turns(ledger: Ledger) -> None:
    from glm4run.session import shorten

    for exchange in ledger.exchanges:
        marks = [
            *(["pinned"] if exchange.is_pinned else []),
            *(["dropped"] if exchange.is_dropped else []),
            *([f"{exchange.file_tokens} of files"] if exchange.file_tokens else []),
        ]
        said = f" ({', '.join(marks)})" if marks else ""
        talk(f"{exchange.number:>3}. {exchange.tokens:>6} tokens{said}  {inert(shorten(exchange.words))}")
    if ledger.overflow == "error":
        note("overflow error: a message that does not fit is refused; nothing is dropped")
    elif ledger.dropped_next is not None:
        note(f"overflow {ledger.overflow}: turn {ledger.dropped_next} goes first; /pin keeps one")


def prompt(chat: Chat, argument: str) -> None:
    """`/prompt`: every token that the model has been shown, control tokens marked."""
    session = chat.session
    tokenizer = session.model.tokenizer
    ids = session.tokens()
    line = Text()
    for token in ids:
        special = tokenizer.special_name(token)
        if special is not None:
            line.append(special, style="bold red reverse")
        else:
            line.append(inert(tokenizer.piece(token)))
    console = stderr_console()
    console.print(line, soft_wrap=True)
    note(f"{len(ids)} tokens: {' '.join(map(str, ids))}")


def tokens(chat: Chat, argument: str) -> None:
    """`/tokens TEXT`: ids and pieces of a text, as a message would hold it."""
    if not argument:
        raise UsageError("/tokens takes a text", hint="/tokens hello; /prompt shows the conversation's")
    tokenizer = chat.session.model.tokenizer
    ids = tokenizer.encode(argument)
    for token in ids:
        talk(f"{token:>7}  {tokenizer.piece(token)!r}")
    note(f"{len(ids)} tokens, {len(argument)} characters")
