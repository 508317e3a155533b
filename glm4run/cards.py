"""The named family: one card per member, and the packaged demo model.

A card holds what a member's files cannot be trusted to say, or do not say: its kind, chat dialect, generation
defaults, hub ids and licence. Reads `models/<name>/card.json` from the wheel or from a checkout. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from glm4run.config import YARN_FACTOR, ModelConfig, parse_config
from glm4run.errors import Glm4RunError

DEMO_NAME = "demo"
# The family stops on all three, whatever a checkpoint's files list. Source: the published generation_config.
FAMILY_STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")


@dataclass(frozen=True)
class Card:
    """One member. `kind` is chat, base, reasoning or text; `dialect` is None for a base model."""

    name: str
    title: str
    kind: str
    dialect: str | None
    hub_ids: tuple[str, ...]
    licence: str
    yarn_factor: float | None  # how far YaRN may stretch the native context, None where the model needs none
    generation: Mapping[str, float]
    note: str
    config: ModelConfig

    @property
    def is_base(self) -> bool:
        return self.kind == "base"


def data_folder() -> Path:
    """The folder `models`: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "models", package.parent / "models"):
        if (candidate / "glm-4-9b-chat" / "card.json").is_file():
            return candidate
    raise Glm4RunError("the packaged models folder is missing", hint="install glm4run again")


def demo_folder() -> Path:
    """The embedded demo model."""
    return data_folder() / DEMO_NAME


@cache
def load_cards() -> Mapping[str, Card]:
    """Every card by its name."""
    cards = {}
    for path in sorted(data_folder().glob("*/card.json")):
        raw = json.loads(path.read_text(encoding="utf-8"))
        cards[raw["name"]] = _parse_card(raw, path)
    return cards


def _parse_card(raw: Mapping[str, Any], path: Path) -> Card:
    return Card(
        name=raw["name"],
        title=raw["title"],
        kind=raw["kind"],
        dialect=raw["dialect"],
        hub_ids=tuple(raw["hub_ids"]),
        licence=raw["licence"],
        yarn_factor=raw["yarn_factor"],
        generation=raw["generation"],
        note=raw["note"],
        config=parse_config(raw["config"], where=str(path)),
    )


def yarn_factor(config: ModelConfig, card: Card | None) -> float | None:
    """How far YaRN may stretch a model: as its card says; without a card, as the series of its architecture does."""
    if card is not None:
        return card.yarn_factor
    return YARN_FACTOR if config.has_sandwich_norms else None


def match_card(config: ModelConfig, *, dialect: str | None = None, name: str = "") -> Card | None:
    """The card of a checkpoint: by its shape, then by the dialect of its own template, then by the folder's name.

    None for a model that is no member (the demo, a test model): its own files are then all there is.
    """
    same = [card for card in load_cards().values() if _same_shape(card.config, config)]
    if dialect is not None:
        same = [card for card in same if card.dialect is not None and dialect.startswith(card.dialect)] or same
    named = [card for card in same if card.name.lower() in name.lower()]
    return max(named, key=lambda card: len(card.name)) if named else (same[0] if same else None)


def _same_shape(card: ModelConfig, config: ModelConfig) -> bool:
    native = config.max_position_embeddings
    if config.rope_scaling is not None:
        native = config.rope_scaling.original_max_position_embeddings
    keys = ("hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size", "vocab_size")
    return (
        all(getattr(card, key) == getattr(config, key) for key in keys)
        and card.has_sandwich_norms == config.has_sandwich_norms
        and card.max_position_embeddings == native
    )
