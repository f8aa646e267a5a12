"""A session as a test sees it: send to it, wait for it, look at what happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import anyio

from mabridge.testing.brain import Agent, Brain
from mabridge.testing.calls import Results
from mabridge.testing.inbox import receive
from mabridge.testing.state import SessionState
from mabridge.testing.wire import Json, text_block

if TYPE_CHECKING:
    from mabridge.testing.plane import Environment

__all__ = ["BrainFailed", "Session"]


class BrainFailed(RuntimeError):
    """The scripted agent raised; the cause says what."""


class Session(SessionState):
    """One session on the platform. Made by `Environment.create_session`.

    Attributes:
        calls: all tool calls, oldest first.
        events: the history, oldest first.
    """

    def __init__(
        self,
        environment: Environment,
        brain: Brain,
        *,
        agent: Json,
        metadata: Mapping[str, str],
        resources: Sequence[Json],
        title: str | None,
        secret: bool,
    ) -> None:
        super().__init__(environment, agent=agent, metadata=metadata, resources=resources, title=title, secret=secret)
        self._brain = brain

    def results(self, tool_use_id: str) -> Results:
        """Return what clients sent for a call: accepted and refused."""
        accepted = self._accepted.get(tool_use_id)
        return Results(
            accepted=[] if accepted is None else [accepted], refused=list(self._refused.get(tool_use_id, []))
        )

    def send(self, *events: Json) -> list[Json]:
        """Send events as a client with an API key would.

        Raises:
            ApiError: as the API would answer.
        """
        return receive(self, list(events))

    def send_message(self, text: str) -> Json:
        """Send a ``user.message``."""
        return self.send({"type": "user.message", "content": [text_block(text)]})[0]

    def interrupt(self, thread_id: str | None = None) -> Json:
        """Send a ``user.interrupt``, for one thread or for all."""
        event: Json = {"type": "user.interrupt"}
        return self.send(event if thread_id is None else {**event, "session_thread_id": thread_id})[0]

    def confirm(self, tool_use_id: str, result: Literal["allow", "deny"], *, message: str | None = None) -> Json:
        """Send a ``user.tool_confirmation``."""
        event: Json = {"type": "user.tool_confirmation", "tool_use_id": tool_use_id, "result": result}
        return self.send(event if message is None else {**event, "deny_message": message})[0]

    def answer(self, tool_use_id: str, text: str, *, is_error: bool = False) -> Json:
        """Send the result of a call, as an application that owns a custom tool would."""
        call = self._calls[tool_use_id]
        kind, key = ("custom_tool_result", "custom_tool_use_id") if call.custom else ("tool_result", "tool_use_id")
        return self.send(
            {"type": f"user.{kind}", key: tool_use_id, "content": [text_block(text)], "is_error": is_error}
        )[0]

    async def wait_for(self, predicate: Callable[[Json], bool], *, timeout: float = 30.0) -> Json:
        """Return the first event, past or to come, that fits.

        Raises:
            TimeoutError: none came within `timeout` seconds; the message shows where the session stands.
            BrainFailed: the scripted agent raised.
        """

        def found() -> Json | None:
            return next((event for event in self.events if predicate(event)), None)

        await self._wait(lambda: found() is not None, "the event", timeout)
        event = found()
        assert event is not None
        return event

    async def wait_idle(self, *, timeout: float = 30.0) -> None:
        """Wait until the session has nothing left to do: idle, with no call open and no message waiting.

        Raises:
            TimeoutError: as in `wait_for`; also, at once, if the session has ended instead.
            BrainFailed: the scripted agent raised.
        """
        await self._wait(lambda: self._at_rest or self._ended, "idle", timeout)
        if self._ended:
            raise TimeoutError(f"{self.describe()}: it ended and will never be idle")

    async def wait_ended(self, *, timeout: float = 30.0) -> None:
        """Wait until the session is terminated or deleted.

        Raises:
            TimeoutError: as in `wait_for`.
            BrainFailed: the scripted agent raised.
        """
        await self._wait(lambda: self._ended, "its end", timeout)

    def describe(self) -> str:
        """Return one line on where the session stands, for error messages."""
        waiting = ", ".join(f"{call.name} {call.id}" for call in self.open_calls) or "none"
        item = next((item for item in self.environment.queue.items if item.id == self.id), None)
        last = ", ".join(event["type"] for event in self.events[-5:])
        state = "no work item" if item is None else f"work item {item.state}"
        return f"session {self.id} is {self.status}; {state}; open calls: {waiting}; last events: {last}"

    async def _think(self, message: Json) -> str | None:
        return await self._brain(Agent(self, self.primary, message=message))

    @property
    def _at_rest(self) -> bool:
        return self.status == "idle" and self._turn is None and not self._waiting and not self.open_calls

    @property
    def _ended(self) -> bool:
        return self.deleted or self.status == "terminated"

    async def _wait(self, done: Callable[[], bool], what: str, timeout: float) -> None:
        with anyio.move_on_after(timeout) as scope:
            while self.failure is None and not done():
                await self.log.changed()
        if self.failure is not None:
            self.environment.plane.reported(self.failure)
            raise BrainFailed(f"the scripted agent of session {self.id} raised") from self.failure
        if scope.cancelled_caught:
            raise TimeoutError(f"{self.describe()}: waited {timeout:g} s for {what}")
