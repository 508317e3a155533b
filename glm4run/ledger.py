"""What the context is spent on: tokens by system, tools, files and turns, and what would be dropped next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glm4run.session import Session

Kind = Literal["prefix", "system", "tools", "files", "turns"]
KINDS: tuple[Kind, ...] = ("prefix", "system", "tools", "files", "turns")


@dataclass(frozen=True)
class Exchange:
    """One question and what followed it."""

    number: int  # from 1, in the order of the conversation
    words: str
    tokens: int
    file_tokens: int  # of `tokens`
    is_pinned: bool
    is_dropped: bool  # no longer goes to the model


@dataclass(frozen=True)
class Ledger:
    """Every token of the context by what it is for. `tokens` sums to `used`."""

    tokens: dict[Kind, int]
    exchanges: list[Exchange]
    used: int
    limit: int
    cached: int  # tokens whose keys and values are in the cache now
    kv_bytes_per_token: int
    dropped_next: int | None  # the number of the exchange that would go first; None where none may
    overflow: str

    @property
    def free(self) -> int:
        return self.limit - self.used


def take_ledger(session: Session) -> Ledger:
    """The ledger of a conversation as its next prompt would be."""
    conversation = session.conversation
    exchanges = []
    for number, turns in enumerate(conversation.exchanges(), 1):
        exchanges.append(
            Exchange(
                number,
                turns[0].message.content,
                sum(map(session.turn_tokens, turns)),
                sum(file.tokens for turn in turns for file in turn.attachments),
                turns[0].number in conversation.pinned,
                turns[0].number in conversation.dropped,
            )
        )
    shown = [exchange for exchange in exchanges if not exchange.is_dropped]
    prefix = len(session.model.tokenizer.prefix_ids)
    head = len(session.head_tokens())
    system = head - len(session.head_tokens(with_system=False))
    files = sum(exchange.file_tokens for exchange in shown)
    droppable = session.droppable()
    first = droppable[0] if droppable else None
    next_number = None if first is None else conversation.exchanges().index(first) + 1
    used = head + sum(exchange.tokens for exchange in shown)
    return Ledger(
        {
            "prefix": prefix,
            "system": system,
            "tools": head - system - prefix,
            "files": files,
            "turns": used - head - files,
        },
        exchanges,
        used,
        session.model.plan.context_len,
        session.cached_tokens,
        session.kv_bytes_per_token,
        next_number,
        session.overflow,
    )
