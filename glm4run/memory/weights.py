"""What the weights take, by class: from a folder's headers, or from a member's shape and a recipe. No torch.

The loader plans by this and then loads; the tests compare it, to the byte, with the tensors that are really there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from glm4run.checkpoint.layouts import linear_shapes, parameter_shapes, stored_tensor_shapes
from glm4run.checkpoint.safetensors_index import DTYPE_BYTES as STORED_BYTES
from glm4run.config import ModelConfig
from glm4run.memory.allocator import reserved_for
from glm4run.memory.kernels import Kernel, Linear, choose_kernel, kept_bytes, scale_bytes
from glm4run.memory.workspace import DTYPE_BYTES, Compute
from glm4run.qformat import SHAPE
from glm4run.quant_config import QuantScheme

CLASSES = ("linears", "scales", "embedding", "head", "norms_and_biases")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
Stored = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor name to safetensors dtype and shape


@dataclass(frozen=True)
class Kept:
    """One tensor (or packed linear) in memory, in the order of loading."""

    name: str
    bytes: int
    scale_bytes: int  # the part that is scales and zero points
    read_bytes: int  # what lies beside it while it is converted: the stored form; 0 where that is what is kept


@dataclass(frozen=True)
class Weights:
    """Every weight of a model as it is kept. `kernels` is the linear and kernel of each kind (q stands for qkv)."""

    kept: tuple[Kept, ...]
    kernels: Mapping[str, tuple[Linear, Kernel]]
    embedding_element_bytes: int

    @cached_property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.kept)

    @cached_property
    def reserved_bytes(self) -> int:
        """What PyTorch's CUDA allocator takes for them."""
        return reserved_for(item.bytes for item in self.kept)

    @cached_property
    def by_class(self) -> Mapping[str, int]:
        """Bytes of each of CLASSES; a head's own scales count as scales."""
        sums = dict.fromkeys(CLASSES, 0)
        for item in self.kept:
            sums[_class_of(item.name)] += item.bytes - item.scale_bytes
            sums["scales"] += item.scale_bytes
        return sums

    @cached_property
    def converted_bytes(self) -> int:
        """Of the weights that are not kept as they are read."""
        return sum(item.bytes for item in self.kept if item.read_bytes)

    @cached_property
    def loading_peak_bytes(self) -> int:
        """The most while loading: what is loaded so far, and the stored form of the tensor that is being converted."""
        loaded = most = 0
        for item in self.kept:
            loaded += item.bytes
            most = max(most, loaded + item.read_bytes)
        return most

    def compute(self, config: ModelConfig, *, dtype: str, device: str, batch: int = 1, ops: str = "torch") -> Compute:
        """How a forward with these weights computes; `ops` as in `Compute`."""
        return Compute(config, dtype, device, self.kernels, self.embedding_element_bytes, batch, ops)


def _class_of(name: str) -> str:
    if name == EMBEDDING:
        return "embedding"
    if name.endswith(("norm", ".bias")):
        return "norms_and_biases"
    return "head" if name == HEAD else "linears"


def stored_tensors(config: ModelConfig, schemes: Mapping[str, QuantScheme], dtype: str = "BF16") -> Stored:
    """What a folder of this model would hold if it were packed by `schemes`; empty schemes: a dense folder."""
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in parameter_shapes(config).items():
        module = name.removesuffix(".weight")
        if module in schemes and name.endswith(".weight"):
            for suffix, (part, dtypes) in stored_tensor_shapes(shape[0], shape[1], schemes[module]).items():
                known = tuple(max(0, size) for size in part)  # a length that only the file knows is of a few bytes
                stored[f"{module}.{suffix}"] = (dtypes[0] if len(dtypes) == 1 else dtype, known)
        else:
            stored[name] = (dtype, shape)
    return stored


def plan_weights(
    config: ModelConfig,
    stored: Stored,
    schemes: Mapping[str, QuantScheme],
    *,
    backend: str,
    dtype: str,
    device: str,
) -> Weights:
    """What the loader keeps of `stored`: packed linears as `backend` arranges them, the rest in its kept dtype.

    Args:
        dtype: what the model computes in: bf16, fp16 or fp32. device: cpu or cuda.
    """
    shapes = linear_shapes(config)
    linears = {module: Linear(*shapes[module], schemes.get(module)) for module in shapes}
    kernels = {
        module: choose_kernel(linear, backend=backend, device=device, dtype=fed_dtype(module, dtype))
        for module, linear in linears.items()
    }
    kept = []
    parts_of = _parts(stored, schemes)
    for module in (module for module in shapes if module in schemes):
        linear, kernel = linears[module], kernels[module]
        parts = sum(_nbytes(stored[name]) for name in parts_of[module] if not name.endswith(f".{SHAPE}"))
        nbytes = kept_bytes(linear, kernel, DTYPE_BYTES[fed_dtype(module, dtype)], parts)
        # The native library reads the file itself, piece by piece; other libraries' weights are always converted.
        beside = parts if kernel == "int4" or schemes[module].kind != "int" else 0
        kept.append(Kept(module, nbytes, scale_bytes(linear, kernel, nbytes), beside))
    packed = {name for names in parts_of.values() for name in names}
    for name, (stored_dtype, shape) in stored.items():
        module, _, suffix = name.rpartition(".")
        if name not in packed:
            element = kept_element_bytes(module, STORED_BYTES[stored_dtype], dtype)
            nbytes = prod(shape) * element
            beside = 0 if element == STORED_BYTES[stored_dtype] else _nbytes((stored_dtype, shape))
            kept.append(Kept(name if suffix == "bias" else module, nbytes, 0, beside))
    embedding_element = STORED_BYTES[stored[f"{EMBEDDING}.weight"][0]]
    if config.tie_word_embeddings and embedding_element != DTYPE_BYTES[dtype]:
        kept.append(Kept(HEAD, config.vocab_size * config.hidden_size * DTYPE_BYTES[dtype], 0, 0))
    return Weights(tuple(kept), _kinds(config, linears, kernels), embedding_element)


def _parts(stored: Stored, schemes: Mapping[str, QuantScheme]) -> dict[str, list[str]]:
    """The stored tensors of each module that is kept quantized, without its bias."""
    parts: dict[str, list[str]] = {module: [] for module in schemes}
    for name in stored:
        module = name.partition(".weight")[0].removesuffix(".SCB")
        if module in parts and not name.endswith(".bias"):
            parts[module].append(name)
    return parts


def fed_dtype(module: str, dtype: str) -> str:
    """What a linear is fed: in fp16 the last projection of each branch gets float32, as it joins the residual."""
    return "fp32" if dtype == "fp16" and module.endswith(("o_proj", "down_proj")) else dtype


def kept_element_bytes(module: str, stored_bytes: int, dtype: str) -> int:
    """The embedding stays as stored; norms are float32, in which they are computed; all else is in `dtype`."""
    if module == EMBEDDING:
        return stored_bytes
    return 4 if module.endswith("norm") else DTYPE_BYTES[dtype]


def _kinds(
    config: ModelConfig, linears: Mapping[str, Linear], kernels: Mapping[str, Kernel]
) -> dict[str, tuple[Linear, Kernel]]:
    """The linears of the first layer stand for all; a tied head is dense."""
    layer = "model.layers.0."
    names = {
        "qkv": layer + "self_attn.q_proj",
        "o_proj": layer + "self_attn.o_proj",
        "gate_up_proj": layer + "mlp.gate_up_proj",
        "down_proj": layer + "mlp.down_proj",
        "lm_head": HEAD,
    }
    dense = (Linear(config.vocab_size, config.hidden_size, None), "dense")
    found: dict[str, tuple[Linear, Kernel]] = {}
    for kind, name in names.items():
        found[kind] = (linears[name], kernels[name]) if name in linears else (dense[0], "dense")
    return found


def _nbytes(tensor: tuple[str, tuple[int, ...]]) -> int:
    return prod(tensor[1]) * STORED_BYTES[tensor[0]]
