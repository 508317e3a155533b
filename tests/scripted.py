"""A model that says what the test tells it to, in the place of the network of a `LoadedModel`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from glm4run import LoadedModel, load_model
from glm4run.dialects import DIALECTS
from glm4run.kv_cache import KVCache
from glm4run.model import Glm4Model
from tests.builders import SPECIAL_IDS, STOP_IDS, VOCAB, write_checkpoint

END = SPECIAL_IDS["<|user|>"]


class ScriptedModel:
    """Likes the tokens of its script best, one a forward, and then the stop token; notes everything it is fed."""

    dtype = torch.float32
    stack = None

    def __init__(self, script: Iterable[int] = (), after: int = END) -> None:
        self.script = list(script)
        self.after = after
        self.fed: list[list[int]] = []
        self.before_forward: Callable[[], None] = lambda: None

    def hidden_states(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        self.before_forward()
        assert cache is not None
        assert cache.position + len(ids) <= cache.capacity
        self.fed.append(ids.tolist())
        cache.advance(len(ids))
        return torch.zeros(len(ids), 1)

    def __call__(self, ids: Tensor, cache: KVCache | None = None, *, logits: Literal["last", "all"] = "last") -> Tensor:
        self.hidden_states(ids, cache)
        return self.logits_for(self.script.pop(0) if self.script else self.after)[None]

    def logits_for(self, token: int) -> Tensor:
        """Float32 [V]: `token` far ahead of "?", which is ahead of the rest."""
        logits = torch.zeros(VOCAB)
        logits[ord("?")] = 5.0
        logits[token] = 20.0
        return logits

    @property
    def all_fed(self) -> list[int]:
        """Every token fed so far, in one list."""
        return [token for part in self.fed for token in part]


def loaded_model(folder: Path, *, dialect: str | None = "chat-2024", context_len: int = 256) -> LoadedModel:
    """A tiny real model of random weights, of one dialect."""
    write_checkpoint(folder)
    loaded = load_model(folder, dtype="fp32", context_len=context_len)
    assert loaded.stop_ids == frozenset(STOP_IDS)
    return dataclasses.replace(loaded, dialect=None if dialect is None else DIALECTS[dialect])


def with_script(
    loaded: LoadedModel, script: str | Iterable[int], after: int = END
) -> tuple[LoadedModel, ScriptedModel]:
    """`loaded` with its network replaced by a script of tokens, or of a text's tokens."""
    scripted = ScriptedModel(loaded.tokenizer.encode(script) if isinstance(script, str) else script, after)
    return dataclasses.replace(loaded, model=cast(Glm4Model, scripted)), scripted
