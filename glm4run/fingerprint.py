"""Which model a cache belongs to: fingerprints of all that its keys and values depend on.

A cache of other weights, another quantization, another RoPE or another template would be taken for a right one and
answer nonsense; so each is fingerprinted by itself, and a difference can be named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glm4run.generate import LoadedModel
    from glm4run.tokenizer import Tokenizer

SAMPLES, SAMPLE_BYTES = 64, 4096  # of each weight file: a fine-tuned copy has the same header and other values
Fingerprint = Mapping[str, str]


def fingerprint(model: LoadedModel) -> dict[str, str]:
    """By part: weights, tokenizer, quantization, rope, template, cache. Reads samples, not the whole files."""
    template = "none" if model.dialect is None else model.dialect.name
    return {**of_computation(model), "tokenizer": _vocabulary(model.tokenizer), "template": template}


def of_computation(model: LoadedModel) -> dict[str, str]:
    """What the keys and values of given token ids depend on: weights, quantization, rope, cache."""
    config = model.config
    rope = (config.rope_theta, config.rope_scaling, config.partial_rotary_factor, config.head_dim)
    packed = None if config.quantization is None else asdict(config.quantization)
    if packed is None and model.backend != "dense":  # packed while it was loaded
        packed = {"backend": model.backend, "bytes": model.plan.weight_bytes}
    kept = model.memory_run.kv_format
    # Before groups had codes, rows of 4 bits were others.
    codes = ", 4 by codes of 8" if 4 in (kept.key_bits, kept.value_bits) else ""
    offset = f", keys less their bias over {config.max_position_embeddings}" if model.key_offsets else ""
    return {
        "weights": _digest(b"".join(map(_weight_file, sorted(model.folder.glob("*.safetensors"))))),
        "quantization": _digest(json.dumps(packed, sort_keys=True, default=str).encode()),
        "rope": _digest(repr(rope).encode()),
        "cache": str(model.model.dtype).removeprefix("torch.")
        + (f", {kept} bits{codes}{offset}" if kept.is_quantized else ""),
    }


def differences(ours: Fingerprint, theirs: Fingerprint) -> list[str]:
    """The parts that are not the same."""
    return [part for part in {**ours, **theirs} if ours.get(part) != theirs.get(part)]


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> str:
    """Every id with its bytes or its control token's name. 151,343 of them take a while, hence once a tokenizer."""
    digest = hashlib.sha256()
    for token in tokenizer.usable_ids():
        name = tokenizer.special_name(token)
        digest.update(f"{token} {name or ''} ".encode() + tokenizer.token_bytes(token) + b"\n")
    return digest.hexdigest()[:32]


def _weight_file(path: Path) -> bytes:
    """Name, size, header and samples over the whole length of a safetensors file."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name} {size} ".encode())
    with path.open("rb") as file:
        header = min(int.from_bytes(file.read(8), "little"), size)
        digest.update(file.read(header))
        for number in range(SAMPLES):
            file.seek(8 + header + (size - 8 - header) * number // SAMPLES)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.digest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
