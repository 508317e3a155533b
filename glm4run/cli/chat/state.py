"""A chat that is going on: the session, where its messages come from, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from glm4run.cli.chat.prompt import Reader
from glm4run.cli.console import talk
from glm4run.tool_runner import Tool

if TYPE_CHECKING:
    from glm4run.session import Session
    from glm4run.session_files import SessionFiles


class ChatEnded(Exception):  # noqa: N818  (it is no error)
    """The user wants to go."""


@dataclass
class Chat:
    """Everything that a command may look at or change."""

    session: Session
    reader: Reader
    files: SessionFiles | None = None  # None: nothing is kept on disk
    tools: dict[str, Tool] = field(default_factory=dict)
    is_raw: bool = False
    shows_thoughts: bool = True
    runs_without_asking: bool = False  # tools
    trusted: set[str] = field(default_factory=set)  # tools that the user said "always" to
    attached: list[tuple[str, str]] = field(default_factory=list)  # name and text of files for the next message
    bandwidth_gb_per_s: float | None = None  # of this machine, where `bench` has measured it

    def use_tools(self, tools: Sequence[Tool]) -> None:
        """Declares these tools, and no others, from the next answer on."""
        from glm4run.tool_runner import declarations

        self.tools = {tool.name: tool for tool in tools}
        self.session.tools = declarations(tools)

    def record_settings(self) -> None:
        """Puts sampling and overflow on record, so that a resumed session goes on the same way."""
        self.session.conversation.on_record(settings_record(self.session))


def settings_record(session: Session) -> dict[str, Any]:
    """The settings of a session as a record of its journal."""
    form = None if session.constraint is None else session.constraint.as_dict()
    return {"params": asdict(session.params), "overflow": session.overflow, "format": form}


def warn(message: str) -> None:
    """What a user must not miss."""
    talk(f"notice: {message}", style="yellow", only="notice:")
