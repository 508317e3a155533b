"""What other runtimes need for the same model: closed forms of their buffers, and the replay of the remote code.

Clearly theirs: nothing here plans a run of glm4run. Sources stand beside each form; published logs are golden tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from glm4run.config import ModelConfig
from glm4run.errors import UsageError
from glm4run.memory import MIB
from glm4run.vram.hf_remote import replay_peak_bytes

RUNTIMES = ("glm4run", "hf-remote", "hf", "llama.cpp", "vllm")
CONTEXT_BYTES = 450 * MIB  # CUDA context and cuBLAS. Source: ggml-org/llama.cpp pull request 15860
MICRO_BATCH = 512  # llama.cpp's default --ubatch-size
VLLM_UTILIZATION = 0.9  # vLLM's default --gpu-memory-utilization
VLLM_NON_TORCH_BYTES = 399 * MIB  # Source: vllm-project/vllm issue 11251
VLLM_BATCHED_TOKENS = 2048  # its profile run's tokens, with chunked prefill
# Bits a weight of ggml's types, scales included. Source: ggml's block layouts.
GGML_BITS: Mapping[str, float] = {
    "F16": 16,
    "Q8_0": 8.5,
    "Q6_K": 6.5625,
    "Q5_1": 6,
    "Q5_K": 5.5,
    "Q5_0": 5.5,
    "Q4_K": 4.5,
    "Q4_0": 4.5,
}
GGML_KV_BYTES: Mapping[int, float] = {16: 2, 8: 34 / 32, 4: 18 / 32}  # f16, q8_0, q4_0
# Model-file types by bits; ffn_down's 13696 columns are no multiple of 256, so that its K types fall back.
FILE_TYPES: Mapping[int, str] = {16: "F16", 8: "Q8_0", 4: "Q4_K_M"}


@dataclass(frozen=True)
class Theirs:
    """Another runtime's need at one context: parts by name, in bytes."""

    runtime: str
    context_len: int
    bits: int
    parts: Mapping[str, int]
    note: str

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())


def estimate(
    runtime: str,
    config: ModelConfig,
    context_len: int,
    *,
    bits: int,
    kv_bits: int = 16,
    device_bytes: int | None = None,
) -> Theirs:
    """What `runtime` would take. `device_bytes` is the whole device's memory, of which vLLM takes its share."""
    if runtime not in RUNTIMES[1:]:
        raise UsageError(f"no runtime {runtime!r}", hint=f"one of: {', '.join(RUNTIMES)}")
    if bits not in (16, 8, 4):
        raise UsageError(f"{runtime} is not modelled at {bits} bits", hint="16, 8 or 4")
    if runtime == "hf-remote":
        return _hf_remote(config, context_len, bits)
    if runtime == "hf":
        return _hf(config, context_len, bits)
    if runtime == "llama.cpp":
        return _llama_cpp(config, context_len, bits, kv_bits)
    return _vllm(config, context_len, bits, kv_bits, device_bytes)


# --- Hugging Face


def _hf_remote(config: ModelConfig, context_len: int, bits: int) -> Theirs:
    if bits == 8:
        raise UsageError("hf-remote is modelled in bf16 and with bitsandbytes' 4 bits", hint="use --bits 16,4")
    peak = replay_peak_bytes(config, context_len, bits=bits)
    note = "replayed tensors of the published remote code; whole prompt at once, cache joined by torch.cat"
    return Theirs("hf-remote", context_len, bits, {"replayed peak": peak}, note)


def hf_bytes_per_token(config: ModelConfig) -> int:
    """What a token of a prompt adds with a fused attention: its cache, and 3 ffn and 4 hidden activations.

    Source: fits the published slope of Qwen2.5-7B with flash attention to 0.4 % (docs/vram.md).
    """
    return kv_bytes(config, 1, 2.0) + 2 * (3 * config.intermediate_size + 4 * config.hidden_size)


def _hf(config: ModelConfig, context_len: int, bits: int) -> Theirs:
    """transformers' own Glm classes: the whole prompt at once, logits of the last token only."""
    parts = {
        "weights": _common_weights(config, bits),
        "cache": kv_bytes(config, context_len, 2.0),
        "activations": context_len * (hf_bytes_per_token(config) - kv_bytes(config, 1, 2.0)),
        "logits": 6 * config.vocab_size,
        "context": CONTEXT_BYTES,
    }
    return Theirs("hf", context_len, bits, parts, "closed form: the whole prompt at once, a fused attention")


def _common_weights(config: ModelConfig, bits: int) -> int:
    """bf16, LLM.int8, or bitsandbytes' 4 bits; head and embedding in bf16."""
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    linears = config.num_parameters - tables
    per_weight = {16: 2.0, 8: 1.0, 4: 0.5 + 4 / 64}[bits]
    return int(linears * per_weight) + 2 * tables


def kv_bytes(config: ModelConfig, context_len: int, element_bytes: float) -> int:
    """Keys and values of a context."""
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * context_len
    return int(elements * element_bytes)


# --- llama.cpp


def llama_cpp_layer_bytes(config: ModelConfig, file_type: str, layer: int) -> int:
    """One block: fused qkv, output, fused gate and up, down; norms and biases in F32.

    Source: llama.cpp's llama_tensor_get_type, for a chatglm file.
    """
    h, f = config.hidden_size, config.intermediate_size
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    query = config.num_attention_heads * config.head_dim
    kinds = _block_types(config, file_type, layer)
    bits = (
        h * qkv * GGML_BITS[kinds["qkv"]]
        + h * query * GGML_BITS[kinds["output"]]
        + 2 * f * h * GGML_BITS[kinds["up"]]
        + f * h * GGML_BITS[kinds["down"]]
    )
    return int(bits) // 8 + 4 * (2 * h + (qkv if config.attention_bias else 0))


def _block_types(config: ModelConfig, file_type: str, layer: int) -> dict[str, str]:
    if file_type == "Q4_K_M":
        return {"qkv": "Q5_K", "output": "Q4_K", "up": "Q4_K", "down": _q4_k_m_down(config, layer)}
    if file_type == "Q5_K_S":
        down = "Q5_K" if config.intermediate_size % 256 == 0 else "Q5_1"
        return {"qkv": "Q5_K", "output": "Q5_K", "up": "Q5_K", "down": down}
    return dict.fromkeys(("qkv", "output", "up", "down"), file_type)


def _q4_k_m_down(config: ModelConfig, layer: int) -> str:
    """Half of the layers get more bits; where 256 does not divide the columns both types fall back."""
    eighth = config.num_hidden_layers // 8
    more = layer < eighth or layer >= 7 * config.num_hidden_layers // 8 or (layer - eighth) % 3 == 2
    if config.intermediate_size % 256 == 0:
        return "Q6_K" if more else "Q4_K"
    return "Q8_0" if more else "Q5_0"


def llama_cpp_table_bytes(config: ModelConfig, file_type: str, *, head: bool) -> int:
    """The head (Q6_K in every K type) or the embedding, which stays on the CPU."""
    kind = {"Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K"}.get(file_type, file_type)
    if head and file_type.startswith(("Q4_K", "Q5_K")):
        kind = "Q6_K"
    return int(config.vocab_size * config.hidden_size * GGML_BITS[kind]) // 8


def llama_cpp_gpu_bytes(config: ModelConfig, file_type: str, layers: int | None = None) -> int:
    """The GPU's model buffer with `layers` blocks offloaded; all of them and the head where it is None."""
    count = config.num_hidden_layers if layers is None else layers
    first = config.num_hidden_layers - count  # the last ones go to the GPU
    blocks = sum(llama_cpp_layer_bytes(config, file_type, i) for i in range(first, config.num_hidden_layers))
    if layers is not None:
        return blocks
    return blocks + llama_cpp_table_bytes(config, file_type, head=True) + 4 * config.hidden_size


def llama_cpp_compute_bytes(config: ModelConfig, *, head_on_host: str | None = None) -> int:
    """Logits and hidden states of a micro-batch; a head that stays on the host is copied over for each one."""
    logits = MICRO_BATCH * config.vocab_size * 4
    hidden = MICRO_BATCH * config.hidden_size * 4
    copy = 0 if head_on_host is None else llama_cpp_table_bytes(config, head_on_host, head=True)
    return max(logits + hidden, MICRO_BATCH * 3 * config.intermediate_size * 4) + copy


def _llama_cpp(config: ModelConfig, context_len: int, bits: int, kv_bits: int) -> Theirs:
    file_type = FILE_TYPES[bits]
    parts = {
        "model buffer": llama_cpp_gpu_bytes(config, file_type),
        "KV": kv_bytes(config, context_len, GGML_KV_BYTES[kv_bits]),
        "compute buffer": llama_cpp_compute_bytes(config),
        "context": CONTEXT_BYTES,
    }
    return Theirs("llama.cpp", context_len, bits, parts, f"{file_type}, all layers on the GPU, flash attention")


# --- vLLM


def vllm_kv_tokens(config: ModelConfig, bits: int, kv_bits: int, device_bytes: int) -> int:
    """How many tokens its cache holds: what its share of the device leaves behind weights and the profile run."""
    activations = VLLM_BATCHED_TOKENS * (2 * 3 * config.intermediate_size + 2 * 4 * config.hidden_size)
    left = VLLM_UTILIZATION * device_bytes - _common_weights(config, bits) - VLLM_NON_TORCH_BYTES - activations
    return max(0, int(left // kv_bytes(config, 1, kv_bits / 8)))


def _vllm(config: ModelConfig, context_len: int, bits: int, kv_bits: int, device_bytes: int | None) -> Theirs:
    if device_bytes is None:
        raise UsageError("vLLM takes a share of the whole device", hint="name one with --gpu")
    held = vllm_kv_tokens(config, bits, kv_bits, device_bytes)
    verdict = "holds" if held >= context_len else "is too small for"
    note = f"takes {VLLM_UTILIZATION:.0%} of the device whatever it needs; its cache of {held} tokens {verdict} this"
    return Theirs("vllm", context_len, bits, {"share of the device": int(VLLM_UTILIZATION * device_bytes)}, note)
