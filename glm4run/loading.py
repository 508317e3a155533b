"""A folder to a model in memory: config, device, backend, plan, modules on the meta device, then their tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from glm4run import memory
from glm4run.cards import Card, match_card, yarn_factor
from glm4run.checkpoint.layouts import linear_shapes, quantized_linears
from glm4run.checkpoint.reader import CheckpointReader
from glm4run.config import ModelConfig, read_config
from glm4run.errors import DoesNotFitError, UsageError
from glm4run.kernels import ACTIVATIONS, Activations, Backend, LinearSpec, select_backend
from glm4run.kernels.cpu.backend import NativeWeight
from glm4run.kernels.cpu.library import native, why_missing
from glm4run.kv_format import KVFormat
from glm4run.later_layout import SMALLEST_BYTES, LaterLayout, MappedEmbedding
from glm4run.layer_stack import native_stack
from glm4run.layers import QuantizedLinear
from glm4run.machine import default_threads
from glm4run.memory import MemoryPlan, Run
from glm4run.memory.heap import kept_block_bytes, return_large_blocks
from glm4run.memory.weights import EMBEDDING
from glm4run.model import Glm4Model
from glm4run.ops import Ops, TritonOps, choose_ops
from glm4run.quant_config import QuantScheme, on_load_scheme
from glm4run.speculative import MOST_DRAFTED
from glm4run.tensor_loading import Progress, TensorLoader

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LONG_CONTEXT, LONG_CONTEXT_THETA = 65536, 1e6
DEFAULT_ON_LOAD = {"bitsandbytes": "nf4", "quanto": "qint8"}  # what these backends make of a dense folder
DEFAULT_CONTEXT_WITHOUT_MEMORY = 8192  # where the machine does not say how much memory is free


@dataclass(frozen=True)
class LoadedWeights:
    """A model ready to run, and what was decided on the way."""

    model: Glm4Model
    plan: MemoryPlan
    memory_run: Run  # what the plan was made of
    backend: str  # of the packed linears; "dense" where nothing is packed
    backend_detail: str  # the kernels that it runs here
    backend_reason: str
    notices: tuple[str, ...]
    layout: LaterLayout | None  # moves the weights into their kernels' order; None: they stay as they are


def use_threads(count: int | None) -> None:
    """Sets the threads of torch and of the native library.

    None leaves torch's own number, unless that is more than the process may use at once: in a container torch counts
    the machine's cores, and threads beyond the quota only wait for each other.
    """
    usable = default_threads()
    if count is not None or torch.get_num_threads() > usable:
        torch.set_num_threads(count or usable)
    if why_missing() is None:
        native().g4_set_threads(count or usable)


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
    than float32, so dense models then run in float32 if they fit (and so does what other libraries quantize); ours stay
    in bf16, which torch's int4 kernel wants.
    """
    if name != "auto":
        if name not in DTYPES:
            raise UsageError(f"unknown dtype {name!r}", hint=f"auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    ours = any(scheme.kind == "int" for scheme in quantized_linears(config).values())
    if ours or torch.ops.mkldnn._is_mkldnn_bf16_supported():
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
    activations: Activations = "auto",
    quantize_on_load: str | None = None,
    threads: int | None = None,
    context_len: int | None = None,
    rope_theta: float | None = None,
    yarn: str = "auto",
    kv_format: KVFormat = KVFormat(),  # noqa: B008 (frozen)
    mmap: bool = False,
    progress: Progress | None = None,
    held_bytes: int | None = None,
) -> LoadedWeights:
    """Loads a dense or packed folder of any layout.

    `quantize_on_load`: one of `quant_config.ON_LOAD`, by which another library packs the layers' linears of a dense
    folder as they come; None does so only where such a library is the named `backend`.
    `mmap`: packed values and the embedding stay in their files, mapped into memory, where the native kernels run.
    Without it a large model begins so, and moves into memory while it is used (`later_layout`).
    `held_bytes`: what the process held before anything of this model was loaded; None measures it now.

    Raises:
        CheckpointError: anything wrong with the files. DoesNotFitError: the context or the memory is exceeded.
        BackendError: the named backend cannot run this model. UsageError: a wrong option.
    """
    if activations not in ACTIVATIONS:
        raise UsageError(f"activations are {activations!r}", hint=f"one of: {', '.join(ACTIVATIONS)}")
    return_large_blocks()  # so that the process holds what the plan says, whatever came and went before
    use_threads(threads)
    config = read_config(folder)
    card = match_card(config, name=folder.name)
    config, notices = adapt_config(config, card, context_len=context_len, rope_theta=rope_theta, yarn=yarn)
    target = choose_device(device)
    compute = choose_dtype(dtype, target, config)
    shapes = linear_shapes(config)
    schemes = _schemes(config, quantize_on_load or DEFAULT_ON_LOAD.get(backend), asked=quantize_on_load is not None)
    specs = {
        module: LinearSpec(*shapes[module], scheme, target, input_dtype(module, compute), activations)
        for module, scheme in schemes.items()
    }
    chosen, reason = _choose_backend(backend, specs)
    with CheckpointReader(folder, config) as reader:
        ops = choose_ops(backend, target)
        can_map = target.type == "cpu" and chosen is not None and chosen.name == "native"
        maps = mmap and can_map
        if mmap and not maps:
            notices.append("the weights are read into memory: only the native kernels use them from their files")
        run = planned_run(reader, config, specs, chosen, target, compute, held_bytes, ops, kv_format, mmap=maps)
        plan = choose_context(run, target, context_len)
        moves = can_map and not mmap and _moves(run)
        with torch.device("meta"):
            model = Glm4Model(config, dtype=compute, ops=ops)
        loader = TensorLoader(reader, model, target, compute, chosen, progress, mmap=maps or moves)
        loader.run(specs)
    model.eval().requires_grad_(False)
    model.stack = native_stack(model)
    if isinstance(ops, TritonOps):
        from glm4run.cuda_graphs import captured_forward  # where Triton is

        model.whole = captured_forward(model, target, kv_format, plan.chunk)
    return_large_blocks(kept_block_bytes(plan.weight_bytes))
    layout = _later_layout(model, loader) if moves else None
    if layout is not None:
        layout.start()
    return LoadedWeights(
        model,
        plan,
        run,
        backend="dense" if chosen is None else chosen.name,
        backend_detail="dense" if chosen is None else chosen.describe(),
        backend_reason=reason,
        notices=(*config.notices, *notices),
        layout=layout,
    )


def _moves(run: Run) -> bool:
    """Whether a model begins with its weights in their files and moves later.

    A large one does, whose plan stays true meanwhile: the embedding comes last, and makes room for any other weight to
    be there twice.
    """
    others = [item.bytes for item in run.weights.kept if item.name != EMBEDDING]
    tied = run.config.tie_word_embeddings
    return not tied and sum(others) >= SMALLEST_BYTES and run.weights.by_class["embedding"] >= max(others)


def _later_layout(model: Glm4Model, loader: TensorLoader) -> LaterLayout:
    """The head first, whose weights gain most, then layer after layer."""
    linears = [model.lm_head, *model.model.layers.modules()]
    weights = [linear.prepacked for linear in linears if isinstance(linear, QuantizedLinear)]
    mapped = [weight for weight in weights if isinstance(weight, NativeWeight) and weight.is_mapped]
    file = loader.embedding_file
    embedding = None if file is None else MappedEmbedding(model.model.embed_tokens, file)
    return LaterLayout(model, mapped, embedding)


def _schemes(config: ModelConfig, on_load: str | None, *, asked: bool) -> dict[str, QuantScheme]:
    """How each linear is packed: as stored, or in a dense folder as `on_load` says, the head apart."""
    stored = quantized_linears(config)
    if on_load is None or (stored and not asked):
        return stored
    if stored:
        kinds = ", ".join(sorted({scheme.describe() for scheme in stored.values()}))
        raise UsageError(
            f"quantize-on-load {on_load} was asked for, but this model is packed already: {kinds}",
            hint="leave the option out, or give the unpacked model",
        )
    shapes = linear_shapes(config)
    return {module: on_load_scheme(on_load, shapes[module][1]) for module in shapes if module != "lm_head"}


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
    factor = yarn_factor(config, card)
    native = config.max_position_embeddings
    passes_native = context_len is not None and context_len > native
    if config.rope_scaling is not None and yarn == "off":
        native = config.rope_scaling.original_max_position_embeddings
        config = dataclasses.replace(config, rope_scaling=None, max_position_embeddings=native)
        notices.append(f"the YaRN of config.json is off: context {native}")
    elif config.rope_scaling is not None:
        scaling = config.rope_scaling
        notices.append(
            f"YaRN x{scaling.factor:g}, as config.json says: native context "
            f"{scaling.original_max_position_embeddings}, now {native} (--yarn off)"
        )
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
        stretchable = run.config.has_sandwich_norms and run.config.rope_scaling is None  # then --yarn off was given
        raise DoesNotFitError(
            f"a context of {context_len} tokens was asked for, this model has {limit}",
            hint=f"use --ctx {limit}" + (", or --yarn auto" if stretchable else ""),
        )
    free = available_bytes(device)
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


def available_bytes(device: torch.device) -> int | None:
    """Memory of a device that may still be taken; None where the system does not say."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.available_ram_bytes()


def planned_run(
    reader: CheckpointReader,
    config: ModelConfig,
    specs: dict[str, LinearSpec],
    backend: Backend | None,
    device: torch.device,
    dtype: torch.dtype,
    held_bytes: int | None,
    ops: Ops,
    kv_format: KVFormat,
    *,
    mmap: bool = False,
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
        memory.process_overhead(
            held_bytes or memory.resident_bytes(), tokenizer, memory.read_calibration(memory.calibrated_cpu())
        )
        if on_cpu
        else memory.device_overhead(
            is_open=True, calibration=memory.read_calibration(torch.cuda.get_device_name(device))
        )
    )
    computes = weights.compute(config, dtype=dtype_name, device=device.type, ops=ops.name)
    verifies = backend is not None and backend.name == "native" and "lm_head" in specs  # drafts: generate.py
    return Run(
        weights,
        computes,
        overhead,
        kv_bits=kv_format.key_bits,
        value_bits=kv_format.value_bits,
        logits_rows=1 + MOST_DRAFTED if verifies else 1,
        **(memory.embedding_in_file(weights) if mmap and not config.tie_word_embeddings else {}),
    )


def input_dtype(module: str, dtype: torch.dtype) -> torch.dtype:
    """What a linear is fed: in fp16 the last projection of each branch gets float32, as it joins the residual."""
    joins_residual = module.endswith(("o_proj", "down_proj"))
    return torch.float32 if dtype == torch.float16 and joins_residual else dtype


def _choose_backend(name: str, specs: dict[str, LinearSpec]) -> tuple[Backend | None, str]:
    if not specs:
        if name != "auto":
            raise UsageError(
                f"backend {name!r} was asked for, but this model is not packed",
                hint="run `glm4run quantize` on it first",
            )
        return None, "nothing is packed"
    return select_backend(name, specs.values())
