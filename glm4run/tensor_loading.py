"""Moves the tensors of a checkpoint into a model that stands on the meta device; every tensor must arrive.

What stays in memory is what the backends keep. Each packed linear is laid out for its backend before the next one is
read, so that loading never holds a second copy of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from glm4run.checkpoint.reader import TORCH_DTYPES, CheckpointReader, FileMapping
from glm4run.errors import CheckpointError
from glm4run.kernels import Backend, FileRange, LinearSpec
from glm4run.kernels.cpu.finite import all_finite
from glm4run.layers import QuantizedLinear
from glm4run.memory.weights import EMBEDDING
from glm4run.model import Glm4Model
from glm4run.qformat import PACKED, SCALE, SHAPE, ZERO_POINT, PackedWeight

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def kept_dtype(module: str, stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The embedding stays as stored; norms are float32, in which they are computed; all else is in `dtype`.

    `memory.weights.kept_element_bytes` plans by the same rule.
    """
    if module == "model.embed_tokens":
        return stored
    return torch.float32 if module.endswith("norm") else dtype


class TensorLoader:
    """Reads one checkpoint into one model, for one device and dtype."""

    def __init__(
        self,
        reader: CheckpointReader,
        model: Glm4Model,
        device: torch.device,
        dtype: torch.dtype,
        backend: Backend | None,
        progress: Progress | None,
        *,
        mmap: bool = False,
    ) -> None:
        self.reader, self.model, self.device, self.dtype = reader, model, device, dtype
        self.backend, self.progress = backend, progress
        self.mmap = mmap  # what is used as it is stored is not read but mapped
        self.embedding_file: FileMapping | None = None  # where the embedding is mapped from
        self.total = sum(source.nbytes for source in reader.sources.values())
        self.done = 0
        self.taken: set[str] = set()

    def run(self, specs: dict[str, LinearSpec]) -> None:
        """Fills every tensor of the model; those of `specs` are packed linears. Raises CheckpointError."""
        for module, spec in specs.items():
            self._put_packed(module, spec)
        for name in self.reader.sources:
            if name not in self.taken:
                self._put_dense(name)
        if self.model.config.tie_word_embeddings:
            shared = self.model.model.embed_tokens.weight.to(self.dtype)
            self.model.lm_head.weight = nn.Parameter(shared, requires_grad=False)
        left = [name for name, tensor in self.model.state_dict().items() if tensor.is_meta]
        assert not left, f"not loaded: {left}"  # the reader has accounted for every tensor

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        tensor = self.reader.read(name)
        self.count(name)
        return tensor

    def count(self, name: str) -> None:
        """Adds a tensor to what is loaded, and to the progress."""
        self.taken.add(name)
        self.done += self.reader.sources[name].nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)

    def check_finite(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor. Raises CheckpointError where it holds NaN or infinity."""
        if not all_finite(tensor):
            file = self.reader.sources[name].entry.file
            raise CheckpointError(
                f"{file.name}: {name} holds NaN or infinity", hint="the file is damaged: get it again"
            )
        return tensor

    def _put_packed(self, module: str, spec: LinearSpec) -> None:
        shape = [spec.out_features, spec.in_features]
        if spec.scheme.kind == "int":
            shape = self.read(f"{module}.{SHAPE}").tolist()
        if shape != [spec.out_features, spec.in_features]:
            raise CheckpointError(
                f"{module}.{SHAPE} says {shape}, config.json says {[spec.out_features, spec.in_features]}",
                hint="the folder mixes files of two models",
            )
        assert self.backend is not None
        prepacked = self.backend.prepack(_FileWeight(self, module, spec), spec)
        bias_name = f"{module}.bias"
        bias = None
        if bias_name in self.reader.sources:
            bias = self.check_finite(bias_name, self.read(bias_name)).to(self.device, self.dtype)
        self.model.set_submodule(module, QuantizedLinear(prepacked, self.backend, bias))

    def _put_dense(self, name: str) -> None:
        module, _, parameter = name.rpartition(".")
        tied = self.model.config.tie_word_embeddings  # it is the head too, which reads it all
        mapped = self.reader.mapped(name) if self.mmap and module == EMBEDDING and not tied else None
        if mapped is not None:
            self.count(name)
            self.embedding_file = self.reader.mapping(name)
        tensor = self.read(name) if mapped is None else mapped
        if tensor.ndim == 1:
            self.check_finite(name, tensor)
        tensor = tensor.to(kept_dtype(module, tensor.dtype, self.dtype))
        setattr(self.model.get_submodule(module), parameter, nn.Parameter(tensor.to(self.device), requires_grad=False))


class _FileWeight:
    """A packed weight that lies in its file: a `kernels.WeightSource`."""

    def __init__(self, loader: TensorLoader, module: str, spec: LinearSpec) -> None:
        self.loader, self.module, self.spec = loader, module, spec
        self.packed, self.scale, self.zero_point = (f"{module}.{part}" for part in (PACKED, SCALE, ZERO_POINT))

    @property
    def scale_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.loader.reader.sources[self.scale].entry.dtype]

    def whole(self) -> PackedWeight:
        scale, zero_point = self.side_tensors()
        return PackedWeight(
            packed=self.loader.read(self.packed).to(self.loader.device),
            scale=scale,
            zero_point=zero_point,
            out_features=self.spec.out_features,
            in_features=self.spec.in_features,
            scheme=self.spec.scheme,
        )

    def side_tensors(self) -> tuple[Tensor, Tensor | None]:
        loader = self.loader
        scale = loader.check_finite(self.scale, loader.read(self.scale)).to(loader.device)
        return scale, None if self.spec.scheme.symmetric else loader.read(self.zero_point).to(loader.device)

    def stored(self) -> Mapping[str, Tensor]:
        loader, prefix = self.loader, f"{self.module}."
        names = [name for name in loader.reader.sources if name.startswith(prefix) and not name.endswith(".bias")]
        tensors = {}
        for name in names:
            tensor = loader.read(name)
            if tensor.is_floating_point():
                loader.check_finite(name, tensor)
            tensors[name.removeprefix(prefix)] = tensor.to(loader.device)
        return tensors

    def location(self) -> FileRange:
        """The backend reads or maps the values itself: they count as read from here on."""
        descriptor, offset = self.loader.reader.location(self.packed)
        entry = self.loader.reader.sources[self.packed].entry
        self.loader.count(self.packed)
        mapping = self.loader.reader.mapping(self.packed) if self.loader.mmap else None
        return FileRange(descriptor, offset, f"{entry.file.name}: {self.packed}", mapping)
