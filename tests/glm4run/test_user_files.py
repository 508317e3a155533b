"""The user's folders, and files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import pytest

from glm4run.user_files import replace_file, user_path


@pytest.mark.parametrize(
    ("kind", "variable"), [("cache", "XDG_CACHE_HOME"), ("data", "XDG_DATA_HOME"), ("state", "XDG_STATE_HOME")]
)
def test_folders_are_those_of_the_user(
    kind: Literal["cache", "data", "state"], variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv(variable, "/elsewhere")
    assert user_path(kind, "name") == Path("/elsewhere/glm4run/name")
    monkeypatch.delenv(variable)
    assert user_path(kind, "name").is_relative_to("/home/someone")
    monkeypatch.setenv("GLM4RUN_ANY", "~/of_mine")
    assert user_path(kind, "name", "GLM4RUN_ANY") == Path("/home/someone/of_mine")


def test_what_was_there_stays_until_the_new_file_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")

    def fail(_: int) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
