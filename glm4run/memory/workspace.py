"""What one forward holds beside weights and cache: the model's own tensors, step by step, and the moment of the most.

`forward_peak` walks through a layer as `model.py`, `attention.py` and `rope.py` do, holding and dropping each tensor
when they do (a caller's variable keeps its tensor until it is assigned anew). It grows with every size, so that a
context that fits says that all shorter ones do. The tests compare it with a trace of the real forward. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from glm4run.config import ModelConfig
from glm4run.kv_format import CODES, CPU_COLUMNS, KVFormat, group_of
from glm4run.memory.kernels import Kernel, Linear, kernel_scratch_bytes
from glm4run.memory.sizes import MIB

MAX_SCORE_BYTES = 64 * MIB  # of attention.py
ATTENTION_LANES = 16  # of kernels/cpu/src/kernels.h
MAX_LOGITS_BYTES = 64 * MIB  # of one product with the head, where the logits of every position are asked for
DTYPE_BYTES: Mapping[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
# Of kernels/triton/attention.py: two programs on each of an H100's multiprocessors, rows and positions of one.
TRITON_PROGRAMS, TRITON_BLOCK, TRITON_POSITIONS = 2 * 132, 128, 32
LINEAR_KINDS = ("qkv", "o_proj", "gate_up_proj", "down_proj", "lm_head")


@dataclass(frozen=True)
class Compute:
    """How a forward computes: the model's shape, dtype (bf16, fp16, fp32), device (cpu, cuda) and its kernels."""

    config: ModelConfig
    dtype: str
    device: str
    kernels: Mapping[str, tuple[Linear, Kernel]]  # of each of LINEAR_KINDS; q stands for qkv
    embedding_bytes: int = 2  # of one element, as stored
    batch: int = 1
    ops: str = "torch"  # what computes between the linears: torch, native (on a CPU) or triton (on CUDA)

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def residual_bytes(self) -> int:
        """fp16 models keep the residual in float32."""
        return 4 if self.dtype == "fp16" else self.dtype_bytes

    @property
    def native_attention(self) -> bool:
        """Whether all attention of one sequence runs in the native library."""
        config = self.config
        return self.ops == "native" and attends_natively(config.num_attention_heads, config.num_key_value_heads)


@dataclass(frozen=True)
class Moment:
    """The tensors that are alive at one step, by name, in bytes."""

    step: str
    tensors: Mapping[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.tensors.values())


@dataclass
class _Ledger:
    """Tensors that come and go; remembers the moment of the most."""

    live: dict[str, int] = field(default_factory=dict)
    most: Moment = field(default_factory=lambda: Moment("start", {}))

    def hold(self, step: str, **tensors: int) -> None:
        self.live.update(tensors)
        if sum(self.live.values()) > self.most.bytes:
            self.most = Moment(step, {name: nbytes for name, nbytes in self.live.items() if nbytes})

    def drop(self, *names: str) -> None:
        for name in names:
            self.live.pop(name, None)

    def rename(self, old: str, new: str) -> None:
        self.live[new] = self.live.pop(old)


def attends_natively(heads: int, kv_heads: int) -> bool:
    """Whether many tokens attend in the native library where it is there: 16 query heads of a KV head run together,
    and with most of them missing torch's products are faster."""
    share = heads // kv_heads
    return 2 * share >= -(-share // ATTENTION_LANES) * ATTENTION_LANES


def logits_block_rows(vocab_size: int, dtype_bytes: int) -> int:
    """Positions whose logits are computed at once where those of every position are asked for."""
    return max(1, MAX_LOGITS_BYTES // (vocab_size * dtype_bytes))


def forward_peak(
    compute: Compute,
    tokens: int,
    context: int,
    *,
    logits_rows: int = 1,
    every_position: bool = False,
    kv_format: KVFormat = KVFormat(),  # noqa: B008 (frozen)
) -> Moment:
    """The fullest moment of a forward of `tokens` new tokens that end at position `context`.

    `logits_rows`: the positions whose logits are computed: 1, or k + 1 to verify k drafted tokens. `every_position`:
    those of all tokens instead, a block after the other into a result that is not counted here; nothing is sampled.
    """
    config, batch = compute.config, compute.batch
    tokens = tokens * batch  # rows of every matrix; the scores alone care that they are several sequences
    hidden = tokens * config.hidden_size
    ledger = _Ledger()
    rotary = 4 * (tokens // batch) * config.rotary_dim // 2
    ledger.hold("embedding", ids=8 * tokens, cos=rotary, sin=rotary, rows=hidden * compute.embedding_bytes)
    if compute.embedding_bytes != compute.residual_bytes:
        ledger.hold("embedding", residual=hidden * compute.residual_bytes)
        ledger.drop("rows")
    else:
        ledger.rename("rows", "residual")
    _attention_branch(ledger, compute, tokens, context, kv_format)
    _mlp_branch(ledger, compute, tokens)
    if every_position:
        _norm(ledger, "final norm", tokens, compute)
        ledger.drop("residual", "cos", "sin")
        rows = min(tokens, logits_block_rows(config.vocab_size, compute.dtype_bytes))
        _linear(ledger, compute, "lm_head", rows, "logits")
    else:
        _head(ledger, compute, tokens, logits_rows * batch)
    return ledger.most


def _norm(ledger: _Ledger, step: str, tokens: int, compute: Compute) -> None:
    """`layers.RMSNorm` and the cast behind it; leaves `normed`."""
    size = tokens * compute.config.hidden_size
    narrow = compute.residual_bytes != 4
    if compute.ops == "triton":
        ledger.hold(step, normed=size * compute.residual_bytes)
        _narrowed(ledger, step, size, compute)
        return
    if narrow:
        ledger.hold(step, wide=4 * size)
    ledger.hold(step, squares=4 * size)
    ledger.drop("squares")
    ledger.hold(step, scaled=4 * size)
    ledger.drop("wide")
    ledger.hold(step, weighted=4 * size)
    if narrow:
        ledger.hold(step, normed=size * compute.dtype_bytes)
        ledger.drop("scaled", "weighted")
        return
    ledger.drop("scaled")
    ledger.rename("weighted", "normed")
    _narrowed(ledger, step, size, compute)


def _narrowed(ledger: _Ledger, step: str, size: int, compute: Compute) -> None:
    """The cast behind a norm in float32, where the linears take fp16."""
    if compute.dtype == "fp16":
        ledger.hold(step, narrowed=size * 2)
        ledger.drop("normed")
        ledger.rename("narrowed", "normed")


def _linear(ledger: _Ledger, compute: Compute, kind: str, tokens: int, out: str, *, element: int = 0) -> None:
    """A product; leaves `out`. `element`: bytes of an output element where that is not the compute dtype's."""
    linear, kernel = compute.kernels[kind]
    element = element or compute.dtype_bytes
    scratch = kernel_scratch_bytes(linear, kernel, tokens, device=compute.device, dtype_bytes=element)
    if kernel == "dense" and element != compute.dtype_bytes:  # fp16 widens the last projections
        scratch = linear.out_features * linear.in_features * element
    ledger.hold(kind, **{out: tokens * linear.out_features * element, f"{kind} kernel": scratch})
    ledger.drop(f"{kind} kernel")


def _attention_branch(ledger: _Ledger, compute: Compute, tokens: int, context: int, kv_format: KVFormat) -> None:
    config, element = compute.config, compute.dtype_bytes
    query = tokens * config.num_attention_heads * config.head_dim
    kv = tokens * config.num_key_value_heads * config.head_dim
    _norm(ledger, "input_layernorm", tokens, compute)
    _linear(ledger, compute, "qkv", tokens, "q")
    if config.attention_bias and compute.ops != "triton":
        ledger.hold("qkv bias", **{"q with bias": query * element})
        ledger.drop("q")
        ledger.rename("q with bias", "q")
    ledger.hold("qkv", k=kv * element, v=kv * element)
    if compute.ops == "triton":
        _triton_attention(ledger, compute, tokens, context, query, kv_format)
    else:
        _rope(ledger, compute, tokens)
        _quantize(ledger, compute, tokens, kv_format)
        ledger.drop("k", "v")  # they are in the cache now
        _scores(ledger, compute, tokens, context, kv_format)
    if compute.dtype == "fp16":
        ledger.hold("attention", widened=4 * query)
        ledger.drop("attended")
        ledger.rename("widened", "attended")
    _linear(ledger, compute, "o_proj", tokens, "branch", element=compute.residual_bytes)
    ledger.drop("normed", "q turned", "attended")
    if config.has_sandwich_norms:
        _norm(ledger, "post_self_attn_layernorm", tokens, compute)
    ledger.hold("residual", **{"residual after attention": tokens * config.hidden_size * compute.residual_bytes})
    ledger.drop("normed")


def _rope(ledger: _Ledger, compute: Compute, tokens: int) -> None:
    """`rope.apply_rope` of q, which is the larger; leaves `q turned`."""
    config, element = compute.config, compute.dtype_bytes
    heads = tokens * config.num_attention_heads
    half = 4 * heads * config.rotary_dim // 2
    pairs = 2 * half if element != 4 else 0
    ledger.hold("rope", pairs=pairs, products=4 * half)
    ledger.drop("products")
    narrowed = heads * config.rotary_dim * element if element != 4 else 0
    turned = heads * config.head_dim * element
    ledger.hold("rope", **{"turned pairs": 2 * half, "narrowed pairs": narrowed, "q turned": turned})
    ledger.drop("pairs", "turned pairs", "narrowed pairs", "q")


def quantizing_bytes(config: ModelConfig, tokens: int, bits: int) -> int:
    """What `kv_rows.quantize_rows` of new keys, or values, takes beside them.

    The rows turned, in steps and rounded, each as floats; in 4 bits the error of every code for each group of 8, twice
    more while it is computed, beside the steps.
    """
    new = 4 * tokens * config.num_key_value_heads * config.head_dim
    if bits == 16:
        return 0
    return 4 * new if bits == 8 else new + 3 * new * len(CODES) // group_of(4, config.head_dim)


def _quantize(ledger: _Ledger, compute: Compute, tokens: int, kv_format: KVFormat) -> None:
    """New keys and values, one after the other."""
    if kv_format.is_quantized and compute.ops != "native":
        new = 4 * tokens * compute.config.num_key_value_heads * compute.config.head_dim
        unbiased = new if compute.config.attention_bias and kv_format.key_bits < 16 else 0
        rows = max(
            quantizing_bytes(compute.config, tokens, bits) for bits in (kv_format.key_bits, kv_format.value_bits)
        )
        ledger.hold("cache", **{"keys less their bias": unbiased, "rows in steps": rows})
        ledger.drop("keys less their bias", "rows in steps")


def _triton_attention(
    ledger: _Ledger, compute: Compute, tokens: int, context: int, query: int, kv_format: KVFormat
) -> None:
    """`rope_append` and `attend` of kernels/triton; leaves `attended`. Queries are turned where they lie, but those
    in float32 that meet quantized keys: they become float16."""
    config, element = compute.config, compute.dtype_bytes
    if kv_format.key_bits < 16:
        narrowed = 2 * query if element == 4 else 0
        ledger.hold("rope", **{"q turned": narrowed, "q scales": 4 * tokens * config.num_attention_heads})
    ledger.drop("k", "v")  # they are in the cache now
    ledger.hold("attention", attended=query * element)
    ledger.hold("attention", **{"split contexts": split_bytes(config, tokens, context)})
    ledger.drop("split contexts", "q", "q scales")


def split_bytes(config: ModelConfig, tokens: int, context: int) -> int:
    """What a few tokens' parts of the context are added up from, in `kernels/triton/attention.py`: sums, two float32 a
    row beside them. Of the largest device that it is likely to meet; at most 18 MB for GLM-4-9B."""
    repeat = config.num_attention_heads // config.num_key_value_heads
    block = min(max(16, 1 << (tokens * repeat - 1).bit_length()), TRITON_BLOCK)
    programs = config.num_key_value_heads * -(-tokens * repeat // block)
    splits = min(max(1, TRITON_PROGRAMS // programs), -(-context // TRITON_POSITIONS))
    return 4 * splits * tokens * config.num_attention_heads * (config.head_dim + 2) if splits > 1 else 4


def widened_bytes(compute: Compute, context: int, bits: int) -> tuple[int, int]:
    """Bytes of keys, or values, as `attention` reads them in float32, and of what making them takes beside."""
    config = compute.config
    rows = config.num_key_value_heads * context * compute.batch
    values = rows * config.head_dim
    if bits == 16:
        return (0 if compute.dtype_bytes == 4 else 4 * values), 0
    scales = 4 * rows * (config.head_dim // group_of(bits, config.head_dim))
    another_order = bits == 8 and compute.device == "cpu" and config.head_dim % CPU_COLUMNS == 0
    return 4 * values, (values if bits == 4 or another_order else 0) + scales


def _scores(ledger: _Ledger, compute: Compute, tokens: int, context: int, kv_format: KVFormat) -> None:
    """`attention.grouped_query_attention`; leaves `attended`. Scores grow with the context up to their bound."""
    config, element = compute.config, compute.dtype_bytes
    if compute.native_attention and compute.batch == 1:
        ledger.hold("attention", attended=tokens * config.num_attention_heads * config.head_dim * element)
        return
    per_sequence = tokens // compute.batch
    row = 4 * config.num_attention_heads * context * compute.batch
    scores = max(row, min(max(MAX_SCORE_BYTES, row), row * per_sequence))
    rows = min(per_sequence, max(1, MAX_SCORE_BYTES // (4 * config.num_attention_heads * context)))
    query = 4 * tokens * config.num_attention_heads * config.head_dim
    one_block = rows == per_sequence
    if element != 4:
        ledger.hold("attention", **{"q in float32": query})
    ledger.hold("attention", **{"scaled q": query})
    ledger.drop("q in float32")
    keys, beside_keys = widened_bytes(compute, context, kv_format.key_bits)
    values, beside_values = widened_bytes(compute, context, kv_format.value_bits)
    if kv_format.key_bits < 16 or (kv_format.is_quantized and element != 4):
        ledger.hold("attention", **{"q for quantized keys": query})
    ledger.hold("attention", **{"keys in float32": keys, "steps": beside_keys})
    ledger.hold("attention", **{"values in float32": values, "steps": beside_values})
    ledger.drop("steps")
    # Past the bound a block of q is copied. It shrinks as the context grows, so that the largest counts: that of a
    # context no longer than the chunk, which every prompt passes through.
    first_rows = min(per_sequence, MAX_SCORE_BYTES // (4 * config.num_attention_heads * per_sequence) or 1)
    copied = 0 if one_block else query // per_sequence * first_rows
    block = query if one_block else query // per_sequence * rows
    ledger.hold("attention", **{"earlier blocks": query - block, "block's q": copied})
    ledger.hold("attention", mask=per_sequence * per_sequence, **{"attention scores": scores})
    ledger.hold("attention", **{"attention weights": scores})
    ledger.hold("attention", **{"block's result": block})
    ledger.drop("block's q", "attention scores", "attention weights", "mask")
    ledger.rename("block's result", "blocks")
    ledger.live["blocks"] = query
    ledger.drop("earlier blocks")
    if not one_block:
        ledger.hold("attention", **{"blocks joined": query})
    ledger.hold("attention", **{"blocks by token": query})
    if element != 4:
        ledger.hold("attention", attended=tokens * config.num_attention_heads * config.head_dim * element)
        ledger.drop("blocks by token")
    else:
        ledger.rename("blocks by token", "attended")
    ledger.drop("scaled q", "q for quantized keys", "keys in float32", "values in float32", "blocks", "blocks joined")
    if kv_format.value_bits < 16:
        ledger.hold("attention", **{"results turned": 3 * query})
        ledger.drop("results turned")


def _mlp_branch(ledger: _Ledger, compute: Compute, tokens: int) -> None:
    config, element = compute.config, compute.residual_bytes
    width = tokens * config.intermediate_size
    _norm(ledger, "post_attention_layernorm", tokens, compute)
    _linear(ledger, compute, "gate_up_proj", tokens, "gate and up")
    if compute.dtype == "fp16":
        ledger.hold("swiglu", widened=2 * width * element)
        ledger.drop("gate and up")
        ledger.rename("widened", "gate and up")
    ledger.hold("swiglu", silu=width * element if compute.ops != "triton" else 0)
    ledger.hold("swiglu", product=width * element)
    ledger.drop("silu", "gate and up")
    _linear(ledger, compute, "down_proj", tokens, "mlp branch", element=element)
    ledger.drop("product", "normed", "branch")
    if config.has_sandwich_norms:
        _norm(ledger, "post_mlp_layernorm", tokens, compute)
    ledger.hold("residual", **{"next residual": tokens * config.hidden_size * element})
    ledger.drop("residual", "residual after attention", "mlp branch", "normed")
    ledger.rename("next residual", "residual")


def _head(ledger: _Ledger, compute: Compute, tokens: int, rows: int) -> None:
    """The last norm, the logits of `rows` positions, and what sampling makes of one row."""
    _norm(ledger, "final norm", tokens, compute)
    ledger.drop("residual", "cos", "sin")
    _linear(ledger, compute, "lm_head", rows, "logits")
    if compute.dtype_bytes != 4:
        ledger.hold("logits", **{"logits in float32": 4 * rows * compute.config.vocab_size})
        ledger.drop("logits")
        ledger.rename("logits in float32", "logits")
    # One row at a time: masked, scaled, softmax, at most all sorted (int64 ids), cumulated, masked: sampling.Sampler.
    ledger.hold("sampling", sampling=40 * compute.config.vocab_size)
