"""The tree of turns: nothing that was said gets out of reach, and records make the same tree again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4run.chat_format import Message, ToolCall
from glm4run.conversation import MAIN, Attachment, Conversation, Record
from glm4run.errors import UsageError


def say(conversation: Conversation, question: str, answer: str = "yes") -> None:
    conversation.add(Message("user", question), [1, len(question)])
    conversation.add(Message("assistant", answer), [2], thought="hm", finish_reason="stop")


def contents(conversation: Conversation, branch: str | None = None) -> list[str]:
    return [turn.message.content for turn in conversation.path(branch)]


def test_undo_and_redo_go_back_and_forth() -> None:
    conversation = Conversation()
    say(conversation, "one")
    say(conversation, "two")
    assert conversation.undo().message.content == "two"
    assert conversation.undo().message.content == "one"
    assert contents(conversation) == []
    with pytest.raises(UsageError, match="nothing to undo"):
        conversation.undo()
    assert conversation.redo() and conversation.redo() and not conversation.redo()
    assert contents(conversation) == ["one", "yes", "two", "yes"]


def test_what_was_undone_stays_as_a_branch_once_something_else_is_said() -> None:
    conversation = Conversation()
    say(conversation, "one")
    say(conversation, "two")
    conversation.undo()
    conversation.undo()
    say(conversation, "three")
    assert contents(conversation) == ["three", "yes"]
    (other,) = set(conversation.branches) - {MAIN}
    assert contents(conversation, other) == ["one", "yes", "two", "yes"]
    assert not conversation.redo()


def test_another_answer_leaves_the_first_one_as_a_branch() -> None:
    conversation = Conversation()
    say(conversation, "one")
    question = conversation.back_to_question()
    assert (question.message.content, conversation.is_unanswered) == ("one", True)
    conversation.add(Message("assistant", "no"), [3])
    (other,) = set(conversation.branches) - {MAIN}
    assert (contents(conversation), contents(conversation, other)) == (["one", "no"], ["one", "yes"])
    assert conversation.path()[0] is conversation.path(other)[0]  # shared, not copied


def test_forks_and_switches() -> None:
    conversation = Conversation()
    say(conversation, "one")
    assert conversation.fork("aside") == "aside"
    say(conversation, "two")
    conversation.switch(MAIN)
    assert contents(conversation) == ["one", "yes"]
    with pytest.raises(UsageError, match="'aside' already"):
        conversation.fork("aside")
    with pytest.raises(UsageError, match="no branch 'x'"):
        conversation.switch("x")
    conversation.clear()
    assert contents(conversation) == []
    assert contents(conversation, "aside") == ["one", "yes", "two", "yes"]


def test_a_question_without_answer_is_withdrawn() -> None:
    conversation = Conversation()
    say(conversation, "one")
    conversation.withdraw_question()
    assert contents(conversation) == ["one", "yes"]
    conversation.add(Message("user", "two"), [1])
    conversation.withdraw_question()
    assert contents(conversation) == ["one", "yes"]


def test_records_of_a_turn_keep_all_of_it() -> None:
    records: list[Record] = []
    conversation = Conversation(on_record=records.append)
    calls = (ToolCall("add", '{"a": 1}'),)
    conversation.add(Message("user", "你好"), [1, 2], attachments=(Attachment("a.txt", 7),))
    turn = conversation.add(Message("assistant", "", tool_calls=calls), [3], thought="hm", finish_reason="tool_calls")
    again = Conversation()
    for record in json.loads(json.dumps(records)):
        again.apply(record)
    assert again.path() == conversation.path()
    assert again.path()[-1] == turn


STEPS = st.lists(
    st.sampled_from(["say", "ask", "undo", "redo", "again", "fork", "switch", "clear", "pin"]), max_size=25
)


@given(STEPS)
def test_replaying_the_records_gives_the_same_tree_after_every_step(steps: list[str]) -> None:
    records: list[Record] = []
    conversation = Conversation(on_record=records.append)

    def do(step: str, number: int) -> None:
        exchanges = conversation.exchanges()
        actions: dict[str, Any] = {
            "say": lambda: say(conversation, f"q{number}"),
            "ask": lambda: conversation.add(Message("user", f"q{number}"), [number]),
            "undo": lambda: exchanges and conversation.undo(),
            "redo": conversation.redo,
            "again": lambda: exchanges and conversation.back_to_question(),
            "fork": conversation.fork,
            "switch": lambda: conversation.switch(sorted(conversation.branches)[number % len(conversation.branches)]),
            "clear": conversation.clear,
            "pin": lambda: [conversation.pin(e[0].number, pinned=bool(number % 2)) for e in exchanges[-1:]],  # type: ignore[func-returns-value]
        }
        actions[step]()

    def state(of: Conversation) -> Any:
        return of.turns, of.branches, of.branch, of.pinned, of.dropped, of._undone

    said: set[str] = set()
    for number, step in enumerate(steps):
        do(step, number)
        again, dumped = Conversation(), Conversation()
        for record in json.loads(json.dumps(records)):
            again.apply(record)
        for record in json.loads(json.dumps(conversation.as_records())):
            dumped.apply(record)
        assert state(again) == state(conversation) == state(dumped)
        said |= {turn.message.content for turn in conversation.path() if turn.message.role == "assistant"}
        reachable = {number for name in conversation.branches for number in map(id, conversation.path(name))}
        reachable |= {id(conversation.turns[number]) for number in conversation._undone}
        answered = {id(turn) for turn in conversation.turns.values() if turn.message.role == "assistant"}
        undone = {id(t) for tip in conversation._undone for t in _up_from(conversation, tip)}
        assert answered <= reachable | undone  # no answer is ever out of reach


def _up_from(conversation: Conversation, number: int | None) -> Any:
    while number is not None:
        yield conversation.turns[number]
        number = conversation.turns[number].parent


@pytest.mark.parametrize("record", [{"turn": {"number": 1}}, {"tip": ["main", 9]}, {"undone": [4]}, {"turn": 3}])
def test_damaged_records_are_refused(record: Record) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Conversation().apply(record)
