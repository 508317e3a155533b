"""What each method promises: less of the error that it minimizes, on the grid of the format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glm4run import load_model
from glm4run.checkpoint.layouts import linear_shapes
from glm4run.checkpoint.reader import CheckpointReader
from glm4run.config import parse_config
from glm4run.kv_cache import KVCache
from glm4run.qformat import scale_groups
from glm4run.quant_config import QuantScheme
from glm4run_quantize import importance
from glm4run_quantize.methods import gptq
from glm4run_quantize.methods.awq import choose_scale, fold_into_norm
from glm4run_quantize.methods.hqq import NORM, quantize_hqq
from glm4run_quantize.methods.mse import error_weights, quantize_mse
from glm4run_quantize.methods.rtn import quantize_rtn
from tests.builders import Layout, raw_config, write_checkpoint

REAL = Path(__file__).resolve().parents[1] / "data" / "demo_layer0_bf16.safetensors"
BF16 = torch.bfloat16
SCHEMES = [QuantScheme(4, 32), QuantScheme(4, 64), QuantScheme(8, 32)]


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """The linears of a trained layer, never quantized before."""
    found = load_file(REAL)
    return {name: w.float() for name, w in found.items() if w.ndim == 2 and w.shape[1] % 64 == 0}


def squared(weight: Tensor, result: tuple[Tensor, Tensor]) -> float:
    return float((weight - scale_groups(*result)).double().square().sum())


def correlated_inputs(count: int, width: int, seed: int = 0) -> Tensor:
    """Inputs as a network has them: a few directions and a few channels carry most."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.linspace(2, 0.05, width).unsqueeze(1)
    x = torch.randn(count, width, generator=generator) @ mixing
    x[:, 5] *= 30
    return x


@pytest.mark.parametrize("scheme", SCHEMES, ids=QuantScheme.describe)
def test_search_beats_rounding_on_real_weights(weights: dict[str, Tensor], scheme: QuantScheme) -> None:
    assert weights
    for name, weight in weights.items():
        searched, rounded = (squared(weight, f(weight, scheme, BF16)) for f in (quantize_mse, quantize_rtn))
        assert searched < (0.9 if scheme.bits == 4 else 1.02) * rounded, name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_results_are_of_the_format(bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    weight[2] = 0.0
    weight[3, :32] = 1e-9
    weight[4, 7] = 3e4
    hessian = gptq.prepare(torch.eye(96))
    scheme = QuantScheme(bits, 32)
    for q, scale in (
        quantize_mse(weight, scheme, dtype),
        quantize_hqq(weight, scheme, dtype),
        gptq.quantize_gptq(weight, hessian, scheme, dtype),
    ):
        assert (q.dtype, q.shape, scale.dtype, scale.shape) == (torch.int8, (6, 96), dtype, (6, 3))
        assert int(q.min()) >= -(1 << bits - 1) and int(q.max()) < 1 << bits - 1
        assert bool(torch.isfinite(scale).all()) and not bool((scale == 0).any())
        assert not bool(scale_groups(q, scale)[2].any())


def test_the_long_side_of_the_grid_goes_where_the_largest_weight_is() -> None:
    weight = torch.cat([torch.linspace(-1, 8, 32), torch.linspace(-8, 1, 32)]).unsqueeze(0)
    _, scale = quantize_mse(weight, QuantScheme(4, 32), torch.float32)
    assert scale[0, 0] < 0 < scale[0, 1]


def test_importance_moves_the_error_to_where_it_does_not_matter() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    importance = torch.ones(64)
    importance[::4] = 100.0
    scheme = QuantScheme(4, 32)
    plain, weighted = quantize_mse(weight, scheme, BF16), quantize_mse(weight, scheme, BF16, importance)

    def error(result: tuple[Tensor, Tensor]) -> float:
        return float(((weight - scale_groups(*result)).square() * importance).sum())

    assert error(weighted) < error(plain)
    assert squared(weight, weighted) > squared(weight, plain)


def test_at_8_bits_searching_takes_a_third_of_what_counts(weights: dict[str, Tensor]) -> None:
    """With inputs of which some are much larger than others, as a model's are."""
    scheme = QuantScheme(8, 64)
    for name, weight in weights.items():
        spread = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(3)).mul(1.5).exp()

        def error(result: tuple[Tensor, Tensor], weight: Tensor = weight, spread: Tensor = spread) -> float:
            return float(((weight - scale_groups(*result)).square() * spread).sum(dtype=torch.float64))

        assert error(quantize_mse(weight, scheme, BF16, spread)) < 0.67 * error(quantize_rtn(weight, scheme, BF16)), (
            name
        )


def test_hqq_lowers_its_own_norm(weights: dict[str, Tensor]) -> None:
    scheme = QuantScheme(4, 64)

    def cost(weight: Tensor, result: tuple[Tensor, Tensor]) -> float:
        errors = (weight - scale_groups(*result)).abs().pow(NORM)
        return float((errors * error_weights(weight, None)).sum())

    for weight in weights.values():
        ours, searched = (cost(weight, f(weight, scheme, BF16)) for f in (quantize_hqq, quantize_mse))
        assert ours < 0.995 * searched


# --- second order


@pytest.mark.parametrize("scheme", SCHEMES, ids=QuantScheme.describe)
def test_gptq_beats_weighted_search_on_the_output(weights: dict[str, Tensor], scheme: QuantScheme) -> None:
    name, weight = next(iter(weights.items()))
    x = correlated_inputs(1024, weight.shape[1])
    hessian = gptq.prepare(x.t() @ x / len(x))
    searched = quantize_mse(weight, scheme, BF16, hessian.diagonal())
    swept = gptq.quantize_gptq(weight, hessian, scheme, BF16, rounds=0)
    refined = gptq.quantize_gptq(weight, hessian, scheme, BF16)
    errors = [gptq.output_error(weight, scale_groups(*result), hessian) for result in (searched, swept, refined)]
    assert errors[1] < 0.8 * errors[0], name
    assert errors[2] < errors[1], name


@pytest.mark.parametrize("threads", [1, 3])
def test_gptq_shares_rows_among_cores(
    weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    name, weight = next(iter(weights.items()))
    x = correlated_inputs(512, weight.shape[1])
    hessian = gptq.prepare(x.t() @ x / len(x))
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    try:
        q, scale = gptq.quantize_gptq(weight, hessian, SCHEMES[0], BF16)
    finally:
        monkeypatch.undo()
        torch.set_num_threads(before)
    rows = slice(5, 9)  # on their own they come out the same: rows have nothing to do with each other
    q_rows, scale_rows = gptq.quantize_gptq(weight[rows], hessian, SCHEMES[0], BF16)
    assert q.shape == weight.shape, name
    assert (q[rows] != q_rows).float().mean() < 0.01  # sums in another order: ties may fall elsewhere
    assert torch.allclose(scale[rows].float(), scale_rows.float(), rtol=0.02)


def plain_gptq(weight: Tensor, hessian: Tensor, scale: Tensor, scheme: QuantScheme) -> Tensor:
    """Column by column in float64 with the inverse taken anew each time: the paper's equations, without its tricks."""
    left, steps = weight.double().clone(), scale.double().repeat_interleave(scheme.group_size or 1, 1)
    q = torch.zeros_like(left)
    remaining = list(range(weight.shape[1]))
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian.double()[remaining][:, remaining])
        q[:, column] = (left[:, column] / steps[:, column]).round().clamp(-8, 7)
        error = (left[:, column] - q[:, column] * steps[:, column]) / inverse[0, 0]
        left[:, remaining] -= error.unsqueeze(1) * inverse[0]
        remaining.pop(0)
    return q


def test_blocked_sweep_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "BLOCK", 24)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(16, 64, generator=generator)
    x = torch.randn(256, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    hessian = gptq.prepare(x.t() @ x / 256)
    scheme = QuantScheme(4, 32)
    q, scale = gptq.quantize_gptq(weight, hessian, scheme, torch.float32, act_order=False, rounds=0)
    assert (q != plain_gptq(weight, hessian, scale, scheme)).float().mean() < 0.01  # rounding of ties apart


def test_order_of_columns_is_undone() -> None:
    """With independent inputs nothing is made up for, so that any order gives plain rounding."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    hessian = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(5)) + 0.5)
    scheme = QuantScheme(4, 32)
    ordered, scale = gptq.quantize_gptq(weight, hessian, scheme, torch.float32, act_order=True, rounds=0)
    plain, _ = gptq.quantize_gptq(weight, hessian, scheme, torch.float32, act_order=False, rounds=0)
    assert torch.equal(ordered, plain)
    assert float((weight - scale_groups(ordered, scale)).abs().max()) < float(scale.abs().max())


@pytest.mark.parametrize("rows", [5, 40])  # fewer rows than inputs, and more: solved from either side
def test_moved_target_is_the_least_squares_solution(rows: int) -> None:
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(rows, 32, generator=generator)
    theirs = torch.randn(500, 32, generator=generator)
    mine = theirs + 0.3 * torch.randn(500, 32, generator=generator)
    moments = mine.t() @ mine / 500
    damped = gptq.prepare(moments.clone(), damping=1e-6)
    moved = gptq.moved_target(weight, moments, theirs.t() @ mine / 500, damped)
    solved = torch.linalg.lstsq(mine, theirs @ weight.t()).solution.t()
    assert torch.allclose(moved, solved, atol=1e-3)
    assert float((mine @ moved.t() - theirs @ weight.t()).norm()) < float(
        (mine @ weight.t() - theirs @ weight.t()).norm()
    )


def test_inputs_never_seen_leave_the_weights_alone() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(7))
    x = torch.randn(100, 32, generator=torch.Generator().manual_seed(8))
    x[:, 3] = 0.0
    x[:, 4] *= 1e-3  # hardly ever
    mine = x + 0.2 * torch.randn(100, 32, generator=torch.Generator().manual_seed(9)) * x.std(0)
    moments, cross = mine.t() @ mine / 100, x.t() @ mine / 100
    hessian = gptq.prepare(moments.clone())
    assert torch.allclose(gptq.moved_target(weight, moments, moments, hessian), weight, atol=1e-5)
    moved = gptq.moved_target(weight, moments, cross, hessian)
    assert torch.equal(moved[:, 3], weight[:, 3])
    assert torch.allclose(moved[:, 4], weight[:, 4], atol=0.05)
    assert float((moved - weight).abs().max()) > 0.05
    q, scale = gptq.quantize_gptq(weight, hessian, QuantScheme(4, 32), torch.float32)
    assert torch.isfinite(scale_groups(q, scale)).all()


# --- activation-aware scaling


def test_awq_scales_up_the_channels_with_large_inputs() -> None:
    generator = torch.Generator().manual_seed(9)
    weight, x = torch.randn(64, 64, generator=generator), torch.randn(256, 64, generator=generator)
    x[:, 7] *= 50
    scheme = QuantScheme(4, 32)
    scale = choose_scale([weight], [scheme], x, BF16)
    assert float(scale[7]) > 1.5 * float(scale.median())
    scaled = scale_groups(*quantize_rtn(weight * scale, scheme, BF16)) / scale
    plain = scale_groups(*quantize_rtn(weight, scheme, BF16))
    assert float((x @ (weight - scaled).t()).norm()) < 0.9 * float((x @ (weight - plain).t()).norm())


def test_heads_that_share_values_share_scales() -> None:
    x = torch.randn(64, 2 * 3 * 4, generator=torch.Generator().manual_seed(10)) * torch.arange(1, 25)
    weight = torch.randn(32, 24, generator=torch.Generator().manual_seed(11))
    scale = choose_scale([weight], [QuantScheme(4, 24)], x, torch.float32, shared=3, width=4)
    heads = scale.view(2, 3, 4)
    assert torch.equal(heads, heads[:, :1].expand_as(heads))
    assert not torch.equal(heads[0], heads[1])


def test_folding_costs_nothing_even_in_bf16() -> None:
    generator = torch.Generator().manual_seed(12)
    norm = 1 + 0.3 * torch.randn(32, generator=generator)
    norm[3] = 0.0
    norm = norm.to(BF16).float()
    weight, x = torch.randn(8, 32, generator=generator), torch.randn(5, 32, generator=generator)
    before = (x * norm) @ weight.t()
    scale = torch.rand(32, generator=generator) * 3 + 0.2
    fold_into_norm(norm, [weight], scale, BF16)
    assert torch.equal(norm, norm.to(BF16).float())
    assert torch.allclose((x * norm) @ weight.t(), before, atol=1e-5)


# --- importance without a text


@pytest.mark.parametrize("layout", ["glm4", "chatglm"])
def test_moments_are_those_of_what_the_model_feeds_its_linears(tmp_path: Path, layout: Layout) -> None:
    source = write_checkpoint(tmp_path / "source", layout)
    config = parse_config(raw_config(layout))
    model = load_model(source, dtype="fp32").model
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (importance.WINDOWS, importance.TOKENS), generator=draw)
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if name in linear_shapes(config):
            module.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0].detach()))
    for window in ids:
        cache = KVCache(config, len(window), dtype=torch.float32, device=torch.device("cpu"))
        model(window, cache, logits="all")
    with CheckpointReader(source, config) as reader:
        moments = importance.InputMoments(reader, config)
        for name in ("model.layers.1.mlp.down_proj", *linear_shapes(config)):  # any order
            expected = torch.cat(seen[name]).square().mean(0)
            assert torch.allclose(moments.of(name), expected, rtol=1e-3, atol=1e-6), name
