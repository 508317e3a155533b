"""Every member's config.json is read as published, and no trap of the family's configs passes silently."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from glm4run.config import ModelConfig, RopeScaling, parse_config, read_config, read_json
from glm4run.errors import CheckpointError, DoesNotFitError, Glm4RunError, UsageError
from glm4run.quant_config import QuantScheme

Raw = dict[str, Any]

STOP_IDS = [151329, 151336, 151338]

# The published files, reduced to the keys that carry a fact. `None` removes a key.
ORIGINAL: Raw = {
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": 13696,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1.5625e-07,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 40,
    "original_rope": True,
    "padded_vocab_size": 151552,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 8192,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "eos_token_id": STOP_IDS,
    "pad_token_id": 151329,
}
HF: Raw = {
    "model_type": "glm",
    "attention_bias": True,
    "eos_token_id": STOP_IDS,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "pad_token_id": 151329,
    "rms_norm_eps": 1.5625e-07,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151552,
}


def original(**changes: Any) -> Raw:
    return _changed(ORIGINAL, changes)


def hf(**changes: Any) -> Raw:
    return _changed(HF, changes)


def glm4(**changes: Any) -> Raw:
    return hf(**{"model_type": "glm4", "max_position_embeddings": 32768, "rms_norm_eps": 1e-05} | changes)


def _changed(base: Raw, changes: Raw) -> Raw:
    return {key: value for key, value in (base | changes).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Member:
    """One row of the family's table of facts."""

    file: str
    stub: Raw
    model_type: str
    kv_heads: int
    context: int
    theta: float
    eps: float
    parameters: int  # Hugging Face layout
    notices: int = 0


MEMBERS = {
    "base": Member(
        "glm-4-9b.config.reconstructed.json", original(), "chatglm", 2, 8192, 1e4, 1.5625e-07, 9_399_951_360
    ),
    "chat": Member(
        "glm-4-9b-chat.config.json",
        original(seq_length=131072, rope_ratio=500, num_hidden_layers=40),
        "chatglm", 2, 131072, 5e6, 1.5625e-07, 9_399_951_360,
    ),
    "chat-1m": Member(
        "glm-4-9b-chat-1m.config.json",
        original(seq_length=1048576, rope_ratio=10000, multi_query_group_num=4, num_hidden_layers=40),
        "chatglm", 4, 1048576, 1e8, 1.5625e-07, 9_483_857_920,
    ),
    "chat-hf": Member(
        "glm-4-9b-chat-hf.config.json", hf(), "glm", 2, 131072, 5e6, 1.5625e-07, 9_399_951_360, notices=1
    ),
    "chat-1m-hf": Member(
        "glm-4-9b-chat-1m-hf.config.json",
        hf(max_position_embeddings=1048576, num_key_value_heads=4),
        "glm", 4, 1048576, 1e8, 1.5625e-07, 9_483_857_920, notices=1,
    ),
    "0414": Member("GLM-4-9B-0414.config.json", glm4(), "glm4", 2, 32768, 1e4, 1e-05, 9_400_279_040),
    "4v": Member("glm-4v-9b.config.json", original(), "chatglm", 2, 8192, 1e4, 1.5625e-07, 9_399_951_360),
}  # fmt: skip
each_member = pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS.keys())


def assert_is_member(config: ModelConfig, member: Member) -> None:
    expected = ModelConfig(
        model_type=member.model_type,
        hidden_size=4096,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=member.kv_heads,
        head_dim=128,
        intermediate_size=13696,
        vocab_size=151552,
        max_position_embeddings=member.context,
        rms_norm_eps=member.eps,
        rope_theta=member.theta,
        partial_rotary_factor=0.5,
        rope_scaling=None,
        attention_bias=True,
        tie_word_embeddings=False,
        eos_token_id=tuple(STOP_IDS),
        pad_token_id=151329,
        torch_dtype="bfloat16",
        quantization=None,
    )
    assert config == expected
    assert config.rotary_dim == 64
    assert config.has_sandwich_norms is (member.model_type == "glm4")
    assert config.num_parameters == member.parameters
    assert len(config.notices) == member.notices


@each_member
def test_published_file(member: Member, shared: Path) -> None:
    assert_is_member(parse_config(read_json(shared / "data" / "configs" / member.file)), member)


@each_member
def test_inline_stub_of_the_published_file(member: Member) -> None:
    assert_is_member(parse_config(member.stub), member)


def test_every_published_file_has_a_member(shared: Path) -> None:
    files = {path.name for path in (shared / "data" / "configs").glob("*.json")}
    assert files == {member.file for member in MEMBERS.values()}


@pytest.mark.parametrize(
    ("member", "layout"),
    [
        ("base", "glm-4-9b_and_chat.remote-code"),
        ("chat", "glm-4-9b_and_chat.remote-code"),
        ("chat-1m", "glm-4-9b-chat-1m.remote-code"),
        ("chat-hf", "glm-4-9b-chat-hf"),
        ("chat-1m-hf", "glm-4-9b-chat-1m-hf"),
        ("0414", "GLM-4-9B-0414_GLM-Z1-9B-0414"),
    ],
)
def test_num_parameters_is_the_layouts_count(member: str, layout: str, shared: Path) -> None:
    published = json.loads((shared / "data" / "layouts" / f"{layout}.shapes.json").read_text())
    buffers = sum(shape[0] for name, shape in published["tensors"].items() if name.endswith("inv_freq"))
    assert buffers == (32 if layout.endswith("remote-code") else 0)
    assert parse_config(MEMBERS[member].stub).num_parameters == published["params"] - buffers


def test_num_parameters_counts_a_tied_head_once_and_no_absent_bias() -> None:
    config = parse_config(hf())
    tied = parse_config(hf(tie_word_embeddings=True))
    assert config.num_parameters - tied.num_parameters == 151552 * 4096
    bare = parse_config(hf(attention_bias=False))
    assert config.num_parameters - bare.num_parameters == 40 * (4096 + 2 * 256)


# RoPE: partial factor, base


@pytest.mark.parametrize("raw", [original(), hf(), glm4()], ids=["chatglm", "glm", "glm4"])
def test_missing_partial_rotary_factor_is_a_half(raw: Raw) -> None:
    assert "partial_rotary_factor" not in raw
    assert parse_config(raw).partial_rotary_factor == 0.5
    assert parse_config(raw | {"partial_rotary_factor": 0.25}).rotary_dim == 32
    nested = {"rope_theta": 1e6, "partial_rotary_factor": 0.75}
    assert parse_config(raw | {"partial_rotary_factor": 0.25, "rope_parameters": nested}).rotary_dim == 96


@pytest.mark.parametrize(("ratio", "theta"), [(1, 1e4), (500, 5e6), (10000, 1e8), (0.5, 5e3)])
def test_rope_ratio_multiplies_the_base(ratio: float, theta: float) -> None:
    assert parse_config(original(rope_ratio=ratio)).rope_theta == theta


def test_nested_rope_parameters_win_and_a_mismatch_is_told() -> None:
    nested = {"rope_type": "default", "rope_theta": 7e5, "partial_rotary_factor": 0.5}
    config = parse_config(glm4(rope_parameters=nested))
    assert config.rope_theta == 7e5
    assert config.rope_scaling is None
    assert len(config.notices) == 1
    assert "700000" in config.notices[0]
    assert "10000" in config.notices[0]
    config = parse_config(original(rope_ratio=500, rope_parameters=nested))
    assert config.rope_theta == 7e5
    assert len(config.notices) == 1


def test_spellings_that_agree_are_not_told() -> None:
    config = parse_config(glm4(rope_parameters={"rope_theta": 10000.0}))
    assert (config.rope_theta, config.notices) == (1e4, ())
    config = parse_config(original(rope_ratio=500, rope_theta=5e6))
    assert (config.rope_theta, config.notices) == (5e6, ())


def test_no_base_at_all_is_ten_thousand() -> None:
    assert parse_config(glm4(rope_theta=None)).rope_theta == 1e4
    assert parse_config(original()).rope_theta == 1e4


@pytest.mark.parametrize(("context", "theta"), [(131072, 5e6), (1048576, 1e8)])
@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 10000.0},
        {"rope_theta": 10000},
        {"rope_theta": None},
        {"rope_parameters": {"rope_theta": 10000.0}},
    ],
    ids=["float", "int", "absent", "nested"],
)
def test_the_hf_copies_wrong_theta_is_corrected_and_told(context: int, theta: float, spelling: Raw) -> None:
    config = parse_config(hf(max_position_embeddings=context, **spelling))
    assert config.rope_theta == theta
    assert len(config.notices) == 1
    assert f"{theta:g}" in config.notices[0]
    assert "--rope-theta" in config.notices[0]


@pytest.mark.parametrize(
    "raw",
    [
        hf(hidden_size=64, head_dim=16, num_attention_heads=4),
        hf(hidden_size=2048),
        hf(max_position_embeddings=8192),
        glm4(max_position_embeddings=131072),
    ],
    ids=["tiny", "other-hidden", "other-context", "glm4"],
)
def test_theta_is_corrected_only_for_the_two_copies(raw: Raw) -> None:
    config = parse_config(raw)
    assert config.rope_theta == 1e4
    assert config.notices == ()


def test_a_theta_that_is_already_right_or_chosen_is_kept() -> None:
    for theta in (5e6, 2e4):
        config = parse_config(hf(rope_theta=theta))
        assert config.rope_theta == theta
        assert config.notices == ()


# YaRN


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_yarn_in_every_spelling(spelling: str, key: str) -> None:
    yarn = {spelling: "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = parse_config(glm4(**{key: yarn}))
    assert config.rope_scaling == RopeScaling(factor=4.0, original_max_position_embeddings=32768)
    assert config.rope_theta == 1e4


def test_yarn_keeps_its_details() -> None:
    yarn = {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 100}
    details = {"beta_fast": 16, "beta_slow": 2.0, "attention_factor": 1.5}
    config = parse_config(glm4(rope_scaling=yarn | details))
    assert config.rope_scaling == RopeScaling(2.0, 100, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5)


def test_yarn_without_its_native_length_takes_the_models() -> None:
    config = parse_config(glm4(rope_scaling={"type": "yarn", "factor": 4.0}))
    assert config.rope_scaling == RopeScaling(factor=4.0, original_max_position_embeddings=32768)


@pytest.mark.parametrize("stated", [32768, 131072])
def test_yarn_in_the_file_stretches_the_context_as_the_model_card_says(stated: int) -> None:
    """The card of the 0414 series says to add `rope_scaling` and nothing else; 32768 x 4 tokens must then be usable."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert parse_config(glm4(max_position_embeddings=stated, rope_scaling=yarn)).max_position_embeddings == 131072


def test_yarn_without_a_factor_is_what_the_two_lengths_say_or_refused() -> None:
    yarn = {"type": "yarn", "original_max_position_embeddings": 32768}
    config = parse_config(glm4(max_position_embeddings=131072, rope_scaling=yarn))
    assert config.rope_scaling == RopeScaling(factor=4.0, original_max_position_embeddings=32768)
    assert config.max_position_embeddings == 131072
    for scaling in ({"type": "yarn"}, yarn):  # the lengths are the same: nothing says how far
        with pytest.raises(CheckpointError, match="factor"):
            parse_config(glm4(rope_scaling=scaling))


@pytest.mark.parametrize("native", [-1, "32k", True, 32768.0])
def test_yarn_of_a_native_length_that_is_none_is_refused(native: object) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": native}
    with pytest.raises(CheckpointError, match="original_max_position_embeddings"):
        parse_config(glm4(rope_scaling=yarn))


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "longrope", "llama3"])
def test_other_rope_scaling_is_refused(key: str, kind: str) -> None:
    with pytest.raises(CheckpointError, match=kind) as caught:
        parse_config(glm4(rope_scaling={key: kind, "factor": 4.0}))
    assert caught.value.hint is not None
    assert "yarn" in caught.value.hint


def test_default_rope_scaling_is_none() -> None:
    assert parse_config(glm4(rope_scaling={"rope_type": "default"})).rope_scaling is None
    assert parse_config(glm4(rope_parameters={"rope_type": "default", "rope_theta": 1e4})).rope_scaling is None


def test_with_yarn_stretches_the_native_context() -> None:
    config = parse_config(glm4())
    stretched = config.with_yarn()
    assert stretched.max_position_embeddings == 131072
    assert stretched.rope_scaling == RopeScaling(factor=4.0, original_max_position_embeddings=32768)
    assert config.rope_scaling is None


# Sizes


def test_num_layers_in_every_spelling() -> None:
    assert parse_config(original()).num_hidden_layers == 40
    assert parse_config(original(num_layers=None, num_hidden_layers=40)).num_hidden_layers == 40
    with pytest.raises(CheckpointError, match=r"num_layers.*num_hidden_layers"):
        parse_config(original(num_layers=40, num_hidden_layers=28))


def test_context_and_vocabulary_that_contradict_are_refused() -> None:
    with pytest.raises(CheckpointError, match="seq_length"):
        parse_config(original(max_position_embeddings=4096))
    with pytest.raises(CheckpointError, match="padded_vocab_size"):
        parse_config(original(vocab_size=65024))


@pytest.mark.parametrize(
    "raw", [original(multi_query_group_num=3), hf(num_key_value_heads=5), hf(num_key_value_heads=64)]
)
def test_heads_must_divide_by_kv_heads(raw: Raw) -> None:
    with pytest.raises(CheckpointError, match="KV heads"):
        parse_config(raw)


@pytest.mark.parametrize("factor", [0.0, -0.5, 1.5, 33 / 128])
def test_the_rotated_share_must_be_even_and_inside_the_head(factor: float) -> None:
    with pytest.raises(CheckpointError, match="RoPE would turn"):
        parse_config(hf(partial_rotary_factor=factor))


def test_head_dim_is_independent_of_hidden_size() -> None:
    config = parse_config(hf(hidden_size=48, num_attention_heads=4, num_key_value_heads=4, head_dim=32))
    assert (config.head_dim, config.rotary_dim) == (32, 16)
    assert parse_config(hf(head_dim=None)).head_dim == 128


def test_kv_heads_default_to_all_heads() -> None:
    assert parse_config(hf(num_key_value_heads=None)).num_key_value_heads == 32
    assert parse_config(original(multi_query_attention=False)).num_key_value_heads == 32


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "num_layers", "num_attention_heads", "kv_channels", "ffn_hidden_size", "padded_vocab_size",
     "seq_length", "layernorm_epsilon", "multi_query_group_num"],
)  # fmt: skip
def test_original_config_without_a_size_is_refused_by_name(key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        parse_config(original(**{key: None}))


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
     "max_position_embeddings", "rms_norm_eps"],
)  # fmt: skip
def test_hf_config_without_a_size_is_refused_by_name(key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        parse_config(hf(**{key: None}))


@pytest.mark.parametrize("value", [0, -1, 40.0, "40", True, [40], {"n": 40}], ids=repr)
def test_a_size_that_is_no_positive_integer_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        parse_config(hf(num_hidden_layers=value))


@pytest.mark.parametrize("value", [0, -1e-5, "1e-5", True, float("nan"), float("inf")], ids=repr)
def test_an_eps_that_is_no_positive_number_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match="rms_norm_eps"):
        parse_config(hf(rms_norm_eps=value))


@pytest.mark.parametrize("value", [0, -1.0, "10000", float("nan"), float("inf")], ids=repr)
def test_a_theta_that_is_no_positive_number_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match="rope_theta"):
        parse_config(glm4(rope_theta=value))


@pytest.mark.parametrize("value", ["yarn", 4.0, ["yarn"]], ids=repr)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_tables_that_are_no_objects_are_refused(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=key):
        parse_config(glm4(**{key: value}))


@pytest.mark.parametrize("factor", [0, -4.0, float("nan")], ids=repr)
def test_a_yarn_factor_that_is_not_positive_is_refused(factor: float) -> None:
    with pytest.raises(CheckpointError, match="factor"):
        parse_config(glm4(rope_scaling={"type": "yarn", "factor": factor, "original_max_position_embeddings": 32768}))


# Stop ids


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        (151329, (151329,)),
        ([151329], (151329,)),
        (STOP_IDS, tuple(STOP_IDS)),
        (-1, ()),
        ([-1], ()),
        ([151336, -1], (151336,)),
        (None, ()),
        ([], ()),
        (0, (0,)),
    ],
)
def test_stop_ids(value: object, ids: tuple[int, ...]) -> None:
    assert parse_config(HF | {"eos_token_id": value}).eos_token_id == ids


def test_a_stop_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(CheckpointError, match="151552"):
        parse_config(hf(eos_token_id=[151329, 151552]))


@pytest.mark.parametrize(("value", "pad"), [(151329, 151329), (-1, None), (None, None), (0, 0)])
def test_pad_id(value: int | None, pad: int | None) -> None:
    assert parse_config(HF | {"pad_token_id": value}).pad_token_id == pad


# What is not this family


@pytest.mark.parametrize("model_type", ["llama", "glm4_moe", "GLM4", "", None, 4])
def test_an_unknown_architecture_is_refused_with_the_known_ones(model_type: object) -> None:
    with pytest.raises(CheckpointError, match="chatglm, glm, glm4") as caught:
        parse_config(HF | {"model_type": model_type}, where="/models/x/config.json")
    assert "/models/x/config.json" in caught.value.message
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rmsnorm", False),
        ("post_layer_norm", False),
        ("add_bias_linear", True),
        ("apply_residual_connection_post_layernorm", True),
        ("original_rope", False),
    ],
)
def test_switches_of_other_chatglm_models_are_refused(key: str, value: bool) -> None:
    with pytest.raises(CheckpointError, match=key):
        parse_config(original(**{key: value}))


def test_another_activation_is_refused() -> None:
    with pytest.raises(CheckpointError, match="gelu"):
        parse_config(hf(hidden_act="gelu"))


def test_bias_is_read_not_assumed() -> None:
    assert parse_config(hf(attention_bias=None)).attention_bias is True
    assert parse_config(hf(attention_bias=False)).attention_bias is False
    assert parse_config(original(add_qkv_bias=False)).attention_bias is False


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_dtype_in_both_spellings(key: str) -> None:
    assert parse_config(hf(**({"torch_dtype": None} | {key: "float16"}))).torch_dtype == "float16"


# quantization_config


def group(*targets: str, bits: int = 4, size: int | None = 128, **weights: Any) -> Raw:
    scheme = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if size is None else "group",
        "group_size": size,
        "dynamic": False,
    }
    return {
        "targets": list(targets),
        "weights": scheme | weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }


def quantized(*groups: Raw, **changes: Any) -> Raw:
    table = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {f"group_{i}": g for i, g in enumerate(groups)},
    }
    return glm4(quantization_config=table | changes)


DOWN_4 = "model.layers.4.mlp.down_proj"
GATE_UP = "model.layers.4.mlp.gate_up_proj"


def test_groups_match_in_the_order_of_the_file() -> None:
    fine = group(r"re:.*mlp\.down_proj$", size=32)
    quantization = parse_config(quantized(fine, group("Linear"))).quantization
    assert quantization is not None
    assert [targets for targets, _ in quantization.groups] == [(r"re:.*mlp\.down_proj$",), ("Linear",)]
    assert quantization.scheme_for(DOWN_4) == QuantScheme(4, 32)
    assert quantization.scheme_for(GATE_UP) == QuantScheme(4, 128)
    assert quantization.scheme_for("lm_head") is None
    reversed_order = parse_config(quantized(group("Linear"), fine)).quantization
    assert reversed_order is not None
    assert reversed_order.scheme_for(DOWN_4) == QuantScheme(4, 128)


def test_a_regex_is_anchored_at_the_start_as_the_library_does() -> None:
    quantization = parse_config(quantized(group(r"re:mlp\.down_proj$"), group(r"re:model\.layers\.1\."))).quantization
    assert quantization is not None
    assert quantization.scheme_for(DOWN_4) is None
    assert quantization.scheme_for("model.layers.1.self_attn.o_proj") == QuantScheme(4, 128)
    assert quantization.scheme_for("model.layers.10.self_attn.o_proj") is None


def test_a_plain_target_is_a_whole_name() -> None:
    quantization = parse_config(quantized(group("lm_head", bits=8), ignore=[])).quantization
    assert quantization is not None
    assert quantization.scheme_for("lm_head") == QuantScheme(8, 128)
    assert quantization.scheme_for("model.lm_head") is None
    assert quantization.scheme_for(DOWN_4) is None


def test_ignore_wins_and_takes_regexes() -> None:
    ignore = ["lm_head", r"re:model\.layers\.4\..*"]
    quantization = parse_config(quantized(group("lm_head"), group("Linear"), ignore=ignore)).quantization
    assert quantization is not None
    assert quantization.scheme_for("lm_head") is None
    assert quantization.scheme_for(DOWN_4) is None
    assert quantization.scheme_for("model.layers.5.mlp.down_proj") == QuantScheme(4, 128)


def test_schemes_are_read_in_full() -> None:
    raw = quantized(group("Linear", bits=8, size=None), group("lm_head", bits=4, size=64, symmetric=False), ignore=None)
    quantization = parse_config(raw).quantization
    assert quantization is not None
    assert [scheme for _, scheme in quantization.groups] == [QuantScheme(8, None, True), QuantScheme(4, 64, False)]
    assert [s.describe() for _, s in quantization.groups] == ["int8 per channel", "int4 g64 asymmetric"]
    assert quantization.ignore == ()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "float-quantized"),
        ({"bits": 4}, "None"),
    ],
)
def test_other_formats_are_refused_by_name(table: Raw, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        parse_config(glm4(quantization_config=table))
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    "bad",
    [
        group("Linear", bits=2),
        group("Linear", type="float"),
        group("Linear", strategy="tensor"),
        group("Linear", strategy="group", group_size=None),
        group("Linear", group_size=-1),
        group("Linear", group_size=0),
        group("Linear", group_size=128.0),
        group("Linear") | {"input_activations": {"num_bits": 8}},
        group("Linear") | {"output_activations": {"num_bits": 8}},
        group("Linear") | {"weights": None},
    ],
)
def test_schemes_that_cannot_run_are_refused_with_their_group(bad: Raw) -> None:
    with pytest.raises(CheckpointError, match="group_1"):
        parse_config(quantized(group("lm_head"), bad))


def test_a_quantized_kv_cache_is_refused() -> None:
    with pytest.raises(CheckpointError, match="kv_cache_scheme"):
        parse_config(quantized(group("Linear"), kv_cache_scheme={"num_bits": 8}))


def test_a_broken_regex_is_an_error_of_the_config() -> None:
    with pytest.raises(CheckpointError):
        config = parse_config(quantized(group("re:*down_proj")))
        assert config.quantization is not None
        config.quantization.scheme_for(DOWN_4)


def test_a_quantization_config_that_is_no_object_is_refused() -> None:
    with pytest.raises(CheckpointError):
        parse_config(glm4(quantization_config="int4"))


def test_a_quantization_config_without_groups_is_refused() -> None:
    with pytest.raises(CheckpointError):
        parse_config(quantized())


@pytest.mark.transformers
def test_targets_match_as_compressed_tensors_matches_them() -> None:
    from compressed_tensors.utils.match import match_name

    targets = [r"re:.*mlp\.down_proj$", r"re:down_proj", r"re:.*layers\.4\.", "lm_head", "down_proj", DOWN_4]
    for target in targets:
        quantization = parse_config(quantized(group(target), ignore=[])).quantization
        assert quantization is not None
        for name in (DOWN_4, GATE_UP, "lm_head", "model.layers.40.mlp.down_proj"):
            assert (quantization.scheme_for(name) is not None) == match_name(name, target), (target, name)


# Files and errors


def test_read_config_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(glm4()), encoding="utf-8")
    assert_is_member(read_config(tmp_path), MEMBERS["0414"])


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[1]", b"null"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_missing_file_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json") as caught:
        read_config(tmp_path)
    assert caught.value.hint is not None


def test_errors_carry_their_exit_code() -> None:
    assert (CheckpointError("x").exit_code, UsageError("x").exit_code, DoesNotFitError("x").exit_code) == (1, 2, 2)
    error = Glm4RunError("got 1", hint="do 2", exit_code=7)
    assert (str(error), error.message, error.hint, error.exit_code) == ("got 1", "got 1", "do 2", 7)
    assert Glm4RunError.exit_code == 1
