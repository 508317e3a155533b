"""The tensors of each layout, and where every Hugging Face parameter is found in it.

Three layouts hold the same numbers: the original (`transformer.encoder.layers...`, fused qkv), the Hugging Face one
(`model.layers...`) and an early Hugging Face one with a fused `qkv_proj`. Everything above this module knows Hugging
Face names only. No torch: `check` and `info` use this too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from glm4run.bnb_format import ANY, bitsandbytes_tensor_shapes
from glm4run.checkpoint.safetensors_index import Problem, TensorEntry
from glm4run.config import ModelConfig
from glm4run.qformat import GROUP_SIZES, packed_tensor_shapes
from glm4run.quant_config import QuantScheme

FLOAT_DTYPES = ("BF16", "F16", "F32")
ORIGINAL_PREFIX = "transformer."
# Rotary buffers are derived from the config; some checkpoints store them.
# bitsandbytes stores a constant beside its int8 weights.
_IGNORED = re.compile(r".*\b(inv_freq|weight_format)$")
_ORIGINAL_LAYER = "transformer.encoder.layers.{}."
_HF_LAYER = "model.layers.{}."
_ORIGINAL_NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.dense.weight",
    "mlp.gate_up_proj.weight": "mlp.dense_h_to_4h.weight",
    "mlp.down_proj.weight": "mlp.dense_4h_to_h.weight",
}
_ORIGINAL_TOP = {
    "model.embed_tokens.weight": "transformer.embedding.word_embeddings.weight",
    "model.norm.weight": "transformer.encoder.final_layernorm.weight",
    "lm_head.weight": "transformer.output_layer.weight",
}


@dataclass(frozen=True)
class Source:
    """Where a Hugging Face parameter lies: rows [first, last) of a stored tensor, all of it when `last` is None."""

    entry: TensorEntry
    first: int = 0
    last: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        rows = self.entry.shape[0] if self.last is None else self.last - self.first
        return (rows, *self.entry.shape[1:])

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes * self.shape[0] // max(1, self.entry.shape[0])


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Module name to weight shape [N, K] of every linear with a weight of its own, in the order of the model."""
    shapes = {}
    hidden, ffn = config.hidden_size, config.intermediate_size
    query, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    for i in range(config.num_hidden_layers):
        layer = _HF_LAYER.format(i)
        shapes[layer + "self_attn.q_proj"] = (query, hidden)
        shapes[layer + "self_attn.k_proj"] = (kv, hidden)
        shapes[layer + "self_attn.v_proj"] = (kv, hidden)
        shapes[layer + "self_attn.o_proj"] = (hidden, query)
        shapes[layer + "mlp.gate_up_proj"] = (2 * ffn, hidden)
        shapes[layer + "mlp.down_proj"] = (hidden, ffn)
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (config.vocab_size, hidden)
    return shapes


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the dense model under its Hugging Face name."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.has_sandwich_norms:
        norms += ["post_self_attn_layernorm", "post_mlp_layernorm"]
    for i in range(config.num_hidden_layers):
        shapes |= {f"{_HF_LAYER.format(i)}{norm}.weight": (config.hidden_size,) for norm in norms}
    for module, (out_features, in_features) in linear_shapes(config).items():
        shapes[f"{module}.weight"] = (out_features, in_features)
        if config.attention_bias and module.endswith(("q_proj", "k_proj", "v_proj")):
            shapes[f"{module}.bias"] = (out_features,)
    shapes["model.norm.weight"] = (config.hidden_size,)
    return shapes


def expected_tensors(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Name to (shape, allowed dtypes) of every tensor that the model needs, packed ones as their parts."""
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    schemes = quantized_linears(config)
    for name, shape in parameter_shapes(config).items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in schemes:
            parts = stored_tensor_shapes(shape[0], shape[1], schemes[module])
            expected |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
        else:
            expected[name] = (shape, FLOAT_DTYPES)
    return expected


def stored_tensor_shapes(
    out_features: int, in_features: int, scheme: QuantScheme
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Suffix to (shape, allowed dtypes) of the tensors of one linear that is stored quantized."""
    shapes = packed_tensor_shapes if scheme.kind == "int" else bitsandbytes_tensor_shapes
    return shapes(out_features, in_features, scheme)


def quantized_linears(config: ModelConfig) -> dict[str, QuantScheme]:
    """Module name to scheme of every linear that is stored packed."""
    if config.quantization is None:
        return {}
    schemes = {module: config.quantization.scheme_for(module) for module in linear_shapes(config)}
    return {module: scheme for module, scheme in schemes.items() if scheme is not None}


def locate(config: ModelConfig, entries: Mapping[str, TensorEntry]) -> tuple[dict[str, Source], list[Problem]]:
    """Finds every tensor that the model needs; lists what is missing, left over, or of the wrong shape or dtype."""
    sources: dict[str, Source] = {}
    problems = [*_scheme_problems(config), *_architecture_problems(config, entries)]
    used: set[str] = set()
    for name, (shape, dtypes) in expected_tensors(config).items():
        source = _find(name, config, entries)
        if source is None:
            problems.append(
                Problem("missing", "the checkpoint is incomplete, or config.json is another model's", None, name)
            )
            continue
        used.add(source.entry.name)
        sources[name] = source
        where = source.entry
        if not _fits(source.shape, shape):
            got = f"{list(source.shape)}" + ("" if source.last is None else f" (rows of {where.name})")
            problems.append(
                Problem(
                    f"shape {got}, config.json says {list(shape)}",
                    "one of the two is another model's",
                    where.file.name,
                    name,
                )
            )
        if where.dtype not in dtypes:
            problems.append(
                Problem(f"dtype {where.dtype}, expected {' or '.join(dtypes)}", "unknown format", where.file.name, name)
            )
    for name in sorted(entries.keys() - used):
        if not _IGNORED.fullmatch(name):
            problems.append(
                Problem("not part of this model", "config.json is another model's?", entries[name].file.name, name)
            )
    return sources, problems


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(shape) == len(expected) and all(e in (ANY, s) for s, e in zip(shape, expected, strict=True))


def _find(name: str, config: ModelConfig, entries: Mapping[str, TensorEntry]) -> Source | None:
    if name in entries:
        return Source(entries[name])
    for candidate, split in _spellings(name):
        if candidate in entries:
            return Source(entries[candidate]) if not split else _qkv_rows(name, config, entries[candidate])
    return None


def _spellings(name: str) -> Iterator[tuple[str, bool]]:
    """Other names of a Hugging Face parameter, and whether it is a part of the fused qkv there."""
    if name in _ORIGINAL_TOP:
        yield _ORIGINAL_TOP[name], False
        return
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return
    layer, rest = match.groups()
    if rest in _ORIGINAL_NAMES:
        yield _ORIGINAL_LAYER.format(layer) + _ORIGINAL_NAMES[rest], False
    fused = re.fullmatch(r"self_attn\.[qkv]_proj\.(weight|bias)", rest)
    if fused is not None:
        yield _ORIGINAL_LAYER.format(layer) + f"self_attention.query_key_value.{fused[1]}", True
        yield _HF_LAYER.format(layer) + f"self_attn.qkv_proj.{fused[1]}", True


def _qkv_rows(name: str, config: ModelConfig, entry: TensorEntry) -> Source | None:
    """q, k or v inside the fused tensor, whose rows are all of q, then all of k, then all of v."""
    query, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    if not entry.shape or entry.shape[0] != query + 2 * kv:
        return Source(entry)  # reported as a wrong shape
    first = {"q": 0, "k": query, "v": query + kv}[name.rsplit(".", 2)[1][0]]
    return Source(entry, first, first + (query if first == 0 else kv))


def _scheme_problems(config: ModelConfig) -> list[Problem]:
    """Group sizes that do not divide K, in words instead of as shapes that do not fit."""
    problems = []
    for module, scheme in quantized_linears(config).items():
        if scheme.kind != "int":
            continue  # its library decides
        in_features = linear_shapes(config)[module][1]
        if scheme.group_size is not None and in_features % scheme.group_size:
            fitting = [str(g) for g in GROUP_SIZES if in_features % g == 0]
            what = f"group size {scheme.group_size} does not divide its {in_features} input features"
            problems.append(Problem(what, f"these do: {', '.join(fitting)}", "config.json", module))
    return problems


def _architecture_problems(config: ModelConfig, entries: Mapping[str, TensorEntry]) -> list[Problem]:
    """`glm` and `glm4` configs look alike, but only 0414 checkpoints hold the sandwich norms: the tensors decide."""
    stored = any(name.endswith(".post_self_attn_layernorm.weight") for name in entries)
    hint = "config.json belongs to another member of the family"
    if stored and not config.has_sandwich_norms:
        what = f"the weights hold the 0414 series' second norms, but config.json says model_type {config.model_type!r}"
        return [Problem(what, hint, "config.json")]
    if config.has_sandwich_norms and entries and not stored:
        what = "config.json says model_type 'glm4', but the weights lack the 0414 series' second norms"
        return [Problem(what, hint, "config.json")]
    return []
