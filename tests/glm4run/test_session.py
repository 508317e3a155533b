"""A conversation prefills only what is new, keeps what an interrupted answer had said, and forgets when told to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from torch import Tensor

from glm4run import LoadedModel, SamplingParams, load_model
from glm4run.cards import demo_folder
from glm4run.chat_format import Message, encode_chat
from glm4run.dialects import DIALECTS
from glm4run.errors import CheckpointError, DoesNotFitError
from glm4run.memory import resident_bytes
from glm4run.schemas import problems
from glm4run.session import Session
from glm4run.steps import Timings
from tests.builders import SPECIAL_IDS, write_checkpoint
from tests.scripted import ScriptedModel, loaded_model, with_script

GREEDY = SamplingParams()
ASSISTANT = SPECIAL_IDS["<|assistant|>"]
USER = SPECIAL_IDS["<|user|>"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return loaded_model(tmp_path_factory.mktemp("session") / "tiny")


def start(tiny: LoadedModel, dialect: str = "chat-2024", system: str | None = None) -> tuple[Session, ScriptedModel]:
    model, scripted = with_script(dataclasses.replace(tiny, dialect=DIALECTS[dialect]), "")
    return Session(model, GREEDY, system=system), scripted


def ask(session: Session, scripted: ScriptedModel, question: str, answer: str) -> str:
    scripted.script = session.model.tokenizer.encode(answer)
    scripted.fed.clear()
    return "".join(step.text for step in session.say(question))


@pytest.mark.parametrize("dialect", ["chat-2024", "0414"])
def test_each_turn_feeds_only_what_is_new(tiny: LoadedModel, dialect: str) -> None:
    session, scripted = start(tiny, dialect, system="be brief")
    encode = tiny.tokenizer.encode
    assert ask(session, scripted, "hello", "\nthe one") == "the one"
    assert scripted.fed[0] == encode_chat(tiny.tokenizer, DIALECTS[dialect], session.messages[:2])
    for number in range(2, 8):
        assert ask(session, scripted, f"and {number}", f"\nanswer {number}") == f"answer {number}"
        # The stop token was never fed; it is the role of the new turn.
        assert scripted.fed[0] == [USER, *encode(f"\nand {number}"), ASSISTANT]
    assert session.context_used < 256


@pytest.mark.parametrize("dialect", ["chat-2024", "0414"])
def test_tokens_are_those_of_the_whole_conversation(tiny: LoadedModel, dialect: str) -> None:
    session, scripted = start(tiny, dialect, system="be brief")
    fed: list[int] = []
    for question, answer in (("hello", "\nyes"), ("你好", "\n你好 the end"), ("so?", "\nso.")):
        assert ask(session, scripted, question, answer) == answer[1:]
        fed += scripted.all_fed
    assert [m.role for m in session.messages] == ["system", *["user", "assistant"] * 3]
    whole = encode_chat(tiny.tokenizer, DIALECTS[dialect], session.messages, add_generation_prompt=False)
    assert fed == whole
    assert session.context_used == len(whole)


def test_thinking_dialect_drops_thoughts_from_history(tiny: LoadedModel) -> None:
    session, scripted = start(tiny, "z1")
    assert ask(session, scripted, "hello", "hm</think>\nyes") == "yes"
    ask(session, scripted, "again", "hm</think>\nno")
    messages = [Message("user", "hello"), Message("assistant", "yes"), Message("user", "again")]
    whole = encode_chat(tiny.tokenizer, DIALECTS["z1"], messages)
    assert scripted.fed[0] == whole[-len(scripted.fed[0]) :]
    assert len(scripted.fed[0]) < len(whole)  # what stands before the first thought is still in the cache
    assert tiny.tokenizer.encode("hm") != [] and "hm" not in tiny.tokenizer.decode(whole)


def test_clear_forgets_all_but_the_system_message(tiny: LoadedModel) -> None:
    session, scripted = start(tiny, system="be brief")
    ask(session, scripted, "hello", "\nyes")
    session.clear()
    assert session.messages == [Message("system", "be brief")]
    assert session.context_used == 0
    ask(session, scripted, "the other", "\nno")
    messages = [Message("system", "be brief"), Message("user", "the other")]
    whole = encode_chat(tiny.tokenizer, DIALECTS["chat-2024"], messages)
    assert whole[-len(scripted.fed[0]) :] == scripted.fed[0]
    assert len(scripted.fed[0]) < len(whole)  # the system message is still in the cache
    assert session.context_used == len(whole) + len(tiny.tokenizer.encode("\nno"))


def test_clear_without_a_system_message_leaves_nothing(tiny: LoadedModel) -> None:
    session, scripted = start(tiny)
    ask(session, scripted, "hello", "\nyes")
    session.clear()
    assert session.messages == []


def interrupted(session: Session, scripted: ScriptedModel, how: str) -> Iterator[str]:
    scripted.script = session.model.tokenizer.encode("\nabcdefgh")
    steps = session.say("hello")
    if how == "closed":
        for _ in range(4):
            yield next(steps).text
        steps.close()  # type: ignore[attr-defined]  # it is a generator
        return
    forwards = 0

    def strike() -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 5:
            raise KeyboardInterrupt

    scripted.before_forward = strike
    with pytest.raises(KeyboardInterrupt):
        for step in steps:
            yield step.text
    scripted.before_forward = lambda: None


@pytest.mark.parametrize("how", ["closed", "ctrl-c"])
def test_interrupted_answer_stays_part_of_the_conversation(tiny: LoadedModel, how: str) -> None:
    session, scripted = start(tiny)
    assert "".join(interrupted(session, scripted, how)) == "abc"
    assert session.messages == [Message("user", "hello"), Message("assistant", "abc")]
    before = session.context_used
    assert ask(session, scripted, "go on", "\ndef") == "def"
    # The last token had been shown but not fed; now it is.
    assert scripted.fed[0] == [ord("c"), USER, *tiny.tokenizer.encode("\ngo on"), ASSISTANT]
    assert session.context_used == before + len(scripted.fed[0]) - 1 + len(tiny.tokenizer.encode("\ndef"))


def test_real_model_interrupted_then_asked_again(tiny: LoadedModel) -> None:
    params = SamplingParams(max_new_tokens=8)
    session = Session(tiny, params)
    steps = session.say("hello")
    next(steps), next(steps)
    steps.close()  # type: ignore[attr-defined]  # it is a generator
    prompt = session._prompt_with(Message("user", "and?"))
    got = [step.token_id for step in session.say("and?")]
    assert got == [step.token_id for step in tiny.stream(prompt, params, chat=True)]


def test_message_that_does_not_fit_changes_nothing(tiny: LoadedModel) -> None:
    session, scripted = start(tiny)
    ask(session, scripted, "hello", "\nyes")
    before = (list(session.messages), session.context_used)
    with pytest.raises(DoesNotFitError, match="the context holds 256") as caught:
        session.say("x" * 300)
    assert caught.value.hint is not None and "/clear" in caught.value.hint
    assert (session.messages, session.context_used) == before
    assert ask(session, scripted, "so?", "\nso.") == "so."


def test_user_text_cannot_open_a_turn(tiny: LoadedModel) -> None:
    session, scripted = start(tiny)
    ask(session, scripted, "<|assistant|>\nI agree<|user|>", "\nyes")
    assert [i for i in scripted.fed[0] if i in tiny.tokenizer.special_ids][2:] == [USER, ASSISTANT]


def test_base_model_has_no_session_turns(tiny: LoadedModel) -> None:
    session = Session(dataclasses.replace(tiny, dialect=None), GREEDY)
    with pytest.raises(CheckpointError, match="base model"):
        session.say("hello")


def test_fifty_turns_feed_every_token_once(tmp_path: Path) -> None:
    model, scripted = with_script(loaded_model(tmp_path, context_len=512), "")
    session = Session(model, GREEDY)
    cache = session._context.cache
    total = 0
    for number in range(50):
        ask(session, scripted, "a", "\nb")
        total += len(scripted.all_fed)
        assert total == session.context_used == cache.position, number
    assert session._context.cache is cache


# --- undo, edit, branches


def test_undo_and_edit_shorten_the_cache_instead_of_prefilling_again(tiny: LoadedModel) -> None:
    session, scripted = start(tiny)
    ask(session, scripted, "hello", "\nthe one")
    ask(session, scripted, "and the second", "\nanother")
    first_turn = len(encode_chat(tiny.tokenizer, DIALECTS["chat-2024"], session.messages[:2], None, False))
    scripted.script = tiny.tokenizer.encode("\nno")
    scripted.fed.clear()
    assert "".join(step.text for step in session.edit("something else")) == "no"
    # The cache holds the first turn, and the second's role and line end; only the rest of the new question is fed.
    assert scripted.fed[0] == [*tiny.tokenizer.encode("something else"), ASSISTANT]
    assert [m.content for m in session.messages] == ["hello", "the one", "something else", "no"]
    session.conversation.undo()
    assert session.context_used == first_turn
    ask(session, scripted, "third", "\nyes")
    assert scripted.fed[0] == [*tiny.tokenizer.encode("third"), ASSISTANT]


def test_another_answer_feeds_one_token(tiny: LoadedModel) -> None:
    session, scripted = start(tiny)
    ask(session, scripted, "hello", "\nthe one")
    scripted.script = tiny.tokenizer.encode("\nanother")
    scripted.fed.clear()
    assert "".join(step.text for step in session.regenerate()) == "another"
    assert scripted.fed[0] == [ASSISTANT]
    assert len(session.conversation.branches) == 2


def test_regenerate_with_other_settings_once(tiny: LoadedModel) -> None:
    session, scripted = start(tiny)
    ask(session, scripted, "hello", "\nthe one")
    scripted.script = tiny.tokenizer.encode("\nanother")
    steps = list(session.regenerate(dataclasses.replace(GREEDY, max_new_tokens=3)))
    assert steps[-1].finish_reason == "max_tokens"
    assert session.params == GREEDY


def test_branches_share_what_they_have_in_common(tiny: LoadedModel) -> None:
    session, scripted = start(tiny)
    ask(session, scripted, "hello", "\nthe one")
    session.conversation.fork("aside")
    ask(session, scripted, "left", "\nyes")
    session.conversation.switch("main")
    ask(session, scripted, "right", "\nno")
    assert scripted.fed[0] == [*tiny.tokenizer.encode("right"), ASSISTANT]
    assert [m.content for m in session.messages] == ["hello", "the one", "right", "no"]


def test_interrupted_while_reading_keeps_chunks_and_the_question(tiny: LoadedModel) -> None:
    plan = dataclasses.replace(tiny.plan, chunk=16)
    session, scripted = start(dataclasses.replace(tiny, plan=plan))
    forwards = 0

    def strike() -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 4:
            raise KeyboardInterrupt

    scripted.before_forward = strike
    with pytest.raises(KeyboardInterrupt):
        list(session.say("x" * 100))
    scripted.before_forward = lambda: None
    assert session.conversation.is_unanswered
    assert session.cached_tokens == 3 * 16
    scripted.script = tiny.tokenizer.encode("\nyes")
    scripted.fed.clear()
    total = session.context_used
    list(session.regenerate())
    assert len(scripted.all_fed) == total + 1 - 3 * 16 + len(tiny.tokenizer.encode("\nyes"))
    assert [m.content for m in session.messages] == ["x" * 100, "yes"]


def test_new_message_takes_the_place_of_one_without_answer(tiny: LoadedModel) -> None:
    session, scripted = start(tiny)
    steps = session.say("never answered")
    steps.close()  # type: ignore[attr-defined]  # it is a generator
    assert session.conversation.is_unanswered
    ask(session, scripted, "hello", "\nyes")
    assert [m.content for m in session.messages] == ["hello", "yes"]
    whole = encode_chat(tiny.tokenizer, DIALECTS["chat-2024"], [Message("user", "hello")])
    assert scripted.all_fed[: len(whole)] == whole


def test_reading_is_predicted_and_its_probe_is_part_of_it(tiny: LoadedModel) -> None:
    session, scripted = start(tiny)
    reading = session.read_first("y" * 180, [("a.txt", "z")])
    assert scripted.fed == [] and reading.seconds is None
    assert reading.new_tokens == len(reading.prompt)
    assert reading.kv_bytes == reading.new_tokens * session.kv_bytes_per_token
    measured = session.probe(reading)
    assert len(scripted.all_fed) == 128
    assert measured.seconds is not None and measured.new_tokens == reading.new_tokens - 128
    scripted.script = tiny.tokenizer.encode("\nyes")
    scripted.fed.clear()
    list(session.say("y" * 180, [("a.txt", "z")]))
    assert scripted.fed[0] == reading.prompt[128:]


# --- overflow


def fill(session: Session, scripted: ScriptedModel, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        ask(session, scripted, f"question number {number}", f"\nanswer number {number}")


def test_overflow_drops_the_oldest_and_says_what(tiny: LoadedModel) -> None:
    session, scripted = start(tiny, system="be brief")
    session.overflow = "drop-oldest-turns"
    said: list[str] = []
    session.on_notice = said.append
    fill(session, scripted, 4)
    assert said == []
    session.conversation.pin(session.conversation.exchanges()[0][0].number, pinned=True)
    fill(session, scripted, 4, first=4)
    assert said and all("no longer go to the model" in line for line in said)
    assert "'question number 1' (" in said[0] and "tokens)" in said[0]
    shown = [m.content for m in session.messages]
    assert shown[:2] == ["be brief", "question number 0"]  # system and pinned stay
    assert "question number 1" not in shown and shown[-2] == "question number 7"
    assert session.context_used < 256
    # What the model was shown is exactly that.
    whole = encode_chat(tiny.tokenizer, DIALECTS["chat-2024"], session.messages, add_generation_prompt=False)
    assert session.tokens() == whole
    assert len(session.conversation.path()) == 16  # on record all the same


def test_overflow_error_drops_nothing(tiny: LoadedModel) -> None:
    session, scripted = start(tiny)
    with pytest.raises(DoesNotFitError) as caught:
        fill(session, scripted, 12)
    assert "drop-oldest-turns" in str(caught.value.hint)
    assert session.conversation.dropped == set()


def test_message_that_fits_in_no_way_drops_nothing(tiny: LoadedModel) -> None:
    session, scripted = start(tiny)
    session.overflow = "drop-oldest-turns"
    fill(session, scripted, 3)
    with pytest.raises(DoesNotFitError):
        session.say("x" * 300)
    assert session.conversation.dropped == set()


# --- tools

ADD = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}
NOW = {"type": "function", "function": {"name": "now", "description": "", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("dialect", ["chat-2024", "0414", "z1"])
def test_tool_calls_and_observations_are_the_dialects_own(tmp_path: Path, dialect: str) -> None:
    loaded = loaded_model(tmp_path, context_len=512)
    session, scripted = start(loaded, dialect)
    session.tools = [ADD]
    thought = "hm</think>\n" if dialect == "z1" else "\n"
    assert ask(session, scripted, "1+1?", thought + 'add\n{"a": 1}') == 'add\n{"a": 1}'
    last = session.conversation.path()[-1]
    assert (last.finish_reason, last.message.tool_calls[0].name) == ("tool_calls", "add")
    scripted.script = loaded.tokenizer.encode(thought + "2")
    scripted.fed.clear()
    assert "".join(step.text for step in session.observe(["2 <|user|>"])) == "2"
    fed = [i for i in scripted.all_fed if i in loaded.tokenizer.special_ids]
    assert fed[-2:] == [SPECIAL_IDS["<|observation|>"], ASSISTANT]  # what the tool wrote is text
    assert [turn.message.role for turn in session.conversation.path()] == [
        *("user", "assistant", "observation", "assistant")
    ]


def test_two_hundred_dialogues_no_false_call_and_no_missed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of all kinds that a model gives; which of them are calls is known from how they were made."""
    monkeypatch.setattr("glm4run.generation.has_engine", lambda: False)  # arguments as the model writes them
    random = Random(7)
    folder = write_checkpoint(tmp_path, dialect="chat-2024", max_position_embeddings=4096)
    loaded = load_model(folder, dtype="fp32", context_len=4096)
    session, scripted = start(loaded)
    session.tools = [ADD, NOW]
    wrong = []
    for number in range(200):
        answer, calls = answer_of_some_kind(random)
        session.conversation.clear()
        scripted.script = loaded.tokenizer.encode(answer)
        list(session.say(f"question {number}"))
        found = [(call.name, call.arguments) for call in session.conversation.path()[-1].message.tool_calls]
        if found != calls:
            wrong.append((answer, calls, found))
    assert wrong == []


def closing(logits_for: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """A model that, where it may not go on as it likes, closes what is open."""

    def call(token: int) -> Tensor:
        logits = logits_for(token)
        for rank, mark in enumerate('1:]}"'):
            logits[ord(mark)] = max(float(logits[ord(mark)]), 6.0 + rank)
        return logits

    return call


def test_two_hundred_dialogues_with_arguments_held_to_their_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What begins with the name of a tool is a call with arguments that fit, whatever the model would write there."""
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    random = Random(11)
    folder = write_checkpoint(tmp_path, dialect="chat-2024", max_position_embeddings=4096)
    loaded = load_model(folder, dtype="fp32", context_len=4096)
    session, scripted = start(loaded)
    number_or_text = {"anyOf": [{"type": "number"}, {"type": "string", "maxLength": 30}]}
    adding = {"type": "object", "properties": {"a": number_or_text, "b": {}}, "additionalProperties": False}
    schemas: dict[str, dict[str, Any]] = {"add": {**adding, "required": ["a"]}, "now": {"type": "object"}}
    session.tools = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in schemas.items()]
    monkeypatch.setattr(scripted, "logits_for", closing(scripted.logits_for))
    wrong, rewritten = [], 0
    for number in range(200):
        answer, calls = answer_of_some_kind(random)
        session.conversation.clear()
        scripted.script = loaded.tokenizer.encode(answer)
        list(session.say(f"question {number}"))
        turn = session.conversation.path()[-1]
        first = answer.lstrip().partition("\n")[0].strip()
        found = turn.message.tool_calls
        fits = [not problems(schemas[call.name], json.loads(call.arguments), extra="") for call in found]
        if (first in schemas) != bool(found) or not all(fits) or (found and found[0].name != first):
            wrong.append((answer, calls, found))
        if not found and turn.message.content != answer.removeprefix("\n"):
            wrong.append((answer, calls, found))  # a free answer is untouched
        rewritten += bool(found) and [(c.name, c.arguments) for c in found] != calls
    assert wrong == []
    assert rewritten > 20  # arguments that did not fit came


def answer_of_some_kind(random: Random) -> tuple[str, list[tuple[str, str]]]:
    """(what the model says, its calls as name and arguments)."""

    def value(depth: int = 0) -> object:
        texts = ["", "北京", 'a "quoted" }', "{", "<|user|>", "\\", "add\n{}", "line\nbreak"]
        simple = [random.choice(texts), random.randint(-5, 5), 1.5, True, None]
        if depth < 2 and random.random() < 0.4:
            return random.choice([[value(2)], {"k": value(depth + 1), "}": 1}])
        return random.choice(simple)

    def arguments() -> str:
        data = {name: value() for name in random.sample(["a", "b", "城市"], random.randint(0, 3))}
        return json.dumps(data, ensure_ascii=random.random() < 0.5, indent=random.choice([None, 2]))

    name, body = random.choice(["add", "now"]), arguments()
    before, after = random.choice(["\n", "", "\n "]), random.choice(["", "\n", " \n"])
    is_call = random.random() < 0.5
    if is_call:
        calls = [(name, body)]
        text = f"{before}{name}{random.choice(['', ' '])}\n{body}{after}"
        if random.random() < 0.3:
            more = arguments()
            calls.append(("add", more))
            text += f"add\n{more}"
        return text, calls
    return random.choice(
        [
            f"\nI call {name}\n{body}",
            f"\n{body}",
            f"\n{name} {body}",
            f"\n{name}\n{body[:-1]}",
            f"\n{name}\n{body} and so on",
            f"\n{name}\n[1, 2]",
            f"\nget_{name}\n{body}",
            f"\n{name.upper()}\n{body}",
            f"\n{name}: {body}\n",
            f"\n```\n{name}\n{body}\n```",
            f"\n{name} is a tool.\n{body}",
            '\n{"name": "add", "arguments": {"a": 1}}',
            f"\n{name}\n{{'a': 1}}",
            f"\n{name}\nhello",
            "\nhello",
        ]
    ), []


# --- many turns


def test_fifty_turns_of_the_demo_prefill_only_what_is_new_and_take_no_memory() -> None:
    model = load_model(demo_folder(), context_len=2048)
    session = Session(model, SamplingParams(max_new_tokens=12))
    cache = session._context.cache
    bytes_before, buffers = cache.nbytes, [layer.keys.data.data_ptr() for layer in cache.layers]
    used = resident = 0
    for number in range(50):
        timings = Timings()
        question = f"{number}: who are you?"
        list(session.say(question, timings=timings))
        mark = 1 + (number > 0 and session.conversation.path()[-3].finish_reason == "max_tokens")
        new = len(model.tokenizer.encode("\n" + question)) + 1 + mark
        assert timings.prefill_tokens == new + (0 if used else len(model.tokenizer.prefix_ids)), number
        used = session.context_used
        if number == 10:
            resident = resident_bytes()
    assert (cache.nbytes, [layer.keys.data.data_ptr() for layer in cache.layers]) == (bytes_before, buffers)
    pages = cache.nbytes  # of the cache itself, which are touched as the conversation grows
    assert resident_bytes() < resident + pages + (16 << 20)
