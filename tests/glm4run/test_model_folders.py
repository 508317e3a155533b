"""What a name on the command line means, and which chat dialect a folder speaks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from glm4run import model_folders
from glm4run.cards import data_folder, demo_folder
from glm4run.config import parse_config, read_config
from glm4run.errors import CheckpointError, Glm4RunError
from glm4run.model_folders import (
    MODELS_VARIABLE,
    chat_dialect,
    describe_report,
    find_model,
    list_models,
    models_folders,
    read_generation_config,
    read_provenance,
    user_models_folder,
)
from tests.builders import raw_config, write_checkpoint, write_json

REPORT: dict[str, Any] = {
    "text": {"name": "wiki.test.raw", "sha256": "0"},
    "windows": 64,
    "ctx": 512,
    "perplexity": 33.1,
    "reference_perplexity": 31.58,
    "kl_mean": 0.0812,
    "kl_p99": 0.91,
    "same_top1": 0.8341,
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models folder that the variable names, and no packaged model but a demo."""
    data = tmp_path / "packaged"
    write_checkpoint(data / "demo")
    monkeypatch.setattr(model_folders, "data_folder", lambda: data)
    monkeypatch.setattr(model_folders, "demo_folder", lambda: data / "demo")
    monkeypatch.setenv(MODELS_VARIABLE, str(tmp_path / "models"))
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def write_model(folder: Path, *, packed: bool = False) -> Path:
    """As much of a model as a name needs."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", raw_config() | ({"quantization_config": {}} if packed else {}))
    return folder


def test_folder_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODELS_VARIABLE, "~/my models")
    assert user_models_folder() == Path.home() / "my models"
    monkeypatch.setenv(MODELS_VARIABLE, "")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert user_models_folder() == Path("/data/glm4run/models")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert user_models_folder() == Path.home() / ".local/share/glm4run/models"
    assert models_folders() == [user_models_folder(), data_folder() / "weights", data_folder()]


def test_path_wins_over_name(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named = write_model(home / "mine")
    assert find_model("mine").folder == named
    monkeypatch.chdir(tmp_path)
    elsewhere = write_model(tmp_path / "mine", packed=True)
    found = find_model("mine")
    assert (found.folder.resolve(), found.is_packed, found.name, found.why) == (elsewhere, True, "mine", "")
    assert find_model(str(named)).folder == named
    assert find_model(".").name == tmp_path.name


def test_first_of_equal_names_wins(home: Path) -> None:
    write_model(home.parent / "packaged" / "weights" / "mine")
    ours = write_model(home / "mine")
    assert [found.folder for found in list_models() if found.name == "mine"] == [ours]


def test_without_a_name_the_only_packed_model_is_taken(home: Path) -> None:
    write_model(home / "dense")
    packed = write_model(home / "small", packed=True)
    found = find_model(None)
    assert (found.folder, found.why) == (packed, "the only packed model here")


def test_without_a_name_the_newest_packed_model_is_taken(home: Path) -> None:
    for age, name in enumerate(("b", "c", "a")):
        folder = write_model(home / name, packed=True)
        os.utime(folder, (10_000 - age, 10_000 - age))
    found = find_model(None)
    assert (found.name, found.why) == ("b", "the newest packed model here")


def test_without_a_packed_model_the_demo_is_taken(home: Path) -> None:
    write_model(home / "dense")
    found = find_model(None)
    assert (found.is_demo, found.name, found.why) == (True, "demo", "no other model is here")


def test_a_packed_demo_is_not_taken_for_a_model(home: Path) -> None:
    write_json(home.parent / "packaged" / "demo" / "config.json", raw_config() | {"quantization_config": {}})
    assert find_model(None).is_demo
    packed = write_model(home / "mine", packed=True)
    assert find_model(None).folder == packed


def test_nothing_at_all_says_what_to_do(home: Path) -> None:
    shutil.rmtree(home.parent / "packaged")
    with pytest.raises(Glm4RunError, match="no model here") as caught:
        find_model(None)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["glm-4-9b-chat", "GLM-4-9B-CHAT", "zai-org/glm-4-9b-chat", "THUDM/glm-4-9b-chat-hf"])
def test_member_that_is_not_here_says_where_to_get_it(home: Path, name: str) -> None:
    with pytest.raises(Glm4RunError, match="glm-4-9b-chat is not on this machine") as caught:
        find_model(name)
    assert caught.value.hint is not None and "zai-org/glm-4-9b-chat" in caught.value.hint


def test_unknown_name_says_where_it_looked(home: Path) -> None:
    with pytest.raises(Glm4RunError, match="no model 'gpt'") as caught:
        find_model("gpt")
    assert str(home) in caught.value.message
    assert caught.value.hint


def test_folders_that_are_no_models_are_not_listed(home: Path) -> None:
    (home / "empty").mkdir()
    (home / "file").write_text("x")
    broken = home / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("not json")
    assert [found.name for found in list_models()] == ["broken", "demo"]


def test_every_card_is_in_the_package() -> None:
    assert demo_folder().parent == data_folder()


# --- dialect and other files


def test_template_of_the_folder_decides(shared: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, dialect="z1")
    template = (shared / "data/templates/GLM-4-0414.chat_template.oneline.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    dialect, card = chat_dialect(folder, read_config(folder))
    assert dialect is not None
    assert (dialect.name, card) == ("0414", None)


def test_recorded_dialect_comes_next(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, dialect="z1")
    dialect, _ = chat_dialect(folder, read_config(folder))
    assert dialect is not None
    assert dialect.name == "z1"


def test_card_comes_last(shared: Path, tmp_path: Path) -> None:
    for name, expected in (("glm-4-9b-chat", "chat-2024"), ("glm-4-9b-chat-1m-hf", "chat-2024-1m")):
        shutil.copyfile(shared / "data/configs" / f"{name}.config.json", tmp_path / "config.json")
        dialect, card = chat_dialect(tmp_path, read_config(tmp_path))
        assert dialect is not None and card is not None
        assert (dialect.name, card.dialect) == (expected, expected)


def test_base_model_has_none(tmp_path: Path) -> None:
    assert chat_dialect(write_checkpoint(tmp_path), parse_config(raw_config())) == (None, None)


def test_unknown_template_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, dialect="z1")
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="fingerprint"):
        chat_dialect(folder, read_config(folder))


def test_optional_files_may_be_absent(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == read_provenance(tmp_path) == {}
    write_json(tmp_path / "generation_config.json", {"top_k": 3})
    assert read_generation_config(tmp_path) == {"top_k": 3}
    (tmp_path / "glm4run.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected an object"):
        read_provenance(tmp_path)


def test_a_measured_report_is_one_line() -> None:
    line = describe_report({"bits_per_weight": 4.251, "report": {"total_bytes": 1, **REPORT}})
    assert line == (
        "4.25 bits per weight, KL divergence 0.0812 (p99 0.91), same top-1 83.4%, "
        "perplexity 33.1 (source 31.58), over 64 windows of 512 tokens of wiki.test.raw"
    )


@pytest.mark.parametrize(
    "provenance",
    [
        {},
        {"report": None},
        {"report": {"total_bytes": 1}},
        {"report": {**REPORT, "text": "wiki"}},
        {"report": {**REPORT, "kl_mean": "0.1"}},
        {"report": {**REPORT, "same_top1": True}},
        {"report": {key: value for key, value in REPORT.items() if key != "kl_p99"}},
    ],
)
def test_what_was_not_measured_is_not_said(provenance: dict[str, Any]) -> None:
    assert describe_report(provenance) is None
