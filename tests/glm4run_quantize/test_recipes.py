"""Which linear gets which scheme, in words that the runtime, transformers and vLLM read the same way."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from glm4run.cards import load_cards
from glm4run.checkpoint.layouts import linear_shapes, quantized_linears
from glm4run.config import ModelConfig, parse_config
from glm4run.errors import UsageError
from glm4run.quant_config import QuantScheme
from glm4run_quantize.recipes import Recipe, choose_recipe
from tests.builders import raw_config

NINE_B = load_cards()["glm-4-9b-chat"].config


def config_of(**sizes: Any) -> ModelConfig:
    return parse_config(raw_config(**sizes))


def read_back(recipe: Recipe, raw: dict[str, Any]) -> dict[str, QuantScheme]:
    """The schemes that a reader of the written config finds."""
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": list(recipe.ignore),
        "config_groups": recipe.config_groups(),
    }
    return quantized_linears(parse_config(raw | {"quantization_config": quantization}))


def by_kind(config: ModelConfig, bits: int, **options: Any) -> dict[str, QuantScheme]:
    schemes = choose_recipe(config, bits, **options)[0].schemes(config)
    return {module.rpartition(".")[2]: scheme for module, scheme in schemes.items()}


def test_default_int4_recipe_of_the_9b() -> None:
    recipe, notices = choose_recipe(NINE_B, 4)
    assert (recipe.name, recipe.ignore, notices) == ("int4", (), [])
    kinds = by_kind(NINE_B, 4)
    assert kinds.pop("down_proj") == QuantScheme(4, 32)
    assert kinds.pop("lm_head") == QuantScheme(8, 128)
    assert set(kinds) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj"}
    assert set(kinds.values()) == {QuantScheme(4, 128)}
    assert len(recipe.schemes(NINE_B)) == 40 * 6 + 1


def test_groups_of_the_default_recipe_as_written() -> None:
    groups: dict[str, Any] = choose_recipe(NINE_B, 4)[0].config_groups()
    assert [group["targets"] for group in groups.values()] == [["lm_head"], [r"re:.*mlp\.down_proj$"], ["Linear"]]
    assert groups["group_1"] == {
        "targets": [r"re:.*mlp\.down_proj$"],
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": 32,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }


def test_default_int8_recipe_of_the_9b() -> None:
    assert set(by_kind(NINE_B, 8).values()) == {QuantScheme(8, 128)}
    assert choose_recipe(NINE_B, 8)[0].name == "int8"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_asked_group_size_is_everywhere(bits: int, group_size: int) -> None:
    kinds = by_kind(NINE_B, bits, group_size=group_size)
    assert kinds.pop("lm_head") == QuantScheme(8, group_size)
    assert set(kinds.values()) == {QuantScheme(bits, group_size)}
    assert choose_recipe(NINE_B, bits, group_size=group_size)[0].name == f"int{bits}-g{group_size}"


def test_dense_head() -> None:
    small, _ = choose_recipe(NINE_B, 4, group_size=128, head_bits=4)
    assert small.name == "int4-g128-head4"
    assert set(small.schemes(NINE_B).values()) == {QuantScheme(4, 128)}
    recipe, _ = choose_recipe(NINE_B, 4, head_bits=16)
    assert (recipe.name, recipe.ignore) == ("int4-head16", ("lm_head",))
    assert "lm_head" not in recipe.schemes(NINE_B)
    assert [group["targets"] for group in recipe.config_groups().values()][-1] == ["Linear"]  # type: ignore[index]


def test_group_that_does_not_divide_takes_the_largest_that_does_and_says_so() -> None:
    config = config_of(hidden_size=192, intermediate_size=96, num_attention_heads=4, head_dim=40)
    kinds = by_kind(config, 8)
    assert {kind: scheme.group_size for kind, scheme in kinds.items()} == {
        "q_proj": 64,
        "k_proj": 64,
        "v_proj": 64,
        "o_proj": 32,
        "gate_up_proj": 64,
        "down_proj": 32,
        "lm_head": 64,
    }
    _, notices = choose_recipe(config, 8)
    assert "down_proj: group size 32, as 128 does not divide 96" in notices
    assert len(notices) == 5  # qkv, o, gate_up, down, head


def test_asked_group_that_does_not_divide_is_an_error_that_lists_what_would() -> None:
    with pytest.raises(
        UsageError, match=r"group size 64 does not divide the 160 input features of .*down_proj"
    ) as caught:
        choose_recipe(config_of(), 4, group_size=64)
    assert caught.value.hint == "these fit every linear of this model: 32"


@pytest.mark.parametrize("group_size", [0, -32, 1, 16, 33, 256, 13696])
def test_group_size_outside_the_format_is_an_error_that_lists_what_fits(group_size: int) -> None:
    with pytest.raises(UsageError, match=f"group size {group_size} is not one of 32, 64, 128") as caught:
        choose_recipe(NINE_B, 4, group_size=group_size)
    assert caught.value.hint == "these fit every linear of this model: 32, 64, 128"


def test_width_that_nothing_divides_is_an_error() -> None:
    with pytest.raises(UsageError, match="down_proj has 100 input features"):
        choose_recipe(config_of(intermediate_size=100), 4)


@pytest.mark.parametrize(("bits", "head_bits"), [(3, 8), (16, 8), (0, 8), (4, 2), (4, 0)])
def test_other_bits_are_usage_errors(bits: int, head_bits: int) -> None:
    with pytest.raises(UsageError, match="bits were asked"):
        choose_recipe(NINE_B, bits, head_bits=head_bits)


@given(
    st.sampled_from([4, 8]),
    st.sampled_from([None, 32, 64, 128]),
    st.sampled_from([8, 16]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([32, 64, 96]),
)
def test_written_groups_mean_what_was_done(
    bits: int, group_size: int | None, head_bits: int, hidden: int, ffn: int, head_dim: int
) -> None:
    raw = raw_config(hidden_size=32 * hidden, intermediate_size=32 * ffn, head_dim=head_dim)
    config = parse_config(raw)
    try:
        recipe, _ = choose_recipe(config, bits, group_size=group_size, head_bits=head_bits)
    except UsageError:
        assume(False)
        return
    schemes = recipe.schemes(config)
    assert schemes == read_back(recipe, raw)
    assert schemes.keys() | set(recipe.ignore) == linear_shapes(config).keys()
    for module, scheme in schemes.items():
        assert scheme.group_size is not None and linear_shapes(config)[module][1] % scheme.group_size == 0
    for layer in range(2):  # engines fuse q, k and v
        assert len({schemes[f"model.layers.{layer}.self_attn.{part}_proj"] for part in "qkv"}) == 1
