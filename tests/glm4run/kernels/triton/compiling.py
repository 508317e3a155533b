"""Compiles what the launchers launch for cards that are not there: `python compiling.py CAPABILITY` (80, 90, 120).

A process of its own, as the tests interpret the kernels. Each kernel is compiled down to machine code, for the shapes
of GLM-4-9B: one decoded token, a few, and a chunk of a prompt, over caches of every kind. Prints a line each.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from glm4run.kernels import LinearSpec
from glm4run.kernels.triton import attention, cache, elementwise, knows_overlap, linear
from glm4run.kv_rows import KVLayer, new_rows
from glm4run.qformat import PackedWeight, num_groups, packed_width
from glm4run.quant_config import QuantScheme

BF16, CPU = torch.bfloat16, torch.device("cpu")
HEADS, KV_HEADS, WIDTH, HIDDEN = 32, 2, 128, 4096


class Compiling:
    """Stands where kernels are launched."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.count = 0

    def __call__(self, kernel: Any, grid: Any, args: Sequence[Any], constants: dict[str, Any], **options: Any) -> None:
        compiled = kernel.warmup(*args, grid=grid, **constants, **options)
        assert len(compiled.asm["cubin"]) > 0
        self.count += 1
        sys.stdout.write(f"sm_{self.capability} {kernel.fn.__name__} {compiled.metadata.num_warps} warps\n")


def weight(rows: int, columns: int, scheme: QuantScheme, dtype: torch.dtype) -> linear.TritonWeight:
    packed = torch.zeros(rows, packed_width(columns, scheme.bits), dtype=torch.int32)
    scale = torch.ones(rows, num_groups(columns, scheme), dtype=BF16)
    zero = None if scheme.symmetric else torch.zeros(packed_width(rows, scheme.bits), scale.shape[1], dtype=torch.int32)
    whole = PackedWeight(packed, scale, zero, rows, columns, scheme)
    return linear.prepack(whole, LinearSpec(rows, columns, scheme, CPU, dtype))


def products() -> None:
    bias = torch.zeros(256, dtype=BF16)
    for scheme in (QuantScheme(4, 128), QuantScheme(8, 128), QuantScheme(4, 32, symmetric=False)):
        for tokens in (1, 4, 16, 48, 200):
            linear.multiply(torch.zeros(tokens, HIDDEN, dtype=BF16), [weight(256, HIDDEN, scheme, BF16)], [bias])
    q, k, v = (weight(rows, HIDDEN, QuantScheme(4, 128), BF16) for rows in (HEADS * WIDTH, 256, 256))
    linear.multiply(torch.zeros(1, HIDDEN, dtype=BF16), [q, k, v], [torch.zeros(HEADS * WIDTH, dtype=BF16), bias, bias])
    down = weight(256, 13696, QuantScheme(4, 32), torch.float32)  # of a model in fp16
    linear.multiply(torch.zeros(1, 13696), [down], [None])


def attending() -> None:
    for key_bits, value_bits, dtype in ((16, 16, BF16), (8, 8, BF16), (4, 4, BF16), (8, 4, torch.float16)):
        keys, values = (
            new_rows(KV_HEADS, 4096, WIDTH, bits, dtype=dtype, device=CPU) for bits in (key_bits, value_bits)
        )
        layer = KVLayer(keys, values)
        for tokens, start in ((1, torch.zeros(1, dtype=torch.int32)), (2048, 512)):
            query = torch.zeros(tokens, HEADS * WIDTH, dtype=dtype)
            key, value = (torch.zeros(tokens, KV_HEADS * WIDTH, dtype=dtype) for _ in range(2))
            cos, sin = (torch.zeros(tokens, WIDTH // 4) for _ in range(2))
            turned = cache.rope_append(query, key, value, cos, sin, layer, start)
            attention.attend(turned, layer, start, out=torch.empty_like(query))


def between() -> None:
    for dtype, residual in ((BF16, BF16), (torch.float16, torch.float32)):
        x, norm = torch.zeros(2, HIDDEN, dtype=residual), torch.ones(HIDDEN)
        elementwise.rms_norm(x, norm, 1e-5, dtype)
        elementwise.add_rms_norm(x, x, norm, norm, 1e-5, dtype)
        elementwise.add_rms_norm(x, x, None, norm, 1e-5, dtype)
        elementwise.silu_mul(torch.zeros(2, 27392, dtype=residual))


def main(capability: int) -> None:
    target = GPUTarget("cuda", capability, 32)
    fake: Any = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    driver.set_active(fake)
    compiling = Compiling(capability)
    can = capability >= 90 and knows_overlap()
    overlaps = {"OVERLAPS": True, "launch_pdl": True} if can else {"OVERLAPS": False}
    for module in (attention, cache, elementwise, linear):
        vars(module)["launch"] = compiling
    for module in (attention, cache, elementwise, linear):
        if "overlap" in vars(module):
            vars(module)["overlap"] = lambda device: overlaps
    for part in (between, attending, products):
        part()
    sys.stdout.write(f"triton {triton.__version__}: {compiling.count} launches compiled for {target}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
