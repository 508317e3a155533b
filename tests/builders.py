"""Tiny checkpoints with random weights, in every layout a folder can come in, and packed ones made from them.

What each holds is the same model: the same seed gives the same numbers under other names. Deterministic and small:
hidden 128, 2 layers, 320 rows of vocabulary of which the last ten are padding.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glm4run.checkpoint.layouts import parameter_shapes
from glm4run.config import parse_config
from glm4run.tokenizer import SPECIAL_TOKENS

Layout = Literal["chatglm", "glm", "fused", "glm4"]
LAYOUTS: tuple[Layout, ...] = ("chatglm", "glm", "fused", "glm4")
SAME_MODEL: tuple[Layout, ...] = ("chatglm", "glm", "fused")  # three layouts of one model

_WORDS = ("he", "ll", "hell", "hello", " t", " th", " the", "in", "er", "on", "re", "at", "en", "th", "the", " a")
_MERGED = (*(word.encode() for word in _WORDS), b"\xe4\xbd", "你".encode(), b"\xe5\xa5", "好".encode(), "你好".encode())
RANKS = (*(bytes([value]) for value in range(256)), *_MERGED)
FIRST_SPECIAL = len(RANKS)
SPECIAL_IDS = {name: FIRST_SPECIAL + i for i, name in enumerate(SPECIAL_TOKENS)}
PREFIX = (SPECIAL_IDS["[gMASK]"], SPECIAL_IDS["<sop>"])
STOP_IDS = tuple(SPECIAL_IDS[name] for name in ("<|endoftext|>", "<|user|>", "<|observation|>"))
VOCAB = 320
FIRST_PADDING = FIRST_SPECIAL + len(SPECIAL_TOKENS)

_SIZES: Mapping[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 160,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": list(STOP_IDS),
    "pad_token_id": STOP_IDS[0],
}
_CHATGLM_KEYS: Mapping[str, str] = {
    "num_hidden_layers": "num_layers",
    "num_key_value_heads": "multi_query_group_num",
    "head_dim": "kv_channels",
    "intermediate_size": "ffn_hidden_size",
    "vocab_size": "padded_vocab_size",
    "max_position_embeddings": "seq_length",
    "rms_norm_eps": "layernorm_epsilon",
}
_TORCH_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def raw_config(layout: Layout = "glm", *, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    """A `config.json` as the layout's own files are spelled; `changes` have Hugging Face names."""
    sizes = {**_SIZES, **changes, "torch_dtype": _TORCH_NAMES[dtype]}
    if layout == "chatglm":
        theta = sizes.pop("rope_theta")
        return {
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
            **{_CHATGLM_KEYS.get(key, key): value for key, value in sizes.items()},
            "rope_ratio": theta / 10000,
            "multi_query_attention": True,
            "add_qkv_bias": True,
            "add_bias_linear": False,
            "rmsnorm": True,
            "post_layer_norm": True,
            "original_rope": True,
            "apply_residual_connection_post_layernorm": False,
        }
    model_type = "glm4" if layout == "glm4" else "glm"
    architecture = {"glm": "GlmForCausalLM", "glm4": "Glm4ForCausalLM"}[model_type]
    return {
        "model_type": model_type,
        "architectures": [architecture],
        **sizes,
        "attention_bias": True,
        "hidden_act": "silu",
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": False,
    }


def hf_weights(raw: Mapping[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights under their Hugging Face names: norms around one, so that one which is left out must show."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in parameter_shapes(parse_config(raw)).items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.3 * noise
        elif len(shape) == 1:
            value = 0.5 * noise
        else:
            value = noise * (1.0 if "embed" in name else 2.0 * shape[1] ** -0.5)
        weights[name] = value.to(dtype)
    return weights


def in_layout(weights: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The same tensors as `layout` names and fuses them."""
    if layout in ("glm", "glm4"):
        return dict(weights)
    stored: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if ".self_attn.q_proj." in name:
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            stored[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            stored[name] = tensor
    if layout == "fused":
        return stored
    original = {_original_name(name): tensor for name, tensor in stored.items()}
    original["transformer.rotary_pos_emb.inv_freq"] = torch.ones(8)
    return original


def _original_name(name: str) -> str:
    for ours, theirs in (
        ("model.embed_tokens", "transformer.embedding.word_embeddings"),
        ("lm_head", "transformer.output_layer"),
        ("model.norm", "transformer.encoder.final_layernorm"),
        ("model.layers", "transformer.encoder.layers"),
        ("self_attn.qkv_proj", "self_attention.query_key_value"),
        ("self_attn.o_proj", "self_attention.dense"),
        ("mlp.gate_up_proj", "mlp.dense_h_to_4h"),
        ("mlp.down_proj", "mlp.dense_4h_to_h"),
    ):
        name = name.replace(ours, theirs)
    return name


def write_checkpoint(
    folder: Path,
    layout: Layout = "glm",
    *,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    dialect: str | None = None,
    **changes: Any,
) -> Path:
    """Writes a whole model folder and returns it. With a `dialect` it is a chat model, without one a base model."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = raw_config(layout, dtype=dtype, **changes)
    write_json(folder / "config.json", raw)
    write_shards(folder, in_layout(hf_weights(raw, seed=seed, dtype=dtype), layout), shards)
    write_tokenizer(folder)
    if dialect is not None:
        write_json(folder / "glm4run.json", {"chat_dialect": dialect})
    return folder


def write_shards(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> None:
    """One `model.safetensors`, or `shards` files with their index."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def edit_tensors(folder: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Replaces, adds or (None) removes tensors of a folder that has one `model.safetensors`."""
    path = folder / "model.safetensors"
    tensors: dict[str, Tensor | None] = {**load_file(path), **changes}
    save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON object in a file; None removes one."""
    data = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    write_json(path, {key: value for key, value in data.items() if value is not None})


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """A `tokenizer.model` as the original layout has it: every byte, a few merges; the 14 specials follow by rule."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(RANKS)]
    (folder / "tokenizer.model").write_text("".join(lines), encoding="ascii")


def write_packed(folder: Path, layout: Layout = "glm", *, source: Mapping[str, Any] = {}, **options: Any) -> Path:
    """What `quantize` makes of `write_checkpoint(..., layout, **source)`."""
    from glm4run_quantize import quantize_checkpoint

    unpacked = write_checkpoint(folder.with_name(f"{folder.name}-source"), layout, **source)
    quantize_checkpoint(unpacked, folder, **options)
    return folder
