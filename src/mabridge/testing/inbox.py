"""What the platform does with the events that clients send to a session.

Read in the platform's documentation (posting results, interrupts) and in `anthropic.resources.beta.sessions.events`. A
request is checked as a whole before any of it takes effect: one event that is refused refuses them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mabridge.testing.calls import Call, Thread
from mabridge.testing.content import check_event
from mabridge.testing.wire import ApiError, Json

if TYPE_CHECKING:
    from mabridge.testing.state import SessionState

__all__ = ["receive"]


def receive(session: SessionState, events: list[object]) -> list[Json]:
    """Take the events of one request, and return them as the API's answer has them.

    Raises:
        ApiError: 400, and nothing was taken.
    """
    if not events:
        raise ApiError(400, "events: at least one event")
    checked = [check_event(event, f"events.{index}") for index, event in enumerate(events)]
    _check_against(session, checked)
    stored, touched = [], list[Thread]()
    for event in checked:
        kind = event["type"]
        if kind == "user.message":
            stored.append(session.take_message(event))
            session.queue_work()
        elif kind == "user.interrupt":
            stored.append(session.emit(event))
            thread_id = event.get("session_thread_id")
            session.interrupt_turn(None if thread_id is None else session.threads[thread_id])
            session.queue_work()
        else:
            call = _call(session, event)
            touched.append(call.thread)
            if kind != "user.tool_confirmation":
                stored.append(session.accept(call, event))
                continue
            thread = {} if call.thread.primary else {"session_thread_id": call.thread.id}
            stored.append(session.emit({**event, **thread}))
            call.confirmed = event["result"]
            if call.confirmed == "deny":
                said = event.get("deny_message")
                text = f"Permission to use {call.name} has been denied." + (f" {said}" if said else "")
                session.close(call, text, by="denied")
            else:
                # It goes on waiting, now for its result: nothing to tell.
                touched.pop()
    session.settle(touched)
    return stored


def _check_against(session: SessionState, events: list[Json]) -> None:
    """Check a whole request against the session, as if its events were taken one after the other."""
    waiting = {call.id for call in session.open_calls}
    confirmed = {call.id for call in session.open_calls if call.confirmed is not None}
    for event in events:
        kind = event["type"]
        if session.status == "terminated":
            raise _refuse(session, event, f"session {session.id} is terminated and accepts no events")
        if kind == "user.message":
            if waiting:
                raise ApiError(400, f"waiting on responses to events {sorted(waiting)}")
        elif kind == "user.interrupt":
            thread_id = event.get("session_thread_id")
            thread = None if thread_id is None else session.threads.get(thread_id)
            if thread_id is not None and (thread is None or thread.status == "terminated"):
                raise ApiError(400, f"session_thread_id: no thread {thread_id} that can be interrupted")
            waiting -= {call.id for call in session.open_calls if thread in (None, session.primary, call.thread)}
        elif kind == "user.tool_confirmation":
            _check_confirmation(session, event, waiting, confirmed)
        else:
            _check_result(session, event, waiting, confirmed)


def _check_confirmation(session: SessionState, event: Json, waiting: set[str], confirmed: set[str]) -> None:
    call = session.call(event["tool_use_id"])
    if call is None:
        raise ApiError(400, f"tool_use_id {event['tool_use_id']} does not match any tool use event")
    if call.custom or call.permission in ("allow", "deny"):
        raise ApiError(400, f"tool use {call.id} does not require confirmation")
    if call.id not in waiting or call.id in confirmed:
        raise ApiError(400, f"tool use {call.id} is not waiting for confirmation")
    confirmed.add(call.id)
    if event["result"] == "deny":
        waiting.remove(call.id)


def _check_result(session: SessionState, event: Json, waiting: set[str], confirmed: set[str]) -> None:
    custom = event["type"] == "user.custom_tool_result"
    key = "custom_tool_use_id" if custom else "tool_use_id"
    call = session.call(event[key])
    if call is None or call.custom != custom:
        raise _refuse(session, event, f"{key} {event[key]} does not match any tool use event of this kind")
    if call.thread.status == "terminated":
        raise _refuse(session, event, f"the thread of tool use {call.id} has terminated")
    if call.id not in waiting:
        raise _refuse(session, event, f"tool use {call.id} is not waiting for a result")
    if call.held and call.id not in confirmed:
        raise _refuse(session, event, f"tool use {call.id} is waiting for confirmation")
    waiting.remove(call.id)


def _refuse(session: SessionState, event: Json, message: str) -> ApiError:
    session.refused(event, message)
    return ApiError(400, message)


def _call(session: SessionState, event: Json) -> Call:
    call = session.call(event.get("tool_use_id") or event["custom_tool_use_id"])
    assert call is not None
    return call
