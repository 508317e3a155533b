"""How a chat gets its session: a new one, one from disk, or one that is to be kept from now on."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from glm4run.cli.chat.on_conversation import show_last
from glm4run.cli.chat.state import Chat, settings_record, warn
from glm4run.cli.console import note
from glm4run.errors import CheckpointError, Glm4RunError, UsageError

if TYPE_CHECKING:
    from glm4run.constraints import Constraint
    from glm4run.generate import LoadedModel
    from glm4run.kv_files import KVFiles
    from glm4run.sampling import SamplingParams
    from glm4run.session import Session
    from glm4run.session_files import Saved, SessionFiles

RETOKENIZED_BY = ("tokenizer", "template")  # with another of these, the same text is other tokens


def resolve_resumed(name: str) -> tuple[str, str | None]:
    """The session that `--resume` means ("" is the last one), and the folder of its model if that is still there."""
    from glm4run.session_files import latest, read_journal, session_path

    chosen = name or latest()
    folder = read_journal(session_path(chosen)).values.get("model_folder")
    return chosen, folder if isinstance(folder, str) and Path(folder).is_dir() else None


def begin(chat: Chat, name: str | None, *, is_kept: bool) -> None:
    """A new session; `is_kept` puts it on disk with its first message, under `name` or the date and time."""
    from glm4run.session_files import new_name, prune_unnamed

    chat.session.on_notice = warn
    if not is_kept:
        return
    pruned = prune_unnamed()
    if pruned:
        note(f"the caches of {len(pruned)} old unnamed sessions were removed; their texts are kept (/sessions)")
    keep(chat, name or new_name())


def keep(chat: Chat, name: str) -> None:
    """Puts the session on disk under `name`, with all that was said so far, and from now on with every turn."""
    from glm4run.session_files import SessionFiles, session_path

    if session_path(name).exists():
        raise UsageError(f"there is a session {name!r} already", hint="choose another name; /sessions lists them")
    files = SessionFiles(name)
    _attach(chat, files)
    for record in chat.session.conversation.as_records() if chat.session.conversation.turns else ():
        files.append(record)
    if chat.session.cache_files is not None and chat.session.conversation.turns:
        chat.session.save_cache()


def rename(chat: Chat, name: str) -> None:
    """Another name for the session, its folder with it."""
    assert chat.files is not None
    if name == chat.files.name:
        return
    chat.files.rename(name)
    chat.session.cache_files = _cache_files(chat.session.model, chat.files)


def resume(chat: Chat, name: str, *, given: dict[str, Any] | None = None, system: str | None = None) -> None:
    """Goes on with a saved session. `given`: sampling parameters that the command line named, which win.

    Raises:
        CheckpointError: there is no such session. UsageError: another chat holds it. Nothing has changed then.
    """
    from glm4run.session import Session, require_overflow
    from glm4run.session_files import SessionFiles, new_name, read_journal, session_path

    folder = session_path(name)
    if not folder.is_dir():
        raise CheckpointError(f"there is no session {name!r}", hint="/sessions (or `ls` its folder) lists them")
    if chat.files is not None and chat.files.name == name:
        note(f"this is session {name}")
        return
    files = SessionFiles(name)
    saved = read_journal(folder)
    before = chat.session
    session = Session(
        before.model,
        _params(saved, before.params, given or {}),
        system=system if system is not None else saved.values.get("system"),
        tools=before.tools,
        overflow=require_overflow(saved.values.get("overflow", before.overflow)),
        constraint=_constraint(saved, before.constraint),
        conversation=saved.conversation,
        on_notice=warn,
        context=before._context,
        most_context_used=before.most_context_used,
        speed=before._speed,
    )
    if chat.files is not None:
        chat.files.close()
    chat.session, chat.files = session, None
    if saved.problem is not None:  # what comes behind a damaged line would be lost: go on in a journal of its own
        files.close()
        warn(f"{saved.problem}; going on as a new session")
        keep(chat, new_name())
        return
    _compare(session, saved)
    _attach(chat, files)
    _say_resumed(chat)


def _params(saved: Saved, default: SamplingParams, given: dict[str, Any]) -> SamplingParams:
    known = {item.name for item in fields(default)}
    stored = {k: v for k, v in (saved.values.get("params") or {}).items() if k in known}
    if "stop" in stored:
        stored["stop"] = tuple(stored["stop"])
    try:
        return replace(replace(default, **stored), **given)
    except (TypeError, UsageError):
        warn("the saved sampling settings cannot be read; the model's own are used")
        return replace(default, **given)


def _constraint(saved: Saved, default: Constraint | None) -> Constraint | None:
    from glm4run.constraints import Constraint

    try:
        stored = saved.values.get("format")
        return Constraint.from_dict(stored) if isinstance(stored, dict) else default
    except Glm4RunError as error:
        warn(f"the format of answers that was saved is not used: {error.message}")
        return default


def _compare(session: Session, saved: Saved) -> None:
    """Says what differs between the model of the session and this one, and makes the texts this one's tokens."""
    from glm4run.fingerprint import differences, fingerprint

    theirs = saved.values.get("fingerprint")
    parts = differences(fingerprint(session.model), theirs if isinstance(theirs, dict) else {})
    if not parts:
        return
    if any(part in RETOKENIZED_BY for part in parts):
        session.reencode()
    name = saved.values.get("model", "another model")
    warn(
        f"the saved cache of {name} is not used: {session.model.name} differs from it in {', '.join(parts)}. "
        "The text is kept, and is read again with the next message"
    )


def _attach(chat: Chat, files: SessionFiles) -> None:
    """From here on what is said goes to `files`."""
    from glm4run.fingerprint import fingerprint

    session = chat.session
    chat.files = files
    files.append(
        {
            "model": session.model.name,
            "model_folder": str(session.model.folder),
            "fingerprint": fingerprint(session.model),
            "system": session.system,
            **settings_record(session),
        }
    )
    session.conversation.on_record = files.append
    session.cache_files = _cache_files(session.model, files)


def _cache_files(model: LoadedModel, files: SessionFiles) -> KVFiles:
    from glm4run.fingerprint import fingerprint
    from glm4run.kv_files import KVFiles
    from glm4run.session_files import KV_NAME

    return KVFiles(files.folder / KV_NAME, fingerprint(model), on_problem=warn)


def _say_resumed(chat: Chat) -> None:
    session = chat.session
    tokens = session.tokens() if session.conversation.turns else []
    restored = session.restore_cache() if tokens else 0
    assert chat.files is not None
    questions = len(session.conversation.exchanges())
    nbytes = decimal(restored * session.kv_bytes_per_token)
    note(
        f"session {chat.files.name}: {questions} question{'s' if questions != 1 else ''}, {len(tokens)} tokens, "
        f"{restored} of them from the saved cache ({nbytes})"
    )
    show_last(chat)
