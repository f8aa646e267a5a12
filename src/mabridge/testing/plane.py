"""A local Managed Agents platform: environments, sessions and scripted agents, over HTTP on loopback."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import anyio
import anyio.abc

from mabridge.testing.brain import Brain
from mabridge.testing.credentials import Credentials
from mabridge.testing.faults import Faults, RequestRecord
from mabridge.testing.gate import Gate
from mabridge.testing.http import make_app
from mabridge.testing.queue import LeaseFrom, WorkItem, WorkQueue
from mabridge.testing.resources import MemoryStore, Skill
from mabridge.testing.server import Server
from mabridge.testing.session import BrainFailed, Session
from mabridge.testing.state import check_metadata
from mabridge.testing.wire import Clock, Json, new_id

__all__ = ["ControlPlane", "Environment"]

ClosingEvent: TypeAlias = Literal["agent.tool_result", "user.tool_result"] | None
Vanished: TypeAlias = Literal["poll_404", "offered"]

_LOOK_EVERY = 0.02
_TOOLSET: Json = {
    "type": "agent_toolset_20260401",
    "default_config": {"enabled": True, "permission_policy": {"type": "always_allow"}},
    "configs": [],
}


class ControlPlane:
    """A local Managed Agents platform; an async context manager that serves while it is open.

    It lives in the event loop that opens it (asyncio's, for uvicorn needs that), installs no signal handlers, and is no
    kinder than the real service: where the documentation leaves a question open, it takes the reading that is harder on
    a worker.

    Args:
        lease_ttl: seconds that a heartbeat keeps a work item's lease; at least 1.
        grants_ttl: whether a heartbeat gets the ``desired_ttl_seconds`` that it asks for; it is not known whether the
            real platform cares.
        lease_from: from when a lease can lapse: the first ``heartbeat``, so that an item which was only acknowledged is
            stuck, or the ``ack``.
        closing_event: the type of the event with which an interrupt closes pending calls, or ``None`` for no event.
        vanished: what a poll does with the item of a deleted session: answer 404 once (``poll_404``), or offer it.
        requeue_on_call: whether a session whose item was stopped is queued again when its agent calls a tool. New
            messages and interrupts always do that.
        token_ttl: seconds that the token in a work item's secret is good for; ``None`` for ever.
        default_brain: the agent of sessions that are created over HTTP.
        port: TCP port on 127.0.0.1; 0 for any that is free.

    Attributes:
        url: the base URL.
        api_key: an organization's API key, for what an application or an operator does.
        environments: by id.
        sessions: by id, the deleted ones too.
        faults: what goes wrong on demand.
        requests: the last requests, oldest first.
        clock: the platform's clock.
    """

    def __init__(
        self,
        *,
        lease_ttl: float = 300.0,
        grants_ttl: bool = False,
        lease_from: LeaseFrom = "heartbeat",
        closing_event: ClosingEvent = "agent.tool_result",
        vanished: Vanished = "poll_404",
        requeue_on_call: bool = False,
        token_ttl: float | None = None,
        default_brain: Brain | None = None,
        port: int = 0,
    ) -> None:
        if lease_ttl < 1:
            raise ValueError("lease_ttl must be at least 1 second: the API tells it in whole seconds")
        self.clock = Clock()
        self.lease_ttl = lease_ttl
        self.grants_ttl = grants_ttl
        self.lease_from: LeaseFrom = lease_from
        self.closing_event: ClosingEvent = closing_event
        self.vanished: Vanished = vanished
        self.requeue_on_call = requeue_on_call
        self.default_brain = default_brain
        self.credentials = Credentials(self.clock, token_ttl=token_ttl)
        self.api_key = self.credentials.new_api_key()
        self.faults = Faults()
        self.requests: deque[RequestRecord] = deque(maxlen=10_000)
        self.environments: dict[str, Environment] = {}
        self.sessions: dict[str, Session] = {}
        self.skills: dict[str, Skill] = {}
        self.memory_stores: dict[str, MemoryStore] = {}
        self.url = ""
        self._port = port
        self._failures: list[BaseException] = []
        self._requested = anyio.Event()

    async def __aenter__(self) -> Self:
        """Start serving."""
        self.closing = anyio.Event()
        self.server = Server(Gate(make_app(self), self), port=self._port)
        async with AsyncExitStack() as stack:
            self._tasks = await stack.enter_async_context(anyio.create_task_group())
            self.url = await self._tasks.start(self._serve)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop serving and end all agents.

        Raises:
            BrainFailed: an agent raised, and nobody who waited for its session was told.
        """
        self.closing.set()
        for session in self.sessions.values():
            session.log.close_streams()
        with anyio.CancelScope(shield=True):
            await self.server.stop()
        self._tasks.cancel_scope.cancel()
        # Without the error, which would come out wrapped in a group; it goes on from here as it is.
        await self._stack.aclose()
        if exc is None and self._failures:
            raise BrainFailed("a scripted agent raised") from self._failures[0]

    def create_environment(self) -> Environment:
        """Create a self-hosted environment with a key."""
        environment = Environment(self)
        self.environments[environment.id] = environment
        return environment

    def create_skill(self, name: str, files: Mapping[str, str | bytes], *, description: str = "A skill.") -> Skill:
        """Upload a custom skill of these files (path below the skill's directory, and content)."""
        skill = Skill.from_files(name, files, clock=self.clock, description=description)
        self.skills[skill.id] = skill
        return skill

    def create_memory_store(self, name: str, files: Mapping[str, str], *, access: str = "read_write") -> MemoryStore:
        """Create a memory store with these memories (path that begins with a slash, and text)."""
        store = MemoryStore(name=name, files=dict(files), access=access, created_at=self.clock.stamp())
        self.memory_stores[store.id] = store
        return store

    def drop_streams(self, *, cut: bool = True) -> int:
        """Break all open event streams, or end them in good order; return how many there were."""
        return sum(session.log.close_streams(cut=cut) for session in self.sessions.values())

    async def wait_until(self, condition: Callable[[], bool], *, timeout: float = 30.0) -> None:
        """Wait until `condition` holds; it is asked after every request, and every 20 ms.

        Raises:
            TimeoutError: it did not hold within `timeout` seconds.
        """
        with anyio.fail_after(timeout):
            while not condition():
                requested = self._requested
                with anyio.move_on_after(_LOOK_EVERY):
                    await requested.wait()

    def record(self, request: RequestRecord) -> None:
        """Note a request."""
        self.requests.append(request)
        self._requested.set()
        self._requested = anyio.Event()

    def start(self, function: Callable[..., Coroutine[Any, Any, None]], *args: object) -> None:
        """Run an agent's turn in the platform's task group."""
        self._tasks.start_soon(function, *args)

    def failed(self, failure: BaseException) -> None:
        """Note that an agent raised."""
        self._failures.append(failure)

    def reported(self, failure: BaseException) -> None:
        """Note that somebody was told that an agent raised."""
        if failure in self._failures:
            self._failures.remove(failure)

    async def _serve(self, *, task_status: anyio.abc.TaskStatus[str]) -> None:
        await self.server.serve(task_status=task_status)


class Environment:
    """A self-hosted environment. Made by `ControlPlane.create_environment`.

    Attributes:
        id: ``env_...``.
        key: the environment key, a bearer token.
        queue: its work queue.
        plane: its platform.
    """

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self.id = new_id("env")
        self.key = plane.credentials.new_environment_key(self.id)
        self.queue = WorkQueue(
            self.id,
            clock=plane.clock,
            lease_ttl=plane.lease_ttl,
            lease_from=plane.lease_from,
            is_gone=self._is_gone,
        )

    def create_session(
        self,
        brain: Brain,
        *,
        message: str | None = None,
        metadata: Mapping[str, str] | None = None,
        title: str | None = None,
        agent_name: str = "agent",
        agent_id: str | None = None,
        tools: Sequence[Json] | None = None,
        skills: Sequence[Skill] = (),
        memory_stores: Sequence[MemoryStore] = (),
        secret: bool = True,
    ) -> Session:
        """Create a session, which queues its work item.

        Args:
            brain: the scripted agent.
            message: a first user message, if there is to be one.
            metadata: at most 16 pairs.
            title: the session's title.
            agent_name: name of the agent.
            agent_id: id of the agent; a new one by default.
            tools: the agent's tools; the whole agent toolset, always allowed, by default.
            skills: the agent's skills.
            memory_stores: attached as resources.
            secret: whether polls hand out a token for this session alone.

        Raises:
            ApiError: as the API would answer.
        """
        check_metadata(metadata or {})
        agent: Json = {
            "id": agent_id or new_id("agent"),
            "type": "agent",
            "version": 1,
            "name": agent_name,
            "description": None,
            "system": None,
            "model": {"id": "claude-scripted", "speed": "standard"},
            "mcp_servers": [],
            "multiagent": None,
            "execution_identity": {"type": "service_account"},
            "skills": [skill.reference() for skill in skills],
            "tools": [_TOOLSET] if tools is None else list(tools),
        }
        session = Session(
            self,
            brain,
            agent=agent,
            metadata=metadata or {},
            resources=[store.resource() for store in memory_stores],
            title=title,
            secret=secret,
        )
        self.plane.sessions[session.id] = session
        if message is not None:
            session.send_message(message)
        return session

    def add_healthcheck(self) -> WorkItem:
        """Queue a healthcheck, an item that is no session's and that the API's types do not describe."""
        return self.queue.add(new_id("work"), {"type": "healthcheck"}, has_secret=False)

    def revoke_key(self) -> None:
        """Revoke the environment key: the worker's next call with it is a 401."""
        self.plane.credentials.revoke(self.key)

    def _is_gone(self, item: WorkItem) -> bool:
        session = self.plane.sessions.get(str(item.data.get("id")))
        return self.plane.vanished == "poll_404" and session is not None and session.deleted
