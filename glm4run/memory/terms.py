"""What a plan is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["exact", "modelled", "measured"]

PREFILL_CHUNK = 512  # tokens of a prompt that are fed at once, where memory allows
WEIGHT_TERMS = ("linears", "scales", "embedding", "head", "norms_and_biases")


@dataclass(frozen=True)
class Term:
    """One line of a plan. `formula` says where the bytes come from."""

    name: str
    bytes: int
    kind: Kind
    formula: str = ""


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs, in bytes, at one context length (tokens), fed `chunk` tokens at a time."""

    context_len: int
    terms: tuple[Term, ...]
    chunk: int = PREFILL_CHUNK
    step: str = ""  # the forward's fullest step

    @property
    def peak_bytes(self) -> int:
        return sum(term.bytes for term in self.terms)

    @property
    def weight_bytes(self) -> int:
        return self.bytes_of(*WEIGHT_TERMS)

    def bytes_of(self, *names: str) -> int:
        """The sum of the terms called so."""
        return sum(term.bytes for term in self.terms if term.name in names)
