"""Everything of a packed folder that is not a weight: config, generation config, tokenizer, template, licence."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm4run.config import ModelConfig, read_json
from glm4run.generate import stop_ids
from glm4run.model_folders import chat_dialect, read_generation_config
from glm4run.tokenizer import Tokenizer, load_tokenizer
from glm4run_quantize.recipes import Recipe
from glm4run_quantize.writer import write_json

COPIED = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
COPIED_PATTERNS = ("LICENSE*",)
TORCH_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
ARCHITECTURES = {"glm": "GlmForCausalLM", "glm4": "Glm4ForCausalLM"}


def hf_config(raw: Mapping[str, Any], config: ModelConfig, recipe: Recipe, dtype: str) -> dict[str, Any]:
    """The `config.json` of the packed folder, in the `glm` or `glm4` layout whatever the source's was.

    RoPE's base is written as it is used, so that the -hf copies' wrong value does not travel on.
    """
    model_type = "glm" if config.model_type == "chatglm" else config.model_type
    data: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "partial_rotary_factor": config.partial_rotary_factor,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": TORCH_DTYPE_NAMES[dtype],
        "use_cache": True,
        "vocab_size": config.vocab_size,
        "eos_token_id": list(config.eos_token_id),
        "pad_token_id": config.pad_token_id,
    }
    if config.rope_scaling is not None:
        data["rope_scaling"] = raw.get("rope_scaling") or {
            key: value for key, value in raw["rope_parameters"].items() if key != "rope_theta"
        }
    if raw.get("_name_or_path"):
        data["_name_or_path"] = raw["_name_or_path"]
    data["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": list(recipe.ignore),
        "config_groups": recipe.config_groups(),
    }
    return data


def write_text_files(source: Path, output: Path, config_json: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Writes or copies every file but the weights.

    Returns what `glm4run.json` keeps of them: the stop ids, the chat dialect and its template's fingerprints.
    Raises CheckpointError where the source has no usable tokenizer or an unknown chat template.
    """
    tokenizer = load_tokenizer(source)
    generation = dict(read_generation_config(source))
    stops = sorted(stop_ids(config, generation, tokenizer))
    config_json["eos_token_id"] = generation["eos_token_id"] = stops  # the full stop set, for every engine
    if config.pad_token_id is not None:
        generation.setdefault("pad_token_id", config.pad_token_id)
    write_json(output / "config.json", config_json)
    write_json(output / "generation_config.json", generation)
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    for pattern in COPIED_PATTERNS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, output / path.name)
    if not (source / "tokenizer.json").is_file():
        # Other engines have no loader for a bare tokenizer.model without the original's remote code.
        tokenizer.save(output / "tokenizer.json")
    write_json(output / "tokenizer_config.json", _tokenizer_config(source, tokenizer))
    dialect, _ = chat_dialect(source, config)
    return {
        "stop_token_ids": stops,
        "chat_dialect": None if dialect is None else dialect.name,
        "chat_template_fingerprints": [] if dialect is None else sorted(dialect.fingerprints),
    }


def _tokenizer_config(source: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    path = source / "tokenizer_config.json"
    data = read_json(path) if path.is_file() else {}
    data.pop("auto_map", None)  # points at code that is not copied, and is never run
    data["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "added_tokens_decoder" not in data:
        data["added_tokens_decoder"] = {
            str(i): {
                "content": tokenizer.special_name(i),
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for i in sorted(tokenizer.special_ids)
        }
    end = tokenizer.special_id("<|endoftext|>")
    if end is not None:
        data.setdefault("eos_token", "<|endoftext|>")
        data.setdefault("pad_token", "<|endoftext|>")
    return data
