"""The evaluation feeds the right windows and compares the right distributions, and holds few of them at once."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glm4run import LoadedModel, evaluation, load_model
from glm4run.cards import demo_folder
from glm4run.errors import DoesNotFitError, GenerationError, UsageError
from glm4run.evaluation import bits_per_weight, compare, evaluate, vocabulary_sha256
from glm4run.reference_logits import SavedReference
from glm4run.text_windows import Cut, Text, cut_windows, read_text
from tests.builders import FIRST_PADDING, LAYOUTS, PREFIX, VOCAB, Layout, edit_tensors, write_checkpoint, write_packed

TEXT = Text("text", "hello the thin in there, on the heron 你好 at the hell. " * 12, "0" * 64)
CUT = Cut(48, windows=4)


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("evaluation") / "dense")


@pytest.fixture(scope="module")
def dense(dense_folder: Path) -> LoadedModel:
    return load_model(dense_folder, dtype="fp32", context_len=64)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_packed(tmp_path_factory.mktemp("evaluation") / "packed")
    return load_model(folder, dtype="fp32", context_len=64, backend="reference")


def log_probs(model: LoadedModel, ids: tuple[int, ...]) -> torch.Tensor:
    """Without padding rows, from the model's own logits of the whole window."""
    return model.logits(ids)[:, :FIRST_PADDING].double().log_softmax(-1)


@pytest.mark.parametrize("cut", [CUT, Cut(48, stride=20, max_tokens=130)], ids=["side by side", "strided"])
def test_figures_equal_those_of_whole_logits(dense: LoadedModel, packed: LoadedModel, cut: Cut) -> None:
    found = compare(packed, dense, TEXT, cut)
    losses, exact_losses, kl = [], [], []
    for window in cut_windows(dense.tokenizer.encode(TEXT.content), PREFIX, cut):
        ours, exact = log_probs(packed, window.ids), log_probs(dense, window.ids)
        for position in range(window.first, len(window.ids)):
            losses.append(-float(ours[position - 1, window.ids[position]]))
            exact_losses.append(-float(exact[position - 1, window.ids[position]]))
            kl.append(float((exact[position - 1].exp() * (exact[position - 1] - ours[position - 1])).sum()))
    assert found.summary.tokens == len(losses)
    assert found.summary.perplexity.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    divergence = found.summary.divergence
    assert divergence is not None
    assert divergence.kl_mean.value == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert divergence.reference_perplexity.value == pytest.approx(math.exp(sum(exact_losses) / len(kl)), rel=1e-6)
    assert divergence.kl_mean.value > 1e-4


def test_padding_rows_do_not_count(dense: LoadedModel, tmp_path: Path) -> None:
    """A head that gives padding rows enormous logits predicts as well as before."""
    folder = write_checkpoint(tmp_path / "padded")
    weight = load_file(folder / "model.safetensors")["lm_head.weight"]
    weight[FIRST_PADDING:] = 50.0
    edit_tensors(folder, {"lm_head.weight": weight})
    other = load_model(folder, dtype="fp32", context_len=64)
    assert VOCAB > FIRST_PADDING
    assert evaluate(other, TEXT, CUT).summary == evaluate(dense, TEXT, CUT).summary


def test_blocks_of_rows_change_nothing(
    dense: LoadedModel, packed: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare(packed, dense, TEXT, CUT).summary
    sizes: list[int] = []
    original = evaluation._Scorer.log_probs

    def watched(self: evaluation._Scorer, hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return original(self, hidden)

    monkeypatch.setattr(evaluation._Scorer, "log_probs", watched)
    monkeypatch.setattr(evaluation, "ROWS_BYTES", 8 * FIRST_PADDING * 5)
    blocks = compare(packed, dense, TEXT, CUT).summary
    assert max(sizes) == 5  # never more distributions at once
    assert blocks.perplexity.value == pytest.approx(whole.perplexity.value, rel=1e-6)
    assert blocks.divergence is not None and whole.divergence is not None
    assert blocks.divergence.kl_mean.value == pytest.approx(whole.divergence.kl_mean.value, rel=1e-4)


def test_a_saved_reference_stands_for_its_model(dense: LoadedModel, packed: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "logits"
    alone = evaluate(dense, TEXT, CUT, save_logits=path)
    saved = SavedReference(path)
    assert saved.columns == FIRST_PADDING
    own = compare(dense, saved, TEXT, CUT).summary.divergence
    assert own is not None
    assert 0 <= own.kl_mean.value < 1e-6
    assert own.same_top1.value == 1.0
    assert own.reference_perplexity == alone.summary.perplexity
    direct, stored = compare(packed, dense, TEXT, CUT).summary, compare(packed, saved, TEXT, CUT).summary
    assert direct.divergence is not None and stored.divergence is not None
    assert stored.perplexity == direct.perplexity
    assert stored.divergence.kl_mean.value == pytest.approx(direct.divergence.kl_mean.value, rel=5e-3)
    assert stored.divergence.same_top1 == direct.divergence.same_top1
    fewer = dataclasses.replace(CUT, windows=2)
    assert compare(packed, saved, TEXT, fewer).windows == 2
    with pytest.raises(UsageError, match="another context"):
        compare(packed, saved, TEXT, Cut(40, windows=2))
    with pytest.raises(UsageError, match="another text"):
        compare(packed, saved, dataclasses.replace(TEXT, sha256="1" * 64), CUT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: Layout, tmp_path: Path) -> None:
    model = load_model(write_checkpoint(tmp_path / "model", layout), dtype="fp32", context_len=48)
    own = compare(model, model, TEXT, CUT).summary.divergence
    assert own is not None
    assert own.kl_mean.value == 0 and own.same_top1.value == 1


def test_the_demo_and_what_a_report_keeps() -> None:
    demo = load_model(demo_folder(), context_len=64)
    reference = load_model(demo_folder(), context_len=64, backend="reference", dtype="fp32")
    progress: list[tuple[int, int]] = []
    found = compare(demo, reference, TEXT, Cut(64, windows=2), progress=lambda *step: progress.append(step))
    assert progress == [(0, 2), (1, 2), (2, 2)]
    report = found.as_report()
    assert list(report) == [
        *("text", "windows", "ctx", "perplexity", "reference_perplexity", "kl_mean", "kl_p99", "same_top1")
    ]
    assert report["text"] == {"name": "text", "sha256": TEXT.sha256}
    assert (report["windows"], report["ctx"]) == (2, 64)
    assert 0 < report["kl_mean"] < 0.1 and 0.8 < report["same_top1"] <= 1
    assert found.prefix_tokens == 2
    assert 4 < bits_per_weight(demo) < 5


def test_bits_of_dense_weights(dense: LoadedModel) -> None:
    assert bits_per_weight(dense) == 32


def test_models_of_two_vocabularies_are_refused(dense: LoadedModel) -> None:
    demo = load_model(demo_folder(), context_len=64)
    with pytest.raises(UsageError, match="different vocabularies"):
        compare(demo, dense, TEXT, CUT)
    assert vocabulary_sha256(demo.tokenizer, 1000) != vocabulary_sha256(demo.tokenizer, 1001)


def test_windows_must_fit_the_context(dense: LoadedModel) -> None:
    with pytest.raises(DoesNotFitError, match="65 tokens do not fit the context"):
        evaluate(dense, TEXT, Cut(65))


def test_logits_that_are_not_finite_stop_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "broken")
    edit_tensors(folder, {"lm_head.weight": torch.full((VOCAB, 128), float("nan"))})
    model = load_model(folder, dtype="fp32", context_len=64)
    with pytest.raises(GenerationError, match="NaN"):
        evaluate(model, TEXT, CUT, save_logits=tmp_path / "logits")
    assert not (tmp_path / "logits").exists()


@pytest.mark.transformers
def test_perplexity_is_that_of_transformers(dense_folder: Path, dense: LoadedModel) -> None:
    from versus_transformers import perplexity_of_windows

    windows = [torch.tensor(w.ids) for w in cut_windows(dense.tokenizer.encode(TEXT.content), PREFIX, CUT)]
    theirs, count = perplexity_of_windows(dense_folder, windows, vocabulary=FIRST_PADDING)
    ours = evaluate(dense, TEXT, CUT).summary
    assert ours.tokens == count
    assert ours.perplexity.value == pytest.approx(theirs, rel=1e-4)


def test_wiki_text_on_the_demo(shared: Path) -> None:
    """A real text, far from what the demo knows: every figure is finite and the windows are as asked."""
    whole = read_text(shared / "data" / "corpora" / "wiki.test.raw")
    text = dataclasses.replace(whole, content=whole.content[:20_000])
    found = evaluate(load_model(demo_folder(), context_len=128), text, Cut(128, windows=3))
    assert found.windows == 3
    assert found.summary.tokens == 3 * 63
    assert 1 < found.summary.perplexity.value < math.inf
