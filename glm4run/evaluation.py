"""How well a loaded model predicts a text, and how far it is from a reference: what `eval` and reports are made of.

Windows are fed one after the other; the head is applied to a few rows at a time, of the model and of its reference,
so that the distributions of a 151,552-wide vocabulary never pile up. Probabilities are over the tokens that the
vocabulary has: the padding rows of embedding and head stand for nothing, and are left out of every softmax.
All that lies between logits and figures is computed in float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glm4run.errors import DoesNotFitError, GenerationError, UsageError
from glm4run.fidelity import Summary, Tally, reference_rows
from glm4run.generate import LoadedModel
from glm4run.layers import QuantizedLinear
from glm4run.reference_logits import Provenance, ReferenceWriter, SavedReference
from glm4run.steps import Context
from glm4run.text_windows import Cut, Text, Window, cut_windows
from glm4run.tokenizer import Tokenizer

ROWS_BYTES = 32 << 20  # of float64 log-probabilities at once; a handful of tensors of this size is alive
Progress = Callable[[int, int], None]  # windows done, windows in all


@dataclass(frozen=True)
class Evaluation:
    """What was measured, on what."""

    text: Text
    cut: Cut
    windows: int
    summary: Summary
    prefix_tokens: int  # at the head of each window

    def as_report(self) -> dict[str, Any]:
        """What a packed folder's `glm4run.json` keeps under `report`. Needs a reference."""
        divergence = self.summary.divergence
        assert divergence is not None, "a report compares with a reference"
        return {
            "text": {"name": self.text.name, "sha256": self.text.sha256},
            "windows": self.windows,
            "ctx": self.cut.context,
            "perplexity": round(self.summary.perplexity.value, 6),
            "reference_perplexity": round(divergence.reference_perplexity.value, 6),
            "kl_mean": _significant(divergence.kl_mean.value),
            "kl_p99": _significant(divergence.kl_p99),
            "same_top1": round(divergence.same_top1.value, 6),
        }


def compare(
    model: LoadedModel,
    reference: LoadedModel | SavedReference,
    text: Text,
    cut: Cut = Cut(),  # noqa: B008 (frozen)
    *,
    progress: Progress | None = None,
) -> Evaluation:
    """`evaluate` with a reference: its summary has a `divergence`."""
    return evaluate(model, text, cut, reference=reference, progress=progress)


@torch.inference_mode()
def evaluate(
    model: LoadedModel,
    text: Text,
    cut: Cut = Cut(),  # noqa: B008 (frozen)
    *,
    reference: LoadedModel | SavedReference | None = None,
    save_logits: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of `model` over `text`; its divergence from `reference`; its own logits saved to be a reference.

    Raises:
        UsageError: text and sizes do not fit each other, or `reference` is of another vocabulary, text or size.
        DoesNotFitError: a model's context is shorter than `cut.context`, or the disk is too full for `save_logits`.
        GenerationError: a logit is NaN or infinite.
    """
    tokenizer = model.tokenizer
    windows = cut_windows(tokenizer.encode(text.content), tokenizer.prefix_ids, cut)
    scorer = _Scorer(model, cut.context)
    provenance = _provenance(model, text, cut)
    ids = [token for window in windows for token in window.ids]
    other = _reference(reference, provenance, ids, cut)
    tally, row = Tally(), 0
    with ExitStack() as stack:
        writer = None
        if save_logits is not None:
            scored = sum(window.scored for window in windows)
            writer = stack.enter_context(ReferenceWriter(save_logits, provenance, ids, scored, scorer.columns))
        if progress is not None:
            progress(0, len(windows))
        for number, window in enumerate(windows):
            hidden = scorer.hidden_states(window)
            theirs = other.hidden_states(window) if isinstance(other, _Scorer) else None
            for first, last in _row_blocks(window.scored, scorer.columns):
                expected = window.ids[window.first + first : window.first + last]
                exact = None
                if isinstance(other, _Scorer):
                    assert theirs is not None
                    exact = reference_rows(other.log_probs(theirs[first:last]), other.targets(expected))
                elif other is not None:
                    exact = other.read(row + first, row + last)
                ours = scorer.log_probs(hidden[first:last])
                rows = tally.add(ours, scorer.targets(expected), window.first + first, exact)
                if writer is not None:
                    writer.write(rows)
            row += window.scored
            if progress is not None:
                progress(number + 1, len(windows))
    return Evaluation(text, cut, len(windows), tally.summary(), len(tokenizer.prefix_ids))


class _Scorer:
    """One model, fed with windows."""

    def __init__(self, model: LoadedModel, context: int) -> None:
        if context > model.plan.context_len:
            raise DoesNotFitError(
                f"windows of {context} tokens do not fit the context of {model.name}, {model.plan.context_len} tokens",
                hint="use a smaller --ctx",
            )
        self.model = model
        self.context: Context = model.new_context()
        usable = [i for i in model.tokenizer.usable_ids() if i < model.config.vocab_size]
        self.columns = len(usable)
        self._usable = torch.tensor(usable, device=model.device)
        self._selection: Tensor | slice = self._usable  # of the head's rows
        if usable[-1] == self.columns - 1:  # no gaps: a view instead of a copy
            self._selection = slice(self.columns)

    def hidden_states(self, window: Window) -> Tensor:
        """Of the positions whose next tokens are scored: [R, hidden]."""
        model, cache = self.model, self.context.cache
        cache.truncate(0)
        ids = torch.tensor(window.ids[:-1], dtype=torch.long, device=model.device)
        size = model.plan.chunk
        parts = [model.model.hidden_states(ids[at : at + size], cache) for at in range(0, len(ids), size)]
        return torch.cat(parts)[window.first - 1 :]

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, hidden] to log-probabilities over the vocabulary's tokens, float64 [R, C]."""
        logits: Tensor = self.model.model.lm_head(hidden)[:, self._selection]
        if not torch.isfinite(logits).all():
            raise GenerationError(
                f"{self.model.name} computes logits that are NaN or infinite",
                hint="compute in --dtype fp32 or bf16; `glm4run check` finds damaged files",
            )
        return logits.double().log_softmax(-1)

    def targets(self, ids: Sequence[int]) -> Tensor:
        """The columns of token ids, int64 [R]."""
        wanted = torch.tensor(ids, dtype=torch.long, device=self.model.device)
        return torch.searchsorted(self._usable, wanted)


def bits_per_weight(model: LoadedModel) -> float:
    """Of the layers' linears as they are kept here, scales and padding included; embedding, head and biases apart."""
    nbytes = weights = 0
    for module in model.model.model.layers.modules():
        if isinstance(module, QuantizedLinear):
            spec = module.prepacked.spec
            nbytes += module.prepacked.nbytes
            weights += spec.out_features * spec.in_features
        elif isinstance(module, nn.Linear):
            nbytes += module.weight.numel() * module.weight.element_size()
            weights += module.weight.numel()
    return 8 * nbytes / weights


def _reference(
    reference: LoadedModel | SavedReference | None, wanted: Provenance, ids: Sequence[int], cut: Cut
) -> _Scorer | SavedReference | None:
    if isinstance(reference, LoadedModel):
        theirs = vocabulary_sha256(reference.tokenizer, reference.config.vocab_size)
        if theirs != wanted.vocabulary_sha256:
            raise UsageError(
                f"{wanted.model} and the reference {reference.name} have different vocabularies",
                hint="a reference is the same model, less quantized",
            )
        return _Scorer(reference, cut.context)
    if reference is not None:
        reference.require(wanted, ids)
    return reference


def _provenance(model: LoadedModel, text: Text, cut: Cut) -> Provenance:
    return Provenance(
        model=model.name,
        text=text.name,
        text_sha256=text.sha256,
        context=str(cut.context),
        stride="none" if cut.stride is None else str(cut.stride),
        prefix=" ".join(map(str, model.tokenizer.prefix_ids)),
        vocabulary_sha256=vocabulary_sha256(model.tokenizer, model.config.vocab_size),
    )


def vocabulary_sha256(tokenizer: Tokenizer, vocab_size: int) -> str:
    """A fingerprint of the tokens below `vocab_size`: ids, bytes, and which are control tokens."""
    digest = hashlib.sha256()
    for token in tokenizer.usable_ids():
        if token < vocab_size:
            kind = b"special" if token in tokenizer.special_ids else b"text"
            digest.update(b"%d %s %s\n" % (token, kind, tokenizer.piece(token).encode()))
    return digest.hexdigest()


def _row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """[first, last) of blocks of rows whose log-probabilities take at most ROWS_BYTES."""
    size = max(1, ROWS_BYTES // (8 * columns))
    for first in range(0, rows, size):
        yield first, min(first + size, rows)


def _significant(value: float, digits: int = 6) -> float:
    return float(f"{value:.{digits}g}")
