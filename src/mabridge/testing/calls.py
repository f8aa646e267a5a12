"""Tool calls and threads of a session, as the platform keeps them.

Read in `anthropic.types.beta.sessions`: the events ``agent.tool_use``, ``agent.custom_tool_use``, ``session.thread_*``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import anyio

from mabridge.testing.wire import Json

__all__ = ["Call", "Reply", "Results", "Thread", "ToolCall"]


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """What the scripted agent calls.

    Attributes:
        name: the tool's name.
        input: its input; ``None`` and unknown fields go out as they are, for models do such things.
        permission: ``evaluated_permission``: ``allow``, ``ask``, ``deny``, or a value that no client knows yet.
        custom: an ``agent.custom_tool_use``, which carries no permission.
    """

    name: str
    input: Mapping[str, Any] | None
    permission: str = "allow"
    custom: bool = False


@dataclass(frozen=True, kw_only=True)
class Reply:
    """How a call ended.

    Attributes:
        tool_use_id: the call's event id.
        content: the content blocks of the result.
        is_error: as the result said.
        by: ``worker`` for a client's result; what else closed the call: ``denied``, ``interrupted``, ``terminated``,
            or ``server`` for a tool that runs on the platform.
    """

    tool_use_id: str
    content: list[Json]
    is_error: bool
    by: Literal["worker", "server", "denied", "interrupted", "terminated"]

    @property
    def text(self) -> str:
        """The text blocks, joined by newlines."""
        return "\n".join(block["text"] for block in self.content if block["type"] == "text")


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that clients sent for one call.

    Attributes:
        accepted: the ``user.tool_result`` or ``user.custom_tool_result`` events that were taken: one at most.
        refused: what was sent and refused, each with the message of the 400.
    """

    accepted: list[Json]
    refused: list[tuple[Json, str]]


@dataclass(eq=False, kw_only=True)
class Call:
    """One tool call of a session.

    Attributes:
        event: the event that made it.
        thread: the thread that made it.
        confirmed: the verdict of a ``user.tool_confirmation``, if there was one.
        reply: how it ended; ``None`` while it is open.
    """

    event: Json
    thread: Thread
    confirmed: str | None = None
    reply: Reply | None = None
    done: anyio.Event = field(default_factory=anyio.Event)

    @property
    def id(self) -> str:
        """The id of the event, which results name."""
        return str(self.event["id"])

    @property
    def name(self) -> str:
        """The tool's name."""
        return str(self.event["name"])

    @property
    def input(self) -> Json | None:
        """The tool's input."""
        value: Json | None = self.event["input"]
        return value

    @property
    def custom(self) -> bool:
        """Whether it is a call of a custom tool."""
        return bool(self.event["type"] == "agent.custom_tool_use")

    @property
    def permission(self) -> str | None:
        """Its ``evaluated_permission``; a custom call has none."""
        return self.event.get("evaluated_permission")

    @property
    def held(self) -> bool:
        """Whether it waits for a confirmation."""
        return not self.custom and self.permission != "allow" and self.confirmed is None


@dataclass(eq=False, kw_only=True)
class Thread:
    """One thread of a session. The first is the primary one, whose events carry no thread id."""

    id: str
    agent_name: str
    primary: bool
    status: Literal["running", "idle", "terminated"] = "idle"
    open: list[Call] = field(default_factory=list)
