"""What was said, as a tree of turns: branches share their beginning, and nothing that was said is ever lost.

Knows messages and the tokens they were; must not know a model, a cache, a file or a terminal. Every change is also a
record (a JSON object), and `apply` replays records: that is how a conversation is kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from glm4run.chat_format import ROLES, Message, ToolCall
from glm4run.errors import UsageError

MAIN = "main"
Record = dict[str, Any]


@dataclass(frozen=True)
class Attachment:
    """A file whose text stands in a user's message, and how many of its tokens are the file's."""

    name: str
    tokens: int


@dataclass(frozen=True)
class Turn:
    """One message. `ids` are exactly the tokens that the model saw or produced, the role's control token first."""

    number: int
    parent: int | None  # None: the first of its conversation
    message: Message
    ids: tuple[int, ...]
    thought: str = ""
    finish_reason: str | None = None
    attachments: tuple[Attachment, ...] = ()

    def as_record(self) -> Record:
        """The turn as JSON; `from_record` reads it back."""
        message = self.message
        return {
            "number": self.number,
            "parent": self.parent,
            "role": message.role,
            "content": message.content,
            "ids": list(self.ids),
            **({"tool_calls": [[c.name, c.arguments] for c in message.tool_calls]} if message.tool_calls else {}),
            **({"thought": self.thought} if self.thought else {}),
            **({"finish_reason": self.finish_reason} if self.finish_reason else {}),
            **({"attachments": [[a.name, a.tokens] for a in self.attachments]} if self.attachments else {}),
        }

    @classmethod
    def from_record(cls, data: Record) -> Turn:
        """Raises KeyError, TypeError or ValueError for what `as_record` did not write."""
        if not isinstance(data, dict) or data["role"] not in ROLES:
            raise ValueError("not a turn")
        calls = tuple(ToolCall(name, arguments) for name, arguments in data.get("tool_calls", ()))
        return cls(
            int(data["number"]),
            None if data["parent"] is None else int(data["parent"]),
            Message(data["role"], data["content"], tool_calls=calls),
            tuple(int(i) for i in data["ids"]),
            data.get("thought", ""),
            data.get("finish_reason"),
            tuple(Attachment(name, int(tokens)) for name, tokens in data.get("attachments", ())),
        )


@dataclass
class Conversation:
    """The tree, the branches (names of tips) and which of them is spoken on."""

    on_record: Callable[[Record], None] = lambda _: None
    turns: dict[int, Turn] = field(default_factory=dict)
    branches: dict[str, int | None] = field(default_factory=lambda: {MAIN: None})
    branch: str = MAIN
    pinned: set[int] = field(default_factory=set)  # numbers of questions
    dropped: set[int] = field(default_factory=set)  # numbers of turns that no longer go to the model
    _undone: list[int] = field(default_factory=list)

    @property
    def tip(self) -> int | None:
        """The last turn's number, None in an empty conversation."""
        return self.branches[self.branch]

    def path(self, branch: str | None = None) -> list[Turn]:
        """The turns of a branch (of the current one by default), from the first."""
        found = []
        number = self.branches[self.branch if branch is None else branch]
        while number is not None:
            found.append(self.turns[number])
            number = found[-1].parent
        return found[::-1]

    def exchanges(self) -> list[list[Turn]]:
        """The current branch cut before each user's message."""
        found: list[list[Turn]] = []
        for turn in self.path():
            if turn.message.role == "user" or not found:
                found.append([])
            found[-1].append(turn)
        return found

    @property
    def is_unanswered(self) -> bool:
        """Whether the last turn still waits for an answer."""
        return self.tip is not None and self.turns[self.tip].message.role != "assistant"

    def add(
        self,
        message: Message,
        ids: Sequence[int],
        *,
        thought: str = "",
        finish_reason: str | None = None,
        attachments: tuple[Attachment, ...] = (),
    ) -> Turn:
        """A turn behind the last one. What had been undone before it stays, as a branch of its own."""
        if self._undone:
            self._keep(self._undone[0])
        number = 1 + max(self.turns, default=0)
        turn = Turn(number, self.tip, message, tuple(ids), thought, finish_reason, attachments)
        self.turns[number] = turn
        self.on_record({"turn": turn.as_record()})
        self._move(number)
        return turn

    def undo(self) -> Turn:
        """Takes the last exchange back; returns its question. Raises UsageError where there is none."""
        exchanges = self.exchanges()
        if not exchanges:
            raise UsageError("there is nothing to undo", hint="the conversation is empty")
        assert self.tip is not None
        self._set_undone([*self._undone, self.tip])
        self._move(exchanges[-1][0].parent)
        return exchanges[-1][0]

    def redo(self) -> bool:
        """Brings back what the last undo took; False where nothing was undone."""
        if not self._undone:
            return False
        *rest, last = self._undone
        self._set_undone(rest)
        self._move(last)
        return True

    def back_to_question(self) -> Turn:
        """Takes back what answered the last question, which is returned. Raises UsageError where there is none."""
        exchanges = self.exchanges()
        if not exchanges:
            raise UsageError("there is no message yet", hint="write one")
        question = exchanges[-1][0]
        answered = self.tip
        if answered is not None and answered != question.number:
            self._move(question.number)
            self._keep(answered)
        return question

    def withdraw_question(self) -> None:
        """Forgets a last turn that was never answered."""
        if self.is_unanswered:
            assert self.tip is not None
            self._move(self.turns[self.tip].parent)

    def fork(self, name: str | None = None) -> str:
        """Starts a branch here and goes on in it; returns its name. The one left behind stays as it is."""
        if name in self.branches:
            raise UsageError(f"there is a branch {name!r} already", hint="/branches lists them; choose another name")
        if self._undone:
            self._keep(self._undone[0])
        chosen = self._free_name() if name is None else name
        self.branches[chosen] = self.tip
        self._select(chosen)
        self._move(self.tip)
        return chosen

    def switch(self, name: str) -> None:
        """Goes on in another branch. Raises UsageError where none is called so."""
        if name not in self.branches:
            raise UsageError(f"there is no branch {name!r}", hint=f"there are: {', '.join(self.branches)}")
        if self._undone:
            self._keep(self._undone[0])
        self._select(name)

    def clear(self) -> None:
        """An empty conversation. What was said before stays as a branch."""
        if self._undone:
            self._keep(self._undone[0])
        before = self.tip
        self._move(None)
        if before is not None:
            self._keep(before)

    def pin(self, question: int, *, pinned: bool) -> None:
        """Whether an exchange stays when the oldest are dropped."""
        (self.pinned.add if pinned else self.pinned.discard)(question)
        self.on_record({"pinned": sorted(self.pinned)})

    def drop(self, turns: Sequence[Turn]) -> None:
        """These turns no longer go to the model; they stay on record."""
        self.dropped |= {turn.number for turn in turns}
        self.on_record({"dropped": sorted(self.dropped)})

    def undrop(self, turns: Sequence[Turn]) -> None:
        """These turns go to the model again."""
        if self.dropped & {turn.number for turn in turns}:
            self.dropped -= {turn.number for turn in turns}
            self.on_record({"dropped": sorted(self.dropped)})

    def replace_ids(self, ids: dict[int, tuple[int, ...]]) -> None:
        """The same texts as other tokens: for a model with another tokenizer or template. Not recorded."""
        self.turns = {n: replace(turn, ids=ids[n]) for n, turn in self.turns.items()}

    def as_records(self) -> list[Record]:
        """Records that `apply` makes the same conversation of."""
        turns = [{"turn": turn.as_record()} for _, turn in sorted(self.turns.items())]
        tips = [{"tip": [name, number]} for name, number in self.branches.items()]
        return [
            *turns,
            *tips,
            {"branch": self.branch},
            {"pinned": sorted(self.pinned)},
            {"dropped": sorted(self.dropped)},
            {"undone": list(self._undone)},
        ]

    def apply(self, record: Record) -> None:
        """Repeats a recorded change; other records are ignored. Raises KeyError, TypeError, ValueError if damaged."""
        if "turn" in record:
            turn = Turn.from_record(record["turn"])
            if turn.parent is not None and turn.parent not in self.turns:
                raise ValueError(f"turn {turn.number} follows turn {turn.parent}, which is missing")
            self.turns[turn.number] = turn
        if "tip" in record:
            name, number = record["tip"]
            if number is not None and number not in self.turns:
                raise ValueError(f"branch {name!r} ends at turn {number}, which is missing")
            self.branches[name] = number
        if "branch" in record:
            self.branch = str(record["branch"])
            self.branches.setdefault(self.branch, None)
        if "pinned" in record:
            self.pinned = {int(n) for n in record["pinned"]}
        if "undone" in record:
            self._undone = [n for n in record["undone"] if self.turns[n]]
        if "dropped" in record:
            self.dropped = {int(n) for n in record["dropped"]}

    def _move(self, number: int | None) -> None:
        self.branches[self.branch] = number
        self.on_record({"tip": [self.branch, number]})

    def _set_undone(self, tips: list[int]) -> None:
        if tips != self._undone:
            self._undone = tips
            self.on_record({"undone": tips})

    def _select(self, name: str) -> None:
        self._set_undone([])
        self.branch = name
        self.on_record({"branch": name})

    def _keep(self, number: int) -> None:
        """A branch for a tip that would be out of reach, unless another branch runs through it."""
        self._set_undone([])
        if any(turn.number == number for name in self.branches for turn in self.path(name)):
            return
        name = self._free_name()
        self.branches[name] = number
        self.on_record({"tip": [name, number]})

    def _free_name(self) -> str:
        count = 2
        while f"{MAIN}-{count}" in self.branches:
            count += 1
        return f"{MAIN}-{count}"
