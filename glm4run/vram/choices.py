"""What is asked about: a model (a member's shape, or the exact bytes of a folder) and how it would run.

A `Choice` becomes a `memory.Run`: where this version can execute it, the very run that the loader plans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from glm4run.cards import load_cards, match_card, yarn_factor
from glm4run.checkpoint.layouts import linear_shapes, locate, quantized_linears
from glm4run.checkpoint.safetensors_index import as_error, read_index
from glm4run.config import ModelConfig, read_config
from glm4run.errors import Glm4RunError, UsageError
from glm4run.memory import (
    MIB,
    PREFILL_CHUNK,
    SMALLER_CHUNKS,
    Overhead,
    Run,
    Stored,
    Term,
    Weights,
    kv_bytes_per_token,
    plan_weights,
    stored_tensors,
)
from glm4run.model_folders import find_model
from glm4run.quant_config import QuantScheme, on_load_scheme
from glm4run.speculative import MOST_DRAFTED
from glm4run_quantize.recipes import choose_recipe

DEFAULT_MEMBER = "glm-4-9b-chat"
BITS = ("16", "8", "4", "nf4")
# NCCL's default buffer of 4 MiB, to and from, on 16 channels. Source: NCCL's NCCL_BUFFSIZE.
COLLECTIVE_BYTES = 4 * MIB * 2 * 16


@dataclass(frozen=True)
class Subject:
    """The model that is asked about. `stored` and `schemes` are those of a folder, None for a member's shape alone."""

    name: str
    config: ModelConfig
    folder: Path | None = None
    stored: Stored | None = None
    schemes: Mapping[str, QuantScheme] = dataclasses.field(default_factory=dict)
    yarn_factor: float | None = None
    source: str = "./MODEL"  # where its files are, or how such a folder might be called

    @property
    def context_limit(self) -> int:
        """The longest context of the model, stretched where the family says how."""
        if self.config.rope_scaling is None and self.yarn_factor is not None:
            return int(self.config.max_position_embeddings * self.yarn_factor)
        return self.config.max_position_embeddings

    @property
    def is_packed(self) -> bool:
        return bool(self.schemes)


@dataclass(frozen=True)
class Choice:
    """How a model would run. `bits` is one of BITS, or "packed": as a packed folder stands."""

    bits: str
    kv_bits: int = 16
    head_bits: int = 8
    group_size: int | None = None
    embed_on_host: bool = False
    batch: int = 1
    chunk: int = PREFILL_CHUNK
    drafted_tokens: int = 0
    every_logits: bool = False
    gpus: int = 1
    split: str = "pp"
    offloaded_layers: int = 0

    @property
    def estimated(self) -> list[str]:
        """What this version of glm4run does not execute yet, in words."""
        beyond = {
            "the embedding in RAM": self.embed_on_host,
            "several sequences at once": self.batch > 1,
            "drafted tokens": self.drafted_tokens > 0,
            "several GPUs": self.gpus > 1,
            "offloaded layers": self.offloaded_layers > 0,
            f"a chunk of {self.chunk}": self.chunk not in (PREFILL_CHUNK, *SMALLER_CHUNKS),
        }
        return [name for name, is_so in beyond.items() if is_so]

    @property
    def label(self) -> str:
        """The weights in a word: bf16, int8, int4, nf4, packed."""
        return {"16": "bf16", "8": "int8", "4": "int4"}.get(self.bits, self.bits)


def find_subject(model: str | None) -> Subject:
    """A member by name, or a folder with its exact bytes.

    Raises:
        Glm4RunError: neither is called so, or the folder's files are damaged.
    """
    cards = {card.name.lower(): card for card in load_cards().values()}
    cards |= {hub_id.lower(): card for card in load_cards().values() for hub_id in card.hub_ids}
    card = cards.get((model or DEFAULT_MEMBER).lower())
    if model is not None and (card is None or Path(model).is_dir()):
        try:
            return read_subject(find_model(model).folder)
        except Glm4RunError as error:
            if "no model" not in error.message:
                raise
            members = ", ".join(item.name for item in load_cards().values())
            raise Glm4RunError(error.message, hint=f"a folder, or a member of the family: {members}") from error
    assert card is not None
    return Subject(card.title, card.config, yarn_factor=card.yarn_factor, source=f"./{card.name}")


def read_subject(folder: Path) -> Subject:
    """The exact bytes of a folder, from its headers; no weight is read."""
    config = read_config(folder)
    sources, problems = locate(config, read_index(folder))
    if problems:
        raise as_error(folder, problems)
    card = match_card(config, name=folder.resolve().name)
    return Subject(
        folder.resolve().name,
        config,
        folder,
        {name: (source.entry.dtype, source.shape) for name, source in sources.items()},
        quantized_linears(config),
        yarn_factor(config, card),
        str(folder),
    )


def default_bits(subject: Subject) -> tuple[str, ...]:
    """A packed folder runs as it stands; anything else is asked about at every width."""
    return ("packed",) if subject.is_packed else ("16", "8", "4")


def make_run(
    subject: Subject,
    choice: Choice,
    overhead: Overhead,
    *,
    device: str,
    dtype: str,
    backend: str,
    draft: Subject | None = None,
) -> Run:
    """The run of a choice on the fullest of its GPUs. `draft`: the model that drafts tokens, if one does."""
    config = _share_of(subject.config, choice)
    weights = _weights(subject, config, choice, device=device, dtype=dtype, backend=backend)
    native = backend == "native"
    is_packed_head = weights.kernels["lm_head"][0].scheme is not None  # then generate.py drafts from the context
    ops = backend if backend in ("native", "triton") else "torch"
    compute = weights.compute(config, dtype=dtype, device=device, batch=choice.batch, ops=ops)
    return Run(
        weights,
        compute,
        overhead,
        choice.chunk,
        choice.kv_bits,
        1 + max(choice.drafted_tokens, MOST_DRAFTED if native and is_packed_head else 0),
        choice.every_logits,
        partial(_extra_terms, choice, draft),
        _elsewhere(weights, choice),
    )


def _weights(
    subject: Subject, config: ModelConfig, choice: Choice, *, device: str, dtype: str, backend: str
) -> Weights:
    whole = config == subject.config
    is_as_stored = choice.bits == "packed" or (choice.bits == "16" and not subject.is_packed)
    if subject.stored is not None and whole and is_as_stored:
        stored, schemes = subject.stored, subject.schemes
    elif choice.bits == "packed":
        schemes = {name: subject.schemes[name] for name in linear_shapes(config) if name in subject.schemes}
        stored = stored_tensors(config, schemes)
    else:
        schemes = _schemes(config, choice)
        stored = stored_tensors(config, {} if choice.bits == "nf4" else schemes)  # NF4 is made while loading
    return plan_weights(config, stored, schemes, backend=backend, dtype=dtype, device=device)


def _schemes(config: ModelConfig, choice: Choice) -> dict[str, QuantScheme]:
    if choice.bits == "16":
        return {}
    if choice.bits == "nf4":
        shapes = linear_shapes(config)
        return {name: on_load_scheme("nf4", shapes[name][1]) for name in shapes if name != "lm_head"}
    recipe, _ = choose_recipe(config, int(choice.bits), group_size=choice.group_size, head_bits=choice.head_bits)
    return recipe.schemes(config)


def _share_of(config: ModelConfig, choice: Choice) -> ModelConfig:
    """What one GPU holds of the model, as a smaller model of the same kind."""
    if choice.offloaded_layers:
        if choice.offloaded_layers >= config.num_hidden_layers:
            raise UsageError(
                f"{choice.offloaded_layers} layers cannot be offloaded, the model has {config.num_hidden_layers}",
                hint=f"fewer than {config.num_hidden_layers}",
            )
        config = dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers - choice.offloaded_layers)
    if choice.gpus == 1:
        return config
    if choice.split == "pp":
        return dataclasses.replace(config, num_hidden_layers=-(-config.num_hidden_layers // choice.gpus))
    return _tensor_share(config, choice)


def _tensor_share(config: ModelConfig, choice: Choice) -> ModelConfig:
    """Heads, ffn and vocabulary are cut. Two KV heads cannot be cut further than in two: more GPUs repeat them."""
    count = choice.gpus
    for what, size in (("query heads", config.num_attention_heads), ("ffn columns", config.intermediate_size)):
        if size % count:
            raise UsageError(f"{size} {what} do not divide by {count} GPUs", hint="2, 4 or 8; or --split pp")
    columns = config.intermediate_size // count
    group = choice.group_size
    if choice.bits in ("8", "4") and group is not None and columns % group:
        fitting = [str(size) for size in (128, 64, 32) if columns % size == 0]
        raise UsageError(
            f"group size {group} does not divide the {columns} columns that each of {count} GPUs gets of down_proj",
            hint=f"--group-size {' or '.join(fitting)}" if fitting else "fewer GPUs, or --split pp",
        )
    return dataclasses.replace(
        config,
        num_attention_heads=config.num_attention_heads // count,
        num_key_value_heads=max(1, config.num_key_value_heads // count),
        intermediate_size=columns,
        vocab_size=-(-config.vocab_size // count),
        eos_token_id=(),
    )


def _extra_terms(choice: Choice, draft: Subject | None, context_len: int) -> tuple[Term, ...]:
    """Buffers between GPUs; a draft model's weights, and its cache at the context that is really used."""
    terms: list[Term] = []
    if choice.gpus > 1 and choice.split == "tp":
        terms.append(Term("collectives", COLLECTIVE_BYTES, "modelled", "NCCL's default buffers of one GPU"))
    if draft is not None:
        draft_bits = Choice(default_bits(draft)[0])
        weights = _weights(draft, draft.config, draft_bits, device="cuda", dtype="bf16", backend="torch")
        cache = kv_bytes_per_token(draft.config, 2) * context_len * choice.batch
        terms.append(Term("draft_weights", weights.bytes, "modelled", f"{draft.name}, {draft_bits.label}"))
        terms.append(Term("draft_kv_cache", cache, "modelled", f"{draft.name} at {context_len} tokens"))
    return tuple(terms)


def _elsewhere(weights: Weights, choice: Choice) -> dict[str, int]:
    """Weight classes in RAM, or on another GPU of a pipeline: its first holds the embedding, its last the head."""
    classes = weights.by_class
    away: dict[str, int] = {}
    if choice.embed_on_host:
        away["embedding"] = classes["embedding"]
    elif choice.gpus > 1 and choice.split == "pp":
        # The GPU with the larger of the two is the fullest.
        smaller = min(("embedding", "head"), key=lambda name: classes[name])
        away[smaller] = classes[smaller]
    return away
