"""A folder to a model in memory: config, plan, modules on the meta device, packed linears, strict assignment.

The packed tensors are what stays in memory. Each linear is read, repacked for its backend and dropped before the
next one is read, so loading never holds a second copy of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from glm4run import memory
from glm4run.cards import Card, match_card
from glm4run.checkpoint.layouts import linear_shapes, quantized_linears
from glm4run.checkpoint.reader import CheckpointReader
from glm4run.config import ModelConfig, read_config
from glm4run.errors import CheckpointError, DoesNotFitError, UsageError
from glm4run.kernels import Backend, LinearSpec, select_backend
from glm4run.layers import QuantizedLinear
from glm4run.memory import MemoryPlan, Run
from glm4run.model import Glm4Model
from glm4run.qformat import PACKED, SCALE, SHAPE, ZERO_POINT, PackedWeight

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LONG_CONTEXT, LONG_CONTEXT_THETA = 65536, 1e6
DEFAULT_CONTEXT_WITHOUT_MEMORY = 8192  # where the machine does not say how much memory is free

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class LoadedWeights:
    """A model ready to run, and what was decided on the way."""

    model: Glm4Model
    plan: MemoryPlan
    memory_run: Run  # what the plan was made of
    backend: str  # of the packed linears; "dense" where nothing is packed
    backend_reason: str
    notices: tuple[str, ...]


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA where there is one. Raises UsageError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}", hint="auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device is available to torch", hint="use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported", hint="auto, cpu, cuda or cuda:N")
    return device


def choose_dtype(name: str, device: torch.device, config: ModelConfig) -> torch.dtype:
    """What to compute in.

    `auto`: bf16 where it is fast. A CPU without bf16 instructions multiplies dense bf16 matrices many times slower
    than float32, so dense models then run in float32 if they fit; packed ones stay in bf16, which torch's int4
    kernel wants.
    """
    if name != "auto":
        if name not in DTYPES:
            raise UsageError(f"unknown dtype {name!r}", hint=f"auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if config.quantization is not None or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    available = memory.available_ram_bytes()
    fits = available is None or 4 * config.num_parameters + memory.HEADROOM_BYTES < available
    return torch.float32 if fits else torch.bfloat16


def load_weights(
    folder: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    context_len: int | None = None,
    rope_theta: float | None = None,
    yarn: str = "auto",
    progress: Progress | None = None,
) -> LoadedWeights:
    """Loads a dense or packed folder of any layout.

    Raises:
        CheckpointError: anything wrong with the files. DoesNotFitError: the context or the memory is exceeded.
        BackendError: the named backend cannot run this model. UsageError: a wrong option.
    """
    config = read_config(folder)
    card = match_card(config, name=folder.name)
    config, notices = adapt_config(config, card, context_len=context_len, rope_theta=rope_theta, yarn=yarn)
    target = choose_device(device)
    compute = choose_dtype(dtype, target, config)
    shapes = linear_shapes(config)
    specs = {
        module: LinearSpec(*shapes[module], scheme, target, input_dtype(module, compute))
        for module, scheme in quantized_linears(config).items()
    }
    chosen, reason = _choose_backend(backend, specs)
    with CheckpointReader(folder, config) as reader:
        run = planned_run(reader, config, specs, chosen, target, compute)
        plan = choose_context(run, target, context_len)
        with torch.device("meta"):
            model = Glm4Model(config, dtype=compute)
        _Loader(reader, model, target, compute, chosen, progress).run(specs)
    model.eval().requires_grad_(False)
    return LoadedWeights(
        model, plan, run, "dense" if chosen is None else chosen.name, reason, (*config.notices, *notices)
    )


def adapt_config(
    config: ModelConfig, card: Card | None, *, context_len: int | None, rope_theta: float | None, yarn: str
) -> tuple[ModelConfig, list[str]]:
    """Applies --rope-theta and YaRN; returns what to tell the user."""
    notices = []
    if yarn not in ("auto", "on", "off"):
        raise UsageError(f"yarn is {yarn!r}", hint="auto, on or off")
    if rope_theta is not None and not rope_theta > 0:
        raise UsageError(f"the RoPE base is {rope_theta:g}, expected a positive number")
    if rope_theta is not None:
        config = dataclasses.replace(config, rope_theta=rope_theta, notices=())
    factor = None if card is None else card.yarn_factor
    native = config.max_position_embeddings
    passes_native = context_len is not None and context_len > native
    if config.rope_scaling is not None and yarn == "off":
        native = config.rope_scaling.original_max_position_embeddings
        config = dataclasses.replace(config, rope_scaling=None, max_position_embeddings=native)
    elif config.rope_scaling is None and yarn == "on" and factor is None:
        raise UsageError("this model is not extended with YaRN", hint="use --yarn auto")
    elif config.rope_scaling is None and factor is not None and (yarn == "on" or (yarn == "auto" and passes_native)):
        config = config.with_yarn(factor)
        notices.append(f"YaRN x{factor:g}: native context {native}, now {config.max_position_embeddings}")
    wanted = context_len or config.max_position_embeddings
    if wanted >= LONG_CONTEXT and config.rope_theta < LONG_CONTEXT_THETA and config.rope_scaling is None:
        notices.append(f"context {wanted} with RoPE base {config.rope_theta:g} and no YaRN: answers may degrade")
    return config, notices


def choose_context(run: Run, device: torch.device, context_len: int | None) -> MemoryPlan:
    """The plan for the asked context, or for the largest that fits where none is asked."""
    limit = run.config.max_position_embeddings
    if context_len is not None and context_len > limit:
        raise DoesNotFitError(
            f"a context of {context_len} tokens was asked for, this model has {limit}", hint=f"use --ctx {limit}"
        )
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.available_ram_bytes()
    if free is None:
        return memory.plan_run(run, context_len or min(limit, DEFAULT_CONTEXT_WITHOUT_MEMORY))
    plan = memory.choose_plan(run, free + run.overhead.held_bytes, context_len, limit)
    if plan is not None:
        return plan
    needed = memory.plan_run(run, context_len or 1).peak_bytes - run.overhead.held_bytes
    smaller = None if context_len is None else memory.choose_plan(run, free + run.overhead.held_bytes, None, limit)
    remedy = "quantize it with `glm4run quantize --bits 4`" if smaller is None else f"use --ctx {smaller.context_len}"
    raise DoesNotFitError(
        f"needs {needed / memory.GIB:.2f} GiB, {free / memory.GIB:.2f} GiB are free on {device}",
        hint=f"{remedy}; `glm4run vram` shows what fits",
    )


def planned_run(
    reader: CheckpointReader,
    config: ModelConfig,
    specs: dict[str, LinearSpec],
    backend: Backend | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Run:
    """What is about to be loaded and run, as `memory` plans it."""
    dtype_name = next(name for name, value in DTYPES.items() if value == dtype)
    weights = memory.plan_weights(
        config,
        {name: (source.entry.dtype, source.shape) for name, source in reader.sources.items()},
        {module: spec.scheme for module, spec in specs.items()},
        backend="dense" if backend is None else backend.name,
        dtype=dtype_name,
        device=device.type,
    )
    on_cpu = device.type == "cpu"
    tokenizer = memory.tokenizer_bytes(reader.folder, config.vocab_size)
    overhead = (
        memory.process_overhead(memory.resident_bytes(), tokenizer) if on_cpu else memory.device_overhead(is_open=True)
    )
    return Run(weights, weights.compute(config, dtype=dtype_name, device=device.type), overhead)


def input_dtype(module: str, dtype: torch.dtype) -> torch.dtype:
    """What a linear is fed: in fp16 the last projection of each branch gets float32, as it joins the residual."""
    joins_residual = module.endswith(("o_proj", "down_proj"))
    return torch.float32 if dtype == torch.float16 and joins_residual else dtype


def _kept_dtype(module: str, stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The embedding stays as stored; norms are float32, in which they are computed; all else is in `dtype`.

    `memory.weights.kept_element_bytes` plans by the same rule.
    """
    if module == "model.embed_tokens":
        return stored
    return torch.float32 if module.endswith("norm") else dtype


def _choose_backend(name: str, specs: dict[str, LinearSpec]) -> tuple[Backend | None, str]:
    if not specs:
        if name != "auto":
            raise UsageError(
                f"backend {name!r} was asked for, but this model is not packed",
                hint="run `glm4run quantize` on it first",
            )
        return None, "nothing is packed"
    return select_backend(name, specs.values())


class _Loader:
    """Moves the tensors of one checkpoint into one model."""

    def __init__(
        self,
        reader: CheckpointReader,
        model: Glm4Model,
        device: torch.device,
        dtype: torch.dtype,
        backend: Backend | None,
        progress: Progress | None,
    ) -> None:
        self.reader, self.model, self.device, self.dtype = reader, model, device, dtype
        self.backend, self.progress = backend, progress
        self.total = sum(source.nbytes for source in reader.sources.values())
        self.done = 0

    def run(self, specs: dict[str, LinearSpec]) -> None:
        for module, spec in specs.items():
            self._put_packed(module, spec)
        for name in self.reader.sources:
            module = name.rpartition(".")[0]
            if module not in specs:
                self._put_dense(name)
        if self.model.config.tie_word_embeddings:
            shared = self.model.model.embed_tokens.weight.to(self.dtype)
            self.model.lm_head.weight = nn.Parameter(shared, requires_grad=False)
        left = [name for name, tensor in self.model.state_dict().items() if tensor.is_meta]
        assert not left, f"not loaded: {left}"  # the reader has accounted for every tensor

    def _read(self, name: str) -> Tensor:
        tensor = self.reader.read(name)
        self.done += self.reader.sources[name].nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)
        return tensor

    def _read_finite(self, name: str) -> Tensor:
        tensor = self._read(name)
        if not torch.isfinite(tensor).all():
            file = self.reader.sources[name].entry.file
            raise CheckpointError(
                f"{file.name}: {name} holds NaN or infinity", hint="the file is damaged: get it again"
            )
        return tensor

    def _put_packed(self, module: str, spec: LinearSpec) -> None:
        out_features, in_features, scheme = spec.out_features, spec.in_features, spec.scheme
        shape = self._read(f"{module}.{SHAPE}").tolist()
        if shape != [out_features, in_features]:
            raise CheckpointError(
                f"{module}.{SHAPE} says {shape}, config.json says {[out_features, in_features]}",
                hint="the folder mixes files of two models",
            )
        zero_point = None if scheme.symmetric else self._read(f"{module}.{ZERO_POINT}").to(self.device)
        weight = PackedWeight(
            packed=self._read(f"{module}.{PACKED}").to(self.device),
            scale=self._read_finite(f"{module}.{SCALE}").to(self.device),
            zero_point=zero_point,
            out_features=out_features,
            in_features=in_features,
            scheme=scheme,
        )
        assert self.backend is not None
        prepacked = self.backend.prepack(weight, spec)
        bias_name = f"{module}.bias"
        bias = None
        if bias_name in self.reader.sources:
            bias = self._read_finite(bias_name).to(self.device, self.dtype)
        self.model.set_submodule(module, QuantizedLinear(prepacked, self.backend, bias))

    def _put_dense(self, name: str) -> None:
        module, _, parameter = name.rpartition(".")
        vector = len(self.reader.sources[name].shape) == 1
        tensor = self._read_finite(name) if vector else self._read(name)
        tensor = tensor.to(_kept_dtype(module, tensor.dtype, self.dtype))
        setattr(self.model.get_submodule(module), parameter, nn.Parameter(tensor.to(self.device), requires_grad=False))
