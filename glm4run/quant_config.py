"""How the linears of a model are packed: schemes, which linear has which, and their spelling in a `config.json`.

Source: the compressed-tensors `pack-quantized` configuration format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glm4run.errors import CheckpointError


@dataclass(frozen=True)
class QuantScheme:
    """How one linear is packed: `bits` per weight, `group_size` along K (None: one scale per output row)."""

    bits: int
    group_size: int | None
    symmetric: bool = True

    def describe(self) -> str:
        group = "per channel" if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits} {group}" + ("" if self.symmetric else " asymmetric")


@dataclass(frozen=True)
class QuantConfig:
    """The `quantization_config` of a compressed-tensors `pack-quantized` folder."""

    groups: tuple[tuple[tuple[str, ...], QuantScheme], ...]  # (targets, scheme), first match wins
    ignore: tuple[str, ...]

    def scheme_for(self, module: str) -> QuantScheme | None:
        """The scheme of a Linear by its Hugging Face module name, None where it stays dense."""
        if any(_matches(target, module) for target in self.ignore):
            return None
        for targets, scheme in self.groups:
            if any(_matches(target, module) for target in targets):
                return scheme
        return None


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in ("Linear", module)


def parse_quantization(raw: Mapping[str, Any], where: str) -> QuantConfig | None:
    if not raw:
        return None
    if raw.get("quant_method") != "compressed-tensors" or raw.get("format") != "pack-quantized":
        raise CheckpointError(
            f"{where}: weights are quantized as {raw.get('quant_method')!r} / {raw.get('format')!r}, "
            "expected 'compressed-tensors' / 'pack-quantized'",
            hint="run `glm4run quantize` on the unquantized model",
        )
    if raw.get("kv_cache_scheme") is not None:
        raise CheckpointError(f"{where}: a kv_cache_scheme is set, which is not supported")
    listed = raw.get("config_groups")
    if not isinstance(listed, dict) or not all(isinstance(group, dict) for group in listed.values()) or not listed:
        raise CheckpointError(f"{where}: quantization_config has no config_groups", hint="the config is incomplete")
    groups = []
    for name, group in listed.items():
        place = f"{where}: config group {name}"
        groups.append((_parse_targets(group.get("targets"), place), _parse_scheme(group, place)))
    return QuantConfig(groups=tuple(groups), ignore=_parse_targets(raw.get("ignore"), f"{where}: ignore"))


def _parse_targets(raw: object, where: str) -> tuple[str, ...]:
    targets = [] if raw is None else raw
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{where}: targets are {raw!r}, expected a list of names")
    for target in targets:
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except re.error as error:
            raise CheckpointError(f"{where}: {target!r} is no regular expression: {error}") from error
    return tuple(targets)


def _parse_scheme(group: Mapping[str, Any], where: str) -> QuantScheme:
    weights = group.get("weights") or {}
    if group.get("input_activations") is not None or group.get("output_activations") is not None:
        raise CheckpointError(f"{where}: quantized activations are not supported")
    bits, strategy, group_size = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
    if (
        weights.get("type") != "int"
        or type(bits) is not int
        or bits not in (4, 8)
        or strategy not in ("group", "channel")
    ):
        raise CheckpointError(
            f"{where}: weights are {weights.get('type')}{bits} by {strategy}, expected int4 or int8 by group or channel"
        )
    if strategy == "group" and not (isinstance(group_size, int) and group_size > 0):
        raise CheckpointError(f"{where}: group_size is {group_size!r}, expected a positive integer")
    return QuantScheme(
        bits=bits,
        group_size=group_size if strategy == "group" else None,
        symmetric=bool(weights.get("symmetric", True)),
    )
