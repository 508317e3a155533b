"""The benchmark counts the right bytes and runs the right work; how long that takes is no test's matter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from glm4run import LoadedModel, benchmark, load_model
from glm4run.benchmark import (
    Bandwidth,
    bytes_per_token,
    filled,
    measure,
    share_of_bandwidth,
    slower_than_bf16,
    time_decode,
    time_prefill,
)
from glm4run.cards import demo_folder
from glm4run.cli import main
from glm4run.errors import UsageError
from glm4run.kernels.cpu import library
from tests.builders import write_checkpoint


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model(demo_folder(), context_len=200)


class FixedProbe(benchmark.ReadProbe):
    """Reads at one speed for ever."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def gb_per_s(self, threads: int, prefetch_bytes: int) -> float:
        self.asked.append((threads, prefetch_bytes))
        return 1000.0


def test_a_token_reads_every_linear_once_and_its_share_of_the_cache(demo: LoadedModel) -> None:
    config = demo.config
    linears = sum(module.nbytes for name, module in demo.model.named_modules() if name.endswith(("_proj", "lm_head")))
    assert bytes_per_token(demo) == linears > 0
    cache = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert bytes_per_token(demo, 100) == linears + 100 * cache
    assert bytes_per_token(demo, tokens=64) == linears // 64
    assert bytes_per_token(demo, tokens=5000) == linears // demo.plan.chunk


def test_dense_linears_count_too(tmp_path: Path) -> None:
    dense = load_model(write_checkpoint(tmp_path), dtype="fp32")
    parameters = {n: p for n, p in dense.model.named_parameters() if "norm" not in n and "embed" not in n}
    assert bytes_per_token(dense) == sum(4 * p.numel() for p in parameters.values())


def test_work_is_done_behind_the_depth(demo: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    positions: list[tuple[int, int]] = []
    forward = type(demo.model).hidden_states

    def watched(self, ids: torch.Tensor, cache: object = None) -> torch.Tensor:  # type: ignore[no-untyped-def]
        positions.append((cache.position, len(ids)))  # type: ignore[attr-defined]
        return forward(self, ids, cache)  # type: ignore[arg-type]

    monkeypatch.setattr(type(demo.model), "hidden_states", watched)
    context = filled(demo, 30, 21)
    assert positions == []  # what lies before is filled in, not computed
    assert time_prefill(demo, context, 20) > 0
    assert positions == [(30, 20)]
    positions.clear()
    for _ in range(2):  # a run leaves the context as it was
        assert time_decode(demo, context, 3) > 0
    assert positions == 2 * [(30, 1), (31, 1), (32, 1), (33, 1)]  # the first step is not timed


def test_rows_are_compared_with_readings_around_them(demo: LoadedModel) -> None:
    probe = FixedProbe()
    arguments = {"prompts": (8,), "generate": 2, "depths": (0, 16), "repeat": 2}
    rows = list(measure(demo, **arguments, probe=probe, bandwidth=Bandwidth(12.0, 2, 512)))  # type: ignore[arg-type]
    assert [(row.test, row.depth) for row in rows] == [("pp8", 0), ("tg2", 0), ("pp8", 16), ("tg2", 16)]
    assert set(probe.asked) == {(2, 512)}
    for row in rows:
        assert row.tok_per_s > 0
        assert row.backend == demo.backend_detail
        assert row.gb_per_s == pytest.approx(row.tok_per_s * row.bytes_per_token / 1e9)
    decoded = rows[1]
    assert decoded.fraction_of_bandwidth is not None and 0 < decoded.fraction_of_bandwidth < 10
    assert all(row.fraction_of_bandwidth is None for row in measure(demo, **arguments, probe=None, bandwidth=None))  # type: ignore[arg-type]


def test_tests_that_do_not_fit_the_context_are_refused(demo: LoadedModel) -> None:
    with pytest.raises(UsageError, match="context of 212 tokens"):
        list(measure(demo, prompts=(12,), generate=0, depths=(200,), repeat=1, probe=None, bandwidth=None))


def test_comparing_with_bf16_needs_something_packed(demo: LoadedModel, tmp_path: Path) -> None:
    factor = slower_than_bf16(demo, 2)
    assert factor is not None and factor > 0
    assert slower_than_bf16(load_model(write_checkpoint(tmp_path)), 2) is None


@pytest.mark.parametrize("present", [True, False])
def test_the_bandwidth_is_found_with_and_without_the_library(present: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if present and library.why_missing() is not None:
        pytest.skip(f"the native library is missing: {library.why_missing()}")
    monkeypatch.setattr(benchmark, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(benchmark, "available_ram_bytes", lambda: None)
    if not present:
        monkeypatch.setattr(benchmark, "why_missing", lambda: "not built")
    with benchmark.ReadProbe() as probe:
        assert (probe.tensor is None) == present
        best = probe.best()
    assert best.best_gb_per_s > 0
    assert best.threads >= 1


def test_the_command_prints_the_contract(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "READ_BYTES", 1 << 20)
    words = ["bench", "demo", "--prompt", "8,16", "--generate", "2", "--depth", "0,4", "--repeat", "1"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--backend", "auto,reference", "--json"])
    assert ended.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["machine", "commit", "read_bandwidth_gb_per_s", "rows"]
    assert [(row["test"], row["depth"]) for row in result["rows"][:3]] == [("pp8", 0), ("pp16", 0), ("tg2", 0)]
    assert len(result["rows"]) == 12
    assert {row["backend"].split(" ")[0] for row in result["rows"]} >= {"reference"}
    keys = ["test", "depth", "tok_per_s", "bytes_per_token", "gb_per_s", "fraction_of_bandwidth", "backend"]
    assert all(list(row) == keys for row in result["rows"])
    with pytest.raises(SystemExit) as ended:
        main(words)
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert "pp16" in printed and "tok/s" in printed


def test_a_packed_format_that_is_slower_than_bf16_is_said_aloud(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(benchmark, "slower_than_bf16", lambda model, tokens: 2.5 if tokens == 1 else 0.4)
    with pytest.raises(SystemExit):
        main(["bench", "demo", "--prompt", "8", "--generate", "1", "--repeat", "1"])
    warned = capsys.readouterr().err
    assert "2.5 times as long as bf16" in warned.replace("\n", " ")
    assert "0.4" not in warned


def test_runs_in_which_the_memory_changed_do_not_count(demo: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    nbytes = bytes_per_token(demo, 1)
    speeds = iter([5.0, 4.0, 9.0, 8.0])  # in GB/s
    monkeypatch.setattr(benchmark, "time_decode", lambda *_: nbytes / next(speeds) / 1e9)
    readings = iter([10.0, 10.0, 9.5, 20.0, 19.0])  # between the second and the third run it doubles
    probe = FixedProbe()
    monkeypatch.setattr(probe, "gb_per_s", lambda *_: next(readings))
    (row,) = measure(demo, prompts=(), generate=1, depths=(1,), repeat=4, probe=probe, bandwidth=Bandwidth(20.0, 2, 0))
    assert row.fraction_of_bandwidth == pytest.approx(4.0 / 9.75)  # of 0.5, 0.41 and 0.41
    assert row.gb_per_s == pytest.approx(6.5)

    readings = iter([10.0, 20.0])
    speeds = iter([6.0])
    (row,) = measure(demo, prompts=(), generate=1, depths=(1,), repeat=1, probe=probe, bandwidth=Bandwidth(20.0, 2, 0))
    assert row.fraction_of_bandwidth == pytest.approx(6.0 / 15.0)


def test_the_plan_is_checked_at_the_depth_without_reading_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(benchmark, "ReadProbe", None)
    monkeypatch.setattr("glm4run.cli.options.say_plan_check", lambda model, tokens: seen.append(tokens))
    words = ["bench", "demo", "--prompt", "0", "--generate", "2", "--depth", "900", "--repeat", "1", "--check-plan"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--kv-bits", "8", "--json"])
    assert ended.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert seen == [904] and result["read_bandwidth_gb_per_s"] is None
    assert [(row["test"], row["fraction_of_bandwidth"]) for row in result["rows"]] == [("tg2", None)]


@pytest.mark.parametrize(
    "words",
    [
        ["--prompt", "0", "--generate", "0"],
        ["--depth", "many"],
        ["--backend", "fast"],
        ["--check-plan", "--backend", "native,torch"],
    ],
)
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "demo", *words])
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_run_that_is_faster_than_what_was_read_around_it_never_counts() -> None:
    assert share_of_bandwidth([55.0, 36.0], [40.0, 40.0, 40.0]) == pytest.approx(36 / 40)
    assert share_of_bandwidth([55.0], [40.0, 40.0]) is None
    assert share_of_bandwidth([30.0, 50.0], [40.0, 60.0, 40.0]) == pytest.approx(40 / 50)  # neither of them is
    assert share_of_bandwidth([30.0], [40.0, None]) is None
