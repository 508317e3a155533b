"""A loaded model and what is known of it: all that an answer needs, and no answer yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from glm4run.cards import Card
from glm4run.chat_format import Message, encode_chat
from glm4run.config import ModelConfig
from glm4run.dialects import Dialect
from glm4run.errors import DoesNotFitError, UsageError
from glm4run.kernels.cpu.ops import FEW_TOKENS, ONE_STRETCH
from glm4run.key_offset import key_offsets
from glm4run.kv_cache import KVCache
from glm4run.later_layout import LaterLayout
from glm4run.layers import QuantizedLinear
from glm4run.loading import available_bytes
from glm4run.memory import GIB, MemoryPlan, Run, attends_natively, grammar_term, plan_run
from glm4run.model import Glm4Model
from glm4run.model_folders import no_chat_template
from glm4run.sampling import SamplingParams
from glm4run.speculative import StepCosts
from glm4run.steps import Context
from glm4run.token_rules import GrammarVocabulary
from glm4run.tokenizer import Tokenizer


class KeptPrompts(Protocol):
    """Prompts whose keys and values are kept beyond the process."""

    def recall(self, context: Context, prompt: Sequence[int]) -> int:
        """Loads what is kept of `prompt` behind what the context shares with it; returns how many tokens."""
        ...

    def offer(self, context: Context, prompt: Sequence[int], start: int) -> None:
        """Notes that `prompt` had to be computed from `start` on."""
        ...

    def keep(self) -> None:
        """Writes what was offered. Called when an answer has been shown: no first token waits for a disk."""
        ...


@dataclass(frozen=True)
class ReadyModel:
    """A model with its tokenizer. `generate.LoadedModel` adds what it can be asked."""

    name: str
    folder: Path
    model: Glm4Model
    tokenizer: Tokenizer
    config: ModelConfig
    plan: MemoryPlan
    memory_run: Run
    dialect: Dialect | None  # None: a base model, or one without a known chat template
    card: Card | None
    stop_ids: frozenset[int]
    generation_defaults: Mapping[str, Any]
    backend: str
    backend_detail: str
    backend_reason: str
    notices: tuple[str, ...]
    load_s: float
    device: torch.device
    kept_prompts: KeptPrompts | None = None
    layout: LaterLayout | None = None

    def settle(self) -> bool:
        """Waits until the weights lie where they stay: a large model answers before that (`later_layout`).

        Nothing depends on it but speed, by a few percent, and what the process holds. False where memory was refused,
        and the model goes on with weights that are still in their files.
        """
        return self.layout is None or self.layout.wait()

    @cached_property
    def ordinary_tokens(self) -> Tensor:
        """bool [V]: the ids that are text. Neither padding rows nor control tokens."""
        mask = torch.zeros(self.config.vocab_size, dtype=torch.bool)
        text = set(self.tokenizer.usable_ids()) - self.tokenizer.special_ids
        mask[[i for i in text if i < self.config.vocab_size]] = True
        return mask

    @cached_property
    def dead_ids(self) -> Tensor:
        """bool [V]: the ids that have no token, which a whole model never likes best."""
        dead = torch.ones(self.config.vocab_size, dtype=torch.bool)
        dead[[i for i in self.tokenizer.usable_ids() if i < self.config.vocab_size]] = False
        return dead

    @cached_property
    def why_no_speculation(self) -> str | None:
        """None where drafts can be verified, else the reason in one clause.

        The logits of a position must be the same bits however many tokens are fed at once, or a draft would change the
        text. The native kernels promise that; torch's products and attention round differently for other shapes.
        """
        if self.model.stack is None:
            return "its layers do not run in the native library, and other kernels round differently for several tokens"
        head = self.model.lm_head
        if not (isinstance(head, QuantizedLinear) and head.backend.name == "native"):
            return "its head is not packed for the native library"
        return None

    @cached_property
    def key_offsets(self) -> list[Tensor]:
        """What is taken from the keys that a cache of few bits keeps, of each layer; empty where nothing is."""
        return key_offsets(self.model) if self.memory_run.kv_format.key_bits < 16 else []

    @property
    def cut_unit(self) -> int:
        """Where a prompt may be cut in two without a trace: behind any token (1), or behind whole chunks only.

        Where a chunk's borders show in its last bits, the rest of a prompt must be computed in the very chunks in which
        it would be from the start.
        """
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        return 1 if self.backend == "native" and attends_natively(heads, kv_heads) else self.plan.chunk

    def read_together(self, prompt_tokens: int) -> int:
        """Of how many tokens at least a cut must leave a prompt's rest, and chunks must be, for the same reason.

        Deep in a context attention adds up a few tokens by stretches and many by blocks, which rounds differently. A
        prompt's are always many.
        """
        return FEW_TOKENS + 1 if self.cut_unit == 1 and prompt_tokens > ONE_STRETCH else 1

    @cached_property
    def step_costs(self) -> StepCosts:
        """What forwards of a few tokens take on this machine, learned as they run."""
        return StepCosts()

    @property
    def run_now(self) -> Run:
        """What the plan is of, with what has been made since the model was loaded (on the CPU, whatever the device)."""
        if "grammar_vocabulary" not in vars(self) or self.device.type != "cpu":
            return self.memory_run
        before, term = self.memory_run.extra_terms, grammar_term(self.tokenizer.vocab_size)
        return dataclasses.replace(self.memory_run, extra_terms=lambda context_len: (*before(context_len), term))

    @cached_property
    def grammar_vocabulary(self) -> GrammarVocabulary:
        """The tokens as the grammar engine takes them. Raises Glm4RunError without the extra `structured`."""
        return GrammarVocabulary(self.tokenizer, self.ordinary_tokens, self.stop_ids)

    def new_context(self, capacity: int | None = None) -> Context:
        """An empty conversation of the planned length, or of `capacity` tokens."""
        cache = KVCache(
            self.config,
            capacity or self.plan.context_len,
            dtype=self.model.dtype,
            device=self.device,
            kv_format=self.memory_run.kv_format,
            key_offsets=self.key_offsets,
            floats_for_cpu=self.memory_run.compute.native_attention,
        )
        return Context(cache)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits float32 [T, V] of every position of `ids`, taken as they are (no prefix is added).

        Computed a chunk after the other into the result, which is four bytes for each position and token of the
        vocabulary: `memory.Run.every_logits` plans it. The run's own plan has room for one position's logits only.

        Raises:
            UsageError: no ids, or ids outside the vocabulary. DoesNotFitError: more ids than the context holds, or no
                memory for the result. Before any computation.
        """
        self.check_prompt(ids)
        self._require_room_for_logits(len(ids))
        context = self.new_context()
        result = torch.empty(len(ids), self.config.vocab_size, device=self.device)
        for first in range(0, len(ids), self.plan.chunk):
            chunk = self.tensor(ids[first : first + self.plan.chunk])
            self.model.write_logits(chunk, context.cache, result[first : first + len(chunk)])
        return result

    def _require_room_for_logits(self, tokens: int) -> None:
        """What the plan of every position's logits needs beyond weights, which are there already."""
        run = dataclasses.replace(self.memory_run, chunk=self.plan.chunk, every_logits=True)
        plan = plan_run(run, tokens)
        needed = plan.bytes_of("kv_cache", "prefill_activations", "attention", "logits", "every_logits")
        free = available_bytes(self.device)
        if free is not None and needed > free:
            raise DoesNotFitError(
                f"the logits of {tokens} positions need {needed / GIB:.2f} GiB beside the model, "
                f"{free / GIB:.2f} GiB are free on {self.device}",
                hint="ask for fewer tokens at once",
            )

    def default_params(self) -> SamplingParams:
        """The sampling that the model's own files ask for, else its card's, else greedy."""
        return SamplingParams().with_defaults(self.generation_defaults)

    def require_dialect(self) -> Dialect:
        """The chat dialect. Raises CheckpointError for a model that has none."""
        if self.dialect is None:
            raise no_chat_template(self.name)
        return self.dialect

    def encode_prompt(
        self, prompt: str | Sequence[Message] | Sequence[int], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a prompt: text behind the `[gMASK]<sop>` prefix, messages in the chat dialect, ids as given."""
        if isinstance(prompt, str):
            return [*self.tokenizer.prefix_ids, *self.tokenizer.encode(prompt)]
        messages = [item for item in prompt if isinstance(item, Message)]
        if messages:
            return encode_chat(self.tokenizer, self.require_dialect(), messages, tools)
        return [item for item in prompt if isinstance(item, int)]

    def check_prompt(self, ids: Sequence[int], *, name: str = "the prompt") -> None:
        """Raises UsageError for no ids or wrong ones, DoesNotFitError for too many; `name` is what they are called."""
        if not ids:
            raise UsageError(f"{name} is empty", hint="give at least one token")
        wrong = next((i for i in ids if not 0 <= i < self.config.vocab_size), None)
        if wrong is not None:
            raise UsageError(f"token id {wrong} is outside the vocabulary of {self.config.vocab_size}")
        if len(ids) > self.plan.context_len:
            most = self.config.max_position_embeddings
            larger = f", or use a larger --ctx (this model has up to {most})" if self.plan.context_len < most else ""
            raise DoesNotFitError(
                f"{name} has {len(ids)} tokens, the context holds {self.plan.context_len}",
                hint=f"shorten it{larger}",
            )

    def tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(list(ids), dtype=torch.long, device=self.device)
