"""The storages of a real forward as they come and go, on the meta device: sizes and lifetimes without memory."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glm4run.config import ModelConfig
from glm4run.kernels import LinearSpec
from glm4run.kernels.torch_ops import TorchBackend
from glm4run.kv_cache import KVCache
from glm4run.kv_format import parse_kv_bits
from glm4run.layers import QuantizedLinear
from glm4run.loading import input_dtype
from glm4run.memory import Stored, stored_tensors
from glm4run.model import Glm4Model
from glm4run.qformat import SHAPE
from glm4run.quant_config import QuantScheme
from glm4run.tensor_loading import TensorLoader

META = torch.device("meta")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STORED = {"BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32, "I64": torch.int64}


class MemoryTrace(TorchDispatchMode):
    """Logs (key, bytes) for every storage that an operation makes, (key, -bytes) when it goes.

    Use under `torch.no_grad`: inference mode hands composite operations over whole, with their temporaries unseen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[tuple[int, int]] = []
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._is_new(tensor.untyped_storage())  # weights and cache: there before the forward
        if func is torch.ops.aten._weight_int4pack_mm.default:
            # Its meta kernel asks for a device that only fake tensors carry. It makes its output and nothing else.
            out = torch.empty(args[0].shape[0], 8 * args[1].shape[0], dtype=args[0].dtype, device=META)
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self._is_new(tensor.untyped_storage()):
                self._made(tensor.untyped_storage())
        return out

    def _is_new(self, storage: Any) -> bool:
        known = self._known.get(id(storage))
        if known is not None and known() is storage:
            return False
        self._known[id(storage)] = weakref.ref(storage)
        return True

    def _made(self, storage: Any) -> None:
        key, nbytes = len(self.events), storage.nbytes()
        self.events.append((key, nbytes))
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, nbytes)

    def _gone(self, key: int, nbytes: int) -> None:
        self.events.append((key, -nbytes))
        self.live -= nbytes


@dataclasses.dataclass(frozen=True)
class _Entry:
    dtype: str


@dataclasses.dataclass(frozen=True)
class _Source:
    nbytes: int
    shape: tuple[int, ...]
    entry: _Entry


class _MetaReader:
    """Gives meta tensors of the stored shapes to the real loader."""

    def __init__(self, config: ModelConfig, stored: Stored) -> None:
        self.stored, self.config = stored, config
        self.sources = {name: _Source(0, shape, _Entry(dtype)) for name, (dtype, shape) in stored.items()}

    def read(self, name: str) -> Tensor:
        dtype, shape = self.stored[name]
        if name.endswith(SHAPE):
            from glm4run.checkpoint.layouts import linear_shapes

            return torch.tensor(linear_shapes(self.config)[name.rpartition(".")[0]])
        return torch.empty(shape, dtype=STORED[dtype], device=META)


class _MetaLoader(TensorLoader):
    def check_finite(self, name: str, tensor: Tensor) -> Tensor:
        return tensor


def meta_model(config: ModelConfig, schemes: Mapping[str, QuantScheme], dtype: str) -> Glm4Model:
    """The model as the loader arranges it for a GPU by torch's kernels, without memory.

    The caller patches `torch.cuda.get_device_capability`, which the choice of kernels asks.
    """
    from glm4run.checkpoint.layouts import linear_shapes

    shapes = linear_shapes(config)
    stored = stored_tensors(config, schemes)
    specs = {
        module: LinearSpec(*shapes[module], scheme, torch.device("cuda"), input_dtype(module, DTYPES[dtype]))
        for module, scheme in schemes.items()
    }
    with META:
        model = Glm4Model(config, dtype=DTYPES[dtype])
    reader: Any = _MetaReader(config, stored)
    loader = _MetaLoader(reader, model, META, DTYPES[dtype], TorchBackend(), None)
    for module, spec in specs.items():
        loader._put_packed(module, spec)
    for name in stored:
        if name.rpartition(".")[0] not in specs:
            loader._put_dense(name)
    return model.requires_grad_(False)


def weight_bytes(model: nn.Module) -> int:
    """Of every parameter and packed weight."""
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    return held + sum(m.prepacked.nbytes for m in model.modules() if isinstance(m, QuantizedLinear))


def trace_forward(
    model: Glm4Model,
    context: int,
    chunk: int,
    *,
    every_position: bool = False,
    kept: str = "16",
    for_cpu: bool = False,
) -> MemoryTrace:
    """The last chunk of a prompt that fills a context; `every_position`: with the logits of all of the chunk."""
    kv_format = parse_kv_bits(kept)
    cache = KVCache(model.config, context, dtype=model.dtype, device=META, kv_format=kv_format, for_cpu=for_cpu)
    cache.position = context - chunk
    ids = torch.zeros(chunk, dtype=torch.long, device=META)
    out = torch.empty(chunk, model.config.vocab_size, device=META)
    trace = MemoryTrace()
    with torch.no_grad(), trace:
        if every_position:
            model.write_logits(ids, cache, out)
        else:
            model(ids, cache)
    return trace
