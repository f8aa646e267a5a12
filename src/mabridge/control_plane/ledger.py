"""What to do about a session's events: events in, actions out. No I/O, and no clock but the times it is given.

The platform's rules for a self-hosted worker live here (https://platform.claude.com/docs/en/managed-agents/):

- A call is run only if its tool is ours and its permission allows it. ``deny`` never runs; ``ask``, or a permission
  that is not known, waits for an explicit ``allow``. Calls of other tools belong to another client of the session.
- A call is run once. It counts as answered when anybody's result for it is seen, the platform's own included.
- A thread that has ended takes no more results. An interrupt stops what runs and closes what waits.
- Within a thread calls run in the agent's order, but neighbouring read-only ones together; what changes anything waits
  until the results of those before it were accepted. Threads run side by side.
- The session is done with some time after it has gone idle, unless it is idle because it waits for an answer.

The platform decides afresh for each call whether its tool may run, so a change of the agent's tools
(``session.updated``) needs no handling here: a call of a tool that was switched off arrives as ``deny``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["RESULT_FIELDS", "Action", "Answer", "Cancel", "Finish", "Hold", "Ledger", "Run", "Skip", "ToolCall"]


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """One call of a tool by the agent.

    Attributes:
        id: the id of its event.
        name: the tool's name.
        input: its input, as the agent wrote it.
        thread: the child thread that made it; ``None`` is the session's own.
        custom: whether it is a custom tool's, answered by another type of event.
    """

    id: str
    name: str
    input: Mapping[str, object]
    thread: str | None = None
    custom: bool = False


@dataclass(frozen=True)
class Run:
    """Run the call now, and tell of its end with `Ledger.finished`."""

    call: ToolCall


@dataclass(frozen=True)
class Hold:
    """The call waits for permission. Nothing is to be done."""

    call: ToolCall


@dataclass(frozen=True)
class Skip:
    """The call will not be run, and nothing is to be sent for it."""

    call: ToolCall
    reason: Literal["not ours", "denied", "answered", "thread ended"]


@dataclass(frozen=True)
class Answer:
    """The call was interrupted before it ran: answer it with an error that says so."""

    call: ToolCall


@dataclass(frozen=True)
class Cancel:
    """Stop the running call. Only an interrupted one is still to be answered, with `Ledger.finished` at its end."""

    call: ToolCall
    reason: Literal["interrupted", "answered", "thread ended"]


@dataclass(frozen=True)
class Finish:
    """The session is done with. Always the last action."""

    reason: Literal["idle", "terminated", "deleted"]


Action = Run | Hold | Skip | Answer | Cancel | Finish


class _State(enum.Enum):
    HELD = enum.auto()  # waits for permission
    READY = enum.auto()  # may run, and waits for its turn in its thread
    RUNNING = enum.auto()
    SENDING = enum.auto()  # its result, whatever it is, is on its way out
    CLOSED = enum.auto()


@dataclass
class _Entry:
    call: ToolCall
    state: _State
    cancelled: bool = False


RESULT_FIELDS = {
    "user.tool_result": "tool_use_id",
    "agent.tool_result": "tool_use_id",
    "user.custom_tool_result": "custom_tool_use_id",
}
"""The types of event that answer a call, each with the field that names the call."""

# They say nothing of whether the agent is at work: the SDK's runner leaves its idle clock alone for them as well.
_NEUTRAL = frozenset({"user.tool_confirmation", "session.thread_status_terminated"})


class Ledger:
    """The calls of one session, and what is to be done about them.

    Args:
        owns: tells whether a call of this tool (name, is it custom) is ours to answer.
        read_only: the names of tools that change nothing, and so may run beside one another.
        max_idle: seconds after which an idle session is done with; ``None`` is never.
    """

    def __init__(
        self, *, owns: Callable[[str, bool], bool], read_only: frozenset[str], max_idle: float | None = 60.0
    ) -> None:
        self._owns = owns
        self._read_only = read_only
        self._max_idle = max_idle
        self._entries: dict[str, _Entry] = {}
        self._seen: set[str] = set()
        self._answered: set[str] = set()
        self._verdicts: dict[str, bool] = {}
        self._primary_thread: str | None = None
        self._child_threads: set[str] = set()
        self._ended_threads: set[str] = set()
        self._reading_history = False
        self._history_read = False
        self.resumed = False
        """Calls of ours were answered before the history was first read: by an earlier run of the session."""
        self._idle_since: float | None = None
        self._finish: Finish | None = None
        self._finish_given = False
        self._actions: list[Action] = []

    # ---- in: what the platform says

    def history_begins(self) -> None:
        """The session's history is about to be received. No call is begun until it has been read to its end.

        A call whose answer is on a page not read yet must not be run.
        """
        self._reading_history = True

    def history_ends(self) -> None:
        """The history was received whole."""
        if not self._history_read:
            self._history_read = True
            self.resumed = any(call_id in self._answered for call_id in self._entries)
        self._reading_history = False

    def receive(self, event: object, now: float) -> None:
        """Take in one event of the session, in the SDK's types. One that was received before changes nothing.

        Args:
            event: what matters of it is read by name, so that types newer than the SDK's do no harm.
            now: the time, in seconds, on any clock that only goes forward.
        """
        event_id = getattr(event, "id", None)
        if self._finish is not None or (event_id is not None and event_id in self._seen):
            return
        if event_id is not None:
            self._seen.add(event_id)
        kind = str(getattr(event, "type", ""))
        if kind not in _NEUTRAL:
            self._idle_since = now if _ends_turn(event) else None
        if kind == "session.thread_created":
            self._child_threads.add(str(getattr(event, "session_thread_id", "")))
        elif kind == "session.thread_status_running" and self._primary_thread is None:
            # The session's own thread runs first, and is not created by another. Its calls name no thread.
            thread = getattr(event, "session_thread_id", None)
            self._primary_thread = None if thread in self._child_threads else thread
        if kind in ("agent.tool_use", "agent.custom_tool_use"):
            self._tool_use(event, custom=kind == "agent.custom_tool_use")
        elif kind in RESULT_FIELDS:
            self._answered_by_anyone(str(getattr(event, RESULT_FIELDS[kind], "")), now)
        elif kind == "user.tool_confirmation":
            self._confirmation(event, now)
        elif kind == "user.interrupt":
            self._interrupt(getattr(event, "session_thread_id", None))
        elif kind == "session.thread_status_terminated":
            self._thread_ended(str(getattr(event, "session_thread_id", "")), now)
        elif kind == "session.status_terminated":
            self._finish = Finish("terminated")
        elif kind == "session.deleted":
            self._finish = Finish("deleted")

    # ---- in: what became of our actions

    def finished(self, call_id: str) -> None:
        """A `Run` call has come to its end, and its result is about to be sent."""
        entry = self._entries[call_id]
        if entry.state is _State.RUNNING:
            entry.state = _State.SENDING

    def settled(self, call_id: str, now: float) -> None:
        """The result of a call was accepted, or refused for good."""
        self._close(self._entries[call_id], now)

    def hurry(self) -> None:
        """From now on the session is done with as soon as it is idle."""
        self._max_idle = 0.0

    # ---- out

    def actions(self) -> list[Action]:
        """Return what is to be done now, each action once."""
        if self._finish is None and not self._reading_history:
            self._schedule()
        actions, self._actions = self._actions, []
        if self._finish is not None and not self._finish_given:
            self._finish_given = True
            actions.append(self._finish)
        return actions

    def tick(self, now: float) -> None:
        """Let time pass. Call it at `deadline`."""
        deadline = self.deadline()
        if self._finish is None and deadline is not None and now >= deadline:
            self._finish = Finish("idle")

    def deadline(self) -> float | None:
        """The time at which the session is done with, if nothing happens before."""
        if self._idle_since is None or self._max_idle is None or self._reading_history or any(self.open_calls()):
            return None
        return self._idle_since + self._max_idle

    def is_open(self, call_id: str) -> bool:
        """Whether a result for the call is still wanted, as far as is known."""
        return self._entries[call_id].state is not _State.CLOSED

    def at_work(self) -> bool:
        """Whether a call runs, is about to, or has a result on its way; not one that waits for permission."""
        return any(entry.state not in (_State.CLOSED, _State.HELD) for entry in self._entries.values())

    def open_calls(self) -> Iterator[ToolCall]:
        """Yield the calls of ours that nobody has answered, the held ones included."""
        return (entry.call for entry in self._entries.values() if entry.state is not _State.CLOSED)

    # ---- the rules

    def _tool_use(self, event: object, *, custom: bool) -> None:
        call = ToolCall(
            id=str(getattr(event, "id", "")),
            name=str(getattr(event, "name", "")),
            input=getattr(event, "input", None) or {},
            thread=getattr(event, "session_thread_id", None) or None,
            custom=custom,
        )
        permission = getattr(event, "evaluated_permission", None)
        verdict = self._verdicts.get(call.id)
        if not self._owns(call.name, custom):
            self._actions.append(Skip(call, "not ours"))
            return
        if call.id in self._answered:
            self._actions.append(Skip(call, "answered"))
        elif call.thread in self._ended_threads:
            self._actions.append(Skip(call, "thread ended"))
        elif permission == "deny" or verdict is False:
            self._actions.append(Skip(call, "denied"))
        elif permission in (None, "allow") or verdict is True:
            self._entries[call.id] = _Entry(call, _State.READY)
            return
        else:
            self._entries[call.id] = _Entry(call, _State.HELD)
            self._actions.append(Hold(call))
            return
        self._entries[call.id] = _Entry(call, _State.CLOSED)

    def _answered_by_anyone(self, call_id: str, now: float) -> None:
        self._answered.add(call_id)
        entry = self._entries.get(call_id)
        if entry is not None:
            self._drop(entry, "answered", now)

    def _confirmation(self, event: object, now: float) -> None:
        call_id = str(getattr(event, "tool_use_id", ""))
        # A verdict that is not known does not release a call, and a denial is never taken back.
        allowed = getattr(event, "result", None) == "allow" and self._verdicts.get(call_id) is not False
        self._verdicts[call_id] = allowed
        entry = self._entries.get(call_id)
        if entry is None:
            return
        if allowed and entry.state is _State.HELD:
            entry.state = _State.READY
        elif not allowed and entry.state in (_State.HELD, _State.READY):
            self._actions.append(Skip(entry.call, "denied"))
            self._close(entry, now)

    def _interrupt(self, thread: str | None) -> None:
        for entry in self._entries.values():
            if thread is not None and thread != (entry.call.thread or self._primary_thread):
                continue
            if entry.state in (_State.HELD, _State.READY):
                self._actions.append(Answer(entry.call))
                entry.state, entry.cancelled = _State.SENDING, True
            elif entry.state is _State.RUNNING and not entry.cancelled:
                entry.cancelled = True
                self._actions.append(Cancel(entry.call, "interrupted"))

    def _thread_ended(self, thread: str, now: float) -> None:
        self._ended_threads.add(thread)
        for entry in self._entries.values():
            if entry.call.thread == thread:
                self._drop(entry, "thread ended", now)

    def _drop(self, entry: _Entry, reason: Literal["answered", "thread ended"], now: float) -> None:
        """Close a call that takes no result of ours any more."""
        if entry.state is _State.RUNNING:
            self._actions.append(Cancel(entry.call, reason))
        elif entry.state in (_State.HELD, _State.READY):
            self._actions.append(Skip(entry.call, reason))
        self._close(entry, now)

    def _close(self, entry: _Entry, now: float) -> None:
        if entry.state is _State.CLOSED:
            return
        entry.state = _State.CLOSED
        # What was still open held the idle clock back: it starts afresh, so that the agent has time to go on.
        if self._idle_since is not None:
            self._idle_since = now

    def _schedule(self) -> None:
        for entries in self._by_thread():
            # What was read counts until its result is accepted: should that get lost with this worker, the next one
            # reads again, and must not see what a later call has changed.
            before = [entry.call for entry in entries if self._stands_before_others(entry)]
            for entry in entries:
                if entry.state is not _State.READY:
                    continue
                beside_others = all(call.name in self._read_only for call in (entry.call, *before))
                if before and not beside_others:
                    break
                entry.state = _State.RUNNING
                before.append(entry.call)
                self._actions.append(Run(entry.call))

    def _stands_before_others(self, entry: _Entry) -> bool:
        if entry.state is _State.SENDING:
            return entry.call.name in self._read_only and not entry.cancelled
        return entry.state is _State.RUNNING

    def _by_thread(self) -> Iterable[list[_Entry]]:
        threads: dict[str | None, list[_Entry]] = {}
        for entry in self._entries.values():
            if entry.state in (_State.READY, _State.RUNNING, _State.SENDING):
                threads.setdefault(entry.call.thread, []).append(entry)
        return threads.values()


def _ends_turn(event: object) -> bool:
    """Whether the session went idle for another reason than that it waits for an answer."""
    if getattr(event, "type", None) != "session.status_idle":
        return False
    return getattr(getattr(event, "stop_reason", None), "type", None) != "requires_action"
