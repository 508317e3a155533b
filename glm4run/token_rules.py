"""Which tokens may come next, where an answer has a form: a constraint on all of it, or on a tool call's arguments.

Works on the bytes of the vocabulary's tokens. Rows without a token, and control tokens other than the stops, never
come. A rule follows an answer token by token and gives a mask for the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from glm4run.chat_format import THINK_CLOSE, AnswerCleaner
from glm4run.constraints import Constraint, grammar_for_arguments, require_engine
from glm4run.errors import GenerationError
from glm4run.tokenizer import Tokenizer
from glm4run.tool_calls import NO_ARGUMENTS

NEWLINE = "\n"
MOST_NEWLINES = 2  # behind a thought


class TokenRule(Protocol):
    """What one answer may be made of."""

    def allowed(self) -> Tensor | None:
        """bool [V] of the ids that may come next, or None where any may that could without the rule."""
        ...

    def push(self, token: int) -> None:
        """`token` has come."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole and nothing may follow."""
        ...


class GrammarVocabulary:
    """The tokens of one model as the grammar engine knows them. Takes a second to build for 151,552 rows."""

    def __init__(self, tokenizer: Tokenizer, ordinary: Tensor, stop_ids: frozenset[int]) -> None:
        """`ordinary`: bool [V], the ids that are text."""
        from llguidance import LLTokenizer, TokenizerWrapper

        self.tokenizer, self.ordinary = tokenizer, ordinary
        self.size = len(ordinary)
        self.stops = torch.zeros(self.size, dtype=torch.bool)
        self.stops[[i for i in stop_ids if i < self.size]] = True
        self.bytes = [tokenizer.token_bytes(i) if bool(text) else b"" for i, text in enumerate(ordinary.tolist())]
        self.newline = tokenizer.encode(NEWLINE)[-1]
        self._engine = LLTokenizer(TokenizerWrapper(_Wrapped(self, stop_ids)))
        self._closing: dict[int, Tensor] = {}

    def matcher(self, grammar: str) -> Matcher:
        """A grammar at its beginning."""
        return Matcher(require_engine()(self._engine, grammar, log_level=0), self)

    def only(self, token: int) -> Tensor:
        """bool [V] with one id."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[token] = True
        return mask

    def ends_thought_with_text(self, written: int) -> Tensor:
        """bool [V]: the ids that end a thought, of whose closing mark `written` characters are there, and go on.

        Text in the token that closes a thought would belong to the answer without having been chosen for it.
        """
        if written not in self._closing:
            mark = THINK_CLOSE.encode()
            rest = mark[written:]
            mask = torch.zeros(self.size, dtype=torch.bool)
            ids = [
                i
                for i, token in enumerate(self.bytes)
                if (token.startswith(rest) and token[len(rest) :].strip()) or token.partition(mark)[2].strip()
            ]
            mask[ids] = True
            self._closing[written] = mask
        return self._closing[written]


class _Wrapped:
    """What the engine asks of a tokenizer."""

    def __init__(self, vocabulary: GrammarVocabulary, stop_ids: frozenset[int]) -> None:
        self._tokenizer = vocabulary.tokenizer
        self.tokens = vocabulary.bytes
        self.eos_token_id = min((i for i in stop_ids if i < vocabulary.size), default=vocabulary.size - 1)
        self.bos_token_id = None
        self.special_token_ids = sorted(i for i in self._tokenizer.special_ids if i < vocabulary.size)

    def __call__(self, text: str | bytes) -> list[int]:
        whole = text if isinstance(text, str) else text.decode("utf-8", errors="replace")
        return self._tokenizer.encode(whole)


class Matcher:
    """A grammar and how far an answer has come in it."""

    def __init__(self, engine: Any, vocabulary: GrammarVocabulary) -> None:
        self._engine, self._vocabulary = engine, vocabulary
        self._bits = torch.zeros(-(-vocabulary.size // 32), dtype=torch.int32)
        self._raise_if_failed()

    def allowed(self) -> Tensor:
        """bool [V] of the text that may come next."""
        self._engine.unsafe_compute_mask_ptr(self._bits.data_ptr(), self._bits.nbytes)
        self._raise_if_failed()
        bits = np.unpackbits(self._bits.numpy().view(np.uint8), count=self._vocabulary.size, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_)) & self._vocabulary.ordinary

    def push(self, token: int) -> None:
        self._engine.consume_token(token)
        self._raise_if_failed()

    def takes(self, text: str) -> bool:
        """Goes on by a text, where the grammar allows it; else it stays as it is."""
        ids = self._vocabulary.tokenizer.encode(text)
        if self._engine.validate_tokens(ids) < len(ids):
            return False
        for token in ids:
            self.push(token)
        return True

    @property
    def is_accepting(self) -> bool:
        """Whether the text may end here."""
        return bool(self._engine.is_accepting())

    @property
    def is_over(self) -> bool:
        """Whether it may, and must."""
        return self.is_accepting and bool(self._engine.is_stopped())

    def _raise_if_failed(self) -> None:
        if self._engine.is_error():
            raise GenerationError(
                f"the grammar cannot go on: {self._engine.get_error()[:200]}",
                hint="the schema or the regular expression is too complex; make it simpler",
            )


class AnswerRule:
    """Holds a whole answer to a constraint. The framing that a chat model writes before it is not part of it."""

    def __init__(self, vocabulary: GrammarVocabulary, constraint: Constraint, *, chat: bool, thinking: bool) -> None:
        self._vocabulary = vocabulary
        self._matcher = vocabulary.matcher(constraint.grammar)
        self._is_framed = not chat or thinking  # else a newline ends the role's line
        self._thought = _Thought() if chat and thinking else None
        self._newlines = 0  # that may still come between a thought and the answer

    def allowed(self) -> Tensor | None:
        vocabulary = self._vocabulary
        if self._thought is not None:  # it may be anything but the end of the answer
            return ~(vocabulary.stops | vocabulary.ends_thought_with_text(self._thought.written))
        if not self._is_framed:
            return vocabulary.only(vocabulary.newline)
        mask = self._matcher.allowed()
        if self._matcher.is_accepting:
            mask |= vocabulary.stops
        if self._newlines:
            mask[vocabulary.newline] = True
        return mask

    def push(self, token: int) -> None:
        if self._thought is not None:
            if self._thought.push(self._vocabulary.bytes[token]):
                self._thought, self._newlines = None, MOST_NEWLINES
        elif not self._is_framed:
            self._is_framed = True
        elif self._newlines and token == self._vocabulary.newline:
            self._newlines -= 1
        else:
            self._newlines = 0
            self._matcher.push(token)

    @property
    def is_complete(self) -> bool:
        return self._thought is None and self._is_framed and self._matcher.is_over


class CallRule:
    """Leaves an answer free until its first line is the name of a tool; then holds the arguments to its schema.

    Behind the arguments the answer ends, or `<|assistant|>` opens another one, of which the same holds.
    """

    def __init__(
        self,
        vocabulary: GrammarVocabulary,
        schemas: Mapping[str, Mapping[str, Any]],
        *,
        thinking: bool,
        separator: int | None,
    ) -> None:
        self._vocabulary, self._schemas, self._separator = vocabulary, schemas, separator
        self._decoder = vocabulary.tokenizer.stream_decoder()
        self._cleaner = AnswerCleaner(thinking=thinking)
        self._matcher: Matcher | None = None
        self._line: str | None = ""  # None: the answer is no call
        self._may_be_empty = False

    def allowed(self) -> Tensor | None:
        matcher = self._matcher
        if matcher is None:
            return None
        mask = torch.zeros_like(self._vocabulary.ordinary) if matcher.is_over else matcher.allowed()
        if matcher.is_accepting or self._may_be_empty:
            mask |= self._vocabulary.stops
            if self._separator is not None:
                mask[self._separator] = True
        return mask

    def push(self, token: int) -> None:
        if token == self._separator:
            self._matcher, self._line = None, None if self._line is None else ""
        elif self._matcher is not None:
            self._matcher.push(token)
            self._may_be_empty = False
        elif self._line is not None:
            self._line += self._cleaner.push(self._decoder.push(token)).answer
            name, newline, rest = self._line.lstrip().partition(NEWLINE)
            if newline:
                self._begin_arguments(name.strip(), rest)

    @property
    def is_complete(self) -> bool:
        return False  # the model says whether another call follows

    def _begin_arguments(self, name: str, begun: str) -> None:
        self._line = None
        if name not in self._schemas:
            return
        grammar = grammar_for_arguments(self._schemas[name])
        matcher = self._vocabulary.matcher(grammar)
        if not begun or matcher.takes(begun):
            self._matcher, self._line = matcher, ""
            self._may_be_empty = not begun and self._vocabulary.matcher(grammar).takes(NO_ARGUMENTS)


class _Thought:
    """Follows a thought to its closing mark, byte by byte of its tokens."""

    def __init__(self) -> None:
        self._tail = b""

    @property
    def written(self) -> int:
        """How many characters of the closing mark stand at the end."""
        mark = THINK_CLOSE.encode()
        return next(n for n in range(len(mark) - 1, -1, -1) if self._tail.endswith(mark[:n]))

    def push(self, token: bytes) -> bool:
        """Whether the thought is over."""
        mark = THINK_CLOSE.encode()
        self._tail += token
        if mark in self._tail:
            return True
        self._tail = self._tail[-len(mark) :]
        return False
