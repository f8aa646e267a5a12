"""The calls of one session: run as the ledger says, and their results sent until the platform has them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
from anyio.abc import TaskGroup

from mabridge.control_plane.lease import Lease
from mabridge.control_plane.ledger import Action, Answer, Cancel, Hold, Ledger, Run, Skip, ToolCall
from mabridge.control_plane.queue import ClaimedWork
from mabridge.control_plane.stream import send_result
from mabridge.errors import MabridgeError, SandboxError, SandboxGone
from mabridge.observe import Event, EventName, Observers
from mabridge.telemetry import call_span, fail
from mabridge.tools import SandboxTools, ToolResult
from mabridge.workplace import Workplace

__all__ = ["Calls"]

_log = logging.getLogger(__name__)

# The platform's own words for a call that an interrupt closed.
_INTERRUPTED = "Tool execution was interrupted before completion. Please retry."
_FRESH = "[The sandbox of this session was lost. This is a new one with a fresh file system: earlier files are gone.]"
_GONE = (
    "The sandbox was lost while this ran, so it is not known how far it got. The next call gets a new sandbox with a "
    "fresh file system: earlier files are gone."
)
_UNCERTAIN = (
    "The sandbox could not be reached, so it is not known whether this was done. Read the file before you edit."
)
# How long a sandbox that cannot be reached is tried again before the call is answered with an error.
_UNREACHABLE_DEADLINE = 60.0
_UNREACHABLE_PAUSE = 1.0
_CALLS_AT_ONCE = 64


@dataclass
class _Running:
    """A call under way: `waiting` is cancelled to end its wait for a sandbox; `tools` has it from then on."""

    waiting: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    tools: SandboxTools | None = None
    interrupted: bool = False


class Calls:
    """Runs a session's calls.

    Args:
        work: the session's item.
        lease: of that item; no result is sent without it.
        ledger: told of what becomes of each call.
        tasks: owns the calls.
        workplace: where they are run; ``None`` if they are all refused.
        refusal: why they are refused, for the model to read.
        observers: told of what happens.
        wake: called when the ledger may have something new to be done.
    """

    def __init__(
        self,
        work: ClaimedWork,
        lease: Lease,
        ledger: Ledger,
        tasks: TaskGroup,
        *,
        workplace: Workplace | None,
        refusal: str | None,
        observers: Observers,
        wake: Callable[[], None],
    ) -> None:
        self._work = work
        self._lease = lease
        self._ledger = ledger
        self._tasks = tasks
        self._workplace = workplace
        self._refusal = refusal
        self._observers = observers
        self._wake = wake
        self._running: dict[str, _Running] = {}
        self._one_ended = anyio.Event()
        self._slots = anyio.CapacityLimiter(_CALLS_AT_ONCE)

    def act(self, action: Action) -> None:
        """Do what the ledger wants done about a call."""
        match action:
            case Run(call):
                self._running[call.id] = _Running()
                self._tasks.start_soon(self._run, call)
            case Answer(call):
                self._tasks.start_soon(self._send, call, _error(_INTERRUPTED))
            case Cancel(call, reason):
                self._emit("call.cancelled", call, reason=reason)
                self._tasks.start_soon(self.interrupt, call.id)
            case Hold(call):
                self._emit("call.held", call, reason="it waits for permission")
            case Skip(call, reason):
                self._emit("call.skipped", call, reason=reason)

    async def interrupt(self, call_id: str) -> None:
        """Stop a running call. It ends soon after, with what it has put out so far."""
        running = self._running.get(call_id)
        if running is None:
            return
        running.interrupted = True
        running.waiting.cancel()
        if running.tools is not None:
            try:
                await running.tools.interrupt(call_id)
            except SandboxError as error:
                _log.warning("call %s could not be interrupted: %s", call_id, error)

    async def interrupt_all(self) -> None:
        """Stop whatever runs, and wait until the results are sent."""
        async with anyio.create_task_group() as tasks:
            for call_id in tuple(self._running):
                tasks.start_soon(self.interrupt, call_id)
        while self._running:
            self._one_ended = anyio.Event()
            await self._one_ended.wait()

    async def answer_all(self, text: str) -> None:
        """Answer every call that nobody has answered with an error."""
        async with anyio.create_task_group() as tasks:
            for call in tuple(self._ledger.open_calls()):
                tasks.start_soon(self._send, call, _error(text))

    async def _run(self, call: ToolCall) -> None:
        with call_span(
            tool=call.name,
            call_id=call.id,
            session_id=self._work.session_id,
            work_id=self._work.work_id,
            thread=call.thread,
        ) as span:
            if await self._run_and_send(call):
                fail(span, "tool_error")

    async def _run_and_send(self, call: ToolCall) -> bool:
        """Return whether the result is an error."""
        started = anyio.current_time()
        running = self._running[call.id]
        self._emit("call.started", call, input=call.input)
        async with self._slots:
            result = await self._result(call, running)
        self._ledger.finished(call.id)
        self._wake()
        self._emit("call.ended", call, is_error=result.is_error, seconds=anyio.current_time() - started)
        if self._ledger.is_open(call.id):
            await self._send(call, result)
        await self._accepted(call, running)
        del self._running[call.id]
        self._one_ended.set()
        return result.is_error

    async def _result(self, call: ToolCall, running: _Running) -> ToolResult:
        """Run the call, whatever comes of it: a failure of the sandbox, or of ours, is an answer too."""
        if self._workplace is None:
            return _error(self._refusal or "The tools of this session are not run.")
        try:
            return await self._run_in_sandbox(self._workplace, call, running)
        except MabridgeError as error:
            return _error(f"The sandbox failed: {error}")
        except Exception as error:  # noqa: BLE001 - no failure may leave a call unanswered
            _log.exception("call %s of %s failed in mabridge itself", call.id, call.name)
            return _error(f"The worker failed on this call ({type(error).__name__}). It is not known how far it got.")

    async def _run_in_sandbox(self, workplace: Workplace, call: ToolCall, running: _Running) -> ToolResult:
        give_up_at = anyio.current_time() + _UNREACHABLE_DEADLINE
        while True:
            with running.waiting:
                running.tools = await workplace.tools()
            if running.tools is None or running.interrupted:
                return _error(_INTERRUPTED)
            # Taken before the call, which may be the one that tells of it, and given back if it does not get to.
            fresh, workplace.fresh_untold = workplace.fresh_untold, False
            try:
                result = await running.tools.call(call.name, call.input, call_id=call.id, thread=call.thread)
            except SandboxGone:
                workplace.lost(running.tools)
                self._emit("sandbox.gone", call)
                running.waiting, running.tools = anyio.CancelScope(), None
                if call.name == "bash":
                    # It may have had effects that outlive the sandbox, so it is not run a second time.
                    return _error(_GONE)
            except SandboxError as error:
                workplace.fresh_untold = workplace.fresh_untold or fresh
                if not error.retryable or anyio.current_time() > give_up_at:
                    raise
                if call.name == "edit":
                    return _error(_UNCERTAIN)
                # Asking again is safe: bash runs once for each call id, and the others come to the same.
                running.waiting = anyio.CancelScope()
                await anyio.sleep(_UNREACHABLE_PAUSE)
            else:
                news = fresh and (workplace.replaced or self._ledger.resumed)
                return _prefixed(_FRESH, result) if news else result

    async def _send(self, call: ToolCall, result: ToolResult) -> None:
        """Send a result until it is accepted, or until it is plain that it never will be."""
        still_wanted = self._wanted(call)
        refused = await send_result(self._work, self._lease, _wire(call, result), still_wanted)
        if refused is not None and still_wanted():
            # Perhaps it was this result that was not wanted, for its size or its form, and not any: an open call
            # that is never answered holds the session up for good.
            fallback = _error(f"The platform did not take the result of this call ({refused}).")
            refused = await send_result(self._work, self._lease, _wire(call, fallback), still_wanted)
        self._emit("call.answered" if refused is None else "call.refused", call, reason=refused)
        self._ledger.settled(call.id, anyio.current_time())
        self._wake()

    async def _accepted(self, call: ToolCall, running: _Running) -> None:
        if running.tools is None:
            return
        try:
            await running.tools.accepted(call.id)
        except SandboxError as error:
            _log.info("the journal entry of call %s was not dropped: %s", call.id, error)

    def _wanted(self, call: ToolCall) -> Callable[[], bool]:
        return lambda: self._ledger.is_open(call.id)

    def _emit(
        self,
        name: EventName,
        call: ToolCall,
        *,
        reason: str | None = None,
        is_error: bool | None = None,
        seconds: float | None = None,
        input: Mapping[str, object] | None = None,  # noqa: A002 - it is what the platform calls it
    ) -> None:
        held = self._workplace.held if self._workplace is not None else None
        self._observers.emit(
            Event(
                name=name,
                session_id=self._work.session_id,
                work_id=self._work.work_id,
                provider=held.by.name if held else None,
                sandbox_id=held.sandbox.id if held else None,
                call_id=call.id,
                tool=call.name,
                reason=reason,
                is_error=is_error,
                seconds=seconds,
                input=input,
            )
        )


def _error(text: str) -> ToolResult:
    return ToolResult(content=[{"type": "text", "text": text}], is_error=True)


def _prefixed(line: str, result: ToolResult) -> ToolResult:
    return ToolResult(content=[{"type": "text", "text": line}, *result.content], is_error=result.is_error)


def _wire(call: ToolCall, result: ToolResult) -> dict[str, Any]:
    kind, id_field = (
        ("user.custom_tool_result", "custom_tool_use_id") if call.custom else ("user.tool_result", "tool_use_id")
    )
    return {"type": kind, id_field: call.id, "content": result.content, "is_error": result.is_error}
