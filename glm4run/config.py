"""What a `config.json` of any of the three layouts means, as one frozen `ModelConfig` with Hugging Face key names.

Knows every spelling and trap of the family's configuration files; must not know tensors, files other than
`config.json`, or torch. Source of the facts: the published configuration files of each member (models/*/card.json).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm4run.errors import CheckpointError
from glm4run.quant_config import QuantConfig, parse_quantization

SUPPORTED_MODEL_TYPES = ("chatglm", "glm", "glm4")
DEFAULT_ROPE_THETA = 10000.0
YARN_FACTOR = 4.0  # what the model card of the 0414 series asks for
DEFAULT_PARTIAL_ROTARY_FACTOR = 0.5  # GlmConfig's and Glm4Config's default; 1.0 is what generic loaders assume

# glm-4-9b-chat-hf and -chat-1m-hf were published with rope_theta 10000.0 although the same weights in the original
# layout use rope_ratio 500 and 10000. Keyed by (hidden_size, max_position_embeddings).
_HF_COPIES_WITH_WRONG_THETA = {(4096, 131072): 5e6, (4096, 1048576): 1e8}


@dataclass(frozen=True)
class RopeScaling:
    """YaRN's parameters. Source: arXiv 2309.00071, with the key names of Hugging Face's `rope_scaling`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: 0.1 ln(factor) + 1

    @property
    def stretched_length(self) -> int:
        """The context in tokens that the scaling reaches."""
        return int(self.original_max_position_embeddings * self.factor)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a GLM-4-family model. Dimensions are counts of elements, positions are tokens."""

    model_type: str  # "chatglm" (original remote code), "glm" (its Hugging Face copy), "glm4" (0414: sandwich norms)
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int  # rows of embedding and head, padding rows included
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float = DEFAULT_ROPE_THETA
    partial_rotary_factor: float = DEFAULT_PARTIAL_ROTARY_FACTOR
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    torch_dtype: str = "bfloat16"
    quantization: QuantConfig | None = None
    notices: tuple[str, ...] = field(default=(), compare=False)  # what was corrected or looks odd, for the user

    @property
    def has_sandwich_norms(self) -> bool:
        """Whether each branch is normed again before it joins the residual (the `glm4` members)."""
        return self.model_type == "glm4"

    @property
    def rotary_dim(self) -> int:
        """The leading dimensions of each q and k head that RoPE turns; the rest pass through."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def num_parameters(self) -> int:
        """The number of weights and biases in the Hugging Face layout (no rotary buffer)."""
        qkv = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        linears = self.hidden_size * (qkv + self.num_attention_heads * self.head_dim + 3 * self.intermediate_size)
        norms = self.hidden_size * (4 if self.has_sandwich_norms else 2)
        layer = linears + norms + (qkv if self.attention_bias else 0)
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + tables + self.hidden_size

    def with_yarn(self, factor: float = YARN_FACTOR) -> ModelConfig:
        """The same model with YaRN stretching its native context by `factor`."""
        scaling = RopeScaling(factor=factor, original_max_position_embeddings=self.max_position_embeddings)
        return dataclasses.replace(self, rope_scaling=scaling, max_position_embeddings=scaling.stretched_length)


def read_config(folder: Path) -> ModelConfig:
    """Reads `folder/config.json`.

    Raises:
        CheckpointError: the file is missing, is not JSON, names an unknown architecture or contradicts itself.
    """
    return parse_config(read_json(folder / "config.json"), where=str(folder / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file, with errors that name it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"no {path.name} in {path.parent}", hint="a model folder holds config.json, the tokenizer and safetensors"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}", hint="download the file again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data


def parse_config(raw: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
    """Turns a `config.json` of any layout into a `ModelConfig`; `where` names the file in errors."""
    model_type = raw.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise CheckpointError(
            f"{where}: model_type is {model_type!r}, expected one of {', '.join(SUPPORTED_MODEL_TYPES)}",
            hint="glm4run runs the GLM-4-9B family only; see `glm4run models` for its members",
        )
    reader = _Reader(raw, where)
    config = _parse_chatglm(reader) if model_type == "chatglm" else _parse_hf(reader, str(model_type))
    _validate(config, where)
    return config


class _Reader:
    """Typed access to a raw config, collecting notices."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where
        self.notices: list[str] = []

    def integer(self, *keys: str, default: int | None = None) -> int:
        """The value of the first key present; several spellings that disagree are an error."""
        found = {key: self.raw[key] for key in keys if self.raw.get(key) is not None}
        values = list(found.values())
        if not found:
            if default is None:
                raise CheckpointError(f"{self.where}: no {' or '.join(keys)}", hint="the config is incomplete")
            return default
        if any(value != values[0] for value in values):
            raise CheckpointError(f"{self.where} contradicts itself: {found}", hint="correct the config")
        value = values[0]
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise CheckpointError(f"{self.where}: {next(iter(found))} is {value!r}, expected a positive integer")
        return value

    def number(self, key: str, default: float | None = None, *, table: Mapping[str, Any] | None = None) -> float:
        value = (self.raw if table is None else table).get(key)
        value = default if value is None else value  # null means the default, as in transformers
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{self.where}: {key} is {value!r}, expected a finite number")
        return float(value)

    def table(self, key: str) -> Mapping[str, Any]:
        """A nested object, {} where it is absent or null."""
        value = self.raw.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.where}: {key} is {value!r}, expected an object or null")
        return value

    def require(self, key: str, expected: object) -> None:
        """Switches of the original configs that only ever had one value in this family."""
        value = self.raw.get(key, expected)
        if value != expected:
            raise CheckpointError(
                f"{self.where}: {key} is {value!r}, GLM-4-9B has {expected!r}", hint="this variant is not supported"
            )

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.raw.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        wrong = next((i for i in ids if i is not None and (isinstance(i, bool) or not isinstance(i, int))), None)
        if wrong is not None:
            raise CheckpointError(f"{self.where}: {key} holds {wrong!r}, expected token ids")
        # Some converters write -1 for "none"; a missing id is legal.
        return tuple(i for i in ids if i is not None and i >= 0)

    def common(self) -> dict[str, Any]:
        pad = self.token_ids("pad_token_id")
        return {
            "tie_word_embeddings": bool(self.raw.get("tie_word_embeddings", False)),
            "eos_token_id": self.token_ids("eos_token_id"),
            "pad_token_id": pad[0] if pad else None,
            "torch_dtype": str(self.raw.get("torch_dtype") or self.raw.get("dtype") or "bfloat16"),
            "quantization": parse_quantization(self.table("quantization_config"), self.where),
        }

    def rope(self) -> tuple[float, float, RopeScaling | None]:
        """(theta, partial_rotary_factor, scaling) from `rope_theta`, `rope_ratio` or the nested `rope_parameters`."""
        nested = self.table("rope_parameters")
        scaling = self.table("rope_scaling")
        spelled: dict[str, float] = {}
        if "rope_theta" in nested:
            spelled["rope_parameters.rope_theta"] = self.number("rope_theta", table=nested)
        if self.raw.get("rope_ratio") is not None:
            spelled["rope_ratio x 10000"] = self.number("rope_ratio") * DEFAULT_ROPE_THETA
        if self.raw.get("rope_theta") is not None:
            spelled["rope_theta"] = self.number("rope_theta")
        theta = next(iter(spelled.values()), DEFAULT_ROPE_THETA)  # nested wins, then the original's own key
        if len(set(spelled.values())) > 1:
            self.notices.append(f"the config spells the RoPE base in contradictory ways {spelled}; using {theta:g}")
        factor_of = nested if nested.get("partial_rotary_factor") is not None else self.raw
        factor = self.number("partial_rotary_factor", DEFAULT_PARTIAL_ROTARY_FACTOR, table=factor_of)
        kind = {**scaling, **nested}
        return theta, factor, self._scaling(kind)

    def _scaling(self, table: Mapping[str, Any]) -> RopeScaling | None:
        kind = table.get("rope_type") or table.get("type") or "default"
        if kind == "default":
            return None
        if kind != "yarn":
            raise CheckpointError(
                f"{self.where}: rope scaling of type {kind!r}, expected yarn or none",
                hint="this family is extended with YaRN: {'rope_type': 'yarn', 'factor': 4.0, ...}",
            )
        positions = self.raw.get("max_position_embeddings") or self.raw.get("seq_length")
        native = table.get("original_max_position_embeddings") or positions
        if isinstance(native, bool) or not isinstance(native, int) or native <= 0:
            raise CheckpointError(
                f"{self.where}: YaRN's original_max_position_embeddings is {native!r}, expected a number of tokens"
            )
        for key, only in (("mscale", None), ("mscale_all_dim", None), ("truncate", True)):
            if table.get(key, only) not in (None, only):
                raise CheckpointError(
                    f"{self.where}: YaRN's {key} is set to {table[key]!r}, which is not supported",
                    hint="the 0414 series uses plain YaRN: rope_type, factor and original_max_position_embeddings",
                )
        # Without a factor it is what the file's two lengths say, as in transformers.
        stretched = positions / native if isinstance(positions, int) and positions > native else None
        factor = self.number("factor", stretched, table=table)
        if factor <= 0:
            raise CheckpointError(f"{self.where}: YaRN's factor is {factor}, expected a positive number")
        return RopeScaling(
            factor=factor,
            original_max_position_embeddings=native,
            beta_fast=self.number("beta_fast", 32.0, table=table),
            beta_slow=self.number("beta_slow", 1.0, table=table),
            attention_factor=(
                None if table.get("attention_factor") is None else self.number("attention_factor", table=table)
            ),
        )


def _parse_chatglm(reader: _Reader) -> ModelConfig:
    for key, expected in (
        ("rmsnorm", True),
        ("post_layer_norm", True),
        ("add_bias_linear", False),
        ("apply_residual_connection_post_layernorm", False),
        ("original_rope", True),
    ):
        reader.require(key, expected)
    heads = reader.integer("num_attention_heads")
    grouped = bool(reader.raw.get("multi_query_attention", True))
    theta, factor, scaling = reader.rope()
    return ModelConfig(
        model_type="chatglm",
        hidden_size=reader.integer("hidden_size"),
        num_hidden_layers=reader.integer("num_layers", "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=reader.integer("multi_query_group_num") if grouped else heads,
        head_dim=reader.integer("kv_channels"),
        intermediate_size=reader.integer("ffn_hidden_size"),
        vocab_size=reader.integer("padded_vocab_size", "vocab_size"),
        max_position_embeddings=reader.integer("seq_length", "max_position_embeddings"),
        rms_norm_eps=reader.number("layernorm_epsilon"),
        rope_theta=theta,
        partial_rotary_factor=factor,
        rope_scaling=scaling,
        attention_bias=bool(reader.raw.get("add_qkv_bias", False)),
        notices=tuple(reader.notices),
        **reader.common(),
    )


def _parse_hf(reader: _Reader, model_type: str) -> ModelConfig:
    reader.require("hidden_act", "silu")
    hidden = reader.integer("hidden_size")
    heads = reader.integer("num_attention_heads")
    positions = reader.integer("max_position_embeddings")
    theta, factor, scaling = reader.rope()
    right_theta = _HF_COPIES_WITH_WRONG_THETA.get((hidden, positions)) if model_type == "glm" else None
    if right_theta is not None and theta == DEFAULT_ROPE_THETA:
        reader.notices.append(
            f"the -hf copy's config says rope_theta {theta:g}, but these weights were trained with {right_theta:g}; "
            f"using {right_theta:g} (--rope-theta overrides)"
        )
        theta = right_theta
    return ModelConfig(
        model_type=model_type,
        hidden_size=hidden,
        num_hidden_layers=reader.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=reader.integer("num_key_value_heads", default=heads),
        head_dim=reader.integer("head_dim", default=max(1, hidden // heads)),
        intermediate_size=reader.integer("intermediate_size"),
        vocab_size=reader.integer("vocab_size"),
        # The model card adds `rope_scaling` to the file and leaves max_position_embeddings at the native length.
        max_position_embeddings=positions if scaling is None else max(positions, scaling.stretched_length),
        rms_norm_eps=reader.number("rms_norm_eps"),
        rope_theta=theta,
        partial_rotary_factor=factor,
        rope_scaling=scaling,
        attention_bias=bool(reader.raw.get("attention_bias", True)),  # GlmConfig's and Glm4Config's default
        notices=tuple(reader.notices),
        **reader.common(),
    )


def _validate(config: ModelConfig, where: str) -> None:
    problems = []
    if config.num_attention_heads % config.num_key_value_heads:
        problems.append(f"{config.num_attention_heads} heads do not divide by {config.num_key_value_heads} KV heads")
    if not 0 < config.rotary_dim <= config.head_dim or config.rotary_dim % 2:
        problems.append(f"RoPE would turn {config.rotary_dim} of {config.head_dim} dimensions, expected an even share")
    if config.rms_norm_eps <= 0 or config.rope_theta <= 0:
        problems.append(f"rms_norm_eps {config.rms_norm_eps} and rope_theta {config.rope_theta} must be positive")
    problems += [f"stop id {i} is outside the vocabulary" for i in config.eos_token_id if i >= config.vocab_size]
    if problems:
        raise CheckpointError(f"{where} contradicts itself: {'; '.join(problems)}", hint="correct the config")
