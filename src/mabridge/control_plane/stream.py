"""A session's events, each once, and the way back for results.

The stream gives only what happens after it was opened, so it is opened first and the history is read then; what comes
by both ways is told apart by its id (https://platform.claude.com/docs/en/managed-agents/events-and-streaming).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

import anyio
import httpx2
import stamina
from anthropic import APIError, APIStatusError

from mabridge.control_plane.lease import Lease
from mabridge.control_plane.ledger import RESULT_FIELDS
from mabridge.control_plane.queue import ClaimedWork, is_transient, worth_repeating

if TYPE_CHECKING:
    from anthropic.types.beta import BetaManagedAgentsSession

__all__ = ["SessionUnreachable", "Sink", "answer_open_calls", "fetch_session", "follow", "send_result"]

_log = logging.getLogger(__name__)

_PAGE = 1000
_LIST_DEADLINE = 60.0
_SEND_DEADLINE = 30.0
# The stream's head is sent at once; its silence afterwards says little.
_OPEN_DEADLINE = 15.0
# A connection that died silently is noticed after this long without a byte. Reopening costs two reads of the
# organization's 1,200 a minute.
_STREAM_SILENCE = 300.0
_BACKOFF_START = 0.25
_BACKOFF_CAP = 10.0
# A conflict passes if it comes of a race, and never if the call is closed.
_MOST_CONFLICTS = 4


class SessionUnreachable(Exception):
    """The platform refuses the session's events for good.

    Args:
        message: what it said.
        gone: the session does not exist any more; else the credentials, or this worker, are not good for it.
    """

    def __init__(self, message: str, *, gone: bool) -> None:
        super().__init__(message)
        self.gone = gone


class Sink(Protocol):
    """Where a session's events go."""

    def history_begins(self) -> None:
        """The events that follow are history."""

    def history_ends(self) -> None:
        """The history was read whole; what follows is live."""

    def receive(self, event: object) -> None:
        """Take one event. The same one may come again."""


async def fetch_session(work: ClaimedWork, *, timeout: float = 60.0) -> BetaManagedAgentsSession:
    """Return the session of a work item, as it is now.

    Args:
        work: the claimed item.
        timeout: seconds to keep trying for.

    Raises:
        SessionUnreachable: it is gone, or refused.
        APIError: the platform failed all that time.
    """
    async for attempt in stamina.retry_context(on=worth_repeating, attempts=None, timeout=timeout, wait_max=5.0):
        with attempt:
            try:
                return await work.request(
                    lambda client: client.beta.sessions.retrieve(work.session_id, timeout=timeout / 3)
                )
            except APIStatusError as error:
                if is_transient(error):
                    raise
                raise _unreachable(work, error) from error
    raise AssertionError("stamina returns or raises")


def _unreachable(work: ClaimedWork, error: APIStatusError) -> SessionUnreachable:
    return SessionUnreachable(f"session {work.session_id}: {error.message}", gone=error.status_code in (404, 410))


async def follow(work: ClaimedWork, sink: Sink) -> None:
    """Pass the session's events to `sink`, across broken connections, until cancelled.

    Raises:
        SessionUnreachable: the platform refuses them for good.
    """
    timeout = httpx2.Timeout(_LIST_DEADLINE, read=_STREAM_SILENCE)
    backoff = _BACKOFF_START
    while True:
        try:
            with anyio.fail_after(_OPEN_DEADLINE):
                opened = await work.request(
                    lambda client: client.beta.sessions.events.stream(work.session_id, timeout=timeout)
                )
            async with opened as stream:
                await _read_history(work, sink)
                async for event in stream:
                    backoff = _BACKOFF_START
                    sink.receive(event)
            _log.debug("session %s: the event stream ended; opening it again", work.session_id)
        except APIStatusError as error:
            if not is_transient(error):
                raise _unreachable(work, error) from error
            _log.info("session %s: the event stream failed (%s)", work.session_id, error.status_code)
        except (APIError, httpx2.HTTPError, TimeoutError) as error:
            _log.info("session %s: the event stream broke (%s)", work.session_id, type(error).__name__)
        await _pause(backoff)
        backoff = min(backoff * 2, _BACKOFF_CAP)


async def _read_history(work: ClaimedWork, sink: Sink) -> None:
    sink.history_begins()
    events = work.client.beta.sessions.events
    async for event in events.list(work.session_id, limit=_PAGE, timeout=_LIST_DEADLINE):
        sink.receive(event)
    sink.history_ends()


async def send_result(
    work: ClaimedWork, lease: Lease, result: dict[str, Any], still_wanted: Callable[[], bool]
) -> str | None:
    """Send one result until the platform has it, for as long as the lease is ours.

    Args:
        work: the item whose session it is for.
        lease: a result is never sent for a session that is not ours.
        result: a ``user.tool_result`` or ``user.custom_tool_result`` event.
        still_wanted: asked before each further try; the stream may show that the result had arrived after all.

    Returns:
        ``None`` once the platform has it; otherwise why the platform will never take it.

    Raises:
        LeaseLost: the lease was lost before it was accepted.
    """
    backoff = _BACKOFF_START
    conflicts = 0
    while True:
        lease.check()
        try:
            with anyio.fail_after(_SEND_DEADLINE):
                await work.request(
                    lambda client: client.beta.sessions.events.send(work.session_id, events=[cast("Any", result)])
                )
        except APIStatusError as error:
            conflicts += error.status_code == 409
            if not is_transient(error) or conflicts > _MOST_CONFLICTS:
                return f"{error.status_code}: {error.message}"
            _log.info("session %s: a result was not taken (%s); again", work.session_id, error.status_code)
        except (APIError, TimeoutError) as error:
            _log.info("session %s: a result did not get through (%s); again", work.session_id, type(error).__name__)
        else:
            return None
        await _pause(backoff)
        backoff = min(backoff * 2, _BACKOFF_CAP)
        if not still_wanted():
            return None


async def answer_open_calls(work: ClaimedWork, lease: Lease, *, owns: Callable[[str, bool], bool], text: str) -> int:
    """Answer whatever of ours waits for a result with an error, and return how many there were.

    For when all else has failed: it asks for the history afresh, and knows nothing but which calls have a result.

    Args:
        work: the item of the session.
        lease: nothing is sent for a session that is not ours.
        owns: tells whether a call of this tool (name, is it custom) is ours to answer.
        text: what the agent is told.

    Raises:
        LeaseLost: the lease was lost.
        APIError: the platform could not be asked.
    """
    waiting: dict[str, bool] = {}
    async for event in work.client.beta.sessions.events.list(work.session_id, limit=_PAGE, timeout=_LIST_DEADLINE):
        kind, event_id = str(getattr(event, "type", "")), getattr(event, "id", None)
        custom = kind == "agent.custom_tool_use"
        if kind in RESULT_FIELDS:
            waiting.pop(str(getattr(event, RESULT_FIELDS[kind], "")), None)
        elif custom or kind == "agent.tool_use":
            denied = getattr(event, "evaluated_permission", None) == "deny"
            if isinstance(event_id, str) and not denied and owns(str(getattr(event, "name", "")), custom):
                waiting[event_id] = custom
    for event_id, custom in waiting.items():
        name = "user.custom_tool_result" if custom else "user.tool_result"
        result = {"type": name, RESULT_FIELDS[name]: event_id, "is_error": True}
        await send_result(work, lease, {**result, "content": [{"type": "text", "text": text}]}, lambda: True)
    return len(waiting)


async def _pause(seconds: float) -> None:
    # Spread out, so that many sessions that were cut off at once do not come back at once.
    await anyio.sleep(seconds * random.uniform(0.5, 1.0))  # noqa: S311
