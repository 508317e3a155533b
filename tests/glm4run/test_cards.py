"""The cards say what the published files say, and a checkpoint finds its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from glm4run.cards import FAMILY_STOP_TOKENS, data_folder, load_cards, match_card
from glm4run.config import parse_config
from glm4run.dialects import DIALECTS
from glm4run.tokenizer import SPECIAL_TOKENS
from tests.builders import raw_config

# published config, card, dialect of the folder's own template, folder name
PUBLISHED = [
    ("glm-4-9b.config.reconstructed", "glm-4-9b", None, "glm-4-9b"),
    ("glm-4-9b-chat.config", "glm-4-9b-chat", "chat-2024", "anything"),
    ("glm-4-9b-chat-hf.config", "glm-4-9b-chat", "chat-2024", "anything"),
    ("glm-4-9b-chat-hf.config", "glm-4-9b-chat", None, "anything"),
    ("glm-4-9b-chat-1m.config", "glm-4-9b-chat-1m", "chat-2024-1m", "anything"),
    ("glm-4-9b-chat-1m-hf.config", "glm-4-9b-chat-1m", None, "anything"),
    ("GLM-4-9B-0414.config", "GLM-4-9B-0414", "0414", "anything"),
    ("GLM-4-9B-0414.config", "GLM-4-9B-0414", "0414-multiline", "anything"),
    ("GLM-4-9B-0414.config", "GLM-Z1-9B-0414", "z1", "anything"),
    ("GLM-4-9B-0414.config", "GLM-Z1-9B-0414", None, "my-glm-z1-9b-0414-int4"),
    ("GLM-4-9B-0414.config", "GLM-4-9B-0414", None, "GLM-4-9B-0414-int4"),
]


@pytest.mark.parametrize(("config_name", "card", "dialect", "folder"), PUBLISHED)
def test_published_config_finds_its_card(
    shared: Path, config_name: str, card: str, dialect: str | None, folder: str
) -> None:
    config = parse_config(json.loads((shared / "data" / "configs" / f"{config_name}.json").read_text()))
    found = match_card(config, dialect=dialect, name=folder)
    assert found is not None
    assert found.name == card
    ours = dataclasses.replace(found.config, model_type=config.model_type, notices=config.notices)
    # The cards hold what the family's files say, but for the base model, whose published files list no stop ids twice.
    assert ours == dataclasses.replace(config, eos_token_id=ours.eos_token_id, pad_token_id=ours.pad_token_id)


def test_every_card_is_whole() -> None:
    cards = load_cards()
    assert set(cards) == {path.parent.name for path in data_folder().glob("*/card.json")}
    for name, card in cards.items():
        assert card.name == name
        assert card.kind in ("chat", "base", "reasoning", "text")
        assert (card.dialect is None) == (card.is_base or card.kind == "text") or card.dialect in DIALECTS
        assert card.hub_ids and card.licence and card.title
        assert card.generation.keys() <= {"temperature", "top_p", "top_k"}
        assert 0 < card.generation.get("temperature", 0.8) <= 1
        assert card.config.eos_token_id == (151329, 151336, 151338)


def test_generation_defaults_of_the_family() -> None:
    cards = load_cards()
    assert dict(cards["glm-4-9b-chat"].generation) == {"temperature": 0.8, "top_p": 0.8}
    assert dict(cards["GLM-Z1-9B-0414"].generation) == {"temperature": 0.6, "top_p": 0.95, "top_k": 40}
    assert cards["glm-4-9b"].is_base
    assert [name for name, card in cards.items() if card.yarn_factor] == ["GLM-4-9B-0414", "GLM-Z1-9B-0414"]


def test_a_stretched_config_is_still_the_member() -> None:
    card = load_cards()["GLM-4-9B-0414"]
    assert match_card(card.config.with_yarn(4.0), dialect="0414") == card


def test_other_models_have_no_card() -> None:
    assert match_card(parse_config(raw_config()), name="glm-4-9b-chat") is None


def test_family_stops_are_control_tokens() -> None:
    assert set(FAMILY_STOP_TOKENS) < set(SPECIAL_TOKENS)
