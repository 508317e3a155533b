"""What mixed precision is chosen by: the predicted cost of rounding a linear, and how bits are given out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from glm4run.checkpoint.reader import CheckpointReader
from glm4run.config import parse_config, read_json
from glm4run.qformat import scale_groups
from glm4run.quant_config import QuantScheme
from glm4run_quantize.calibration import Calibration
from glm4run_quantize.methods.mse import quantize_mse
from glm4run_quantize.sensitivity import BASE, Unit, measure_units, spend
from glm4run_quantize.source_layers import SourceLayers, linear_of
from tests.builders import VOCAB, Layout, write_checkpoint

WINDOWS, TOKENS = 4, 96


@torch.no_grad()
def divergences(reader: CheckpointReader, calibration: Calibration, units: list[Unit]) -> list[float]:
    """KL divergence from the source with one unit rounded, for each: by running the whole model every time."""
    config = parse_config(read_json(reader.folder / "config.json"), where="")
    layers = SourceLayers(reader, config, TOKENS, torch.device("cpu"))
    embedded = layers.embed(calibration.ids)
    norm, head = (reader.read(f"{name}.weight").double() for name in ("model.norm", "lm_head"))

    def log_probs(rounded: tuple[str, ...]) -> Tensor:
        x = embedded
        for index in range(config.num_hidden_layers):
            layer = layers.layer(index)
            for module in rounded:
                if module.startswith(f"model.layers.{index}."):
                    weight = linear_of(layer, module).weight
                    weight.copy_(scale_groups(*quantize_mse(weight, BASE, torch.bfloat16)))
            x = layers.forward(layer, x)
        wide = x.double()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + config.rms_norm_eps) * norm
        return (normed @ head.t()).log_softmax(-1)

    exact = log_probs(())
    return [float((exact.exp() * (exact - log_probs(unit.modules))).sum(-1).mean()) for unit in units]


@pytest.mark.parametrize("layout", ["glm", "glm4"])
def test_predicted_cost_is_the_divergence(tmp_path: Path, layout: Layout) -> None:
    source = write_checkpoint(tmp_path / "source", layout)
    ids = torch.randint(0, VOCAB, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(5))
    calibration = Calibration("drawn", "", ids, held_out=0)
    config = parse_config(read_json(source / "config.json"), where="")
    with CheckpointReader(source, config) as reader:
        units = measure_units(reader, config, calibration)
        measured = torch.tensor(divergences(reader, calibration, units))
    assert [unit.modules[0] for unit in units][:2] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.o_proj",
    ]
    predicted = torch.tensor([next(cost for scheme, _, cost in unit.options if scheme == BASE) for unit in units])
    ratio = predicted / measured
    assert float(ratio.log().abs().max()) < 0.5
    assert float(measured.max() / measured.min()) > 4


def test_costs_fall_with_bits_and_bytes_grow(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "glm4")
    ids = torch.randint(0, VOCAB, (2, 32), generator=torch.Generator().manual_seed(5))
    config = parse_config(read_json(source / "config.json"), where="")
    with CheckpointReader(source, config) as reader:
        units = measure_units(reader, config, Calibration("drawn", "", ids, held_out=0))
    for unit in units:
        sizes, costs = [size for _, size, _ in unit.options], [cost for *_, cost in unit.options]
        assert sizes == sorted(sizes)
        assert costs == sorted(costs, reverse=True)
        assert costs[-1] < costs[0] / 100


def test_bytes_go_where_they_remove_most() -> None:
    small, large = QuantScheme(4, 32), QuantScheme(8, 32)

    def unit(before: float, after: float, price: int) -> Unit:
        return Unit(("x",), 100, [(small, 50, before), (large, 50 + price, after)])

    units = [unit(1.0, 0.0, 50), unit(5.0, 0.0, 50), unit(6.0, 0.0, 100)]
    spend(units, 150 + 100)
    assert [u.taken for u in units] == [1, 1, 0]  # per byte the second removes most; the third no longer fits
    spend(units := [unit(1.0, 0.0, 50), unit(5.0, 0.0, 50), unit(6.0, 0.0, 100)], 150 + 150)
    assert [u.taken for u in units] == [0, 1, 1]
