"""`MemoryPlan`: every byte of a run, by name, and the largest context that fits. No torch.

Each term is exact (it is allocated so, to the byte), modelled (a formula that the tests check against runs) or measured
on this machine. The total is the fullest moment: what stays, and the forward's fullest step or the loading's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from glm4run.config import ModelConfig
from glm4run.kv_format import KVFormat, row_bytes, rows_for, tensor_widths
from glm4run.memory.allocator import reserved_for_equal
from glm4run.memory.heap import kept_block_bytes
from glm4run.memory.overhead import CUBLAS_BYTES, Overhead
from glm4run.memory.sizes import MIB, tokens_text
from glm4run.memory.terms import PREFILL_CHUNK, MemoryPlan, Term
from glm4run.memory.weights import Weights
from glm4run.memory.workspace import MAX_LOGITS_BYTES, Compute, forward_peak

LARGER_CHUNKS = (2048, 1024)  # what a GPU with room for them takes
SMALLER_CHUNKS = (256, 128, 64)  # what a context that would not fit otherwise is tried with
HEADROOM_BYTES = 512 * MIB  # what choosing a dtype leaves to everything that is not weights
# Free pieces between the forward's tensors that fit no other. Source: traces replayed in tests/glm4run/memory.
FRAGMENTATION_BYTES = 64 * MIB
# What glibc's heap keeps of tensors that came and went, as a share of them. Source: measured, docs/vram.md.
HEAP_SLACK_SHARE, LOADING_SLACK_SHARE, MOST_LOADING_SLACK_BYTES = 32, 16, 16 * MIB

MAPPED_WINDOW_BYTES = 64 << 10  # Linux maps so much around a page of a file that is touched (fault_around_bytes)

ATTENTION = ("keys in float32", "values in float32", "attention scores", "attention weights", "split contexts")
LOGITS = ("logits", "logits in float32", "sampling")


def _nothing_more(context_len: int) -> tuple[Term, ...]:
    return ()


@dataclass(frozen=True)
class Run:
    """What is to be planned: weights, how they compute, and where."""

    weights: Weights
    compute: Compute
    overhead: Overhead
    chunk: int = PREFILL_CHUNK
    kv_bits: int = 16  # of keys, and of values unless `value_bits` says otherwise
    logits_rows: int = 1  # k + 1 where k drafted tokens are verified at once
    every_logits: bool = False  # the logits of every position are kept, as `LoadedModel.logits` returns them
    extra_terms: Callable[[int], tuple[Term, ...]] = _nothing_more  # at a context: a draft model, other buffers
    not_here: Mapping[str, int] = dataclasses.field(default_factory=dict)  # weight classes kept elsewhere, in bytes
    value_bits: int | None = None

    @property
    def config(self) -> ModelConfig:
        return self.compute.config

    @property
    def kv_format(self) -> KVFormat:
        """How keys and values are kept."""
        return KVFormat(self.kv_bits, self.kv_bits if self.value_bits is None else self.value_bits)


def embedding_in_file(weights: Weights) -> dict[str, Any]:
    """What a Run says of an embedding that is mapped from its file: only what tokens touch of it is resident."""
    whole = weights.by_class["embedding"]

    def touched(context_len: int) -> tuple[Term, ...]:
        nbytes = min(whole, context_len * MAPPED_WINDOW_BYTES)
        return (
            Term("embedding_rows", nbytes, "modelled", "pages of the file around the rows of the context's tokens"),
        )

    return {"not_here": {"embedding": whole}, "extra_terms": touched}


def kv_bytes_per_token(config: ModelConfig, dtype_bytes: int) -> int:
    """Keys and values of one token over all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype_bytes


def every_logits_bytes(config: ModelConfig, tokens: int) -> int:
    """Float32 logits of every position, as `LoadedModel.logits` returns them."""
    return 4 * config.vocab_size * tokens


def plan_run(run: Run, context_len: int) -> MemoryPlan:
    """The plan of sequences of up to `context_len` tokens. No term shrinks as the context, batch or chunk grows."""
    compute, config = run.compute, run.config
    chunk = min(run.chunk, context_len)
    kv_format = run.kv_format
    key_bytes, value_bytes = (
        row_bytes(config.head_dim, bits, compute.dtype_bytes) for bits in (kv_format.key_bits, kv_format.value_bits)
    )
    heads, rows = config.num_hidden_layers * config.num_key_value_heads, rows_for(context_len)
    kv_cache = heads * (key_bytes + value_bytes) * rows * compute.batch
    moment = forward_peak(
        compute, chunk, context_len, logits_rows=run.logits_rows, every_position=run.every_logits, kv_format=kv_format
    )
    attention = sum(moment.tensors.get(name, 0) for name in ATTENTION)
    logits = sum(moment.tensors.get(name, 0) for name in LOGITS)
    weights = _weight_terms(run)
    result = every_logits_bytes(config, context_len) * compute.batch if run.every_logits else 0
    staying = sum(term.bytes for term in weights) + kv_cache + moment.bytes + result
    each = f"2 x {key_bytes}" if key_bytes == value_bytes else f"({key_bytes} + {value_bytes})"
    per_token = f"{config.num_hidden_layers} layers x {config.num_key_value_heads} KV heads x {each} B"
    batch = f" x {compute.batch} sequences" if compute.batch > 1 else ""
    terms = [
        *weights,
        Term("kv_cache", kv_cache, "exact", f"{per_token} x {rows} tokens{batch}"),
        Term(
            "prefill_activations",
            moment.bytes - attention - logits,
            "modelled",
            f"the other tensors of a {chunk}-token chunk's fullest step ({moment.step})",
        ),
        Term("attention", attention, "modelled", _attention_formula(moment.tensors, context_len)),
        Term("logits", logits, "modelled", _logits_formula(run)),
        *(_every_logits_term(run, context_len, result) if run.every_logits else ()),
        *(_graph_term(run, context_len) if compute.ops == "triton" else ()),
        *run.extra_terms(context_len),
        Term(run.overhead.name, run.overhead.bytes, run.overhead.kind, run.overhead.formula),
    ]
    loading = max(0, run.weights.loading_peak_bytes - sum(run.not_here.values()) - staying)
    if compute.device == "cuda":
        slack = _slack(run, context_len)
        terms.append(Term("allocator_slack", slack, "modelled", "2 MiB segments of weights and cache, fragments"))
    else:
        converted = min(MOST_LOADING_SLACK_BYTES, run.weights.converted_bytes // LOADING_SLACK_SHARE)
        kept = min(moment.bytes, 2 * kept_block_bytes(sum(term.bytes for term in weights)))
        slack = moment.bytes // HEAP_SLACK_SHARE + converted + kept
        formula = (
            f"1/{HEAP_SLACK_SHARE} of the forward's tensors, 1/{LOADING_SLACK_SHARE} of converted weights (up to "
            f"{MOST_LOADING_SLACK_BYTES // MIB} MiB), and what glibc's heap may keep: 1/128 of the weights, 2 to 64 MiB"
        )
        terms.append(Term("allocator_slack", slack, "modelled", formula))
    terms.append(Term("loading", loading, "modelled", "what loading needs beyond running: a tensor being converted"))
    return MemoryPlan(context_len, tuple(terms), chunk, moment.step)


def _weight_terms(run: Run) -> list[Term]:
    classes = run.weights.by_class
    linears = {linear.scheme.describe() for linear, _ in run.weights.kernels.values() if linear.scheme is not None}
    formulas = {
        "linears": f"values of q, k, v, o, gate_up, down: {', '.join(sorted(linears)) or run.compute.dtype}",
        "scales": "scales and zero points, as the kernel keeps them",
        "embedding": f"{run.config.vocab_size} x {run.config.hidden_size} as stored",
        "head": "shared with the embedding" if run.config.tie_word_embeddings else "lm_head's values",
        "norms_and_biases": "norms in float32, biases in the compute dtype",
    }
    return [
        Term(name, nbytes - run.not_here.get(name, 0), "modelled" if name in run.not_here else "exact", formulas[name])
        for name, nbytes in classes.items()
    ]


def _graph_term(run: Run, context_len: int) -> tuple[Term]:
    """`cuda_graphs`: the tensors of a captured forward stay, beside those of forwards that are not; so does cuBLAS's
    workspace on the stream of the capture."""
    chunks = run.chunk in LARGER_CHUNKS
    most = min(run.chunk, context_len) if chunks else 1  # of the two the larger: they share memory
    tensors = forward_peak(run.compute, most, context_len, kv_format=run.kv_format).bytes
    multiplies = chunks or any(kernel == "dense" for _, kernel in run.compute.kernels.values())
    formula = "tensors of the captured forward of a token" + (f", and of {run.chunk}" if chunks else "")
    nbytes = tensors + (CUBLAS_BYTES if multiplies else 0)
    return (Term("cuda_graphs", nbytes, "modelled", formula + (", and cuBLAS" if multiplies else "")),)


def _logits_formula(run: Run) -> str:
    if run.every_logits:
        return f"a block of up to {MAX_LOGITS_BYTES // MIB} MiB; 0 where another step is the fullest"
    return f"{run.logits_rows} positions; 0 where another step is the fullest"


def _every_logits_term(run: Run, context_len: int, nbytes: int) -> tuple[Term]:
    return (Term("every_logits", nbytes, "exact", f"{context_len} positions x {run.config.vocab_size} x 4 B"),)


def _attention_formula(tensors: Mapping[str, int], context_len: int) -> str:
    parts = [f"{name} {tensors[name] / MIB:.1f} MiB" for name in ATTENTION if name in tensors]
    return f"at {tokens_text(context_len)}: " + (", ".join(parts) or "another step is fuller")


def _slack(run: Run, context_len: int) -> int:
    """What the caching allocator reserves beyond the tensors' own bytes.

    Weights and cache are replayed; a cache tensor in a shared segment counts as if its segment were its own, so that
    the sum never shrinks as the context grows.
    """
    config = run.config
    rows = config.num_key_value_heads * rows_for(context_len) * run.compute.batch
    cache = 0
    for bits in (run.kv_format.key_bits, run.kv_format.value_bits):
        for width in tensor_widths(config.head_dim, bits, run.compute.dtype_bytes):
            tensor, count = rows * width, config.num_hidden_layers
            cache += reserved_for_equal(tensor, count) - count * tensor
    return (
        run.weights.reserved_bytes
        - run.weights.bytes
        + max(0, cache)
        + max(FRAGMENTATION_BYTES, run.overhead.slack_bytes)
    )


def largest_context(run: Run, available_bytes: int, limit: int) -> int:
    """The largest context up to `limit` whose plan fits; 0 if none does. The plan is monotone in the context."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if plan_run(run, middle).peak_bytes <= available_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def choose_plan(run: Run, available_bytes: int, wanted: int | None, limit: int) -> MemoryPlan | None:
    """What a run executes: the wanted context, or the largest that fits; None where nothing does.

    A smaller chunk costs speed, so it is taken only where the wanted context (or any at all) needs it.
    """
    for chunk in (run.chunk, *(size for size in SMALLER_CHUNKS if size < run.chunk)):
        candidate = dataclasses.replace(run, chunk=chunk)
        fitting = largest_context(candidate, available_bytes, wanted or limit)
        if fitting and (wanted is None or fitting == wanted):
            return _with_larger_chunk(candidate, plan_run(candidate, fitting), available_bytes)
    return None


def _with_larger_chunk(run: Run, plan: MemoryPlan, available_bytes: int) -> MemoryPlan:
    """On a GPU large chunks are faster: weights are unpacked once for each. Taken where the same context fits."""
    if run.compute.ops != "triton":
        return plan
    larger = (plan_run(dataclasses.replace(run, chunk=size), plan.context_len) for size in LARGER_CHUNKS)
    return next((found for found in larger if found.peak_bytes <= available_bytes), plan)
