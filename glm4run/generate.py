"""Generation: a loaded model, prefill in chunks, decode, stop rules, one `GenerationStep` after the other."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from glm4run.cards import FAMILY_STOP_TOKENS, Card
from glm4run.chat_format import AnswerCleaner, Message, encode_chat
from glm4run.config import ModelConfig
from glm4run.constraints import Constraint, has_engine
from glm4run.dialects import Dialect
from glm4run.errors import DoesNotFitError, GenerationError, UsageError
from glm4run.guard import DeadTokens, after_a_loop, diagnose, first_nonfinite
from glm4run.kernels import Activations
from glm4run.kv_cache import KVCache
from glm4run.kv_format import KVFormat, parse_kv_bits
from glm4run.layers import QuantizedLinear
from glm4run.loading import LoadedWeights, available_bytes, load_weights
from glm4run.memory import GIB, MemoryPlan, Run, attends_natively, grammar_term, plan_run, resident_bytes
from glm4run.memory.heap import return_large_blocks
from glm4run.model import Glm4Model
from glm4run.model_folders import chat_dialect, no_chat_template, read_generation_config
from glm4run.sampling import Sampler, SamplingParams, TokenLogprobs
from glm4run.speculative import MOST_DRAFTED, Speculation, StepCosts
from glm4run.steps import Context, FinishReason, GenerationStep, Rollback, TextStream, Timings
from glm4run.stopping import find_loop
from glm4run.tensor_loading import Progress
from glm4run.token_rules import AnswerRule, CallRule, GrammarVocabulary, TokenRule
from glm4run.tokenizer import Tokenizer, load_tokenizer
from glm4run.tool_calls import argument_schemas, tool_names
from glm4run.torch_threads import one_torch_thread

SEPARATOR = "<|assistant|>"  # between the calls of one answer
COMPLETE = "constraint"  # what an answer was stopped by that is whole and to which nothing may be added


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
class LoadedModel:
    """A model with its tokenizer, ready to be asked. Made by `load_model`."""

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

    @property
    def cut_unit(self) -> int:
        """Where a prompt may be cut in two without a trace: behind any token (1), or behind whole chunks only.

        Where a chunk's borders show in its last bits, the rest of a prompt must be computed in the very chunks in which
        it would be from the start.
        """
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        return 1 if self.backend == "native" and attends_natively(heads, kv_heads) else self.plan.chunk

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
            chunk = self._tensor(ids[first : first + self.plan.chunk])
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

    def stream(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat: bool | None = None,
        context: Context | None = None,
        timings: Timings | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        constraint: Constraint | None = None,
    ) -> Iterator[GenerationStep]:
        """Generates an answer, a step per token; the last step carries the finish reason.

        A `str` is continued behind the family's prefix, messages are answered in the model's chat dialect, ids are
        taken as they are. `chat` says whether ids end where an assistant's answer begins, so that the answer's framing
        (its first newline, a thought) is taken off; messages always do. `context` keeps the cache between calls: only
        what is new is prefilled. Closing the iterator, or an exception inside it (Ctrl-C), leaves `context` whole.

        `constraint` says what the answer (behind its thought) must be. It is that when the stream ends with `stop` and
        no stop string; an answer that was cut short may not be: `Constraint.problem` tells. With `tools` and the extra
        `structured`, the arguments of a call are held to the tool's schema in the same way.

        Raises:
            DoesNotFitError: the prompt leaves no room in the context. UsageError: a constraint and tools. Both before
            any computation.
        """
        if constraint is not None and tools:
            raise UsageError("a constraint on the answer and tools were given", hint="leave one of the two out")
        ids = self.encode_prompt(prompt, tools)
        self.check_prompt(ids)
        if chat is None:
            chat = is_conversation(prompt)
        run = _Generation(self, params or self.default_params(), context or self.new_context(), timings or Timings())
        rule = run.rule_for(constraint, tools or (), chat=chat)
        declared = tool_names(tools or ())
        return run.steps(run.answer(ids, chat=chat, declared=declared, on_prefill=on_prefill, new_rule=rule))

    def open_answer(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        chat: bool,
        context: Context,
        timings: Timings,
        constraint: Constraint | None = None,
    ) -> OpenAnswer:
        """The answer that `stream` would give, decoded by whoever decodes several together. Nothing is drafted."""
        self.check_prompt(ids)
        run = _Generation(self, dataclasses.replace(params, speculate="off"), context, timings)
        rule = run.rule_for(constraint, (), chat=chat)
        return OpenAnswer(run, run.answer(list(ids), chat=chat, declared=frozenset(), on_prefill=None, new_rule=rule))

    @torch.inference_mode()
    def decode_together(self, answers: Sequence[OpenAnswer]) -> list[Tensor]:
        """Feeds the token that each of the answers waits for, in one forward; logits [V] for each."""
        started = time.perf_counter()
        tokens = [answer.token for answer in answers]
        caches = [answer.context.cache for answer in answers]
        logits = self.model.decode_together(self._tensor(tokens), caches)
        for answer, token in zip(answers, tokens, strict=True):
            answer.context.ids.append(token)
        elapsed = time.perf_counter() - started
        for answer in answers:  # each has waited for all of it
            answer.timings.decode_s += elapsed
            answer.timings.decode_tokens += 1
        return list(logits)

    def prefill(
        self,
        ids: Sequence[int],
        context: Context,
        *,
        timings: Timings | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> None:
        """Feeds what `context` does not hold of `ids` yet, a chunk at a time. What is fed stays, whatever ends it.

        Raises:
            DoesNotFitError: more ids than the context holds. Before any computation.
        """
        self.check_prompt(ids)
        _Generation(self, SamplingParams(), context, timings or Timings()).prefill(list(ids), on_prefill)

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

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(list(ids), dtype=torch.long, device=self.device)


def is_conversation(prompt: str | Sequence[Message] | Sequence[int]) -> bool:
    """Whether a prompt is messages, which an answer follows, and not text or ids to continue."""
    return not isinstance(prompt, str) and any(isinstance(item, Message) for item in prompt)


@dataclass(frozen=True)
class _Feed:
    """What an answer asks for: the logits behind `token`, the last of so many that were generated."""

    token: int
    generated: int


_Answering = Generator[GenerationStep | _Feed, Tensor | None, None]


class OpenAnswer:
    """An answer that waits for logits. `proceed` goes on until it needs the next, and says what came."""

    def __init__(self, run: _Generation, answering: _Answering) -> None:
        self.context, self.timings = run.context, run.timings
        self.token = -1  # what it waits for the logits of
        self._answering = answering

    def proceed(self, logits: Tensor | None) -> tuple[list[GenerationStep], bool]:
        """The steps that logits [V] of `token` (None to begin: the prompt is read) add, and whether it goes on.

        Raises:
            GenerationError: as `LoadedModel.stream` does; the answer is over then.
        """
        steps: list[GenerationStep] = []
        try:
            item = self._answering.send(logits)
            while not isinstance(item, _Feed):
                steps.append(item)
                item = next(self._answering)
        except StopIteration:
            return steps, False
        self.token = item.token
        return steps, True


class _Generation:
    """One answer being generated."""

    def __init__(self, owner: LoadedModel, params: SamplingParams, context: Context, timings: Timings) -> None:
        self.owner, self.params, self.context, self.timings = owner, params, context, timings
        self.has_recovered = False
        self.speculation: Speculation | None = None
        if params.speculate != "off" and owner.why_no_speculation is None:
            self.speculation = Speculation(params.speculate, owner.step_costs)
        # Drafted tokens whose keys and values stand in the cache behind its position, each with the logits after it.
        self.ahead: deque[tuple[int, Tensor]] = deque()

    def steps(self, answering: _Answering) -> Iterator[GenerationStep]:
        """An answer that `answer` began, every forward of which is run here."""
        item = next(answering, None)
        while item is not None:
            if isinstance(item, _Feed):
                logits = self._decode(item.token, item.generated)
                try:
                    item = answering.send(logits)
                except StopIteration:
                    return
            else:
                yield item
                item = next(answering, None)

    def answer(
        self,
        prompt: list[int],
        *,
        chat: bool,
        declared: frozenset[str],
        on_prefill: Callable[[int, int], None] | None,
        new_rule: Callable[[], TokenRule | None],
    ) -> _Answering:
        """Steps, and requests for the logits behind a token, which are sent in return."""
        owner = self.owner
        text = self._new_text(chat=chat)
        rule = new_rule()
        allowed = self._allowed(calls=bool(declared))
        sampler = Sampler(self.params, allowed)
        dead = DeadTokens(owner.dead_ids)
        self._recall(prompt)
        logits = self.prefill(prompt, on_prefill, keep=True)
        generated: list[int] = []
        while True:
            mask = None if rule is None else rule.allowed()
            try:
                token = sampler.sample(_masked(logits, mask), self.context.ids)
            except GenerationError:
                logits = self._compute_again(len(generated))
                token = sampler.sample(_masked(logits, mask), self.context.ids)
                yield GenerationStep("", rollback=Rollback(0, text.shown, text.thought, "the output was not finite"))
            dead.watch(logits)
            if token in owner.stop_ids:
                yield text.finish("stop", declared, stopped_by=owner.tokenizer.special_name(token) or str(token))
                return
            generated.append(token)
            step = text.push(token)
            if self.params.logprobs is not None:
                likely = TokenLogprobs.of(token, logits, self.params.logprobs)
                step = dataclasses.replace(step, logprobs=likely)
            yield step
            if step.stopped_by is not None:
                yield GenerationStep("", finish_reason="stop", stopped_by=step.stopped_by)
                return
            if rule is not None:
                rule.push(token)
                if rule.is_complete:
                    yield text.finish("stop", declared, stopped_by=COMPLETE)
                    return
            reason = self._limit(generated)
            if reason == "repetition" and self.params.recover and not self.has_recovered:
                text, rule = self._new_text(chat=chat), new_rule()
                rollback, logits = self._take_back_loop(generated, len(prompt), text, rule)
                sampler = Sampler(after_a_loop(self.params), allowed)
                yield GenerationStep("", rollback=rollback)
                continue
            if reason is not None:
                yield text.finish(reason, declared)
                return
            decoded = yield _Feed(token, len(generated))
            assert decoded is not None
            logits = decoded

    def rule_for(
        self, constraint: Constraint | None, tools: Sequence[Mapping[str, Any]], *, chat: bool
    ) -> Callable[[], TokenRule | None]:
        """What makes the rule of an answer, at its beginning."""
        thinking = self._thinks(chat=chat)
        if constraint is not None:
            return lambda: AnswerRule(self.owner.grammar_vocabulary, constraint, chat=chat, thinking=thinking)
        schemas = argument_schemas(tools)
        if schemas and has_engine():
            role = self.owner.tokenizer.special_id(SEPARATOR)
            return lambda: CallRule(self.owner.grammar_vocabulary, schemas, thinking=thinking, separator=role)
        return lambda: None

    def _thinks(self, *, chat: bool) -> bool:
        return chat and self.owner.dialect is not None and self.owner.dialect.opens_thinking

    def _new_text(self, *, chat: bool) -> TextStream:
        cleaner = AnswerCleaner(thinking=self._thinks(chat=chat)) if chat else None
        return TextStream(self.owner.tokenizer, self.params.stop, cleaner)

    def _take_back_loop(
        self, generated: list[int], start: int, text: TextStream, rule: TokenRule | None
    ) -> tuple[Rollback, Tensor]:
        """Shortens `generated` (behind `start` tokens of prompt) and the cache to the loop's first round.

        `text` and `rule` are fresh and get what is kept. Returns the logits behind it, without the token that went
        round (unless the rule has no other).
        """
        loop = find_loop(generated)
        assert loop is not None
        kept = loop.start + loop.period
        again, taken = generated[kept], len(generated) - kept
        del generated[kept:]
        for token in generated:
            text.push(token)
            if rule is not None:
                rule.push(token)
        self._forget_from(start + kept - 1)
        logits = self._feed(generated[-1], kept).clone()
        allowed = None if rule is None else rule.allowed()
        if allowed is None or int(allowed.sum()) > 1:
            logits[again] = float("-inf")
        self.has_recovered = True
        why = f"it went round in a loop of {loop.period} token{'s' if loop.period > 1 else ''}"
        return Rollback(taken, text.shown, text.thought, why), logits

    def _compute_again(self, generated: int) -> Tensor:
        """Logits [V] of the last position, from the first position whose keys or values are not finite.

        A fault that passes (memory, another thread) is cured so. One that stays is diagnosed.

        Raises:
            GenerationError: the logits are still not finite, or that was so before; with what is known about it.
        """
        cache, ids = self.context.cache, self.context.ids
        found = first_nonfinite(cache)
        if self.has_recovered:
            raise diagnose(found, len(ids), generated)
        self.has_recovered = True
        wanted = list(ids)
        self._forget_from(min(len(ids) - 1, len(ids) if found is None else found.position))
        logits = self.prefill(wanted, None)
        if not bool(torch.isfinite(logits).all()):
            raise diagnose(first_nonfinite(cache) or found, len(wanted), generated)
        return logits

    def _forget_from(self, position: int) -> None:
        self.context.cache.truncate(position)
        del self.context.ids[position:]
        self.ahead.clear()
        if self.speculation is not None:
            self.speculation.truncate(position)

    def _allowed(self, *, calls: bool) -> Tensor:
        """The ids that may come: every real token; of the control tokens only the stops, and between calls the role."""
        owner = self.owner
        allowed = owner.ordinary_tokens.clone()
        kept = set(owner.stop_ids)
        role = owner.tokenizer.special_id(SEPARATOR)
        if calls and role is not None:
            kept.add(role)
        allowed[[i for i in kept if i < len(allowed) and owner.tokenizer.is_usable(i)]] = True
        return allowed

    def _limit(self, generated: list[int]) -> FinishReason | None:
        if self.params.max_new_tokens is not None and len(generated) >= self.params.max_new_tokens:
            return "max_tokens"
        if self.context.cache.position >= self.context.cache.capacity:
            return "context_full"
        if self.params.stop_on_repetition and find_loop(generated) is not None:
            return "repetition"
        return None

    def _recall(self, prompt: list[int]) -> None:
        if self.owner.kept_prompts is not None:
            self.timings.recalled_tokens += self.owner.kept_prompts.recall(self.context, prompt)

    def prefill(
        self, prompt: list[int], on_prefill: Callable[[int, int], None] | None, *, keep: bool = False
    ) -> Tensor:
        """Feeds what the cache does not hold yet, a chunk at a time; returns the last position's logits [V].

        With `keep` it is offered to the kept prompts, also what was fed before an interrupt.
        """
        new = self.context.reuse(prompt)
        start = len(self.context.ids)
        try:
            return self._read(new, on_prefill)
        finally:
            if keep and self.owner.kept_prompts is not None:
                self.owner.kept_prompts.offer(self.context, prompt, start)

    @torch.inference_mode()
    def _read(self, new: list[int], on_prefill: Callable[[int, int], None] | None) -> Tensor:
        started = time.perf_counter()
        logits: Tensor | None = None
        size = self.owner.plan.chunk
        if on_prefill is not None and len(new) > size:
            on_prefill(0, len(new))
        for first in range(0, len(new), size):
            chunk = new[first : first + size]
            if first + len(chunk) < len(new):
                self.owner.model.hidden_states(self.owner._tensor(chunk), self.context.cache)
            else:
                logits = self.owner.model(self.owner._tensor(chunk), self.context.cache)[-1]
            self.context.ids += chunk  # only after the cache holds them: an interrupt must not tear the two apart
            if on_prefill is not None:
                on_prefill(first + len(chunk), len(new))
        self.timings.prefill_s += time.perf_counter() - started
        self.timings.prefill_tokens += len(new)
        assert logits is not None  # a prompt is never empty
        return logits

    def _decode(self, token: int, generated: int) -> Tensor:
        """Logits [V] behind `token`, the last of `generated`: verified ahead if it was drafted, else of a forward."""
        if self.speculation is not None:
            self.speculation.chosen(token)
        if self.ahead and self.ahead[0][0] == token:
            return self._take_drafted()
        return self._feed(token, generated)

    def _take_drafted(self) -> Tensor:
        """The drafted token that came becomes part of the context."""
        token, logits = self.ahead.popleft()
        self.context.cache.advance(1)
        self.context.ids.append(token)
        self.timings.decode_tokens += 1
        self.timings.accepted_tokens += 1
        if self.speculation is not None:
            self.speculation.accepted()
        return logits

    @torch.inference_mode()
    def _feed(self, token: int, generated: int) -> Tensor:
        """A forward of `token` and of a draft, which stays behind the cache's position until its tokens come."""
        self.ahead.clear()
        draft = self._draft(token, generated)
        cache = self.context.cache
        started, position = time.perf_counter(), cache.position
        fed = self.owner._tensor([token, *draft])
        logits: Tensor = self.owner.model(fed, cache, logits="all" if draft else "last")
        cache.truncate(position + 1)
        self.context.ids.append(token)
        elapsed = time.perf_counter() - started
        self.timings.decode_s += elapsed
        self.timings.decode_tokens += 1
        self.timings.drafted_tokens += len(draft)
        if self.speculation is not None:
            self.speculation.fed(len(fed), elapsed)
        self.ahead.extend(zip(draft, logits[1:], strict=True))
        return logits[0]

    def _draft(self, token: int, generated: int) -> tuple[int, ...]:
        if self.speculation is None:
            return ()
        room = self.context.cache.capacity - self.context.cache.position - 1
        if self.params.max_new_tokens is not None:
            room = min(room, self.params.max_new_tokens - generated - 1)
        return self.speculation.draft(self.context.ids, token, min(room, MOST_DRAFTED))


@one_torch_thread()
def _masked(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Logits [V] with all that is not allowed at minus infinity."""
    return logits if allowed is None else logits.masked_fill(~allowed.to(logits.device), float("-inf"))


def load_model(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    activations: Activations = "auto",
    quantize_on_load: str | None = None,
    threads: int | None = None,
    kv_bits: int | str | KVFormat = 16,
    context_len: int | None = None,
    rope_theta: float | None = None,
    yarn: str = "auto",
    mmap: bool = False,
    progress: Progress | None = None,
) -> LoadedModel:
    """Loads a model folder, dense or packed.

    Args:
        path: the folder. device: auto, cpu, cuda, cuda:N. dtype: auto, bf16, fp16, fp32.
        backend: auto, or the name of one, which then never falls back.
        kv_bits: of the cache: 16 (as computed), 8 or 4; keys and values apart as "8:4".
        activations: how they meet packed weights. auto takes the faster form where its loss is negligible; int8, bf16.
        quantize_on_load: how to pack a dense folder while it is loaded, by bitsandbytes (nf4, fp4, int8) or
            optimum-quanto (qint8, qint4).
        threads: of the CPU; None takes one per core that this process may use.
        context_len: tokens; None takes the largest that fits the memory, up to the model's own.
        rope_theta: overrides the config's base. yarn: auto (when the context asks for it), on, off.
        mmap: leave packed weights and the embedding in their files, mapped into memory, where the native kernels run.

    Raises:
        Glm4RunError: with what to do. See `loading.load_weights`.
    """
    kv_format = parse_kv_bits(kv_bits)
    folder = Path(path)
    started = time.perf_counter()
    return_large_blocks()
    held = resident_bytes()  # before the tokenizer comes, which the plan counts by itself
    with ThreadPoolExecutor(max_workers=1) as beside:  # a large vocabulary takes a second of its own
        tokenizer = beside.submit(load_tokenizer, folder)
        weights = load_weights(
            folder,
            device=device,
            dtype=dtype,
            backend=backend,
            activations=activations,
            quantize_on_load=quantize_on_load,
            threads=threads,
            context_len=context_len,
            rope_theta=rope_theta,
            yarn=yarn,
            kv_format=kv_format,
            mmap=mmap,
            progress=progress,
            held_bytes=held,
        )
        return _assemble(folder, weights, tokenizer.result(), started)


def _assemble(folder: Path, weights: LoadedWeights, tokenizer: Tokenizer, started: float) -> LoadedModel:
    config = weights.model.config
    dialect, card = chat_dialect(folder, config)
    generation = read_generation_config(folder)
    first = next(weights.model.parameters())
    return LoadedModel(
        name=folder.resolve().name,
        folder=folder.resolve(),
        model=weights.model,
        tokenizer=tokenizer,
        config=config,
        plan=weights.plan,
        memory_run=weights.memory_run,
        dialect=dialect,
        card=card,
        stop_ids=stop_ids(config, generation, tokenizer),
        generation_defaults={**(card.generation if card is not None else {}), **generation},
        backend=weights.backend,
        backend_detail=weights.backend_detail,
        backend_reason=weights.backend_reason,
        notices=weights.notices,
        load_s=time.perf_counter() - started,
        device=first.device,
    )


def stop_ids(config: ModelConfig, generation: Mapping[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    """The union of what the config, the generation config and the family say."""
    listed = generation.get("eos_token_id")
    more = listed if isinstance(listed, list) else [] if listed is None else [listed]
    family = (tokenizer.special_id(name) for name in FAMILY_STOP_TOKENS)
    return frozenset(i for i in (*config.eos_token_id, *more, *family) if isinstance(i, int) and i >= 0)
