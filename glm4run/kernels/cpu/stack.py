"""All decoder layers in one call of the native library, for a few new tokens.

Does exactly what the modules do one after the other, with the same roundings, and without an interpreter in between:
after a product has streamed tens of megabytes, every line of Python runs out of a cold cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Array
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from glm4run.config import ModelConfig
from glm4run.errors import GenerationError
from glm4run.kernels.cpu.backend import DTYPE_CODES, NativeWeight
from glm4run.kernels.cpu.library import G4Cache, G4Layer, G4Output, G4Stack, native
from glm4run.kernels.cpu.ops import FEW_TOKENS, MAX_QUANTIZED_HEAD, MAX_ROTARY_DIM, cache_struct
from glm4run.kv_rows import KVLayer

MAX_TOKENS = FEW_TOKENS  # of a sequence; more are a prefill, whose attention shares out tokens, not the context


class NativeStack:
    """The layers of one model, by their addresses. Whoever holds it holds the model's tensors alive.

    linears: per layer query, key, value, output, gate_up, down, each (weight, bias or None);
    norms: per layer float32 input, post_attention and, or None, the two norms of the branches.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        linears: Sequence[Sequence[tuple[NativeWeight, Tensor | None]]],
        norms: Sequence[Sequence[Tensor | None]],
    ) -> None:
        self._keep = (linears, norms)
        self._layers: Any = (G4Layer * len(linears))()
        for layer, parts, weights in zip(self._layers, linears, norms, strict=True):
            addresses = [None if norm is None else norm.data_ptr() for norm in weights]
            layer.input_norm, layer.post_attention_norm, layer.branch_attention_norm, layer.branch_mlp_norm = addresses
            names = ("query", "key", "value", "output", "gate_up", "down")
            for name, (weight, bias) in zip(names, parts, strict=True):
                output = G4Output(weight=ctypes.pointer(weight.struct), bias=None if bias is None else bias.data_ptr())
                setattr(layer, name, output)
        self.dtype = dtype
        self.max_tokens = MAX_TOKENS
        self._stack = G4Stack(
            layers=self._layers,
            count=len(linears),
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rotary_half=config.rotary_dim // 2,
            dtype=DTYPE_CODES[dtype],
            eps=config.rms_norm_eps,
        )

        # By the first layer of a sequence's cache: its tensors stay where they are for as long as it lives.
        self._structs: WeakKeyDictionary[KVLayer, Array[G4Cache]] = WeakKeyDictionary()

    def _structs_of(self, layers: Sequence[KVLayer]) -> Array[G4Cache]:
        """A sequence's cache as the library takes it. Made once: making it takes as long as a small model's layer."""
        found = self._structs.get(layers[0])
        if found is None:
            found = self._structs[layers[0]] = (G4Cache * len(layers))(*map(cache_struct, layers))
        return found

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, caches: Sequence[KVLayer], position: int) -> Tensor:
        """x [T, hidden] through all layers; writes the new keys and values of each into its cache at `position`."""
        return self.run_sequences(x, cos, sin, [caches], [position])

    def run_sequences(
        self, x: Tensor, cos: Tensor, sin: Tensor, caches: Sequence[Sequence[KVLayer]], positions: Sequence[int]
    ) -> Tensor:
        """The same for sequences that share every product: x [S * T, hidden], T new tokens of each in turn.

        cos, sin: of every row. caches: of each sequence. What a row becomes does not depend on the others, to the bit.
        """
        assert x.dtype == self.dtype
        x = x.clone(memory_format=torch.contiguous_format)
        count = len(positions)
        structs = [self._structs_of(layers) for layers in caches]
        pointer = ctypes.POINTER(G4Cache)
        failed = native().g4_stack(
            ctypes.byref(self._stack),
            x.data_ptr(),
            count,
            x.shape[0] // count,
            (ctypes.c_int64 * count)(*positions),
            cos.data_ptr(),
            sin.data_ptr(),
            (pointer * count)(*(ctypes.cast(array, pointer) for array in structs)),
        )
        if failed:
            raise GenerationError("out of memory for the activations", hint="use a smaller --ctx")
        return x


def takes(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether a model of this shape and dtype can run as a stack. fp16 keeps its residual in another dtype."""
    suits = config.rotary_dim <= MAX_ROTARY_DIM and config.head_dim <= MAX_QUANTIZED_HEAD
    return suits and dtype in (torch.bfloat16, torch.float32)
