"""The published remote code of GLM-4-9B under transformers, replayed: what its tensors make PyTorch reserve.

Theirs, not ours: one prefill of the whole prompt, keys and values joined by `torch.cat` after every layer and expanded
to all query heads, and a cache that is joined anew for each token. The order of tensors is `modeling_chatglm.py`'s
(GLM-4-9B-Chat, mid 2024, SDPA); the lifetimes are Python's. A warm-up leaves nothing: the cache is emptied after it. A
golden test compares with the published peaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from glm4run.config import ModelConfig
from glm4run.memory.allocator import CachingAllocator
from glm4run.memory.sizes import MIB

CONTEXT_BYTES = 450 * MIB  # CUDA context and cuBLAS, as everywhere here; assumed for the A100 runs
DECODED_STEPS = 2  # the later ones repeat the sizes, one token longer
BF16, FP32 = 2, 4


class _Heap:
    """Named tensors over the allocator."""

    def __init__(self) -> None:
        self.allocator = CachingAllocator()
        self.count = 0

    def new(self, nbytes: int) -> int:
        self.count += 1
        self.allocator.allocate(self.count, nbytes)
        return self.count

    def free(self, *keys: int) -> None:
        for key in keys:
            self.allocator.free(key)

    @contextmanager
    def temporary(self, *sizes: int) -> Iterator[None]:
        keys = [self.new(size) for size in sizes]
        yield
        self.free(*keys)


def replay_peak_bytes(config: ModelConfig, tokens: int, *, bits: int = 16) -> int:
    """What nvidia-smi would show at the peak of a prompt of `tokens` tokens; `bits` 4 is bitsandbytes."""
    heap = _Heap()
    for nbytes in _weights(config, bits):
        heap.new(nbytes)
    model = _RemoteModel(config, heap, bits)
    cache = model.prefill(tokens)
    for step in range(1, DECODED_STEPS + 1):
        cache = model.decode(tokens + step, cache)
    return heap.allocator.peak_reserved + CONTEXT_BYTES


def _weights(config: ModelConfig, bits: int) -> Iterator[int]:
    h, f, table = config.hidden_size, config.intermediate_size, config.vocab_size * config.hidden_size
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    yield table * BF16
    for _ in range(config.num_hidden_layers):
        yield from (h * BF16, h * BF16, qkv * BF16)
        for values in (h * qkv, h * h, 2 * f * h, f * h):
            if bits == 16:
                yield values * BF16
            else:  # 4-bit values and a float32 maximum per 64
                yield from (values // 2, values // 64 * FP32)
    yield h * BF16
    yield table * BF16


class _RemoteModel:
    def __init__(self, config: ModelConfig, heap: _Heap, bits: int) -> None:
        self.config, self.heap, self.bits = config, heap, bits
        self.qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        self.query = config.num_attention_heads * config.head_dim
        self.kv = config.num_key_value_heads * config.head_dim

    def prefill(self, tokens: int) -> list[int]:
        """Feeds the prompt; returns the cache's tensors."""
        heap, h = self.heap, self.config.hidden_size
        ids = heap.new(8 * tokens)
        embeddings = heap.new(tokens * h * BF16)
        rope = self._rope_cache(tokens)
        hidden, previous, presents = embeddings, 0, 0
        for layer in range(self.config.num_hidden_layers):
            out, cache = self._layer(tokens, tokens, first=True)
            # What the layer before returned is dropped now, when its names are bound anew.
            heap.free(*({hidden, previous} - {embeddings, presents}))
            hidden, previous = out, cache
            if layer == 0:
                presents = cache
                continue
            joined = heap.new((layer + 1) * tokens * 2 * self.kv * BF16)
            heap.free(presents)
            presents = joined
        normed = self._norm(tokens)
        heap.free(hidden, previous)
        with heap.temporary(self.config.vocab_size * BF16, self.config.vocab_size * FP32):
            pass
        heap.free(normed, rope, embeddings, ids)
        return [presents]

    def decode(self, tokens: int, cache: list[int]) -> list[int]:
        """One token: every layer joins its keys and values anew while the old ones are still referenced."""
        heap, h = self.heap, self.config.hidden_size
        rope = self._rope_cache(1)
        hidden = heap.new(h * BF16)
        made: list[int] = []
        for _ in range(self.config.num_hidden_layers):
            made += [heap.new(tokens * self.kv * BF16), heap.new(tokens * self.kv * BF16)]
            out, _ = self._layer(1, tokens, first=False)
            heap.free(hidden)
            hidden = out
        with heap.temporary(self.config.vocab_size * BF16, self.config.vocab_size * FP32):
            heap.free(hidden, rope)
        heap.free(*cache)
        return made

    def _rope_cache(self, tokens: int) -> int:
        """Cosines and sines of the model's whole context, in float32, then bf16; those of the positions are kept."""
        angles = self.config.max_position_embeddings * self.config.rotary_dim // 2
        with self.heap.temporary(angles * FP32, angles * FP32, angles * FP32):
            stacked = self.heap.new(2 * angles * FP32)
        whole = self.heap.new(2 * angles * BF16)
        self.heap.free(stacked)
        chosen = self.heap.new(tokens * self.config.rotary_dim * BF16)
        self.heap.free(whole)
        return chosen

    def _norm(self, tokens: int) -> int:
        size = tokens * self.config.hidden_size
        with self.heap.temporary(size * FP32, size * FP32):
            pass
        scaled = self.heap.new(size * FP32)
        with self.heap.temporary(size * FP32):
            out = self.heap.new(size * BF16)
        self.heap.free(scaled)
        return out

    def _linear(self, tokens: int, out_features: int, in_features: int) -> int:
        """bitsandbytes makes the dense weight of a product of more than one row, here in fp16 and then in bf16.

        The second copy is an assumption (weights quantized from half); with it the published int4 peaks are met.
        """
        if self.bits == 16 or tokens == 1:
            return self.heap.new(tokens * out_features * BF16)
        half = self.heap.new(out_features * in_features * BF16)
        dense = self.heap.new(out_features * in_features * BF16)
        self.heap.free(half)
        out = self.heap.new(tokens * out_features * BF16)
        self.heap.free(dense)
        return out

    def _rotate(self, tokens: int, width: int) -> int:
        """Half of each head is turned and joined with the other half."""
        half = tokens * width // 4 * BF16
        first = self.heap.new(half)
        with self.heap.temporary(half, half):  # two products
            second = self.heap.new(half)
        stacked = self.heap.new(2 * half)
        self.heap.free(first, second)
        out = self.heap.new(tokens * width * BF16)
        self.heap.free(stacked)
        return out

    def _layer(self, tokens: int, context: int, *, first: bool) -> tuple[int, int]:
        """One block on `tokens` rows that attend to `context`; returns the next hidden states and the cache, if new."""
        heap, h, f = self.heap, self.config.hidden_size, self.config.intermediate_size
        normed = self._norm(tokens)
        mixed = self._linear(tokens, self.qkv, h)
        query = self._rotate(tokens, self.query)
        key = self._rotate(tokens, self.kv)
        cache = heap.new(context * 2 * self.kv * BF16) if first else 0
        keys = heap.new(context * self.query * BF16)  # expanded to all query heads
        heap.free(key)
        values = heap.new(context * self.query * BF16)
        attended = heap.new(tokens * self.query * BF16)
        with heap.temporary(tokens * self.config.num_attention_heads * FP32):
            pass
        attention = self._linear(tokens, h, self.query)
        heap.free(mixed, query, keys, values, attended)
        after = heap.new(tokens * h * BF16)
        normed_again = self._norm(tokens)
        heap.free(normed)
        up = self._linear(tokens, 2 * f, h)
        silu = heap.new(tokens * f * BF16)
        product = heap.new(tokens * f * BF16)
        heap.free(silu, up)
        down = self._linear(tokens, h, f)
        heap.free(product)
        out = heap.new(tokens * h * BF16)
        heap.free(attention, after, normed_again, down)
        return out, cache
