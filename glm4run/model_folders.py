"""Where models lie, and which one a name means. No torch.

A MODEL on the command line is a folder, or a name under `$GLM4RUN_MODELS` (else the user's data folder), or under the
packaged `models/`. Without one, the only or the newest packed model is taken, else the embedded demo.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4run.cards import DEMO_NAME, Card, data_folder, demo_folder, load_cards, match_card
from glm4run.config import ModelConfig, read_json
from glm4run.dialects import DIALECTS, Dialect, dialect_from_template, read_template
from glm4run.errors import CheckpointError, Glm4RunError
from glm4run.user_files import user_path

MODELS_VARIABLE = "GLM4RUN_MODELS"
PROVENANCE_NAME = "glm4run.json"  # what `quantize` writes beside the weights


@dataclass(frozen=True)
class FoundModel:
    """A model folder. `why` says in one clause why it was taken, where the user named none."""

    name: str
    folder: Path
    is_packed: bool
    is_demo: bool
    why: str = ""


def user_models_folder() -> Path:
    """`$GLM4RUN_MODELS`, else `glm4run/models` in the user's data folder (XDG)."""
    return user_path("data", "models", MODELS_VARIABLE)


def models_folders() -> list[Path]:
    """The folders whose children are models, in the order in which names are looked up."""
    return [user_models_folder(), data_folder() / "weights", data_folder()]


def list_models() -> list[FoundModel]:
    """Every model folder under the models folders; the first of equal names wins."""
    found: dict[str, FoundModel] = {}
    for root in models_folders():
        if root.is_dir():
            for folder in sorted(root.iterdir()):
                if (folder / "config.json").is_file() and folder.name not in found:
                    found[folder.name] = describe(folder)
    return list(found.values())


def describe(folder: Path, why: str = "") -> FoundModel:
    """What kind of model a folder is, by its config alone."""
    try:
        packed = "quantization_config" in read_json(folder / "config.json")
    except CheckpointError:
        packed = False
    is_demo = folder.resolve() == demo_folder().resolve()
    return FoundModel(folder.resolve().name, folder, packed, is_demo, why)


def find_model(model: str | None) -> FoundModel:
    """The model that MODEL means, or the default one where it is None.

    Raises:
        Glm4RunError: nothing is called so.
    """
    if model is None:
        return _default_model()
    path = Path(model).expanduser()
    if path.is_dir():
        return describe(path)
    for found in list_models():
        if found.name == model:
            return found
    cards = {card.name.lower(): card for card in load_cards().values()}
    cards |= {hub_id.lower(): card for card in load_cards().values() for hub_id in card.hub_ids}
    known = cards.get(model.lower())
    if known is not None:
        hint = f"get its files from the hub ({known.hub_ids[0]}) into a folder and give that folder"
        raise Glm4RunError(f"{known.name} is not on this machine", hint=hint)
    raise Glm4RunError(
        f"no model {model!r}: it is no folder, and no name under {user_models_folder()}",
        hint="`glm4run models` lists what is here",
    )


def _default_model() -> FoundModel:
    packed = [found for found in list_models() if found.is_packed and not found.is_demo]
    if packed:
        newest = max(packed, key=lambda found: found.folder.stat().st_mtime)
        why = "the only packed model here" if len(packed) == 1 else "the newest packed model here"
        return describe(newest.folder, why)
    if (demo_folder() / "config.json").is_file():
        return describe(demo_folder(), "no other model is here")
    raise Glm4RunError(
        f"no model here: none under {user_models_folder()}, and no {DEMO_NAME} model is installed",
        hint="give a model folder",
    )


def read_provenance(folder: Path) -> Mapping[str, Any]:
    """What `quantize` recorded in `glm4run.json`, {} in a folder that it did not write."""
    path = folder / PROVENANCE_NAME
    return read_json(path) if path.is_file() else {}


def describe_report(provenance: Mapping[str, Any]) -> str | None:
    """What packing cost, in one line, from the figures that were measured when a folder was packed; else None.

    Source of the keys: `evaluation.Evaluation.as_report`.
    """
    report = provenance.get("report")
    if not isinstance(report, Mapping) or not isinstance(report.get("text"), Mapping):
        return None
    keys = ("kl_mean", "kl_p99", "same_top1", "perplexity", "reference_perplexity", "windows", "ctx")
    found = {key: report[key] for key in keys if type(report.get(key)) in (int, float)}
    if len(found) < len(keys):
        return None
    line = (
        f"KL divergence {found['kl_mean']:.4g} (p99 {found['kl_p99']:.3g}), same top-1 {found['same_top1']:.1%}, "
        f"perplexity {found['perplexity']:.4g} (source {found['reference_perplexity']:.4g}), "
        f"over {found['windows']} windows of {found['ctx']} tokens of {report['text'].get('name')}"
    )
    bits = provenance.get("bits_per_weight")
    return f"{bits:.2f} bits per weight, {line}" if isinstance(bits, int | float) else line


def read_generation_config(folder: Path) -> Mapping[str, Any]:
    """`generation_config.json`, {} where there is none."""
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def chat_dialect(folder: Path, config: ModelConfig) -> tuple[Dialect | None, Card | None]:
    """The chat dialect of a folder (None for a base model) and the family member it is (None for another model).

    The folder's own template decides; else what `quantize` recorded; else the card that fits the shape.

    Raises:
        CheckpointError: the template is none of the published ones.
    """
    name = folder.resolve().name
    template = read_template(folder)
    if template is not None:
        dialect = dialect_from_template(template)
        return dialect, match_card(config, dialect=dialect.name, name=name)
    card = match_card(config, name=name)
    recorded = read_provenance(folder).get("chat_dialect")
    chosen = recorded if recorded in DIALECTS else card.dialect if card is not None else None
    return (None if chosen is None else DIALECTS[chosen]), card


def no_chat_template(name: str) -> CheckpointError:
    """The refusal of a conversation with the base model `name`; it names the chat variants."""
    chats = ", ".join(card.name for card in load_cards().values() if not card.is_base)
    return CheckpointError(
        f"{name} has no chat template: a base model continues text and cannot hold a conversation",
        hint=f"use a chat variant ({chats}); `chat --force` chats all the same, `generate` continues text",
    )
