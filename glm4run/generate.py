"""What a loaded model can be asked, and how one is loaded."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm4run.cards import FAMILY_STOP_TOKENS
from glm4run.chat_format import Message
from glm4run.config import ModelConfig
from glm4run.constraints import Constraint
from glm4run.errors import UsageError
from glm4run.generation import Generation, OpenAnswer
from glm4run.kernels import Activations
from glm4run.kv_format import KVFormat, parse_kv_bits
from glm4run.loading import LoadedWeights, load_weights
from glm4run.memory import resident_bytes
from glm4run.memory.heap import return_large_blocks
from glm4run.model_folders import chat_dialect, read_generation_config
from glm4run.ready_model import ReadyModel
from glm4run.sampling import SamplingParams
from glm4run.steps import Context, GenerationStep, Timings
from glm4run.tensor_loading import Progress
from glm4run.tokenizer import Tokenizer, load_tokenizer
from glm4run.tool_calls import tool_names


@dataclass(frozen=True)
class LoadedModel(ReadyModel):
    """A model with its tokenizer, ready to be asked. Made by `load_model`."""

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
        run = Generation(self, params or self.default_params(), context or self.new_context(), timings or Timings())
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
        run = Generation(self, dataclasses.replace(params, speculate="off"), context, timings)
        rule = run.rule_for(constraint, (), chat=chat)
        return OpenAnswer(run, run.answer(list(ids), chat=chat, declared=frozenset(), on_prefill=None, new_rule=rule))

    @torch.inference_mode()
    def decode_together(self, answers: Sequence[OpenAnswer]) -> list[Tensor]:
        """Feeds the token that each of the answers waits for, in one forward; logits [V] for each."""
        started = time.perf_counter()
        tokens = [answer.token for answer in answers]
        caches = [answer.context.cache for answer in answers]
        logits = self.model.decode_together(self.tensor(tokens), caches)
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
        Generation(self, SamplingParams(), context, timings or Timings()).prefill(list(ids), on_prefill)


def is_conversation(prompt: str | Sequence[Message] | Sequence[int]) -> bool:
    """Whether a prompt is messages, which an answer follows, and not text or ids to continue."""
    return not isinstance(prompt, str) and any(isinstance(item, Message) for item in prompt)


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
            Without it a large model begins so and moves into memory while it is used; `settle` waits for that.

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
        layout=weights.layout,
        device=first.device,
    )


def stop_ids(config: ModelConfig, generation: Mapping[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    """The union of what the config, the generation config and the family say."""
    listed = generation.get("eos_token_id")
    more = listed if isinstance(listed, list) else [] if listed is None else [listed]
    family = (tokenizer.special_id(name) for name in FAMILY_STOP_TOKENS)
    return frozenset(i for i in (*config.eos_token_id, *more, *family) if isinstance(i, int) and i >= 0)
