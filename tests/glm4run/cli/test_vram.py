"""`glm4run vram`: screens at every width, forms for machines, exit codes, and that every option does something."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4run import calibrate
from glm4run.cli import main, vram_plot
from glm4run.memory import GIB, MIB
from glm4run.memory.calibration import FILE_VARIABLE
from glm4run.vram import detect
from glm4run.vram.targets import Target
from tests.builders import write_packed

TERM_KINDS = {"exact", "modelled", "measured"}


class Result:
    """What one run gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU whatever the machine has, no models of the user, 80 columns."""
    monkeypatch.setattr(detect, "_load_nvml", lambda: None)
    monkeypatch.setattr(detect, "_output", lambda command: "")
    monkeypatch.setattr(detect, "DRM", tmp_path / "drm")
    monkeypatch.setenv("GLM4RUN_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "calibration.json"))
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str | Path) -> Result:
        with pytest.raises(SystemExit) as caught:
            main(["vram", *map(str, words)])
        out, err = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Result(caught.value.code, out, err)

    return call


def test_new_user_with_twelve_gigabytes_gets_one_screen(run: Run) -> None:
    got = run("--gpu", "12GB")
    assert (got.code, got.err) == (0, "")
    lines = got.out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    rows = {line.split()[0]: line.split() for line in lines if line.startswith(("bf16", "int8", "int4"))}
    assert [rows["int4"][i] for i in (1, 3, 5)] == ["+", "+", "~"]
    assert [rows["bf16"][i] for i in (1, 3, 5)] == ["-", "-", "-"]
    assert "decode, tok/s:" in got.out
    steps = [line.strip() for line in lines if line.startswith("  glm4run")]
    assert steps[0] == "glm4run quantize ./glm-4-9b-chat --bits 4 -o ./glm-4-9b-chat-int4"
    assert steps[1].startswith("glm4run chat ./glm-4-9b-chat-int4 --ctx ")


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize(
    "words",
    [
        ("--gpu", "12GB"),
        ("--gpu", "4GB"),
        ("--gpu", "4090", "--explain"),
        ("--gpu", "all", "--bits", "4"),
        ("--gpu", "16GB", "--plot"),
        ("--gpu", "3060 12GB", "--max-ctx", "--kv-bits", "16,8,4"),
        ("--gpu", "A100 SXM4 80GB", "--runtime", "hf-remote"),
    ],
    ids=" ".join,
)
def test_no_line_is_wider_than_the_terminal(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    got = run(*words)
    too_wide = [line for line in got.out.splitlines() if len(line) > width and not line.startswith("  glm4run")]
    assert too_wide == []
    assert got.out.count("\n") > 5


# --- contexts


def test_sizes_are_understood_and_echoed(run: Run) -> None:
    got = run("--gpu", "24GB", "--ctx", "128k,128000", "--bits", "4")
    assert " 128k" in got.out and " 128000" in got.out
    rows = run("--gpu", "24GB", "--ctx", "128k,128000", "--bits", "4", "--json").json()["rows"]
    assert [row["context_tokens"] for row in rows] == [131072, 128000]
    assert rows[0]["peak_bytes"] >= rows[1]["peak_bytes"]  # equal: the cache's tensors fill the same 64 MiB segments


def test_context_beyond_the_model(run: Run) -> None:
    got = run("--ctx", "1m", "--gpu", "80GB")
    assert got.code == 2
    assert "has 131072" in got.err
    assert run("glm-4-9b-chat-1m", "--ctx", "1m", "--gpu", "180GB").code == 0


def test_yarn_is_said(run: Run) -> None:
    assert "beyond 32768 tokens with YaRN" in run("GLM-4-9B-0414", "--gpu", "24GB").out
    assert "beyond" not in run("GLM-4-9B-0414", "--gpu", "24GB", "--ctx", "32k").out


# --- nothing fits


def test_nothing_fits_says_what_is_short_and_what_helps(run: Run) -> None:
    got = run("--gpu", "RTX 4060", "--bits", "4", "--ctx", "128k")
    assert got.code == 2
    data = run("--gpu", "RTX 4060", "--bits", "4", "--ctx", "128k", "--json")
    (row,) = data.json()["rows"]
    short = -row["headroom_bytes"] / GIB
    needed = row["peak_bytes"] / GIB
    assert got.err.startswith(f"error: needs {needed:.2f} GiB, 7.76 free on GeForce RTX 4060: short {short:.2f}")
    for step in ("chunks of 128", "embedding in RAM*", "cache of 8 bits (", "cache of 4 bits (", "longest context"):
        assert step in got.out
    assert "--offload" in got.out and "--gpus 2" in got.out and "or a larger card" in got.out
    assert data.code == 2
    remedies = data.json()["remedies"]
    assert [item["peak_bytes"] for item in remedies] == sorted((i["peak_bytes"] for i in remedies), reverse=True)


def test_max_ctx_of_nothing(run: Run) -> None:
    got = run("--gpu", "2GB", "--max-ctx")
    assert got.code == 2
    assert "no context fits" in got.err


def test_busy_gpu_names_who_holds_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def output(command: Any) -> str:
        if "--query-gpu" in command[1]:
            return "0, NVIDIA GeForce RTX 4070, 12282, 1000\n"
        return "4711, /opt/render, 11000\n"

    monkeypatch.setattr(detect, "_output", output)
    got = run()
    assert got.code == 2
    assert "0.98 of 11.99 GiB free (nvidia-smi)" in got.out
    assert "render (process 4711) holds 11000 MiB" in got.out


# --- forms


def test_json_has_the_contract_s_keys(run: Run) -> None:
    data = run("--gpu", "24GB", "--json").json()
    keys = {"schema_version", "model", "gpu", "rows", "max_context", "recommendations"}
    assert keys <= data.keys()
    assert data["schema_version"] == 1
    assert {"name", "total_bytes", "free_bytes", "source"} <= data["gpu"].keys()
    assert len(data["rows"]) == 9
    for row in data["rows"]:
        expected = {"context_tokens", "bits", "kv_bits", "head_bits", "batch", "chunk", "peak_bytes", "terms"}
        assert expected | {"fits", "headroom_bytes", "decode_tok_per_s"} <= row.keys()
        assert row["peak_bytes"] == sum(term["bytes"] for term in row["terms"])
        assert row["fits"] == (row["headroom_bytes"] >= 0) == (row["peak_bytes"] <= data["gpu"]["free_bytes"])
        assert {term["kind"] for term in row["terms"]} <= TERM_KINDS
    assert run("--json").json()["gpu"] is None  # no GPU here: the plan is about RAM
    assert run("--gpu", "all", "--bits", "4", "--json").json()["recommendations"][0]["gpu"]


def test_csv_and_markdown(run: Run) -> None:
    rows = list(csv.DictReader(io.StringIO(run("--gpu", "24GB", "--csv").out)))
    assert len(rows) == 9
    terms = [name for name in rows[0] if name.endswith("_bytes") and name not in ("peak_bytes", "headroom_bytes")]
    for row in rows:
        assert sum(int(row[name]) for name in terms) == int(row["peak_bytes"])
    lines = run("--gpu", "24GB", "--md").out.splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 5
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_explain_adds_up(run: Run) -> None:
    out = run("--gpu", "4090", "--bits", "4", "--ctx", "63k", "--explain").out
    values = [float(line.split()[0]) for line in out.splitlines() if " MiB  " in line and line.split()[0][-1].isdigit()]
    *terms, peak, held, spare, device = values
    assert sum(terms) == pytest.approx(peak, abs=0.1)
    assert peak + held + spare == pytest.approx(device, abs=0.1)


def test_chart_has_a_line_for_each_choice(run: Run) -> None:
    out = run("--gpu", "16GB", "--plot").out
    body = "".join(line.partition("|")[2] for line in out.splitlines())
    assert all(body.count(letter) >= 30 for letter in "ABC")
    assert "=" in body and "-" in body


needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="the extra `plot` is not installed"
)


@needs_matplotlib
def test_images_name_curves_device_and_card_sizes(run: Run, tmp_path: Path) -> None:
    words = ("--gpu", "12GB", "--bits", "8,4", "--kv-bits", "16,8")
    assert run(*words, "--svg", tmp_path / "a.svg", "--png", tmp_path / "a.png").code == 0
    svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]
    assert {"int8 KV 16", "int8 KV 8", "int4 KV 16", "int4 KV 8", "11.64 GiB to take"} <= set(texts)
    assert {"8", "12", "16k", "128k", "context in tokens"} <= set(texts)
    image = (tmp_path / "a.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert int.from_bytes(image[16:20], "big") >= 1000  # pixels
    run(*words, "--svg", tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_text(encoding="utf-8") == svg


@needs_matplotlib
def test_an_image_that_cannot_be_written_leaves_what_was_there(run: Run, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    got = run("--gpu", "12GB", "--png", tmp_path / "folder.png")
    assert got.code == 1
    assert "cannot write" in got.err
    assert run("--gpu", "12GB", "--png", tmp_path / "nowhere" / "a.png").code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=10))
def test_labels_of_curves_stay_apart_and_in_order(values: list[float]) -> None:
    placed = vram_plot._apart(values, 100.0)
    in_order = [placed[index] for index in sorted(range(len(values)), key=lambda index: values[index])]
    assert all(upper - lower > 0.8 * vram_plot.LABEL_GAP * 100 for lower, upper in pairwise(in_order))


def test_images_without_matplotlib_say_what_to_install(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    got = run("--gpu", "12GB", "--svg", tmp_path / "a.svg")
    assert got.code == 1
    assert "glm4run[plot]" in got.err


def test_reserve_is_left_free_everywhere(run: Run) -> None:
    plain, kept = (run("--gpu", "12GB", "--json", *more).json() for more in ((), ("--reserve", "2GB")))
    assert kept["device"]["reserved_bytes"] == 2 * GIB
    for before, after in zip(plain["rows"], kept["rows"], strict=True):
        assert after["peak_bytes"] == before["peak_bytes"]
        assert after["headroom_bytes"] == before["headroom_bytes"] - 2 * GIB
    longest = [{row["bits"]: row["context_tokens"] for row in data["max_context"]} for data in (plain, kept)]
    assert longest[1][4] < longest[0][4]
    assert kept["best"]["context_tokens"] < plain["best"]["context_tokens"]
    assert "2.00 GiB are left free (--reserve)" in run("--gpu", "12GB", "--reserve", "2GB").out
    fewer = run("--gpu", "all", "--bits", "4", "--ctx", "63k", "--reserve", "40%", "--json").json()
    more = run("--gpu", "all", "--bits", "4", "--ctx", "63k", "--json").json()
    assert fewer["recommendations"][0]["usable_bytes"] > more["recommendations"][0]["usable_bytes"]


def test_more_reserved_than_there_is_is_short_and_not_a_crash(run: Run) -> None:
    got = run("--gpu", "8GB", "--reserve", "9GB")
    assert got.code == 2
    assert "-1.24 free" in got.err and "17592186" not in got.out + got.err


@pytest.mark.parametrize("text", ["x", "-3%", "100%", "", "%"])
def test_wrong_reserves_are_usage_errors(run: Run, text: str) -> None:
    got = run("--gpu", "8GB", f"--reserve={text}")
    assert got.code == 2
    assert "is no amount of memory" in got.err


def test_calibration_is_said_and_is_about_this_machine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    case = {"version": "x", "context_bytes": 90 * MIB, "later_bytes": 0, "slack_bytes": 0, "read_gb_per_s": 50.0}
    monkeypatch.setattr(calibrate, "_run_child", lambda words: case)
    monkeypatch.setattr(Target, "backend", lambda target: "native")
    got = run("--gpu", "cpu", "--ctx", "1k", "--bits", "4", "--calibrate")
    assert "measured: process 90 MiB" in got.err
    assert "process measured here on" in got.out
    data = run("--gpu", "cpu", "--ctx", "1k", "--bits", "16,4", "--json").json()
    assert data["device"]["calibration"]["context_bytes"] == 90 * MIB
    kinds = {term["name"]: term["kind"] for term in data["rows"][0]["terms"]}
    assert kinds["process"] == "measured"
    assert data["rows"][0]["decode_tok_per_s"] is None  # dense weights were not measured
    low, high = data["rows"][1]["decode_tok_per_s"]
    assert 0 < low < high < 50e9 / 4e9
    assert run("--gpu", "12GB", "--calibrate").code == 2
    assert run("--gpu", "12GB", "--json").json()["device"]["calibration"] is None


# --- every option does something


@pytest.mark.parametrize(
    "words",
    [
        *(("--bits", "8"), ("--bits", "nf4"), ("--kv-bits", "8"), ("--kv-bits", "4"), ("--head-bits", "16")),
        *(("--group-size", "32"), ("--embed", "host"), ("--batch", "4"), ("--chunk", "2k"), ("--offload", "8")),
        *(("--draft", "demo"), ("--draft", "ngram", "--draft-tokens", "400"), ("--gpus", "2")),
        *(("--gpus", "2", "--split", "tp"), ("--context-mib", "900"), ("--every-logits",)),
    ],
    ids=" ".join,
)
def test_option_changes_the_plan(run: Run, words: tuple[str, ...]) -> None:
    common = ("--gpu", "80GB", "--ctx", "32k", "--json")
    plain, changed = (run(*common, *more).json()["rows"][0] for more in (("--bits", "4"), ("--bits", "4", *words)))
    assert plain["peak_bytes"] != changed["peak_bytes"]


def test_folder_is_told_by_its_headers(run: Run, tmp_path: Path) -> None:
    folder = write_packed(tmp_path / "tiny")
    got = run(folder, "--gpu", "8GB")
    assert got.out.startswith("tiny on a card of 8 GiB")
    assert "packed" in got.out and f"glm4run chat {folder}" in got.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpu", "rtx 4099"), "in the catalogue"),
        (("--bits", "3"), "--bits '3'"),
        (("--kv-bits", "16,2"), "--kv-bits '2'"),
        (("--ctx", "many"), "--ctx 'many' is not a size"),
        (("--chunk", "0"), "--chunk '0' is not a size"),
        (("--group-size", "48"), "--group-size 48"),
        (("--split", "x", "--gpu", "8GB"), "--split 'x'"),
        (("--embed", "disk"), "--embed 'disk'"),
        (("--embed", "host"), "are about a GPU"),
        (("--json", "--csv"), "more than one of"),
        (("--runtime", "x"), "--runtime 'x'"),
        (("--runtime", "vllm"), "vLLM takes a share"),
        (("--gpu", "8GB", "--gpus", "2", "--offload", "3"), "not modelled"),
        (("--gpu", "8GB", "--gpus", "2", "--split", "tp", "--group-size", "128", "--bits", "4"), "6848 columns"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_use(run: Run, words: tuple[str, ...], message: str) -> None:
    got = run(*words)
    assert got.code == 2
    assert message in got.err
    assert "hint:" in got.err
    assert "Traceback" not in got.err


def test_others_are_marked_as_theirs(run: Run) -> None:
    for name in ("hf-remote", "hf", "llama.cpp", "vllm"):
        got = run("--runtime", name, "--gpu", "A100 SXM4 80GB", "--ctx", "8k")
        assert got.code == 0
        assert "which is not glm4run" in " ".join(got.out.split())
        assert "(glm4run " in got.out
