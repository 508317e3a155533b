"""Messages to token ids, and the answer back, in the dialects that the family was trained on (see `dialects`).

Content is encoded apart from control tokens, so what a user types cannot open a turn. Knows no model and no sampling.
Source: the chat templates of glm-4-9b-chat, glm-4-9b-chat-1m, GLM-4-9B-0414 and GLM-Z1-9B-0414.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NoReturn

from glm4run.dialects import DIALECTS, Dialect, dialect_from_template, read_template, template_fingerprint
from glm4run.errors import CheckpointError, UsageError
from glm4run.tokenizer import PREFIX_TOKENS, Tokenizer
from glm4run.tool_calls import ToolCall, parse_tool_call, parse_tool_calls, render_tool, tool_names

__all__ = [
    "DIALECTS",
    "AnswerCleaner",
    "AnswerPart",
    "Control",
    "Dialect",
    "Message",
    "Text",
    "ToolCall",
    "dialect_from_template",
    "encode_chat",
    "parse_messages",
    "parse_tool_call",
    "parse_tool_calls",
    "read_template",
    "render_text",
    "segments",
    "split_thinking",
    "strip_answer",
    "template_fingerprint",
    "tool_names",
]

ROLES = ("system", "user", "assistant", "observation")
ROLE_ALIASES = MappingProxyType({"tool": "observation"})
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation; role `tool` becomes `observation`.

    `metadata` is the name of the tool in an assistant turn that is a call (`content` is then its JSON), `tool_calls`
    the OpenAI way to say the same, `tools` the declarations that the 2024 dialect keeps in a system message.

    Raises: UsageError if the role is unknown.
    """

    role: str
    content: str
    metadata: str = ""
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_calls: Sequence[ToolCall] = ()

    def __post_init__(self) -> None:
        role = ROLE_ALIASES.get(self.role, self.role)
        if role not in ROLES:
            raise UsageError(
                f"a message has role {self.role!r}; expected one of {', '.join((*ROLES, *ROLE_ALIASES))}",
                hint="use one of these roles",
            )
        object.__setattr__(self, "role", role)

    @classmethod
    def from_dict(cls, data: Any) -> Message:
        """From a JSON message, GLM or OpenAI style; keys that no dialect prints are ignored.

        Raises: UsageError naming the key that is missing or of the wrong type, or the unknown role.
        """
        if not isinstance(data, Mapping):
            raise UsageError(f"a message is {data!r:.80}; expected an object", hint='{"role": ..., "content": ...}')
        role, calls, tools = data.get("role"), data.get("tool_calls") or [], data.get("tools")
        content, metadata = data.get("content"), data.get("metadata")
        if calls and (role != "assistant" or not isinstance(calls, list)):
            _wrong("tool_calls", calls, "a list, in an assistant message")
        if content is None and calls:
            content = ""
        if not isinstance(role, str):
            _wrong("role", role, "a text")
        if not isinstance(content, str):
            _wrong("content", content, "a text")
        if metadata is not None and not isinstance(metadata, str):
            _wrong("metadata", metadata, "a text")
        if tools is not None and not (isinstance(tools, list) and all(isinstance(t, Mapping) for t in tools)):
            _wrong("tools", tools, "a list of objects")
        return cls(role, content, metadata or "", tools, tuple(map(ToolCall.from_dict, calls)))


def _wrong(key: str, value: object, expected: str) -> NoReturn:
    raise UsageError(
        f"{key} of a message is {value!r:.80}; expected {expected}",
        hint="see the message format: role, content, metadata, tools, tool_calls",
    )


def parse_messages(data: Any) -> list[Message]:
    """The messages of a JSON conversation.

    Raises: UsageError that says which message is wrong and how.
    """
    if not isinstance(data, list):
        raise UsageError(f"messages is {data!r:.80}; expected a list", hint='[{"role": "user", "content": "..."}]')
    messages = []
    for number, item in enumerate(data, start=1):
        try:
            messages.append(Message.from_dict(item))
        except UsageError as error:
            raise UsageError(f"message {number} of {len(data)}: {error}", hint=error.hint) from error
    return messages


@dataclass(frozen=True, slots=True)
class Control:
    """A control token of the prompt, by name."""

    name: str


@dataclass(frozen=True, slots=True)
class Text:
    """A stretch of ordinary text of the prompt."""

    text: str


def segments(
    dialect: Dialect,
    messages: Iterable[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> list[Control | Text]:
    """The prompt of a conversation, control tokens apart from text; no two `Text` follow each other.

    `tools` and the messages' own tools mean the same in every dialect: 2024 prints `tools` as a system message at the
    front, the others print what messages carry as if given here.

    Raises: UsageError if tools are given both ways, or one has no name.
    """
    turns = [turn for message in messages for turn in _expand_calls(dialect, message)]
    if tools and any(turn.tools for turn in turns):
        raise UsageError(
            "tools are given twice: as an argument and inside a message; expected one of the two",
            hint="remove one of them",
        )
    if dialect.tools_in_messages:
        carrier = [Message("system", "", tools=tools)] if tools else []
        printed = _print_2024(dialect, carrier + turns)
    else:
        printed = _print_0414(dialect, turns, tools or [tool for turn in turns for tool in turn.tools or ()])
    prompt: list[Control | Text] = [Control(name) for name in PREFIX_TOKENS]
    for role, text in printed:
        prompt += [Control(f"<|{role}|>"), Text(text)]
    if add_generation_prompt:
        prompt.append(Control("<|assistant|>"))  # no newline: the model writes it
        if dialect.opens_thinking:
            prompt.append(Text(f"\n{THINK_OPEN}"))
    return prompt


def render_text(
    dialect: Dialect,
    messages: Iterable[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt as one text, byte for byte what the published template prints. To look at, never to encode.

    Raises: UsageError as `segments`.
    """
    parts = segments(dialect, messages, tools, add_generation_prompt)
    return "".join(part.name if isinstance(part, Control) else part.text for part in parts)


def encode_chat(
    tokenizer: Tokenizer,
    dialect: Dialect,
    messages: Iterable[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The prompt as token ids, `[gMASK]<sop>` once at the head; text can never become a control token.

    Raises: UsageError as `segments`; CheckpointError if the vocabulary lacks a control token that the dialect needs.
    """
    ids: list[int] = []
    for part in segments(dialect, messages, tools, add_generation_prompt):
        if isinstance(part, Text):
            ids += tokenizer.encode(part.text)
            continue
        control = tokenizer.special_id(part.name)
        if control is None:
            raise CheckpointError(
                f"the tokenizer has no control token {part.name}; the chat dialect {dialect.name} needs it",
                hint="this is not the tokenizer of a GLM-4 chat model: copy the model's own, or generate without chat",
            )
        ids.append(control)
    return ids


def _visible(dialect: Dialect, content: str) -> str:
    return content.split(THINK_CLOSE)[-1].strip() if dialect.drops_thoughts else content


def _expand_calls(dialect: Dialect, message: Message) -> Iterator[Message]:
    """A message with OpenAI-style calls as one turn per call, after a turn for its text if it has any."""
    if not message.tool_calls:
        yield message
        return
    if message.tools is not None or _visible(dialect, message.content):
        yield replace(message, tool_calls=())
    for call in message.tool_calls:
        yield Message("assistant", call.arguments, metadata=call.name)


def _tool_list(dialect: Dialect, tools: Iterable[Mapping[str, Any]]) -> str:
    sections = [render_tool(tool, built_in=dialect.tools_in_messages) for tool in tools]
    return "\n" + dialect.tools_heading + "".join(sections)


def _print_2024(dialect: Dialect, turns: Iterable[Message]) -> Iterator[tuple[str, str]]:
    """Role and text of each printed turn, in the order of the messages."""
    for turn in turns:
        if turn.tools is not None:
            yield "system", _tool_list(dialect, turn.tools)
        if turn.content:
            yield turn.role, f"{turn.metadata}\n{turn.content}"


def _print_0414(
    dialect: Dialect, turns: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str]]:
    """Role and text of each printed turn: tools, system messages, then the rest."""
    if tools:
        yield "system", _tool_list(dialect, tools)
    for turn in turns:
        if turn.role == "system" and (turn.content or not turn.tools):  # not one that only carries tools
            yield "system", f"\n{turn.content}"
    for turn in turns:
        if turn.role != "system":
            called = f"{turn.metadata}{dialect.after_metadata}" if turn.role == "assistant" and turn.metadata else ""
            yield turn.role, f"{called}\n{_visible(dialect, turn.content)}"


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """What a piece of generated text adds to the thought and to the answer."""

    thought: str = ""
    answer: str = ""


class AnswerCleaner:
    """Takes the framing off generated text while it streams.

    That is the newline which ends the `<|assistant|>` line, and in a thinking dialect `</think>` with the white space
    about the thought and before the answer. What `push` and `flush` return joins to the same, however text is cut.
    """

    def __init__(self, *, thinking: bool = False) -> None:
        """`thinking`: the text starts inside a thought, as the prompt ended in `<think>` (`Dialect.opens_thinking`)."""
        self._thinking = thinking
        self._strip_space = thinking
        self._at_start = True
        self._held = ""

    def push(self, text: str) -> AnswerPart:
        """What is certain once `text` has come; in a thought, white space and the start of `</think>` are held back."""
        if not self._thinking:
            return AnswerPart(answer=self._lead_off(text))
        thought, closed, rest = (self._held + text).partition(THINK_CLOSE)
        if closed:
            self._held = ""
            last = self._lead_off(thought.rstrip())
            self._thinking, self._at_start = False, True
            return AnswerPart(last, self._lead_off(rest))
        partial = next(n for n in range(len(THINK_CLOSE) - 1, -1, -1) if thought.endswith(THINK_CLOSE[:n]))
        certain = thought[: len(thought) - partial].rstrip()
        self._held = thought[len(certain) :]
        return AnswerPart(thought=self._lead_off(certain))

    def flush(self) -> AnswerPart:
        """What was held back, when no more text will come."""
        held, self._held = self._held.rstrip(), ""
        return AnswerPart(thought=self._lead_off(held))

    def _lead_off(self, text: str) -> str:
        """`text` without the framing before the first character of a thought or an answer."""
        if self._at_start and text:
            text = text.lstrip() if self._strip_space else text.removeprefix("\n")
            self._at_start = self._strip_space and not text
        return text


def strip_answer(text: str) -> str:
    """A whole answer without the one newline that the model writes after `<|assistant|>`."""
    return text.removeprefix("\n")


def split_thinking(text: str) -> tuple[str, str]:
    """Thought and answer of a whole text that starts inside a thought; without `</think>` all of it is thought."""
    cleaner = AnswerCleaner(thinking=True)
    part, rest = cleaner.push(text), cleaner.flush()
    return part.thought + rest.thought, part.answer
