"""One claimed session, from the first heartbeat to the stop."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import anyio
from anthropic import APIError, APIStatusError

from mabridge.calls import Calls
from mabridge.control_plane.lease import Lease, LeaseEnd
from mabridge.control_plane.ledger import Finish, Ledger
from mabridge.control_plane.queue import ClaimedWork, is_transient
from mabridge.control_plane.stream import SessionUnreachable, fetch_session, follow
from mabridge.errors import LeaseLost, first_error
from mabridge.observe import Event, EventName, Observers
from mabridge.resources.skills import install_skills
from mabridge.routing import Route, SessionFacts, route
from mabridge.sandbox import Sandbox
from mabridge.sandboxes import Sandboxes
from mabridge.tools import SandboxTools, ToolLimits
from mabridge.workplace import Workplace

if TYPE_CHECKING:
    from anthropic.types.beta import BetaManagedAgentsSession

__all__ = ["SessionRun", "SessionSettings"]

_log = logging.getLogger(__name__)

_NO_MEMORY = (
    "This session has memory stores attached, and the worker that runs its tools (mabridge) cannot mount them yet, so "
    "it runs none of them. Tell the user that the session has to be created without memory stores."
)
_GAVE_UP = "The worker that runs the tools of this session failed ({}). It is not known how far this call got."
# For the calls of a session that is stopped: they are interrupted, and their results sent.
_STOP_DEADLINE = 10.0


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """What all sessions of a worker have in common.

    Attributes:
        routes: which providers may serve a session.
        max_idle: seconds that a session is kept after its agent has ended its turn; ``None`` is for ever.
        limits: of the tools.
    """

    routes: Sequence[Route]
    max_idle: float | None = 60.0
    limits: ToolLimits = field(default_factory=ToolLimits)


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """How serving ended: `stop` the item, or let its lease lapse so that it is offered again."""

    reason: str
    stop: bool = True
    for_good: bool = False


class SessionRun:
    """Serves one work item.

    Cancelling `run` is what a crash would be: nothing is stopped or torn down, the lease lapses, and another worker
    goes on where this one was.
    """

    def __init__(
        self, work: ClaimedWork, *, sandboxes: Sandboxes, settings: SessionSettings, observers: Observers
    ) -> None:
        self.work = work
        self.lease = Lease(work)
        self._sandboxes = sandboxes
        self._settings = settings
        self._observers = observers
        self._event = partial(Event, session_id=work.session_id, work_id=work.work_id)
        self._ledger = Ledger(
            owns=lambda name, custom: not custom and name in SandboxTools.NAMES,
            read_only=SandboxTools.READ_ONLY,
            max_idle=settings.max_idle,
        )
        self._woken = anyio.Event()
        self._workplace: Workplace | None = None
        self._calls: Calls | None = None

    async def run(self) -> None:
        """Serve the item until its session is done with, or its lease has ended. Raises nothing of its own."""
        try:
            await self.work.acknowledge()
            await self.lease.claim()
        except (APIError, LeaseLost) as error:
            self._observers.emit(self._event(name="session.lost", reason=str(error)))
            if isinstance(error, APIStatusError) and not is_transient(error):
                # Nobody can take it, and left alone it would be offered for ever.
                await self.work.stop()
            return
        self._observers.emit(self._event(name="session.claimed"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.lease.keep)
            outcome = await self._serve_while_leased()
            if not self._lost():
                await self._put_away(outcome)
                if outcome.stop:
                    await self.work.stop()
            self.lease.finish(LeaseEnd.DONE)
        if self._lost():
            self._observers.emit(self._event(name="session.lost", reason=outcome.reason))
        else:
            self._observers.emit(self._event(name="session.released", reason=outcome.reason))

    def wake(self) -> None:
        """Look at the ledger again."""
        self._woken.set()

    def history_begins(self) -> None:
        """See `stream.Sink`."""
        self._ledger.history_begins()

    def history_ends(self) -> None:
        """See `stream.Sink`."""
        self._ledger.history_ends()
        self.wake()

    def receive(self, event: object) -> None:
        """See `stream.Sink`."""
        self._ledger.receive(event, anyio.current_time())
        self.wake()

    def _lost(self) -> bool:
        return self.lease.end is not None and self.lease.end.lost

    async def _serve_while_leased(self) -> _Outcome:
        outcome: _Outcome | None = None
        async with anyio.create_task_group() as tasks:

            async def end_with_lease() -> None:
                await self.lease.ended.wait()
                if self.lease.end is LeaseEnd.STOP_REQUESTED and self._calls is not None:
                    with anyio.move_on_after(_STOP_DEADLINE):
                        await self._calls.interrupt_all()
                tasks.cancel_scope.cancel()

            tasks.start_soon(end_with_lease)
            outcome = await self._serve()
            tasks.cancel_scope.cancel()
        if outcome is None:
            outcome = _Outcome(reason=self.lease.end.value if self.lease.end else "the lease ended")
        return outcome

    async def _serve(self) -> _Outcome:
        """Serve the session to its end, and answer what is open should anything fail."""
        try:
            session = await fetch_session(self.work)
            if session.status == "terminated":
                # It takes no results any more.
                return _Outcome(reason="the session was terminated", for_good=True)
            async with anyio.create_task_group() as tasks:
                self._calls = self._open_calls(session, tasks)
                tasks.start_soon(follow, self.work, self)
                finish = await self._act_until_finished(self._calls)
                tasks.cancel_scope.cancel()
            return _Outcome(reason=finish.reason, for_good=finish.reason != "idle")
        except Exception as caught:  # noqa: BLE001 - no failure may leave a session silent
            error = first_error(caught) if isinstance(caught, ExceptionGroup) else caught
        return await self._give_up(error)

    def _open_calls(self, session: BetaManagedAgentsSession, tasks: anyio.abc.TaskGroup) -> Calls:
        facts = SessionFacts(
            session_id=session.id,
            metadata=session.metadata or {},
            agent_id=session.agent.id,
            agent_name=session.agent.name,
        )
        decision = route(facts, self._settings.routes)
        refusal = None
        if any(resource.type == "memory_store" for resource in session.resources or ()):
            refusal = _NO_MEMORY
        elif not decision.providers:
            refusal = f"The worker that runs the tools of this session has no sandbox for it. {decision.explain()}"
        if refusal is not None:
            self._observers.emit(self._event(name="session.refused", reason=refusal))
        else:
            self._observers.emit(self._event(name="session.routed", reason=decision.explain().splitlines()[0]))
            self._workplace = Workplace(
                self._sandboxes,
                session_id=session.id,
                providers=decision.providers,
                furnish=partial(self._furnish, session),
                limits=self._settings.limits,
            )
            tasks.start_soon(self._workplace.run)
            # The agent thinks before it acts: its sandbox is made meanwhile.
            self._workplace.want()
        return Calls(
            self.work,
            self.lease,
            self._ledger,
            tasks,
            workplace=self._workplace,
            refusal=refusal,
            observers=self._observers,
            wake=self.wake,
        )

    async def _furnish(self, session: BetaManagedAgentsSession, sandbox: Sandbox) -> None:
        for skill in await install_skills(self.work.environment_client, session.agent, sandbox):
            name: EventName = "skill.failed" if skill.error else "skill.installed"
            self._observers.emit(self._event(name=name, sandbox_id=sandbox.id, reason=skill.error or skill.name))

    async def _act_until_finished(self, calls: Calls) -> Finish:
        while True:
            self._woken = anyio.Event()
            for action in self._ledger.actions():
                if isinstance(action, Finish):
                    return action
                calls.act(action)
            deadline = self._ledger.deadline()
            with anyio.CancelScope(deadline=float("inf") if deadline is None else deadline):
                await self._woken.wait()
            self._ledger.tick(anyio.current_time())

    async def _give_up(self, error: Exception) -> _Outcome:
        if isinstance(error, LeaseLost):
            return _Outcome(reason=str(error))
        self._observers.emit(self._event(name="session.failed", reason=str(error) or type(error).__name__))
        if isinstance(error, SessionUnreachable):
            return _Outcome(reason=str(error))
        if isinstance(error, APIError):
            return _Outcome(reason=f"the platform failed: {error.message}", stop=False)
        _log.error("session %s failed", self.work.session_id, exc_info=error)
        if self._calls is not None:
            with anyio.move_on_after(_STOP_DEADLINE):
                await self._calls.answer_all(_GAVE_UP.format(type(error).__name__))
        return _Outcome(reason=f"{type(error).__name__}: {error}")

    async def _put_away(self, outcome: _Outcome) -> None:
        held = self._workplace.held if self._workplace is not None else None
        if held is not None:
            await self._sandboxes.put_away(self.work.session_id, held, for_good=outcome.for_good)
