"""Dense folders that other libraries quantize while they are loaded, and folders that hold bitsandbytes' tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glm4run import LoadedModel, load_model
from glm4run.checking import check_folder
from glm4run.cli import main
from glm4run.config import read_config
from glm4run.errors import BackendError, CheckpointError, UsageError
from glm4run.layers import QuantizedLinear
from glm4run.quant_config import ON_LOAD, Kind, QuantScheme, on_load_scheme, parse_quantization
from tests.builders import PREFIX, Layout, edit_json, edit_tensors, write_checkpoint, write_packed, write_tokenizer
from tests.foreign_cases import DIVISIBLE, require, write_bitsandbytes
from tests.tracing import weight_bytes

require("bitsandbytes")
require("optimum.quanto")

IDS = (*PREFIX, *range(40, 72))
# How far the logits of random weights may move, as a share: 4 bits move them much, 8 bits little.
MOST = {"nf4": 0.5, "fp4": 0.6, "qint4": 0.5, "int8": 0.06, "qint8": 0.06}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("on-load") / "dense", dtype=torch.bfloat16, **DIVISIBLE)


@pytest.fixture(scope="module")
def dense(folder: Path) -> LoadedModel:
    return load_model(folder, dtype="fp32", context_len=64)


def quantized(model: LoadedModel) -> dict[str, QuantizedLinear]:
    return {name: m for name, m in model.model.named_modules() if isinstance(m, QuantizedLinear)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", list(ON_LOAD))
def test_every_kind_and_dtype(name: str, dtype: str, folder: Path, dense: LoadedModel) -> None:
    model = load_model(folder, dtype=dtype, context_len=64, quantize_on_load=name)
    linears = quantized(model)
    assert len(linears) == 12  # all but the head
    assert {linear.prepacked.spec.scheme.kind for linear in linears.values()} == {ON_LOAD[name]}
    assert model.plan.weight_bytes == weight_bytes(model.model)
    assert model.backend == ("quanto" if name.startswith("q") else "bitsandbytes")
    exact, got = dense.logits(IDS), model.logits(IDS)
    moved = float((got - exact).norm() / exact.norm())
    assert 1e-4 < moved < MOST[name], moved


@pytest.mark.parametrize("layout", ["chatglm", "fused"])
def test_other_layouts_give_the_same(layout: Layout, folder: Path, tmp_path: Path) -> None:
    """q, k and v lie in one tensor there."""
    other = write_checkpoint(tmp_path / "other", layout, dtype=torch.bfloat16, **DIVISIBLE)
    ours, theirs = (
        load_model(f, dtype="fp32", context_len=64, quantize_on_load="nf4").logits(IDS) for f in (folder, other)
    )
    assert torch.equal(ours, theirs)


def test_named_backends_have_a_kind_of_their_own(folder: Path) -> None:
    for backend, kind in (("bitsandbytes", "nf4"), ("quanto", "qint8")):
        model = load_model(folder, context_len=64, backend=backend)
        assert {m.prepacked.spec.scheme.kind for m in quantized(model).values()} == {kind}
    with pytest.raises(BackendError, match="reads qint8, qint4, not nf4"):
        load_model(folder, backend="quanto", quantize_on_load="nf4")
    with pytest.raises(UsageError, match="quantize-on-load is 'int4'") as caught:
        load_model(folder, quantize_on_load="int4")
    assert "qint4" in str(caught.value.hint)


def test_a_packed_folder_is_not_packed_again(tmp_path: Path) -> None:
    packed = write_packed(tmp_path / "packed")
    with pytest.raises(UsageError, match="packed already: int4"):
        load_model(packed, quantize_on_load="nf4")
    with pytest.raises(BackendError, match="reads nf4, fp4, llm_int8, not int"):
        load_model(packed, backend="bitsandbytes")


@pytest.mark.parametrize(("kind", "nested"), [("nf4", False), ("fp4", True), ("nf4", True), ("llm_int8", False)])
def test_checkpoints_with_bitsandbytes_tensors(
    kind: Kind, nested: bool, tmp_path: Path, folder: Path, dense: LoadedModel
) -> None:
    saved = write_bitsandbytes(tmp_path / "saved", kind, nested=nested)
    assert check_folder(saved) == []
    model = load_model(saved, dtype="fp32", context_len=64)
    assert model.backend == "bitsandbytes"
    assert model.plan.weight_bytes == weight_bytes(model.model)
    on_load = load_model(folder, dtype="fp32", context_len=64, quantize_on_load="int8" if kind == "llm_int8" else kind)
    got, made = model.logits(IDS), on_load.logits(IDS)
    if nested:
        assert 0 < float((got - made).norm() / made.norm()) < 0.1
    else:
        assert torch.equal(got, made)
    assert float((got - dense.logits(IDS)).norm() / got.norm()) < MOST["fp4"]
    with pytest.raises(UsageError, match="packed already"):
        load_model(saved, quantize_on_load="qint8")


def test_skipped_modules_stay_dense(tmp_path: Path) -> None:
    saved = write_bitsandbytes(tmp_path / "saved", "nf4", llm_int8_skip_modules=["lm_head", "mlp.down_proj"])
    source = load_file(write_checkpoint(tmp_path / "source", dtype=torch.bfloat16, **DIVISIBLE) / "model.safetensors")
    stored = load_file(saved / "model.safetensors")
    dense = {name: source[name] for name in source if "down_proj" in name}
    gone = dict.fromkeys(name for name in stored if "down_proj.weight." in name)
    edit_tensors(saved, {**gone, **dense})
    assert check_folder(saved) == []
    model = load_model(saved, dtype="fp32", context_len=64)
    assert {name.rpartition(".")[2] for name in quantized(model)} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj")
    }


def test_what_is_wrong_with_such_a_folder_is_said(tmp_path: Path) -> None:
    saved = write_bitsandbytes(tmp_path / "saved", "nf4")
    name = "model.layers.0.mlp.down_proj.weight.absmax"
    absmax = load_file(saved / "model.safetensors")[name]
    edit_tensors(saved, {name: torch.full_like(absmax, float("nan"))})
    assert [(p.tensor, p.what) for p in check_folder(saved)] == [(name, "holds NaN or infinity")]
    with pytest.raises(CheckpointError, match="NaN"):
        load_model(saved)
    edit_tensors(saved, {name: None})
    assert [p.tensor for p in check_folder(saved)] == [name]
    edit_tensors(saved, {name: absmax[:-1]})
    with pytest.raises(CheckpointError, match=r"absmax.*shape"):
        load_model(saved)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage is 'bfloat16'"),
        ({"bnb_4bit_quant_type": "int4"}, "'int4', expected 'nf4' or 'fp4'"),
        ({"load_in_4bit": False}, "expected one"),
        ({"load_in_4bit": False, "load_in_8bit": True, "llm_int8_threshold": 4.0}, "llm_int8_threshold is 4.0"),
        ({"load_in_8bit": True, "load_in_4bit": False, "llm_int8_has_fp16_weight": True}, "has_fp16_weight"),
        ({"llm_int8_skip_modules": "lm_head"}, "expected a list"),
    ],
)
def test_settings_that_are_not_read(settings: dict[str, object], message: str) -> None:
    raw = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **settings}
    with pytest.raises(CheckpointError, match=message):
        parse_quantization(raw, "config.json")


def test_schemes_have_names() -> None:
    assert on_load_scheme("nf4", 4096) == QuantScheme(4, 64, kind="nf4")
    assert on_load_scheme("int8", 4096).describe() == "llm_int8 per channel"
    assert on_load_scheme("qint4", 13696).describe() == "qint4 g128"


def test_the_commands_take_it(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello the thin in there, on the heron at the hell. " * 9)
    words = ["eval", str(folder), "--text", str(tmp_path / "text"), "--ctx", "48", "--json"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--quantize-on-load", "nf4", "--dtype", "fp32", "--reference", str(folder)])
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    result = json.loads(out)
    assert result["backend"].startswith("bitsandbytes") and result["kld_mean"] > 0
    assert 4.5 < result["bits_per_weight"] < 4.6  # and the tables of these small linears
    with pytest.raises(SystemExit) as ended:
        main(["generate", "hello", "-m", str(folder), "--max-tokens", "2", "--backend", "quanto"])
    assert ended.value.code == 0
    assert "backend quanto" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["generate", "hello", "-m", str(folder), "--quantize-on-load", "nf3"])
    assert ended.value.code == 2
    assert "nf3" in capsys.readouterr().err


@pytest.mark.transformers
@pytest.mark.parametrize("name", ["nf4", "fp4 nested", "int8"])
def test_what_transformers_saved(name: str, folder: Path, tmp_path: Path) -> None:
    """Made and saved by transformers with bitsandbytes: the same tensors as ours, and logits close to its own."""
    require("accelerate")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kind, nested = name.split()[0], name.endswith("nested")
    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested)
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    )
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    write_tokenizer(saved)
    assert check_folder(saved) == []
    config = read_config(saved)
    assert config.quantization is not None
    assert config.quantization.scheme_for("lm_head") is None
    ours = load_model(saved, dtype="fp32", context_len=64).logits(IDS)
    with torch.inference_mode():
        theirs = model(torch.tensor([IDS])).logits[0].float()
    # Its activations are bf16 (or rounded by LLM.int8 differently far); ours are float32.
    assert float((ours - theirs).norm() / ours.norm()) < 0.05
    if not nested:
        on_load = load_model(folder, dtype="fp32", context_len=64, quantize_on_load=kind)
        assert torch.equal(ours, on_load.logits(IDS))
    edit_json(saved / "config.json", quantization_config=None)
    assert check_folder(saved)  # without its settings the tensors make no sense
