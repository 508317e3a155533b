"""Whatever is wrong with a folder is named in one line with what to do: by loading it, and by `check` before that."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glm4run import load_model
from glm4run.checking import check_folder
from glm4run.cli import main
from glm4run.errors import Glm4RunError
from tests.builders import VOCAB, edit_json, edit_tensors, write_checkpoint, write_packed

FIRST_SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.0.mlp.down_proj"


@dataclass(frozen=True)
class Case:
    """One way to damage a folder, and what must be said about it."""

    damage: Callable[[Path], object]
    says: tuple[str, ...]
    packed: bool = False
    shards: int = 1
    exit_code: int = 1


def cut(folder: Path) -> None:
    path = folder / FIRST_SHARD
    path.write_bytes(path.read_bytes()[:-100])


def point_to(target: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        edit_json(folder / INDEX, weight_map=index["weight_map"] | {"lm_head.weight": target})

    return damage


def spoil_scale(folder: Path) -> None:
    name = f"{DOWN}.weight_scale"
    scale = load_file(folder / "model.safetensors")[name]
    scale[0, 0] = float("nan")
    edit_tensors(folder, {name: scale})


def set_group_size(size: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for group in config["quantization_config"]["config_groups"].values():
            group["weights"]["group_size"] = size
        (folder / "config.json").write_text(json.dumps(config))

    return damage


CASES = {
    "truncated shard": Case(cut, (FIRST_SHARD, "truncated"), shards=2),
    "missing shard": Case(lambda f: (f / FIRST_SHARD).unlink(), (FIRST_SHARD, "missing"), shards=2),
    "no weights": Case(lambda f: (f / "model.safetensors").unlink(), ("no safetensors files",)),
    "wrong shape": Case(
        lambda f: edit_tensors(f, {"model.norm.weight": torch.ones(127)}), ("model.norm.weight", "[127]", "[128]")
    ),
    "extra tensor": Case(lambda f: edit_tensors(f, {"surprise": torch.ones(1)}), ("surprise", "not part of")),
    "missing tensor": Case(lambda f: edit_tensors(f, {f"{DOWN}.weight": None}), (f"{DOWN}.weight", "missing")),
    "NaN scale": Case(spoil_scale, (f"{DOWN}.weight_scale", "NaN"), packed=True),
    "NaN norm": Case(
        lambda f: edit_tensors(f, {"model.norm.weight": torch.full((128,), float("nan"))}), ("model.norm.weight", "NaN")
    ),
    "wrong weight_shape": Case(
        lambda f: edit_tensors(f, {f"{DOWN}.weight_shape": torch.tensor([128, 128])}),
        (f"{DOWN}.weight_shape", "[128, 128]", "[128, 160]"),
        packed=True,
    ),
    "config contradicts the tensors": Case(
        lambda f: edit_json(f / "config.json", num_key_value_heads=4), ("k_proj.weight", "config.json says [128, 128]")
    ),
    "config contradicts itself": Case(
        lambda f: edit_json(f / "config.json", num_key_value_heads=3), ("config.json", "contradicts itself")
    ),
    "config of the other norm layout": Case(
        lambda f: edit_json(f / "config.json", model_type="glm4"), ("config.json", "second norms")
    ),
    "config is no JSON": Case(lambda f: (f / "config.json").write_text("{"), ("config.json", "JSON")),
    "no config": Case(lambda f: (f / "config.json").unlink(), ("no config.json",)),
    "unknown architecture": Case(
        lambda f: edit_json(f / "config.json", model_type="llama"), ("model_type is 'llama'", "chatglm, glm, glm4")
    ),
    "unknown quantization": Case(
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq"}), ("'gptq'",)
    ),
    "group size 256": Case(set_group_size(256), ("config.json", "group size 256 does not divide"), packed=True),
    "index points nowhere": Case(point_to("gone.safetensors"), ("gone.safetensors", "missing"), shards=2),
    "index points outside": Case(point_to("../gone.safetensors"), (INDEX, "outside the folder"), shards=2),
    "index is no JSON": Case(lambda f: (f / INDEX).write_text("[1"), (INDEX, "JSON"), shards=2),
    "no tokenizer": Case(lambda f: (f / "tokenizer.model").unlink(), ("no tokenizer",)),
    "damaged tokenizer": Case(lambda f: (f / "tokenizer.model").write_text("version https://git-lfs"), ("line 1",)),
    "unknown template": Case(lambda f: (f / "chat_template.jinja").write_text("{{ x }}"), ("template", "unknown")),
    "damaged generation config": Case(
        lambda f: (f / "generation_config.json").write_text("x"), ("generation_config.json", "JSON")
    ),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Case]:
    case = CASES[request.param]
    folder = tmp_path / "model"
    if case.packed:
        write_packed(folder)
    else:
        write_checkpoint(folder, shards=case.shards)
    case.damage(folder)
    return folder, case


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_loading_names_it(damaged: tuple[Path, Case]) -> None:
    folder, case = damaged
    with pytest.raises(Glm4RunError) as caught:
        load_model(folder, dtype="fp32")
    assert all(words in caught.value.message for words in case.says), caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == case.exit_code


def test_check_names_it_before(damaged: tuple[Path, Case]) -> None:
    folder, case = damaged
    problems = check_folder(folder)
    said = "\n".join(f"{p.file}: {p.tensor}: {p.what} ({p.hint})" for p in problems)
    assert all(words in said for words in case.says), said
    assert all(problem.hint for problem in problems)


def test_commands_print_error_and_hint_and_no_traceback(
    damaged: tuple[Path, Case], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, case = damaged
    assert run("generate", "hello", "-m", folder, "--max-tokens", "1") == case.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "\nhint: " in err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 13  # one line each, or a list of at most ten problems
    assert run("check", folder) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("problem: ")


def test_quantize_names_it_and_writes_nothing(damaged: tuple[Path, Case], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _case = damaged
    code = run("quantize", folder, "-o", folder.parent / "out", "--bits", "8")
    _, err = capsys.readouterr()
    assert (code, err.startswith("error: ")) == (1, True)
    assert not (folder.parent / "out").exists()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good base model."""
    return write_checkpoint(tmp_path_factory.mktemp("bad") / "base")


def test_prompt_longer_than_the_context(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "x" * 100, "-m", base, "--ctx", "64") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: the prompt has 102 tokens, the context holds 64\nhint: " in err


def test_context_longer_than_the_model(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "x", "-m", base, "--ctx", "1k") == 2
    assert capsys.readouterr().err.endswith(
        "error: a context of 1024 tokens was asked for, this model has 512\nhint: use --ctx 512\n"
    )


@pytest.mark.parametrize("command", [("chat",), ("generate", "hello", "--chat", "-m")], ids=lambda words: words[0])
def test_base_model_does_not_chat(base: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    assert run(*command, base) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: base has no chat template: a base model" in err
    assert "glm-4-9b-chat" in err and "--force" in err


@pytest.mark.parametrize("size", [16, 256])
def test_group_size_that_is_not_of_the_format(base: Path, capsys: pytest.CaptureFixture[str], size: int) -> None:
    assert run("quantize", base, "-o", base.parent / "out", "--group-size", str(size)) == 2
    err = capsys.readouterr().err
    assert err == (
        f"error: group size {size} is not one of 32, 64, 128\nhint: these fit every linear of this model: 32\n"
    )


def test_unknown_template_does_not_chat(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "model")
    edit_json_template = {"chat_template": "{% for m in messages %}<|im_start|>{{ m }}{% endfor %}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(edit_json_template))
    assert run("chat", folder) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: the chat template with fingerprint")
    assert "known dialects" in err


def test_stored_nan_weight_ends_generation_without_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "model")
    edit_tensors(folder, {"lm_head.weight": torch.full((VOCAB, 128), float("nan"))})
    assert run("generate", "hello", "-m", folder) == 1
    out, err = capsys.readouterr()
    assert out.strip() == ""
    assert "error: the model's output is not finite" in err
