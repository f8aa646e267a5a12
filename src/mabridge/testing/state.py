"""A session as the platform keeps it: its status, its threads and their calls, and the events that tell of them.

Read in the platform's documentation (self-hosted sandboxes, session events, operations) and in
`anthropic.types.beta.sessions`. What the platform does with what clients send is in `mabridge.testing.inbox`; how the
scripted agent speaks, in `mabridge.testing.brain`; what a test sees of all this, in `mabridge.testing.session`.

The order of two events follows from the SDK: ``session.thread_status_idle`` comes before ``session.status_idle``, for
any event after the latter stops the SDK's idle countdown. The primary thread's status events are in the log too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import anyio

from mabridge.testing.calls import Call, Reply, Thread, ToolCall
from mabridge.testing.eventlog import EventLog
from mabridge.testing.wire import ApiError, Json, new_id, text_block

if TYPE_CHECKING:
    from mabridge.testing.plane import Environment

__all__ = ["SessionState", "check_metadata"]

DENIED = "Permission to use {tool} has been denied."
INTERRUPTED = "Tool execution was interrupted before completion. Please retry."
TERMINATED = "The thread was terminated."


class SessionState(ABC):
    """What the platform knows of one session, and how it changes.

    Attributes:
        id: ``sesn_...``, which is also the id of its work item.
        status: ``idle``, ``running`` or ``terminated``.
        deleted: it is gone: every request for it is a 404.
        agent: the snapshot of the agent, as the API shows it.
        log: its events.
        threads: by id.
        failure: what the scripted agent raised, if it did.
    """

    def __init__(
        self,
        environment: Environment,
        *,
        agent: Json,
        metadata: Mapping[str, str],
        resources: Sequence[Json],
        title: str | None,
        secret: bool,
    ) -> None:
        self.id = new_id("sesn")
        self.environment = environment
        self.agent = agent
        self.metadata = dict(metadata)
        self.resources = list(resources)
        self.title = title
        self.secret = secret
        self.status: Literal["idle", "running", "terminated"] = "idle"
        self.deleted = False
        self.archived_at: str | None = None
        self.log = EventLog(environment.plane.clock)
        self.created_at = self.updated_at = environment.plane.clock.stamp()
        self.primary = Thread(id=new_id("sthr"), agent_name=agent["name"], primary=True)
        self.threads = {self.primary.id: self.primary}
        self.failure: BaseException | None = None
        self._calls: dict[str, Call] = {}
        self._accepted: dict[str, Json] = {}
        self._refused: dict[str, list[tuple[Json, str]]] = {}
        self._waiting: deque[str] = deque()
        self._turn: anyio.CancelScope | None = None
        self.queue_work()

    @property
    def events(self) -> list[Json]:
        """The history, oldest first."""
        return self.log.events

    @property
    def calls(self) -> list[Call]:
        """All tool calls, oldest first."""
        return list(self._calls.values())

    @property
    def open_calls(self) -> list[Call]:
        """The calls that wait for a client."""
        return [call for thread in self.threads.values() for call in thread.open]

    def to_json(self) -> Json:
        """Return the session as the API shows it."""
        return {
            "id": self.id,
            "type": "session",
            "agent": self.agent,
            "archived_at": self.archived_at,
            "budget": None,
            "created_at": self.created_at,
            "deployment_id": None,
            "environment_id": self.environment.id,
            "metadata": self.metadata,
            "outcome_evaluations": [],
            "resources": self.resources,
            "stats": {},
            "status": self.status,
            "title": self.title,
            "updated_at": self.updated_at,
            "usage": {},
            "vault_ids": [],
        }

    def queue_work(self) -> None:
        """Queue the session's work item, if it has none that is not stopped."""
        self.environment.queue.add(self.id, {"type": "session", "id": self.id}, has_secret=self.secret)

    def call(self, tool_use_id: str) -> Call | None:
        """Return a call by its id."""
        return self._calls.get(tool_use_id)

    def refused(self, event: Json, message: str) -> None:
        """Note that a client's result was refused."""
        tool_use_id = event.get("tool_use_id") or event.get("custom_tool_use_id")
        if isinstance(tool_use_id, str):
            self._refused.setdefault(tool_use_id, []).append((event, message))

    def take_message(self, event: Json) -> Json:
        """Give a message to the scripted agent, or keep it until the turn that is under way has ended."""
        if self._turn is None:
            stored = self.emit(event)
            self._start_turn(stored)
        else:
            stored = self.log.append(event, processed=False)
            self._waiting.append(stored["id"])
        return stored

    def open(self, thread: Thread, wanted: Sequence[ToolCall]) -> list[Call]:
        """Emit the calls of one turn of a thread; what the platform denies is closed at once."""
        calls = [self._open(thread, tool) for tool in wanted]
        for call in calls:
            if call.permission == "deny":
                self.close(call, DENIED.format(tool=call.name), by="denied")
        self.settle([thread])
        if self.environment.plane.requeue_on_call:
            self.queue_work()
        return calls

    def server_call(self, tool: ToolCall, result: str) -> Reply:
        """Emit a call of a tool that runs on the platform, and its result."""
        call = self._open(self.primary, tool)
        self.close(call, result, by="server", is_error=False)
        assert call.reply is not None
        return call.reply

    def close(
        self, call: Call, text: str, *, by: Literal["denied", "interrupted", "server"], is_error: bool = True
    ) -> None:
        """End a call from the platform's side, with an ``agent.tool_result`` (or what the plane is set to)."""
        kind: str | None = self.environment.plane.closing_event if by == "interrupted" else "agent.tool_result"
        if kind is not None:
            key = "tool_use_id"
            if kind == "user.tool_result" and call.custom:
                kind, key = "user.custom_tool_result", "custom_tool_use_id"
            self.emit({"type": kind, key: call.id, "content": [text_block(text)], "is_error": is_error})
        self._close(call, text, by=by, is_error=is_error)

    def accept(self, call: Call, event: Json) -> Json:
        """Take a client's result."""
        thread = {} if call.thread.primary else {"session_thread_id": call.thread.id}
        stored = self._accepted[call.id] = self.emit({**event, **thread})
        content = list(event.get("content") or [])
        reply = Reply(tool_use_id=call.id, content=content, is_error=bool(event.get("is_error")), by="worker")
        self._finish(call, reply)
        return stored

    def settle(self, threads: Sequence[Thread]) -> None:
        """Set threads running or idle by whether they have open calls, and say so."""
        waiting = []
        for thread in dict.fromkeys(threads):
            if thread.status == "terminated":
                continue
            if thread.open:
                waiting.append(thread)
            else:
                self.set_running(thread)
        for thread in waiting:
            self.set_idle(thread)

    def set_running(self, thread: Thread) -> None:
        """A thread runs."""
        if thread.status == "running":
            return
        thread.status = "running"
        if self.status != "running":
            self.status = "running"
            self.emit({"type": "session.status_running"})
        self.emit({"type": "session.thread_status_running", **self._naming(thread)})

    def set_idle(self, thread: Thread, stop_reason: str = "end_turn") -> None:
        """A thread waits for its calls or, with none open, has ended its turn; the last one idles the session."""
        thread.status = "idle"
        self.emit(
            {
                "type": "session.thread_status_idle",
                **self._naming(thread),
                "stop_reason": _stop_reason(thread.open, stop_reason),
            }
        )
        if all(other.status != "running" for other in self.threads.values()):
            self.status = "idle"
            self.emit({"type": "session.status_idle", "stop_reason": _stop_reason(self.open_calls, stop_reason)})

    def add_thread(self, agent_name: str) -> Thread:
        """Create a child thread, running."""
        thread = Thread(id=new_id("sthr"), agent_name=agent_name, primary=False)
        self.threads[thread.id] = thread
        self.emit({"type": "session.thread_created", **self._naming(thread), "workflow_run_id": None})
        self.set_running(thread)
        return thread

    def end_thread(self, thread: Thread) -> None:
        """Terminate a child thread: its calls take no result any more."""
        thread.status = "terminated"
        for call in list(thread.open):
            self._close(call, TERMINATED, by="terminated")
        self.emit({"type": "session.thread_status_terminated", **self._naming(thread)})

    def interrupt_turn(self, thread: Thread | None) -> None:
        """Close the pending calls of a thread, or of all, and end what the agent is doing.

        The agent on a child thread gets the closed calls as replies, and goes on. Naming the primary thread interrupts
        its children too, for they live in its turn.
        """
        whole = thread is None or thread.primary
        if whole:
            # First, so that the agent does not go on with the replies that the next lines give it.
            self._cancel_turn()
        threads = [*self.threads.values()] if thread is None or whole else [thread]
        for each in threads:
            for call in list(each.open):
                self.close(call, INTERRUPTED, by="interrupted")
        active = [each for each in threads if each.status != "terminated"]
        # The session is idle only once: after its last thread.
        for each in active:
            each.status = "running"
        for each in active:
            self.set_idle(each)

    def update(
        self,
        *,
        tools: Sequence[Json] | None = None,
        metadata: Mapping[str, str | None] | None = None,
        title: str | None = None,
    ) -> None:
        """Change the session, which emits ``session.updated`` with what changed.

        Raises:
            ApiError: 400, if it is terminated, or if tools are given while it runs.
        """
        if self.status == "terminated":
            raise ApiError(400, f"session {self.id} is terminated")
        if tools is not None and self.status != "idle":
            raise ApiError(400, "agent: can only be updated while the session is idle")
        event: Json = {"type": "session.updated"}
        if tools is not None:
            self.agent = event["agent"] = {**self.agent, "tools": list(tools)}
        if metadata is not None:
            merged = {key: value for key, value in {**self.metadata, **metadata}.items() if value is not None}
            check_metadata(merged)
            self.metadata = merged
            if merged:
                event["metadata"] = merged
        if title is not None:
            self.title = event["title"] = title
        self.emit(event)

    def terminate(self, *, archive: bool = False) -> None:
        """End the session: its open calls can never be answered. Archiving one does that too."""
        if archive:
            self.archived_at = self.archived_at or self.environment.plane.clock.stamp()
        if self.status == "terminated":
            return
        self._cancel_turn()
        for call in self.open_calls:
            self._close(call, TERMINATED, by="terminated")
        self.status = "terminated"
        self.emit({"type": "session.status_terminated"})

    def delete(self) -> None:
        """Delete the session: streams get ``session.deleted`` and end, and every later request for it is a 404."""
        self._cancel_turn()
        self.deleted = True
        self.emit({"type": "session.deleted"})
        self.log.close_streams()

    def emit(self, event: Mapping[str, object]) -> Json:
        """Put any event into the log and on the streams: an id and a time are added. For what no brain says."""
        stored = self.log.append(event)
        self.updated_at = stored["processed_at"]
        return stored

    @abstractmethod
    async def _think(self, message: Json) -> str | None:
        """Let the scripted agent have its turn; returns the stop reason."""

    def _start_turn(self, message: Json) -> None:
        self._turn = anyio.CancelScope()
        self.set_running(self.primary)
        self.environment.plane.start(self._take_turn, self._turn, message)

    async def _take_turn(self, turn: anyio.CancelScope, message: Json) -> None:
        stop_reason = None
        try:
            with turn:
                stop_reason = await self._think(message)
        except Exception as error:  # noqa: BLE001 - kept, and raised to whoever waits, or by the plane at its end
            self.failure = error
            self.environment.plane.failed(error)
            self.emit({"type": "session.error", "error": _unknown_error(str(error))})
            self.terminate()
            return
        if turn.cancel_called:
            return
        for thread in self.threads.values():
            if not thread.primary and thread.status == "running":
                self.set_idle(thread)
        if self._waiting:
            self._start_turn(self.log.process(self._waiting.popleft()))
        else:
            self._turn = None
            self.set_idle(self.primary, stop_reason or "end_turn")

    def _cancel_turn(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None

    def _open(self, thread: Thread, tool: ToolCall) -> Call:
        event: Json = {"id": new_id("sevt"), "type": "agent.custom_tool_use" if tool.custom else "agent.tool_use"}
        event |= {"name": tool.name, "input": None if tool.input is None else dict(tool.input)}
        if not tool.custom:
            event["evaluated_permission"] = tool.permission
            evaluation = {"allow": "always_allow", "ask": "always_ask"}.get(tool.permission)
            event |= {} if evaluation is None else {"evaluation": {"type": evaluation}}
        if not thread.primary:
            event["session_thread_id"] = thread.id
        call = Call(event=self.emit(event), thread=thread)
        self._calls[call.id] = call
        thread.open.append(call)
        return call

    def _close(
        self,
        call: Call,
        text: str,
        *,
        by: Literal["denied", "interrupted", "terminated", "server"],
        is_error: bool = True,
    ) -> None:
        self._finish(call, Reply(tool_use_id=call.id, content=[text_block(text)], is_error=is_error, by=by))

    def _finish(self, call: Call, reply: Reply) -> None:
        call.reply = reply
        call.thread.open.remove(call)
        call.done.set()
        self.log.wake()

    def _naming(self, thread: Thread) -> Json:
        return {"session_thread_id": thread.id, "agent_name": thread.agent_name}


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Refuse metadata beyond the API's bounds: 16 pairs, keys of 64 and values of 512 characters.

    Raises:
        ApiError: 400.
    """
    if len(metadata) > 16:
        raise ApiError(400, "metadata: at most 16 pairs")
    for key, value in metadata.items():
        if not isinstance(value, str) or len(key) > 64 or len(value) > 512:
            raise ApiError(400, f"metadata.{key}: keys have at most 64 characters, values are strings of at most 512")


def _stop_reason(waiting: Sequence[Call], otherwise: str) -> Json:
    if waiting:
        return {"type": "requires_action", "event_ids": [call.id for call in waiting]}
    return {"type": otherwise}


def _unknown_error(message: str) -> Json:
    return {"type": "unknown_error", "message": message, "retry_status": {"type": "terminal"}}
