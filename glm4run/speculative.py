"""Speculation by prompt lookup: what the context said last time after the same words is drafted and verified at once.

A forward of one token and one of a few cost nearly the same where reading the weights bounds both. So the tokens that
followed the longest earlier occurrence of the context's end are fed beside the token that is due. A position's logits
then choose a token as ever, and as long as that is the drafted one, the next position's logits are there already. No
token is chosen otherwise than without drafts: greedily the text is the same, and a sampled token is drawn from the full
distribution of its position (drawing first and comparing then accepts a draft x with probability p(x), and else draws
from the rest: the rule of speculative sampling for a drafter that is certain).

Sources: prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding); arXiv 2211.17192 (sampling).
This file knows tokens and seconds; it must not know models or caches.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from glm4run.errors import UsageError

Speculate = Literal["auto", "off"] | int

MOST_DRAFTED = 7  # one native call takes eight tokens
SHORTEST_MATCH, LONGEST_MATCH = 2, 32
CANDIDATES = 24  # earlier places that are looked at, the latest first
_HEADS = 1 << 14

# The shares of drafted tokens that were right, by the length of the match, before anything is known of a text: matches
# (upper end, share). They count as so many observations, and older ones fade.
_PRIORS = ((2, 0.3), (3, 0.4), (5, 0.5), (8, 0.65), (15, 0.8), (LONGEST_MATCH + MOST_DRAFTED, 0.9))
_PRIOR_WEIGHT, _MEMORY = 3.0, 48.0
# What a forward of m tokens takes beside one of a single token, before this machine has shown it. Source:
# benchmarks/speculation.py --costs, rounded.
_FIRST_COSTS = (1.0, 1.05, 1.25, 1.3, 1.7, 1.8, 1.95, 2.0)
_COST_RATE, _UNIT_RATE, _INFERRED_RATE, _MOST_ERROR = 0.3, 0.3, 0.05, 0.5
_FORGETTING = 0.005
LEAST_GAIN = 1.02  # a draft that promises less is not worth the risk
# What drafts may have lost so far, in forwards of a single token: so many, and a share of the tokens generated.
_ALLOWANCE, _ALLOWED_SHARE = 0.6, 0.015


def parse_speculate(text: str) -> Speculate:
    """The value of `--speculate`. Raises UsageError for what is none."""
    if text == "auto":
        return "auto"
    if text == "off":
        return "off"
    if text.isdecimal() and 1 <= int(text) <= MOST_DRAFTED:
        return int(text)
    raise UsageError(
        f"speculate is {text!r}", hint=f"auto, off, or a number of drafted tokens from 1 to {MOST_DRAFTED}"
    )


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next, and how long the match was that they follow."""

    tokens: tuple[int, ...]
    match: int


class NgramIndex:
    """Finds the longest earlier occurrence of the end of a growing sequence of tokens.

    Chains of positions by a hash of two tokens, as LZ77 coders keep them: 8 bytes a token, whatever the text.
    """

    def __init__(self) -> None:
        self.ids = array("i")
        self._previous = array("i")  # the position before with the same hash of its own and the token before it
        self._heads = array("i", [-1]) * _HEADS

    def __len__(self) -> int:
        return len(self.ids)

    def extend(self, ids: Sequence[int]) -> None:
        """Adds tokens at the end."""
        for token in ids:
            position = len(self.ids)
            self.ids.append(token)
            key = self._key(position)
            self._previous.append(self._heads[key])
            self._heads[key] = position

    def truncate(self, length: int) -> None:
        """Forgets all tokens from `length` on."""
        for position in range(len(self.ids) - 1, length - 1, -1):
            self._heads[self._key(position)] = self._previous[position]
        del self.ids[length:]
        del self._previous[length:]

    def draft(self, count: int) -> Draft | None:
        """What followed the longest match (the latest of equals), repeated where it runs into the end itself."""
        ids, end = self.ids, len(self.ids) - 1
        best = length = 0
        at = self._previous[end] if end > 0 else -1
        for _ in range(CANDIDATES):
            if at < 1:
                break
            # A longer match must agree where the best so far ends.
            if ids[at] == ids[end] and (length == 0 or (at >= length and ids[at - length] == ids[end - length])):
                found = self._match(at, end)
                if found > length:
                    best, length = at, found
                    if length == LONGEST_MATCH:
                        break
            at = self._previous[at]
        if length < SHORTEST_MATCH:
            return None
        followed = ids[best + 1 : best + 1 + count].tolist()
        period = end - best
        while len(followed) < count:
            followed.append(followed[len(followed) - period])
        return Draft(tuple(followed), length)

    def _match(self, at: int, end: int) -> int:
        ids, count = self.ids, 0
        while count <= at and count < LONGEST_MATCH and ids[at - count] == ids[end - count]:
            count += 1
        return count

    def _key(self, position: int) -> int:
        before = self.ids[position - 1] if position else 0
        return (before * 0x9E5F + self.ids[position] * 0x1003F) % _HEADS


class StepCosts:
    """What forwards of 1 to 8 tokens take, relative to one token: an estimate that every forward improves.

    The time of a single token is inferred from forwards of any length, so that a machine that becomes slower in between
    does not look like a length that does.
    """

    def __init__(self) -> None:
        self.ratios = list(_FIRST_COSTS)
        self.unit_s = 0.0  # 0: not known yet

    def of(self, tokens: int) -> float:
        """The cost of a forward of `tokens`, in forwards of one."""
        return self.ratios[tokens - 1]

    def observe(self, tokens: int, seconds: float) -> float:
        """A forward of `tokens` took so long. Returns that in forwards of one token."""
        if self.unit_s == 0.0:
            self.unit_s = seconds / self.ratios[tokens - 1]
            return self.ratios[tokens - 1]
        cost = min(seconds / self.unit_s, float(tokens))
        expected = self.ratios[tokens - 1]
        # How far off the expectation was; a process that was stopped for a while says nothing about forwards.
        error = max(-_MOST_ERROR, min(_MOST_ERROR, seconds / (self.unit_s * expected) - 1.0))
        if tokens == 1:  # what is not tried is forgotten, or one bad moment would end drafts for good
            for place, first in enumerate(_FIRST_COSTS):
                self.ratios[place] += _FORGETTING * (first - self.ratios[place])
        else:
            first = _FIRST_COSTS[tokens - 1]
            self.ratios[tokens - 1] = max(1.0, min(expected * (1.0 + _COST_RATE * error), tokens, 2.0 * first))
        self.unit_s *= 1.0 + (_UNIT_RATE if tokens == 1 else _INFERRED_RATE) * error
        return cost


class Acceptance:
    """How likely the next drafted token is right, by the length of the match before it."""

    def __init__(self) -> None:
        self._right = [share * _PRIOR_WEIGHT for _, share in _PRIORS]
        self._seen = [_PRIOR_WEIGHT] * len(_PRIORS)

    def likelihood(self, match: int) -> float:
        place = self._place(match)
        return self._right[place] / self._seen[place]

    def observe(self, match: int, *, right: bool) -> None:
        place = self._place(match)
        fade = min(1.0, _MEMORY / (self._seen[place] + 1.0))
        self._right[place] = (self._right[place] + right) * fade
        self._seen[place] = (self._seen[place] + 1.0) * fade

    def _place(self, match: int) -> int:
        return next((place for place, (end, _) in enumerate(_PRIORS) if match <= end), len(_PRIORS) - 1)


class Speculation:
    """Decides for one answer what is drafted, and learns from what came.

    `mode`: auto drafts where it is expected to pay; a number drafts so many tokens wherever there is a match.
    Predictions are judged whether or not they were drafted, so that a pause costs nothing and ends by itself.
    """

    def __init__(self, mode: Speculate, costs: StepCosts) -> None:
        self.mode = mode
        self.costs = costs
        self.index = NgramIndex()
        self.acceptance = Acceptance()
        self.lost = 0.0  # by drafts so far, in forwards of one token; negative: won
        self.tokens = 0
        self._predicted: Draft | None = None
        self._judged = 0  # of the predicted tokens

    def draft(self, context: Sequence[int], token: int, most: int) -> tuple[int, ...]:
        """Up to `most` tokens to verify behind `context` and the `token` that is fed next. The context only grows."""
        self.index.extend(context[len(self.index) :])
        self.index.extend((token,))
        self._predicted, self._judged = self.index.draft(MOST_DRAFTED), 0
        if self._predicted is None or most < 1:
            return ()
        return self._predicted.tokens[: self._length(self._predicted, min(most, MOST_DRAFTED))]

    def truncate(self, length: int) -> None:
        """The context was shortened to `length` tokens."""
        self.index.truncate(min(length, len(self.index)))
        self._predicted = None

    def chosen(self, token: int) -> None:
        """This token came next."""
        self.tokens += 1
        predicted = self._predicted
        if predicted is None:
            return
        right = predicted.tokens[self._judged] == token
        self.acceptance.observe(predicted.match + self._judged, right=right)
        self._judged += 1
        if not right or self._judged == len(predicted.tokens):
            self._predicted = None

    def fed(self, tokens: int, seconds: float) -> None:
        """A forward of one token and its draft, `tokens` together, took so long."""
        cost = self.costs.observe(tokens, seconds)
        if tokens > 1:
            self.lost += cost - 1.0

    def accepted(self) -> None:
        """A drafted token came."""
        self.lost -= 1.0

    def _length(self, draft: Draft, most: int) -> int:
        if isinstance(self.mode, int):
            return min(self.mode, most)
        risk = _ALLOWANCE + _ALLOWED_SHARE * self.tokens - self.lost  # what may be lost if all of it is wrong
        best, best_gain = 0, LEAST_GAIN
        expected = likely = 1.0
        for count in range(1, most + 1):
            likely *= self.acceptance.likelihood(draft.match + count - 1)
            expected += likely
            cost = self.costs.of(count + 1)
            if cost - 1.0 <= risk and expected / cost > best_gain:
                best, best_gain = count, expected / cost
        return best
