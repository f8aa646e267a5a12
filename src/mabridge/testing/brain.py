"""The scripted agent: what a brain function says and does on the platform."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import anyio
import anyio.lowlevel

from mabridge.testing.calls import Reply, Thread, ToolCall
from mabridge.testing.wire import Json, text_block

if TYPE_CHECKING:
    from mabridge.testing.state import SessionState

__all__ = ["Agent", "Brain"]


class Agent:
    """The agent during one turn of a session, on one thread.

    A brain is ``async def brain(agent)``; it is called once for each user message. When it returns, the turn has ended,
    with the stop reason that it returned, or ``end_turn``. An interrupt cancels it.

    Attributes:
        session: the session.
        message: the ``user.message`` event that began this turn.
    """

    def __init__(self, session: SessionState, thread: Thread, *, message: Json) -> None:
        self.session = session
        self.message = message
        self._thread = thread

    @property
    def thread_id(self) -> str:
        """The id of this agent's thread."""
        return self._thread.id

    @property
    def text(self) -> str:
        """The text of the user message."""
        return "\n".join(block["text"] for block in self.message["content"] if block["type"] == "text")

    async def say(self, text: str) -> None:
        """Emit an ``agent.message``; a child thread's message reaches the session as one that its parent received."""
        await anyio.lowlevel.checkpoint()
        event: Json = {"type": "agent.message", "content": [text_block(text)]}
        if not self._thread.primary:
            event |= {"type": "agent.thread_message_received", "from_session_thread_id": self._thread.id}
            event |= {"from_agent_name": self._thread.agent_name}
        self.session.emit(event)

    async def think(self, seconds: float) -> None:
        """Let the model take its time."""
        await anyio.sleep(seconds)

    async def call(
        self, name: str, arguments: Mapping[str, Any] | None, *, permission: str = "allow", custom: bool = False
    ) -> Reply:
        """Call one tool, wait for the result and return it. Arguments as in `ToolCall`."""
        return (await self.calls([(name, arguments)], permission=permission, custom=custom))[0]

    async def calls(
        self,
        calls: Sequence[ToolCall | tuple[str, Mapping[str, Any] | None]],
        *,
        permission: str = "allow",
        custom: bool = False,
    ) -> list[Reply]:
        """Call several tools in one turn, wait for all results and return them in the order of the calls.

        Args:
            calls: each a `ToolCall`, or a name and an input, for which the other arguments hold.
            permission: as in `ToolCall`.
            custom: as in `ToolCall`.
        """
        wanted = [
            call
            if isinstance(call, ToolCall)
            else ToolCall(name=call[0], input=call[1], permission=permission, custom=custom)
            for call in calls
        ]
        # An interrupt cancels the turn here, so that nothing is emitted after it.
        await anyio.lowlevel.checkpoint()
        self.session.set_running(self._thread)
        replies = []
        for open_call in self.session.open(self._thread, wanted):
            await open_call.done.wait()
            assert open_call.reply is not None
            replies.append(open_call.reply)
        return replies

    async def server_call(self, name: str, arguments: Mapping[str, Any], *, result: str) -> Reply:
        """Call a tool that the platform runs itself, such as ``web_search``; no client may answer it."""
        await anyio.lowlevel.checkpoint()
        return self.session.server_call(ToolCall(name=name, input=arguments), result)

    async def thread(self, name: str) -> Self:
        """Create a child thread that runs the agent `name`, and return the agent on it.

        Its calls reach the session's stream with its ``session_thread_id``. It shares this brain function: use a task
        group to let several of them work at the same time.
        """
        await anyio.lowlevel.checkpoint()
        child = self.session.add_thread(name)
        return type(self)(self.session, child, message=self.message)

    async def finish(self) -> None:
        """End this child thread's turn."""
        await anyio.lowlevel.checkpoint()
        self.session.set_idle(self._thread)

    async def terminate(self) -> None:
        """Terminate this child thread: its open calls come back as errors, and take no result any more."""
        await anyio.lowlevel.checkpoint()
        self.session.end_thread(self._thread)

    @asynccontextmanager
    async def idle(self) -> AsyncIterator[None]:
        """Let this thread be idle inside the block, as a coordinator is while its children work.

        Without it the parent counts as running, so the session is not idle while a child waits for a result.
        """
        await anyio.lowlevel.checkpoint()
        self.session.set_idle(self._thread)
        yield
        self.session.set_running(self._thread)


Brain: TypeAlias = Callable[[Agent], Awaitable[str | None]]
"""What a scripted agent is: called once for each user message, returns the stop reason or ``None`` for ``end_turn``."""
