"""`glm4run info`: what is this? `glm4run models`: what is here? Both read headers only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from glm4run.cards import load_cards
from glm4run.checkpoint.layouts import ORIGINAL_PREFIX, quantized_linears
from glm4run.checkpoint.safetensors_index import TensorEntry, scan_folder
from glm4run.cli.console import note, talk, write_json, write_text
from glm4run.config import ModelConfig, read_config
from glm4run.errors import Glm4RunError
from glm4run.memory import kv_bytes_per_token
from glm4run.model_folders import (
    chat_dialect,
    describe_report,
    find_model,
    list_models,
    models_folders,
    read_provenance,
)

KV_DTYPE_BYTES = 2


def info(
    model: Annotated[str | None, typer.Argument(help="A folder or the name of a model")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document")] = False,
) -> None:
    """Say what a model is: member of the family, shape, quantization, size, context, chat dialect."""
    found = find_model(model)
    if found.why:
        note(f"model: {found.name} ({found.why})")
    config = read_config(found.folder)
    entries, problems = scan_folder(found.folder)
    facts = _facts(found.folder, config, entries)
    if as_json:
        write_json({"name": found.name, "folder": str(found.folder), "is_demo": found.is_demo, **facts})
    else:
        for key, value in facts.items():
            write_text(f"{key.replace('_', ' '):<22} {_readable(value)}\n")
    for notice in config.notices:
        talk(f"notice: {notice}", style="yellow", only="notice:")
    if found.is_demo:
        talk("This is the embedded demo model, not GLM-4-9B.", style="yellow")
    if problems:
        talk(f"{len(problems)} problems; `glm4run check {found.folder}` lists them", style="bold red")


def _facts(folder: Path, config: ModelConfig, entries: dict[str, TensorEntry]) -> dict[str, Any]:
    dialect, card = chat_dialect(folder, config)
    original = any(name.startswith(ORIGINAL_PREFIX) for name in entries)
    provenance = read_provenance(folder)
    schemes = sorted({scheme.describe() for scheme in quantized_linears(config).values()})
    return {
        "member": None if card is None else card.name,
        "title": None if card is None else card.title,
        "licence": None if card is None else card.licence,
        "model_type": config.model_type,
        "layout": "original (chatglm)" if original else "Hugging Face",
        "parameters": config.num_parameters,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "context_tokens": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rotary_dims": config.rotary_dim,
        "yarn_factor": None if config.rope_scaling is None else config.rope_scaling.factor,
        "weights_bytes": sum(entry.nbytes for entry in entries.values()),
        "kv_bytes_per_token": kv_bytes_per_token(config, KV_DTYPE_BYTES),
        "quantization": schemes or None,
        "bits_per_weight": provenance.get("bits_per_weight"),
        "quality": describe_report(provenance),
        "recipe": provenance.get("recipe"),
        "source": provenance.get("source", {}).get("path_or_id"),
        "chat_dialect": None if dialect is None else dialect.name,
        "stop_token_ids": provenance.get("stop_token_ids", list(config.eos_token_id)),
    }


def _readable(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def models(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document")] = False) -> None:
    """List the models on this machine, and the members of the family."""
    here = []
    for found in list_models():
        try:
            config = read_config(found.folder)
        except Glm4RunError as error:
            talk(f"notice: {found.folder}: {error.message}", style="yellow", only="notice:")
            continue
        size = sum(path.stat().st_size for path in found.folder.glob("*.safetensors"))
        row: dict[str, Any] = {"name": found.name, "folder": str(found.folder), "bytes": size}
        here.append({**row, "packed": found.is_packed, "is_demo": found.is_demo, "parameters": config.num_parameters})
    family = [
        {"name": card.name, "title": card.title, "licence": card.licence, "hub_id": card.hub_ids[0]}
        for card in load_cards().values()
    ]
    if as_json:
        write_json({"models": here, "family": family, "folders": [str(path) for path in models_folders()]})
        return
    note("on this machine:")
    for item in here:
        kind = "demo" if item["is_demo"] else "packed" if item["packed"] else "unpacked"
        write_text(f"{item['name']:<28} {kind:<9} {item['bytes'] / 1e9:8.3f} GB  {item['folder']}\n")
    note("the family (get one from its hub, then `glm4run quantize` its folder):")
    for member in family:
        note(f"  {member['name']:<20} {member['hub_id']:<28} {member['title']}")
    note(f"models are looked for in {', '.join(str(path) for path in models_folders())}")
