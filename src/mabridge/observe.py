"""What a worker tells of its work: one `Event` for everything that matters, as a log line and to whoever listens."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

__all__ = ["Event", "EventName", "Observer", "Observers"]

EventName = Literal[
    "worker.started",  # it claims from now on
    "worker.draining",  # it claims no more, and ends once its sessions have
    "worker.stopped",
    "worker.key_rejected",  # it claims no more; the sessions that it serves are served on
    "poll.failed",  # the queue could not be read; it is tried again
    "session.claimed",  # its lease is ours
    "session.routed",  # which providers may serve it
    "session.refused",  # its calls are answered with an error, for the reason given
    "session.released",  # we are done with it
    "session.handed_over",  # we were told to stop: whoever claims it next goes on with it
    "session.lost",  # its lease is someone else's now: nothing more was done for it
    "session.failed",  # a fault of ours or the platform's: its open calls were answered with an error
    "session.given_up",  # it failed again and again; it is offered to others when its lease has lapsed
    "sandbox.created",
    "sandbox.attached",  # it was there already
    "sandbox.fell_back",  # it was made by a later provider of the route, for the earlier ones failed
    "sandbox.failed",  # this provider could not give one; the next is tried
    "sandbox.gone",  # it was lost under way
    "sandbox.removed",
    "sandbox.kept",
    "sandbox.suspended",
    "sandbox.left",  # it could not be put away, and is left to its time-out
    "sandbox.reaped",  # nobody had any more use for it
    "reap.failed",  # the sweep was ended, or one sandbox could not be removed
    "provider.down",  # it does not answer, and is left alone for a while
    "provider.up",  # it answers again
    "skill.installed",
    "skill.failed",
    "call.started",
    "call.held",  # it waits for somebody's permission
    "call.skipped",  # not run: denied, another client's, or answered already
    "call.cancelled",  # stopped under way
    "call.ended",  # its result is being sent
    "call.answered",  # the platform has its result
    "call.refused",  # the platform takes no result for it
]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened. What does not apply is ``None``.

    Attributes:
        name: what happened.
        session_id: the session, ``sesn_...``.
        work_id: the work item of it.
        provider: the configured name of the provider instance.
        sandbox_id: the provider's own id of the sandbox.
        call_id: the id of the tool call, ``sevt_...``.
        tool: the tool's name.
        seconds: how long it took.
        is_error: whether the result of the call is an error.
        reason: why, for a person to read.
        input: the tool's input. Never logged.
        at: the time it happened, in seconds since the epoch.
    """

    name: EventName
    session_id: str | None = None
    work_id: str | None = None
    provider: str | None = None
    sandbox_id: str | None = None
    call_id: str | None = None
    tool: str | None = None
    seconds: float | None = None
    is_error: bool | None = None
    reason: str | None = None
    input: Mapping[str, object] | None = field(default=None, repr=False)
    at: float = field(default_factory=time.time)

    def log_fields(self) -> dict[str, object]:
        """Return what a log may hold of it: everything that is set, but the tool's input."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name not in ("name", "input", "at"))
        return {name: value for name, value in values if value is not None}

    def __str__(self) -> str:
        parts = (
            f"{name}={value:.3f}" if isinstance(value, float) else f"{name}={value}"
            for name, value in self.log_fields().items()
        )
        return " ".join((self.name, *parts))


Observer = Callable[[Event], None]

_log = logging.getLogger("mabridge.events")
_WARNINGS: frozenset[EventName] = frozenset(
    {"poll.failed", "worker.key_rejected", "session.failed", "session.given_up", "session.lost", "session.refused",
     "sandbox.failed", "sandbox.fell_back", "sandbox.gone", "sandbox.left", "reap.failed", "provider.down",
     "skill.failed", "call.refused"}
)  # fmt: skip


class Observers:
    """Passes each event on to the log and to every listener. A listener that raises is logged, and harms nothing."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = tuple(observers)

    def emit(self, event: Event) -> None:
        """Tell of `event`."""
        level = logging.WARNING if event.name in _WARNINGS else logging.INFO
        _log.log(level, "%s", event, extra={"event": event.name, "fields": event.log_fields()})
        for observer in self._observers:
            try:
                observer(event)
            except Exception:  # noqa: BLE001 - whatever a listener does, the session goes on
                _log.exception("an observer of mabridge's events failed on %s", event.name)
