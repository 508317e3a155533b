"""How the linears of a model are packed: schemes, which linear has which, and their spelling in a `config.json`.

Source: the compressed-tensors `pack-quantized` configuration format; the `BitsAndBytesConfig` of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from glm4run.errors import CheckpointError, UsageError

# int: this project's packed format. The others are other libraries': bitsandbytes' three, then optimum-quanto's two.
Kind = Literal["int", "nf4", "fp4", "llm_int8", "qint8", "qint4"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BITSANDBYTES_KINDS: tuple[Kind, ...] = ("nf4", "fp4", "llm_int8")
QUANTO_KINDS: tuple[Kind, ...] = ("qint8", "qint4")
# What `--quantize-on-load` takes, and which scheme it stands for.
ON_LOAD: Mapping[str, Kind] = {"nf4": "nf4", "fp4": "fp4", "int8": "llm_int8", "qint8": "qint8", "qint4": "qint4"}
BITSANDBYTES_BLOCK = 64  # weights that share a scale; what transformers always takes
LLM_INT8_THRESHOLD = 6.0  # columns with a larger activation are multiplied in 16 bits. Source: arXiv 2208.07339
_QUANTO_GROUP, _QUANTO_GROUP_STEP = 128, 32


@dataclass(frozen=True)
class QuantScheme:
    """How one linear is packed: `bits` per weight, `group_size` along K (None: one scale per output row)."""

    bits: int
    group_size: int | None
    symmetric: bool = True
    kind: Kind = "int"
    nested: bool = False  # bitsandbytes' scales are stored quantized once more

    def describe(self) -> str:
        group = "per channel" if self.group_size is None else f"g{self.group_size}"
        if self.kind != "int":
            return f"{self.kind} {group}"
        return f"int{self.bits} {group}" + ("" if self.symmetric else " asymmetric")


def on_load_scheme(name: str, in_features: int) -> QuantScheme:
    """The scheme of a linear with `in_features` K that is quantized while it is loaded, as its library chooses it.

    Raises:
        UsageError: an unknown name.
    """
    if name not in ON_LOAD:
        raise UsageError(f"quantize-on-load is {name!r}", hint=f"one of: {', '.join(ON_LOAD)}")
    kind = ON_LOAD[name]
    if kind in ("nf4", "fp4"):
        return QuantScheme(4, BITSANDBYTES_BLOCK, kind=kind)
    if kind == "qint4":
        return QuantScheme(4, _quanto_group(in_features), symmetric=False, kind=kind)
    return QuantScheme(8, None, kind=kind)


def _quanto_group(in_features: int) -> int | None:
    """Source: `QModuleMixin.__init__` of optimum-quanto 0.2.7."""
    group = _QUANTO_GROUP
    if in_features <= group:
        return None
    while in_features % group and group > _QUANTO_GROUP_STEP:
        group -= _QUANTO_GROUP_STEP
    return group if in_features % group == 0 else None


@dataclass(frozen=True)
class QuantConfig:
    """Which linears of a folder are quantized, and how: its `quantization_config`."""

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
    if raw.get("quant_method") == "bitsandbytes":
        return _parse_bitsandbytes(raw, where)
    if raw.get("quant_method") != "compressed-tensors" or raw.get("format") != "pack-quantized":
        raise CheckpointError(
            f"{where}: weights are quantized as {raw.get('quant_method')!r} / {raw.get('format')!r}, "
            "expected 'compressed-tensors' / 'pack-quantized', or 'bitsandbytes'",
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


def _parse_bitsandbytes(raw: Mapping[str, Any], where: str) -> QuantConfig:
    """What transformers writes for a model that it loaded with bitsandbytes and saved."""
    four, eight = raw.get("load_in_4bit") is True, raw.get("load_in_8bit") is True
    if four == eight:
        raise CheckpointError(f"{where}: bitsandbytes with load_in_4bit {four} and load_in_8bit {eight}, expected one")
    only: dict[str, object] = {"bnb_4bit_quant_storage": "uint8", "llm_int8_has_fp16_weight": False}
    if eight:
        only["llm_int8_threshold"] = LLM_INT8_THRESHOLD
    for key, expected in only.items():
        if raw.get(key, expected) != expected:
            raise CheckpointError(
                f"{where}: {key} is {raw[key]!r}, expected {expected!r}", hint="save the model with that setting"
            )
    kind = raw.get("bnb_4bit_quant_type", "fp4") if four else "llm_int8"
    if kind not in BITSANDBYTES_KINDS:
        raise CheckpointError(f"{where}: bnb_4bit_quant_type is {kind!r}, expected 'nf4' or 'fp4'")
    nested = bool(raw.get("bnb_4bit_use_double_quant", False))
    scheme = (
        QuantScheme(4, BITSANDBYTES_BLOCK, kind=kind, nested=nested) if four else QuantScheme(8, None, kind="llm_int8")
    )
    skipped = raw.get("llm_int8_skip_modules")
    # transformers leaves the head alone by itself, and a module with everything below it where it is named.
    names = ("lm_head",) if skipped is None else _parse_targets(skipped, f"{where}: llm_int8_skip_modules")
    return QuantConfig(
        groups=((("Linear",), scheme),),
        ignore=tuple(rf"re:(.*\.)?{re.escape(name)}(\..*)?$" for name in names),
    )


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
