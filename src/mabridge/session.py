"""One claimed session, from the first heartbeat to the stop."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import anyio
from anthropic import APIError, APIStatusError
from anyio.abc import TaskGroup
from opentelemetry import trace

from mabridge.calls import Calls
from mabridge.control_plane.lease import Lease, LeaseEnd
from mabridge.control_plane.ledger import Finish, Ledger
from mabridge.control_plane.queue import ClaimedWork, is_transient
from mabridge.control_plane.stream import SessionUnreachable, answer_open_calls, fetch_session, follow
from mabridge.errors import LeaseLost, first_error
from mabridge.observe import Event, EventName, Observers
from mabridge.plugins import registry
from mabridge.resources.skills import install_skills
from mabridge.routing import Route, SessionFacts
from mabridge.sandbox import Sandbox
from mabridge.sandboxes import Sandboxes
from mabridge.telemetry import fail
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
_STOPPED = "The worker that runs the tools of this session was stopped. It is not known how far this call got."
# For the calls of a session that is stopped: they are interrupted, and their results sent.
_STOP_DEADLINE = 10.0
_ANSWER_DEADLINE = 30.0
_TOLD_TO_STOP = "the worker was told to stop"
# What does not see by itself that the worker has to go is cut off so much later.
_LEAVE_SLACK = 2.0
# How often a session is begun anew after a fault of our own.
_ATTEMPTS = 3
_ATTEMPT_PAUSE = 1.0


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
    """How serving ended: `stop` the item, or let its lease lapse, so that it is offered again."""

    reason: str
    stop: bool = True
    for_good: bool = False


class SessionRun:
    """Serves one work item.

    Cancelling `run` is what a crash would be: nothing is stopped or torn down, the lease lapses, and another worker
    goes on where this one was.

    An item is stopped only when its session has come to rest or has ended, or when an operator asks for it: the
    platform does not offer a stopped item again before the session has something new for it. Whatever else happens,
    its open calls are answered and its lease lapses.
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
        self._begin()
        self._woken = anyio.Event()
        self._leave_by: float | None = None
        self._told_to_leave = anyio.Event()
        self._asked_to_hand_over = False

    def _begin(self) -> None:
        """Forget all that was known of the session."""
        self._ledger = Ledger(owns=_owns, read_only=SandboxTools.READ_ONLY, max_idle=self._settings.max_idle)
        self._history_read = anyio.Event()
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
        started = anyio.current_time()
        self._observers.emit(self._event(name="session.claimed"))
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.lease.keep)
                outcome = await self._serve_while_leased()
                await self._let_go(outcome)
                self.lease.finish(LeaseEnd.DONE)
        finally:
            self._sandboxes.release(self.work.session_id)
        name: EventName = "session.released"
        if self.lease.end is LeaseEnd.HANDED_OVER:
            name = "session.handed_over"
        elif self._lost():
            name = "session.lost"
        self._observers.emit(self._event(name=name, reason=outcome.reason, seconds=anyio.current_time() - started))

    def drain(self, leave_by: float) -> None:
        """Let go of the session soon: when it comes to rest, when others can go on with it, or at last at `leave_by`.

        Args:
            leave_by: on the clock of `anyio.current_time`. What runs then runs on in the sandbox.
        """
        self._leave_by = leave_by
        self._told_to_leave.set()
        self.wake()

    def wake(self) -> None:
        """Look at the ledger again."""
        self._woken.set()

    def history_begins(self) -> None:
        """See `stream.Sink`."""
        self._ledger.history_begins()

    def history_ends(self) -> None:
        """See `stream.Sink`."""
        self._ledger.history_ends()
        self._history_read.set()
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
                if not self._lost() and self._calls is not None:
                    with anyio.move_on_after(_STOP_DEADLINE):
                        await self._calls.interrupt_all()
                tasks.cancel_scope.cancel()

            async def end_with_patience() -> None:
                await self._told_to_leave.wait()
                await anyio.sleep((self._leave_by or 0.0) - anyio.current_time() + _LEAVE_SLACK)
                tasks.cancel_scope.cancel()

            tasks.start_soon(end_with_lease)
            tasks.start_soon(end_with_patience)
            outcome = await self._serve()
            tasks.cancel_scope.cancel()
        end = self.lease.end
        if outcome is None and end is None:
            outcome = _Outcome(reason=_TOLD_TO_STOP, stop=False)
        elif outcome is None:
            assert end is not None
            if not end.lost:
                await self._answer_all(_STOPPED)
            outcome = _Outcome(reason=end.value, stop=end is LeaseEnd.STOP_REQUESTED)
        return outcome

    async def _serve(self) -> _Outcome:
        """Serve the session to its end. After a fault of ours its open calls are answered, and it is begun anew."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await self._serve_once()
            except Exception as caught:  # noqa: BLE001 - no failure may leave a session silent
                error = first_error(caught) if isinstance(caught, ExceptionGroup) else caught
            if isinstance(error, LeaseLost):
                break
            fail(trace.get_current_span(), type(error).__qualname__)
            reason = str(error) or type(error).__name__
            if isinstance(error, SessionUnreachable):
                self._observers.emit(self._event(name="session.failed", reason=reason))
                return _Outcome(reason=reason, stop=error.gone, for_good=error.gone)
            if isinstance(error, APIError):
                self._observers.emit(self._event(name="session.failed", reason=reason))
                return _Outcome(reason=f"the platform failed: {error.message}", stop=False)
            _log.error("session %s failed", self.work.session_id, exc_info=error)
            self._observers.emit(self._event(name="session.failed", reason=f"{type(error).__name__}: {reason}"))
            await self._answer_all(_GAVE_UP.format(type(error).__name__))
            if attempt < _ATTEMPTS:
                await anyio.sleep(attempt * _ATTEMPT_PAUSE)
        else:
            self._observers.emit(self._event(name="session.given_up", reason=f"it failed {_ATTEMPTS} times: {reason}"))
        return _Outcome(reason=str(error), stop=False)

    async def _serve_once(self) -> _Outcome:
        self._begin()
        session = await fetch_session(self.work)
        if session.status == "terminated":
            # It takes no results any more.
            return _Outcome(reason="the session was terminated", for_good=True)
        async with anyio.create_task_group() as tasks:
            self._calls = self._open_calls(session, tasks)
            tasks.start_soon(follow, self.work, self)
            finish = await self._act_until_finished(self._calls)
            tasks.cancel_scope.cancel()
        if finish is None:
            return _Outcome(reason=_TOLD_TO_STOP, stop=False)
        return _Outcome(reason=finish.reason, for_good=finish.reason != "idle")

    def _open_calls(self, session: BetaManagedAgentsSession, tasks: TaskGroup) -> Calls:
        facts = SessionFacts(
            session_id=session.id,
            metadata=session.metadata or {},
            agent_id=session.agent.id,
            agent_name=session.agent.name,
        )
        decision = registry().decide(facts, self._settings.routes)
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
                lived_before=self._lived_before,
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

    async def _lived_before(self) -> bool:
        await self._history_read.wait()
        return self._ledger.resumed

    async def _furnish(self, session: BetaManagedAgentsSession, sandbox: Sandbox) -> None:
        for skill in await install_skills(self.work.environment_client, session.agent, sandbox):
            name: EventName = "skill.failed" if skill.error else "skill.installed"
            self._observers.emit(self._event(name=name, sandbox_id=sandbox.id, reason=skill.error or skill.name))

    async def _act_until_finished(self, calls: Calls) -> Finish | None:
        """Do what the ledger says until it says that the session is done with; ``None`` if we are to leave before."""
        while True:
            self._woken = anyio.Event()
            # A process that was suspended for longer than its lease lasts finds out here, before it begins anything.
            self.lease.check()
            if self.lease.end is not None:
                await anyio.sleep_forever()  # nothing more is begun; we are about to be cancelled
            if self._leave_by is not None:
                self._ledger.hurry()
            for action in self._ledger.actions():
                if isinstance(action, Finish):
                    return action
                calls.act(action)
            if self._leave_by is not None and await self._may_leave(self._leave_by):
                return None
            deadlines = [time for time in (self._ledger.deadline(), self._leave_by) if time is not None]
            with anyio.CancelScope(deadline=min(deadlines, default=float("inf"))):
                await self._woken.wait()
            self._ledger.tick(anyio.current_time())

    async def _may_leave(self, leave_by: float) -> bool:
        """Whether it is time to leave: at once if others can go on at once, else when the time is over."""
        if anyio.current_time() >= leave_by:
            return True
        if self._asked_to_hand_over or not self._history_read.is_set() or self._ledger.at_work():
            return False
        self._asked_to_hand_over = True
        return await self.lease.hand_over(only_if_soon=True)

    async def _answer_all(self, text: str) -> None:
        """Answer every open call of ours with an error, as far as that can be done in time."""
        with anyio.move_on_after(_ANSWER_DEADLINE) as scope:
            try:
                await answer_open_calls(self.work, self.lease, owns=_owns, text=text)
            except (APIError, LeaseLost) as error:
                _log.warning("open calls of session %s were not answered: %s", self.work.session_id, error)
        if scope.cancelled_caught:
            _log.warning("open calls of session %s were not answered in time", self.work.session_id)

    async def _let_go(self, outcome: _Outcome) -> None:
        if not outcome.stop:
            if self._leave_by is not None and self.lease.end is None:
                await self.lease.hand_over(only_if_soon=False)
            return
        held = self._workplace.held if self._workplace is not None else None
        if held is not None and not self._lost():
            await self._sandboxes.put_away(self.work.session_id, held, for_good=outcome.for_good)
        if not self._lost():
            await self.work.stop(still_ours=lambda: not self._lost())


def _owns(name: str, custom: bool) -> bool:
    return not custom and name in SandboxTools.NAMES
