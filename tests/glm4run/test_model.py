"""The forward pass against the authors' own outputs, against transformers, and against itself in every cutting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from glm4run import qformat
from glm4run.config import ModelConfig, parse_config
from glm4run.kernels import LinearSpec, load_backend
from glm4run.kv_cache import KVCache
from glm4run.layers import QuantizedLinear
from glm4run.model import Attention, Glm4Model
from glm4run.quant_config import QuantScheme

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.inference_mode():
        yield


def config_of(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "model_type": "glm4",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": 50,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
    }
    return ModelConfig(**(sizes | changes))


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Every parameter random, norms around one: a factor or a bias that is left out must show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name
        parameter.data.copy_(1 + 0.3 * noise if is_norm else noise * (0.5 if parameter.dim() == 1 else 0.2))


def random_model(**changes: Any) -> Glm4Model:
    model = Glm4Model(config_of(**changes))
    randomize(model)
    return model.eval()


def random_ids(count: int, vocab: int = 50, seed: int = 1) -> Tensor:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed))


def new_cache(model: Glm4Model, capacity: int = 64, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(model.config, capacity, dtype=dtype, device=CPU)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


def in_chunks(model: Glm4Model, ids: Tensor, *sizes: int) -> Tensor:
    """All logits, with the ids cut into chunks of these sizes."""
    assert sum(sizes) == len(ids)
    cache = new_cache(model)
    return torch.cat([model(chunk, cache, logits="all") for chunk in ids.split(list(sizes))], dim=-2)


# The authors' code


def tiny_original(path: Path) -> tuple[Glm4Model, Tensor, Tensor]:
    """The authors' one-layer fixture as a model, with its ids and the hidden states their code produced."""
    arrays = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    config = parse_config(
        {
            "model_type": "chatglm",
            "add_qkv_bias": True,
            "ffn_hidden_size": 48,
            "hidden_size": 32,
            "kv_channels": 4,
            "layernorm_epsilon": 1.5625e-07,
            "multi_query_group_num": 2,
            "num_attention_heads": 8,
            "num_layers": 1,
            "padded_vocab_size": 5,
            "seq_length": 64,
        }
    )
    layer, state = "transformer.encoder.layers.0.", {}
    for kind in ("weight", "bias"):
        q, k, v = arrays[f"{layer}self_attention.query_key_value.{kind}"].split([32, 8, 8])
        for name, rows in (("q", q), ("k", k), ("v", v)):
            state[f"model.layers.0.self_attn.{name}_proj.{kind}"] = rows
    for ours, theirs in (
        ("model.embed_tokens", "transformer.embedding.word_embeddings"),
        ("model.norm", "transformer.encoder.final_layernorm"),
        ("model.layers.0.input_layernorm", layer + "input_layernorm"),
        ("model.layers.0.post_attention_layernorm", layer + "post_attention_layernorm"),
        ("model.layers.0.self_attn.o_proj", layer + "self_attention.dense"),
        ("model.layers.0.mlp.gate_up_proj", layer + "mlp.dense_h_to_4h"),
        ("model.layers.0.mlp.down_proj", layer + "mlp.dense_4h_to_h"),
    ):
        state[f"{ours}.weight"] = arrays[f"{theirs}.weight"]
    state["lm_head.weight"] = torch.zeros(5, 32)  # the fixture ends at the final norm
    model = Glm4Model(config)
    model.load_state_dict(state, strict=True)
    return model.eval(), arrays["input_ids"].long(), arrays["expected_hidden_after_final_norm"]


def test_authors_fixture_prefill_and_two_decode_steps(shared: Path) -> None:
    model, ids, expected = tiny_original(shared / "data" / "tiny_glm4" / "glm4_tiny_remote_layout.npz")
    cache = new_cache(model)
    rows = [
        model.hidden_states(ids[:3], cache),
        model.hidden_states(ids[3:4], cache),
        model.hidden_states(ids[4:], cache),
    ]
    assert cache.position == 5
    got = torch.cat(rows)
    assert float((got - expected).abs().max()) < 1e-5
    whole = model.hidden_states(ids)
    assert float((whole - expected).abs().max()) < 1e-5


# transformers


def tiny_transformers(kind: str, **changes: Any) -> tuple[Any, Glm4Model]:
    """A random model of theirs in fp32, and ours with its weights, configured from its own config.json."""
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 50,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "eos_token_id": [1, 2],
        "attn_implementation": "eager",
    }
    config_class = transformers.GlmConfig if kind == "glm" else transformers.Glm4Config
    model_class = transformers.GlmForCausalLM if kind == "glm" else transformers.Glm4ForCausalLM
    theirs = model_class(config_class(**(sizes | changes))).float().eval()
    randomize(theirs)
    ours = Glm4Model(parse_config(json.loads(theirs.config.to_json_string(use_diff=False))))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours.eval()


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide-heads": {"hidden_size": 48, "head_dim": 32},
    "all-kv-heads": {"num_key_value_heads": 4},
    "four-of-eight-kv": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
    "one-kv-head": {"num_key_value_heads": 1, "head_dim": 24},
    "no-bias": {"attention_bias": False},
    "other-base": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}},
    "yarn": {"rope_parameters": YARN, "max_position_embeddings": 256},
    "yarn-four-kv": {"rope_parameters": YARN, "max_position_embeddings": 256, "num_key_value_heads": 4},
}


@pytest.mark.transformers
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("kind", ["glm", "glm4"])
def test_logits_are_those_of_transformers(kind: str, shape: dict[str, Any]) -> None:
    theirs, ours = tiny_transformers(kind, **shape)
    ids = random_ids(130)
    expected = theirs(input_ids=ids[None]).logits[0]
    assert float(expected.std()) > 0.1  # not a comparison of zeros
    assert relative_error(ours(ids, logits="all"), expected) < 1e-4
    cache = new_cache(ours, 130)
    stepped = [ours(ids[:100], cache, logits="all"), *(ours(ids[t : t + 1], cache) for t in range(100, 130))]
    assert relative_error(torch.cat(stepped), expected) < 1e-4


@pytest.mark.transformers
@pytest.mark.parametrize("kind", ["glm", "glm4"])
def test_parameter_names_and_count_are_those_of_transformers(kind: str) -> None:
    theirs, ours = tiny_transformers(kind)
    assert list(ours.state_dict()) == list(dict.fromkeys(ours.state_dict()))
    assert set(ours.state_dict()) == set(theirs.state_dict())
    assert ours.config.num_parameters == sum(p.numel() for p in theirs.parameters())
    assert ours.config.has_sandwich_norms is (kind == "glm4")


# Itself


each_type = pytest.mark.parametrize("model_type", ["chatglm", "glm", "glm4"])


@each_type
def test_prefill_equals_token_by_token(model_type: str) -> None:
    model, ids = random_model(model_type=model_type), random_ids(20)
    one_shot = model(ids, logits="all")
    assert relative_error(in_chunks(model, ids, *[1] * 20), one_shot) < 1e-5


@pytest.mark.parametrize("sizes", [(20,), (7, 13), (16, 4), (1, 18, 1), (5, 5, 5, 5)])
def test_chunks_equal_one_shot(sizes: tuple[int, ...]) -> None:
    model, ids = random_model(), random_ids(20)
    assert relative_error(in_chunks(model, ids, *sizes), model(ids, logits="all")) < 1e-5


def test_truncated_cache_continues_as_if_the_rest_had_never_been() -> None:
    model, ids = random_model(), random_ids(20)
    cache = new_cache(model)
    model(ids[:12], cache)
    model(random_ids(5, seed=9), cache)
    cache.truncate(12)
    assert relative_error(model(ids[12:], cache, logits="all"), model(ids, logits="all")[12:]) < 1e-5


def test_last_logits_are_the_last_row_of_all() -> None:
    model, ids = random_model(), random_ids(9)
    everything, last = model(ids, logits="all"), model(ids)
    assert everything.shape == (9, 50)
    assert last.shape == (1, 50)
    assert everything.dtype == last.dtype == torch.float32
    assert relative_error(last[0], everything[-1]) < 1e-6


def test_a_batch_equals_its_rows() -> None:
    model = random_model()
    batch = torch.stack([random_ids(9, seed=seed) for seed in range(3)])
    logits = model(batch, logits="all")
    assert logits.shape == (3, 9, 50)
    assert model(batch).shape == (3, 1, 50)
    for got, ids in zip(logits, batch, strict=True):
        assert relative_error(got, model(ids, logits="all")) < 1e-5


def test_the_future_does_not_reach_the_past() -> None:
    model, ids = random_model(), random_ids(9)
    changed = ids.clone()
    changed[5:] = (changed[5:] + 1) % 50
    before, after = model(ids, logits="all"), model(changed, logits="all")
    assert torch.equal(before[:5], after[:5])
    assert not torch.isclose(before[5:], after[5:]).all(dim=-1).any()


def test_order_matters() -> None:
    model = random_model()
    a, b = model(torch.tensor([1, 2, 3])), model(torch.tensor([2, 1, 3]))
    assert relative_error(a, b) > 1e-3


def test_all_layers_share_one_pair_of_rope_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = random_model(), []
    forward = Attention.forward

    def spy(self: Attention, x: Tensor, rope: tuple[Tensor, Tensor], *rest: Any) -> Tensor:
        seen.append(rope)
        return forward(self, x, rope, *rest)

    monkeypatch.setattr(Attention, "forward", spy)
    model(random_ids(5))
    assert len(seen) == 3
    assert all(cos is seen[0][0] and sin is seen[0][1] for cos, sin in seen)


def test_only_glm4_has_sandwich_norms() -> None:
    sandwich = {"post_self_attn_layernorm.weight", "post_mlp_layernorm.weight"}
    for model_type in ("chatglm", "glm", "glm4"):
        layer = Glm4Model(config_of(model_type=model_type)).model.layers[0]
        assert sandwich <= set(layer.state_dict()) if model_type == "glm4" else sandwich.isdisjoint(layer.state_dict())


# fp16


def overflowing_model() -> Glm4Model:
    """Weights within fp16 whose branches push the residual far past fp16's 65504, layer after layer."""
    model = random_model(model_type="glm")
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(1e4)
    assert all(float(p.abs().max()) < 65504 for p in model.parameters())
    assert float(largest_residual(model)) > 65504
    return model


def largest_residual(model: Glm4Model) -> Tensor:
    largest = []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: largest.append(out.abs().max()))
        for layer in model.model.layers
    ]
    model(random_ids(12))
    for hook in hooks:
        hook.remove()
    return torch.stack(largest).max()


def to_half(model: Glm4Model, replace_linear: Callable[[nn.Linear], nn.Module]) -> Glm4Model:
    """The same weights in a model that computes in fp16, norms in float32 as the loader keeps them."""
    half = Glm4Model(model.config, dtype=torch.float16)
    half.load_state_dict(model.state_dict())
    half.model.embed_tokens.half()
    for name, module in list(half.named_modules()):
        if isinstance(module, nn.Linear):
            half.set_submodule(name, replace_linear(module))
    return half.eval()


def int8_linear(linear: nn.Linear) -> nn.Module:
    scheme = QuantScheme(8, None)
    scale = linear.weight.abs().amax(-1, keepdim=True) / 127
    q = torch.round(linear.weight / scale).to(torch.int8)
    N, K = linear.weight.shape
    weight = qformat.PackedWeight(qformat.pack(q, 8), scale, None, N, K, scheme)
    backend = load_backend("reference")
    bias = None if linear.bias is None else linear.bias.data.half()
    return QuantizedLinear(backend.prepack(weight, LinearSpec(N, K, scheme, CPU, torch.float16)), backend, bias)


@pytest.mark.parametrize(
    ("replace_linear", "tolerance"),
    [(lambda linear: linear.half(), 2e-2), (int8_linear, 1e-1)],
    ids=["dense", "packed"],
)
def test_fp16_survives_activations_beyond_fp16(
    replace_linear: Callable[[nn.Linear], nn.Module], tolerance: float
) -> None:
    wide = overflowing_model()
    half = to_half(wide, replace_linear)
    ids = random_ids(12)
    cache = new_cache(half, dtype=torch.float16)
    logits = torch.cat([half(ids[:8], cache, logits="all"), half(ids[8:], cache, logits="all")])
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert float(largest_residual(half)) > 65504  # it did pass through the overflowing range
    assert relative_error(logits, wide(ids, logits="all")) < tolerance


@pytest.mark.parametrize(
    ("dtype", "residual"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_residual_dtype(dtype: torch.dtype, residual: torch.dtype) -> None:
    assert Glm4Model(config_of(), dtype=dtype).residual_dtype == residual


def test_bf16_agrees_with_fp32_within_its_precision() -> None:
    wide = random_model()
    narrow = Glm4Model(wide.config, dtype=torch.bfloat16)
    narrow.load_state_dict(wide.state_dict())
    narrow = narrow.bfloat16().eval()
    ids = random_ids(12)
    cache = new_cache(narrow, dtype=torch.bfloat16)
    logits = torch.cat([narrow(ids[:8], cache, logits="all"), narrow(ids[8:], cache, logits="all")])
    assert logits.dtype == torch.float32
    assert relative_error(logits, wide(ids, logits="all")) < 5e-2
