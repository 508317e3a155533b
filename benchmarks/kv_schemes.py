#!/usr/bin/env python3
"""What ways of quantizing keys and values cost, on a real model: KL divergence from a cache of floats.

    python benchmarks/kv_schemes.py MODEL --text FILE [--tokens 1024] [--schemes NAME ...] [--key-outliers 60]

Computed in float32 with exact activations, so that nothing but the cache differs; the second half of one window is
scored. `--key-outliers SIZE` first adds a random bias to channels of every layer's keys, of the reference's too, as
models with biased keys have them: to 6 channels anywhere, or with `--slow` to the 6 of each head that RoPE turns least.
"less the bias" leaves out what a bias adds to all keys alike, as the product does (`key_offset.py`). `channels`
quantizes each channel of keys over blocks of 32 tokens: it cannot forget a token exactly, and is here as a bound.
JSON on stdout, a line a scheme on stderr.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from glm4run import load_model
from glm4run.generate import LoadedModel
from glm4run.kernels.cpu import ops as native
from glm4run.key_offset import key_offsets
from glm4run.kv_cache import KVCache
from glm4run.kv_format import parse_kv_bits
from glm4run.kv_rows import KVLayer, dequantize_rows, quantize_rows, turn
from glm4run.model import DecoderLayer
from glm4run.ops import NativeOps, Ops

Rounding = Callable[[Tensor], Tensor]
CHUNK, ROWS = 512, 64
OUTLIER_CHANNELS = 6


def symmetric(bits: int, group: int) -> Rounding:
    def rounded(x: Tensor) -> Tensor:
        groups, top = x.unflatten(-1, (-1, min(group, x.shape[-1]))), (1 << (bits - 1)) - 1
        scale = (groups.abs().amax(-1, keepdim=True) / top).half().float().clamp_min(1e-8)
        out: Tensor = ((groups / scale).round().clamp(-top, top) * scale).flatten(-2)
        return out

    return rounded


def asymmetric(bits: int, group: int) -> Rounding:
    def rounded(x: Tensor) -> Tensor:
        groups, top = x.unflatten(-1, (-1, min(group, x.shape[-1]))), (1 << bits) - 1
        lowest = groups.amin(-1, keepdim=True)
        scale, minimum = ((groups.amax(-1, keepdim=True) - lowest) / top).half().float().clamp_min(1e-8), lowest.half()
        out: Tensor = (((groups - minimum) / scale).round().clamp(0, top) * scale + minimum).flatten(-2)
        return out

    return rounded


def searched(bits: int, group: int) -> Rounding:
    """Asymmetric; of many lowest and highest levels a group takes those that leave the least squared error."""

    def rounded(x: Tensor) -> Tensor:
        groups, top = x.unflatten(-1, (-1, min(group, x.shape[-1]))), (1 << bits) - 1
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        best, least = groups, torch.full_like(low, torch.inf)
        for shrunk, moved in itertools.product(torch.arange(0.7, 1.09, 0.04), (-0.5, -0.25, 0.0, 0.25)):
            scale = (shrunk * (high - low) / top).half().float().clamp_min(1e-8)
            minimum = ((low + high - top * scale) / 2 + moved * scale).half().float()
            out = ((groups - minimum) / scale).round().clamp(0, top) * scale + minimum
            error = (out - groups).square().sum(-1, keepdim=True)
            best, least = torch.where(error < least, out, best), torch.minimum(error, least)
        found: Tensor = best.flatten(-2)
        return found

    return rounded


def turned(rounding: Rounding) -> Rounding:
    return lambda x: turn(rounding(turn(x)))


def kept(bits: int) -> Rounding:
    """As the product keeps rows."""
    return lambda x: turn(dequantize_rows(*quantize_rows(x, bits), bits))


def channels(bits: int, block: int) -> Rounding:
    by_row = asymmetric(bits, block)

    def rounded(x: Tensor) -> Tensor:
        whole = x.shape[1] // block * block
        return torch.cat((by_row(x[:, :whole].transpose(1, 2)).transpose(1, 2), x[:, whole:]), dim=1)

    return rounded


def unchanged(x: Tensor) -> Tensor:
    return x


FOUR, EIGHT = kept(4), kept(8)
SCHEMES: dict[str, tuple[Rounding, Rounding]] = {
    "8 bits (--kv-bits 8)": (EIGHT, EIGHT),
    "8:4 bits (--kv-bits 8:4)": (EIGHT, FOUR),
    "4 bits (--kv-bits 4)": (FOUR, FOUR),
    "keys 8, rows not turned": (symmetric(8, 128), unchanged),
    "keys 8, turned": (EIGHT, unchanged),
    "keys 8, turned, less the bias": (EIGHT, unchanged),
    "keys 4, turned": (FOUR, unchanged),
    "keys 4, turned, less the bias": (FOUR, unchanged),
    "4 g32 with minima, turned, less the bias": (turned(asymmetric(4, 32)), turned(asymmetric(4, 32))),
    "keys 4 g32 with minima, not turned": (asymmetric(4, 32), unchanged),
    "keys 4 g32 with minima, turned": (turned(asymmetric(4, 32)), unchanged),
    "keys 4 g32 with minima, turned, less the bias": (turned(asymmetric(4, 32)), unchanged),
    "keys 4 g32 with minima, searched, turned, less the bias": (turned(searched(4, 32)), unchanged),
    "keys 4 g16 with minima, turned, less the bias": (turned(asymmetric(4, 16)), unchanged),
    "keys 4 g16 with minima, searched, turned, less the bias": (turned(searched(4, 16)), unchanged),
    "keys 5 g32 with minima, turned, less the bias": (turned(asymmetric(5, 32)), unchanged),
    "keys 6 g32 with minima, turned, less the bias": (turned(asymmetric(6, 32)), unchanged),
    "keys 4, channels over 32 tokens": (channels(4, 32), unchanged),
    "values 4 g32 with minima, not turned": (unchanged, asymmetric(4, 32)),
    "values 4 g32 with minima, turned": (unchanged, turned(asymmetric(4, 32))),
    "values 4, turned": (unchanged, FOUR),
}


# What the native attention loses, whose queries and weights are integers as well: names and `--kv-bits`.
NATIVE = {f"the native library, --kv-bits {kept}": kept for kept in ("8", "8:4", "4")}


class Library(NativeOps):
    """The native attention, over a cache that is quantized, for few heads too."""

    def attend(self, query: Tensor, cache: KVLayer, end: int) -> Tensor:
        return native.attention(query.contiguous(), cache, end)


class Rounded(Ops):
    """Torch's operations over a cache of floats that hold what a scheme would give back."""

    def __init__(self, scheme: tuple[Rounding, Rounding], offset: Tensor | None = None) -> None:
        self.scheme = scheme
        self.offset = torch.zeros(1) if offset is None else offset[:, None]

    def append(self, cache: KVLayer, start: int, key: Tensor, value: Tensor) -> None:
        kept = self.scheme[0](key.float() - self.offset) + self.offset
        super().append(cache, start, kept, self.scheme[1](value.float()))


def layers(model: LoadedModel) -> list[DecoderLayer]:
    return [layer for layer in model.model.model.layers if isinstance(layer, DecoderLayer)]


def add_outliers(model: LoadedModel, size: float, *, slow: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    width = model.config.num_key_value_heads * model.config.head_dim
    for layer in layers(model):
        bias = torch.zeros(width)
        heads = bias.unflatten(0, (-1, model.config.head_dim))
        if slow:
            last = model.config.rotary_dim
            heads[:, last - OUTLIER_CHANNELS : last] = (
                torch.randn(len(heads), OUTLIER_CHANNELS, generator=generator) * size
            )
        else:
            bias[torch.randperm(width, generator=generator)[:OUTLIER_CHANNELS]] = (
                torch.randn(OUTLIER_CHANNELS, generator=generator) * size
            )
        projection = layer.self_attn.k_proj
        before = torch.zeros(width) if projection.bias is None else projection.bias.float()
        projection.bias = torch.nn.Parameter(before + bias, requires_grad=False)


def hidden_states(
    model: LoadedModel, ids: list[int], scheme: tuple[Rounding, Rounding], *, less_bias: bool = False
) -> Tensor:
    offsets = key_offsets(model.model) if less_bias else []
    for number, layer in enumerate(layers(model)):
        layer.self_attn.ops = Rounded(scheme, offsets[number] if offsets else None)
    return scored(model, ids, model.new_context().cache)


def in_the_library(model: LoadedModel, ids: list[int], kept: str) -> Tensor:
    for layer in layers(model):
        layer.self_attn.ops = Library()
    config, offsets = model.config, key_offsets(model.model)
    device = torch.device("cpu")
    cache = KVCache(
        config, len(ids), dtype=torch.float32, device=device, kv_format=parse_kv_bits(kept), key_offsets=offsets
    )
    return scored(model, ids, cache)


def scored(model: LoadedModel, ids: list[int], cache: KVCache) -> Tensor:
    parts = [model.model.hidden_states(torch.tensor(ids[i : i + CHUNK]), cache) for i in range(0, len(ids), CHUNK)]
    return torch.cat(parts)[len(ids) // 2 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument(
        "--schemes", nargs="+", choices=[*SCHEMES, *NATIVE], default=[*SCHEMES, *NATIVE], metavar="NAME"
    )
    parser.add_argument("--key-outliers", type=float, default=0.0)
    parser.add_argument("--slow", action="store_true", help="outliers where RoPE turns least")
    args = parser.parse_args()
    model = load_model(args.model, dtype="fp32", activations="bf16", context_len=args.tokens)
    model.model.stack = None
    if args.key_outliers:
        add_outliers(model, args.key_outliers, slow=args.slow)
    text = args.text.read_text(encoding="utf-8")
    ids = [*model.tokenizer.prefix_ids, *model.tokenizer.encode(text[: 12 * args.tokens])][: args.tokens]
    rows = []
    with torch.inference_mode():
        exact = hidden_states(model, ids, (unchanged, unchanged))
        for name in args.schemes:
            less_bias = "--kv-bits" in name or "less the bias" in name
            if name in SCHEMES:
                ours = hidden_states(model, ids, SCHEMES[name], less_bias=less_bias)
            else:
                ours = in_the_library(model, ids, NATIVE[name])
            kl, same = 0.0, 0
            for first in range(0, len(ours), ROWS):
                p, q = (model.model.lm_head(h[first : first + ROWS]).double().log_softmax(-1) for h in (exact, ours))
                kl += float((p.exp() * (p - q)).sum())
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
            rows.append({"scheme": name, "kld_mean": kl / len(ours), "same_top1": same / len(ours)})
            print(rows[-1], file=sys.stderr, flush=True)
    facts = {"model": model.name, "tokens": len(ids), "key_outliers": args.key_outliers, "slow": args.slow}
    print(json.dumps({**facts, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
