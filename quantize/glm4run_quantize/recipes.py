"""Which linear gets which scheme. A recipe is data: ordered rules of module-name patterns, first match wins."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path

from glm4run.checkpoint.layouts import linear_shapes
from glm4run.config import ModelConfig
from glm4run.errors import UsageError
from glm4run.qformat import GROUP_SIZES
from glm4run.quant_config import QuantScheme
from glm4run_quantize import named_recipes

HEAD = "lm_head"
DEFAULT_GROUP_SIZE = 128
# 13696 / 2 is no multiple of 128: at g32 vLLM can split down_proj over up to 4 devices, for 105 MB more.
INT4_DOWN_PROJ_GROUP_SIZE = 32


@dataclass(frozen=True)
class Rule:
    """Linears whose name matches `pattern` (a regular expression on the whole name; "Linear" is all) get `scheme`."""

    pattern: str
    scheme: QuantScheme

    def matches(self, module: str) -> bool:
        return self.pattern == "Linear" or re.fullmatch(self.pattern, module) is not None

    @property
    def target(self) -> str:
        """The pattern as compressed-tensors spells it."""
        return self.pattern if self.pattern in ("Linear", HEAD) else f"re:{self.pattern}$"


@dataclass(frozen=True)
class Recipe:
    """The rules, and what stays dense."""

    name: str
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...]

    def schemes(self, config: ModelConfig) -> dict[str, QuantScheme]:
        """Module name to scheme of every linear that is packed."""
        schemes = {}
        for module in linear_shapes(config):
            if module in self.ignore:
                continue
            rule = next((rule for rule in self.rules if rule.matches(module)), None)
            if rule is not None:
                schemes[module] = rule.scheme
        return schemes

    def config_groups(self) -> dict[str, object]:
        """The `config_groups` of quantization_config, in the order in which they must be tried."""
        return {
            f"group_{i}": {
                "targets": [rule.target],
                "weights": {
                    "num_bits": rule.scheme.bits,
                    "type": "int",
                    "symmetric": rule.scheme.symmetric,
                    "strategy": "group",
                    "group_size": rule.scheme.group_size,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
            for i, rule in enumerate(self.rules)
        }


def choose_recipe(
    config: ModelConfig, bits: int, *, group_size: int | None = None, head_bits: int = 8
) -> tuple[Recipe, list[str]]:
    """The default recipe of `bits`, or every linear at `group_size`; and notices about what was adapted.

    Raises:
        UsageError: bits or group size are not of the format, or an asked group size does not divide K somewhere.
    """
    if bits not in (4, 8):
        raise UsageError(f"{bits} bits were asked for", hint="4 or 8")
    if head_bits not in (4, 8, 16):
        raise UsageError(f"{head_bits} bits were asked for lm_head", hint="4, 8 or 16 (dense)")
    widths = {module: in_features for module, (_, in_features) in linear_shapes(config).items()}
    if head_bits == 16:
        widths.pop(HEAD, None)  # a tied head is the embedding, and has no width of its own
    if group_size is not None:
        _require_divides(group_size, widths)
    kinds = _kinds(widths)
    wanted = dict.fromkeys(kinds, group_size or DEFAULT_GROUP_SIZE)
    if group_size is None and bits == 4:
        wanted["down_proj"] = INT4_DOWN_PROJ_GROUP_SIZE
    notices = []
    chosen: dict[str, int] = {}
    for kind, in_features in kinds.items():
        chosen[kind] = _largest_dividing(in_features, wanted[kind], kind)
        if chosen[kind] != wanted[kind]:
            notices.append(f"{kind}: group size {chosen[kind]}, as {wanted[kind]} does not divide {in_features}")
    return _as_recipe(bits, group_size, head_bits, chosen), notices


def _as_recipe(bits: int, group_size: int | None, head_bits: int, chosen: Mapping[str, int]) -> Recipe:
    common = chosen["o_proj"]
    rules = []
    if HEAD in chosen:
        rules.append(Rule(HEAD, QuantScheme(head_bits, chosen[HEAD])))
    for kind in ("qkv", "gate_up_proj", "down_proj"):
        if chosen[kind] != common:
            # q, k and v share one scheme: engines that fuse them require it.
            pattern = r".*self_attn\.[qkv]_proj" if kind == "qkv" else rf".*mlp\.{kind}"
            rules.append(Rule(pattern, QuantScheme(bits, chosen[kind])))
    rules.append(Rule("Linear", QuantScheme(bits, common)))
    name = f"int{bits}" if group_size is None else f"int{bits}-g{group_size}"
    packed_head = HEAD in chosen
    suffix = "" if packed_head and head_bits == 8 else f"-head{head_bits if packed_head else 16}"
    return Recipe(name + suffix, tuple(rules), () if packed_head else (HEAD,))


def _kinds(widths: Mapping[str, int]) -> dict[str, int]:
    """K of each kind of linear."""
    kinds = {}
    for module, in_features in widths.items():
        kind = module.rpartition(".")[2]
        kinds["qkv" if kind in ("q_proj", "k_proj", "v_proj") else kind] = in_features
    return kinds


def _require_divides(group_size: int, widths: Mapping[str, int]) -> None:
    fitting = [g for g in GROUP_SIZES if all(width % g == 0 for width in widths.values())]
    hint = f"these fit every linear of this model: {', '.join(map(str, fitting)) or 'none'}"
    if group_size not in GROUP_SIZES:
        raise UsageError(f"group size {group_size} is not one of {', '.join(map(str, GROUP_SIZES))}", hint=hint)
    for module, width in widths.items():
        if width % group_size:
            raise UsageError(
                f"group size {group_size} does not divide the {width} input features of {module}", hint=hint
            )


def _largest_dividing(in_features: int, wanted: int, kind: str) -> int:
    fitting = [g for g in GROUP_SIZES if g <= wanted and in_features % g == 0]
    if not fitting:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise UsageError(f"{kind} has {in_features} input features, which none of {sizes} divides")
    return max(fitting)


def recipe_names() -> list[str]:
    """The built-in recipes that `--recipe` knows by name."""
    return sorted(p.name.removesuffix(".toml") for p in files(named_recipes).iterdir() if p.name.endswith(".toml"))


def load_recipe(name: str, config: ModelConfig) -> Recipe:
    """A built-in recipe by its name, or one from a TOML file.

    The file holds `[[rules]]`, of which the first whose `linears` (a shell pattern on module names, "*" is all)
    matches a linear gives it its `bits` and `group_size`: one, or several of which the first that divides is taken;
    and `ignore`, a list of patterns of linears that stay dense.

    Raises:
        UsageError: there is no such recipe, or it does not fit the format or the model.
    """
    if name in recipe_names():
        raw = (files(named_recipes) / f"{name}.toml").read_bytes()
        title = name
    else:
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"no recipe {name!r}", hint=f"a TOML file, or one of: {', '.join(recipe_names())}")
        raw, title = path.read_bytes(), path.stem
    try:
        data = tomllib.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"recipe {name} is not TOML: {error}") from error
    unknown = sorted(data.keys() - {"rules", "ignore"})
    if unknown or not isinstance(data.get("rules"), list) or not isinstance(data.get("ignore", []), list):
        raise UsageError(f"recipe {name}: expected [[rules]] and ignore, got {', '.join(unknown) or 'no rules'}")
    rules = [_toml_rule(rule, f"recipe {name}, rule {i + 1}") for i, rule in enumerate(data["rules"])]
    dense = tuple(str(pattern) for pattern in data.get("ignore", []))
    chosen: dict[str, QuantScheme] = {}
    for module, (_, in_features) in linear_shapes(config).items():
        if any(fnmatchcase(module, pattern) for pattern in dense):
            continue
        rule = next((rule for rule in rules if fnmatchcase(module, rule[0])), None)
        if rule is None:
            continue
        _, bits, sizes = rule
        size = next((g for g in sizes if in_features % g == 0), None)
        if size is None:
            raise UsageError(f"recipe {name}: none of {sizes} divides the {in_features} input features of {module}")
        chosen[module] = QuantScheme(bits, size)
    if not chosen:
        raise UsageError(f"recipe {name} packs no linear of this model")
    return recipe_of(title, chosen, config)


def _toml_rule(rule: object, where: str) -> tuple[str, int, list[int]]:
    if not isinstance(rule, dict) or rule.keys() != {"linears", "bits", "group_size"}:
        raise UsageError(f"{where}: expected linears, bits and group_size")
    sizes = rule["group_size"] if isinstance(rule["group_size"], list) else [rule["group_size"]]
    if rule["bits"] not in (4, 8) or not sizes or any(size not in GROUP_SIZES for size in sizes):
        raise UsageError(f"{where}: bits are 4 or 8, group sizes {', '.join(map(str, GROUP_SIZES))}")
    return str(rule["linears"]), rule["bits"], sizes


def recipe_of(name: str, schemes: Mapping[str, QuantScheme], config: ModelConfig) -> Recipe:
    """The recipe that gives each linear just the scheme of `schemes`; those without one stay dense.

    Linears of one scheme share a rule, so that a config stays readable.
    """
    for layer in range(config.num_hidden_layers):
        fused = {schemes.get(f"model.layers.{layer}.self_attn.{part}_proj") for part in "qkv"}
        if len(fused) > 1:
            raise UsageError(f"q, k and v of layer {layer} have different schemes", hint="engines fuse the three")
    inner = [scheme for module, scheme in schemes.items() if module != HEAD]
    common = max(set(inner), key=lambda s: (inner.count(s), -s.bits)) if inner else None
    rules: list[Rule] = []
    if HEAD in schemes:
        rules.append(Rule(HEAD, schemes[HEAD]))
    by_kind: dict[tuple[str, QuantScheme], list[int]] = {}
    for module, scheme in schemes.items():
        if module != HEAD and scheme != common:
            _, _, layer_text, kind = module.split(".", 3)
            kind = re.sub(r"[qkv]_proj", "[qkv]_proj", kind)
            layers = by_kind.setdefault((kind, scheme), [])
            if int(layer_text) not in layers:
                layers.append(int(layer_text))
    for (kind, scheme), layers in by_kind.items():
        every = len(layers) == config.num_hidden_layers
        which = r"\d+" if every else f"({'|'.join(map(str, layers))})"
        rules.append(Rule(rf"model\.layers\.{which}\.{kind.replace('.', chr(92) + '.')}", scheme))
    if common is not None:
        rules.append(Rule("Linear", common))
    dense = tuple(module for module in linear_shapes(config) if module not in schemes)
    # A tied head is no linear of its own, but engines see one.
    ignore = dense if HEAD in schemes or HEAD in dense else (*dense, HEAD)
    return Recipe(name, tuple(rules), ignore)
