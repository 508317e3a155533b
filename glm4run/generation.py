"""One answer: prefill in chunks, decode, stop rules, what is taken back, one `GenerationStep` after the other."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm4run.chat_format import AnswerCleaner
from glm4run.constraints import Constraint, has_engine
from glm4run.errors import GenerationError
from glm4run.guard import DeadTokens, after_a_loop, diagnose, first_nonfinite
from glm4run.ready_model import ReadyModel
from glm4run.sampling import Sampler, SamplingParams, TokenLogprobs
from glm4run.speculative import MOST_DRAFTED, Speculation
from glm4run.steps import Context, FinishReason, GenerationStep, Rollback, TextStream, Timings
from glm4run.stopping import find_loop
from glm4run.token_rules import AnswerRule, CallRule, TokenRule
from glm4run.tool_calls import argument_schemas
from glm4run.torch_threads import one_torch_thread

SEPARATOR = "<|assistant|>"  # between the calls of one answer
COMPLETE = "constraint"  # what an answer was stopped by that is whole and to which nothing may be added


@dataclass(frozen=True)
class Feed:
    """What an answer asks for: the logits behind `token`, the last of so many that were generated."""

    token: int
    generated: int


Answering = Generator[GenerationStep | Feed, Tensor | None, None]


class OpenAnswer:
    """An answer that waits for logits. `proceed` goes on until it needs the next, and says what came."""

    def __init__(self, run: Generation, answering: Answering) -> None:
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
            while not isinstance(item, Feed):
                steps.append(item)
                item = next(self._answering)
        except StopIteration:
            return steps, False
        self.token = item.token
        return steps, True


class Generation:
    """One answer being generated."""

    def __init__(self, owner: ReadyModel, params: SamplingParams, context: Context, timings: Timings) -> None:
        self.owner, self.params, self.context, self.timings = owner, params, context, timings
        self.has_recovered = False
        self.speculation: Speculation | None = None
        if params.speculate != "off" and owner.why_no_speculation is None:
            self.speculation = Speculation(params.speculate, owner.step_costs)
        # Drafted tokens whose keys and values stand in the cache behind its position, each with the logits after it.
        self.ahead: deque[tuple[int, Tensor]] = deque()

    def steps(self, answering: Answering) -> Iterator[GenerationStep]:
        """An answer that `answer` began, every forward of which is run here."""
        item = next(answering, None)
        while item is not None:
            if isinstance(item, Feed):
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
    ) -> Answering:
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
            decoded = yield Feed(token, len(generated))
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
        size, first = self.owner.plan.chunk, 0
        together = self.owner.read_together(len(self.context.ids) + len(new))
        if on_prefill is not None and len(new) > size:
            on_prefill(0, len(new))
        while first < len(new):
            chunk = new[first : first + _next_chunk(len(new) - first, size, together)]
            if first + len(chunk) < len(new):
                self.owner.model.hidden_states(self.owner.tensor(chunk), self.context.cache)
            else:
                logits = self.owner.model(self.owner.tensor(chunk), self.context.cache)[-1]
            self.context.ids += chunk  # only after the cache holds them: an interrupt must not tear the two apart
            first += len(chunk)
            if on_prefill is not None:
                on_prefill(first, len(new))
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
        fed = self.owner.tensor([token, *draft])
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


def _next_chunk(left: int, size: int, together: int) -> int:
    """How many of `left` tokens to read next: at most `size`, and so that the last ones are at least `together`."""
    behind = left - size
    return size - (together - behind) if 0 < behind < together < size else min(size, left)
