"""Sessions on disk: what a kill leaves, who may write, what a list shows."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glm4run import session_files
from glm4run.chat_format import Message
from glm4run.conversation import Conversation
from glm4run.errors import CheckpointError, UsageError
from glm4run.session_files import (
    JOURNAL_NAME,
    KV_NAME,
    SessionFiles,
    list_sessions,
    new_name,
    prune_unnamed,
    read_journal,
    session_path,
)
from tests.conftest import REPO


@pytest.fixture(autouse=True)
def sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(session_files.SESSIONS_VARIABLE, str(tmp_path / "sessions"))
    return tmp_path / "sessions"


def talk(name: str, *questions: str) -> Conversation:
    with SessionFiles(name) as files:
        files.append({"model": "tiny", "system": None})
        conversation = Conversation(on_record=files.append)
        for question in questions:
            conversation.add(Message("user", question), [1, 2])
            conversation.add(Message("assistant", "是的"), [3])
    return conversation


def test_nothing_is_written_before_the_first_message(sessions: Path) -> None:
    with SessionFiles("mine") as files:
        files.append({"model": "tiny"})
    assert not sessions.exists()
    assert list_sessions() == []


def test_a_session_reads_back(sessions: Path) -> None:
    conversation = talk("mine", "hello", "and?")
    saved = read_journal(session_path("mine"))
    assert saved.conversation.path() == conversation.path()
    assert (saved.values["model"], saved.problem) == ("tiny", None)
    assert (sessions / "mine").stat().st_mode & 0o077 == 0  # nobody else's to read


def test_what_a_kill_cut_off_is_not_taken_and_the_next_record_starts_a_line(sessions: Path) -> None:
    conversation = talk("mine", "hello")
    path = sessions / "mine" / JOURNAL_NAME
    whole = path.read_bytes()
    for cut in range(1, 40):
        path.write_bytes(whole + json.dumps({"turn": "x" * 60}).encode()[:cut])
        assert read_journal(session_path("mine")).conversation.path() == conversation.path()
    talk("mine", "again")
    assert read_journal(session_path("mine")).problem is None


def test_a_damaged_line_is_named_and_what_stands_before_it_is_kept(sessions: Path) -> None:
    talk("mine", "hello", "and?")
    path = sessions / "mine" / JOURNAL_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    where = next(n for n, line in enumerate(lines) if b"and?" in line)
    path.write_bytes(b"".join([*lines[:where], b'{"turn": \n', *lines[where + 1 :]]))
    saved = read_journal(session_path("mine"))
    assert [turn.message.content for turn in saved.conversation.path()] == ["hello", "是的"]
    assert saved.problem is not None and f"line {where + 1}" in saved.problem


def test_a_later_format_is_refused(sessions: Path) -> None:
    talk("mine", "hello")
    path = sessions / "mine" / JOURNAL_NAME
    path.write_bytes(b'{"format_version": 2}\n' + path.read_bytes())
    with pytest.raises(CheckpointError, match="format version 2"):
        read_journal(session_path("mine"))


def test_two_chats_cannot_hold_one_session() -> None:
    talk("mine", "hello")
    with SessionFiles("mine"), pytest.raises(UsageError, match="open in another chat"):
        SessionFiles("mine")
    SessionFiles("mine").close()


def test_a_killed_process_gives_its_session_free(sessions: Path) -> None:
    code = (
        "import os, signal\nfrom glm4run.session_files import SessionFiles\n"
        "files = SessionFiles('mine')\nfiles.append({'turn': "
        "{'number': 1, 'parent': None, 'role': 'user', 'content': 'x', 'ids': []}})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {"PYTHONPATH": str(REPO), session_files.SESSIONS_VARIABLE: str(sessions), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=False)
    assert done.returncode == -9
    with SessionFiles("mine"):
        assert len(read_journal(session_path("mine")).conversation.turns) == 1


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "a b", "x" * 101, ".hidden"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match="is no name for a session"):
        session_path(name)


def test_rename_keeps_all_and_takes_no_other_s_place(sessions: Path) -> None:
    talk("other", "hello")
    talk("mine", "hello")
    with SessionFiles("mine") as files:
        with pytest.raises(UsageError, match="'other' already"):
            files.rename("other")
        files.rename("yours")
        files.append({"system": "be brief"})
    assert read_journal(session_path("yours")).values["system"] == "be brief"
    assert {summary.name for summary in list_sessions()} == {"yours", "other"}


def test_lists_show_the_last_first_and_leave_out_what_they_cannot_read(sessions: Path) -> None:
    talk("first", "hello")
    talk("second", "你好")
    (sessions / "stray").mkdir()
    found = list_sessions()
    assert [summary.name for summary in found] == ["second", "first"]
    assert (found[0].first_words, found[0].turns, found[0].model) == ("你好", 2, "tiny")


def test_caches_of_old_unnamed_sessions_go_their_texts_and_named_ones_stay(
    sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_files, "UNNAMED_CACHE_BYTES", 150)
    for name in ("named", "2026-01-01-000000", "2026-01-02-000000", "2026-01-03-000000"):
        talk(name, "hello")
        (sessions / name / KV_NAME).mkdir()
        (sessions / name / KV_NAME / "0.safetensors").write_bytes(b"x" * 100)
    assert sorted(prune_unnamed()) == ["2026-01-01-000000", "2026-01-02-000000"]
    kept = {summary.name: summary.cache_bytes for summary in list_sessions()}
    assert kept == {"named": 100, "2026-01-01-000000": 0, "2026-01-02-000000": 0, "2026-01-03-000000": 100}


def test_new_names_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "2026-01-01-000000")
    talk(new_name(), "hello")
    assert new_name() == "2026-01-01-000000-2"
