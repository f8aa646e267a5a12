"""A session's events: the history, and the live streams.

Read in `anthropic.resources.beta.sessions.events` and in the platform's documentation on streaming: a stream carries
only what is emitted after it opened; the history is ordered by ``processed_at``, so an event that had to wait moves to
where it was processed, and is then sent again, with the same id, on the streams.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import anyio

from mabridge.testing.wire import ApiError, Clock, Json, decode_cursor, encode_cursor, new_id

__all__ = ["EventLog", "Subscription"]

_STREAM_BUFFER = 10_000
_MAX_LIMIT = 1000
_DEFAULT_LIMIT = 100


class Subscription:
    """One open stream.

    Attributes:
        cut: the connection is to be broken, not ended in good order.
    """

    def __init__(self) -> None:
        self.cut = False
        self._events: deque[Json] = deque()
        self._closed = False
        self._changed = anyio.Event()

    def put(self, event: Json) -> bool:
        """Hand over an event; ``False`` if the reader is so far behind that the stream is closed instead."""
        if len(self._events) >= _STREAM_BUFFER:
            self.close(cut=True)
        if self._closed:
            return False
        self._events.append(event)
        self._changed.set()
        return True

    def close(self, *, cut: bool = False) -> None:
        """End the stream, after what is in it already."""
        self.cut = self.cut or cut
        self._closed = True
        self._changed.set()

    async def receive(self, *, timeout: float = math.inf) -> Json | None:
        """Return the next event, or ``None`` if none came within `timeout` seconds.

        Raises:
            anyio.EndOfStream: the stream has ended.
        """
        with anyio.move_on_after(timeout):
            while not self._events and not self._closed:
                self._changed = anyio.Event()
                await self._changed.wait()
        if self._events:
            return self._events.popleft()
        if self._closed:
            raise anyio.EndOfStream
        return None


@dataclass
class EventLog:
    """All events of one session, and who listens.

    Args:
        clock: the platform's clock.
    """

    clock: Clock
    _entries: dict[str, tuple[int, Json]] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _subscriptions: set[Subscription] = field(default_factory=set)
    _changed: anyio.Event = field(default_factory=anyio.Event)

    @property
    def events(self) -> list[Json]:
        """The history, oldest first."""
        return [event for _, event in self._entries.values()]

    def append(self, event: Mapping[str, object], *, processed: bool = True) -> Json:
        """Add an event, giving it an id and, if it is `processed`, a time; send it to the streams."""
        stored: Json = {"id": new_id("sevt"), **event}
        stored["processed_at"] = self.clock.stamp() if processed else None
        self._put(stored)
        return stored

    def process(self, event_id: str) -> Json:
        """Give a waiting event its time, and send it again."""
        _, event = self._entries.pop(event_id)
        event = {**event, "processed_at": self.clock.stamp()}
        self._put(event)
        return event

    def repeat(self, event_id: str) -> None:
        """Send an event of the history to the streams once more, as it is."""
        self._publish(self._entries[event_id][1])

    def subscribe(self) -> Subscription:
        """Open a stream. It carries what is emitted from now on."""
        subscription = Subscription()
        self._subscriptions.add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Forget a stream whose reader has gone."""
        subscription.close()
        self._subscriptions.discard(subscription)

    def close_streams(self, *, cut: bool = False) -> int:
        """End all open streams, in good order or by breaking the connection; return how many there were."""
        open_now, self._subscriptions = self._subscriptions, set()
        for subscription in open_now:
            subscription.close(cut=cut)
        return len(open_now)

    @property
    def streams(self) -> int:
        """How many streams are open."""
        return len(self._subscriptions)

    async def changed(self) -> None:
        """Wait for the next event."""
        await self._changed.wait()

    def wake(self) -> None:
        """Wake whoever waits in `changed`, for a change that is not an event."""
        self._changed.set()
        self._changed = anyio.Event()

    def page(self, query: Mapping[str, str], types: Sequence[str]) -> Json:
        """Return one page of the history.

        Args:
            query: ``order``, ``limit``, ``page`` and ``created_at[gt|gte|lt|lte]``.
            types: only events of these types, if any is given.

        Raises:
            ApiError: 400.
        """
        order = query.get("order", "asc")
        if order not in ("asc", "desc"):
            raise ApiError(400, "order: must be 'asc' or 'desc'")
        limit = _limit(query.get("limit"))
        wanted = _time_filters(query)
        entries = list(self._entries.values())
        if order == "desc":
            entries.reverse()
        if "page" in query:
            after = decode_cursor(query["page"])
            entries = [entry for entry in entries if (entry[0] > after if order == "asc" else entry[0] < after)]
        if types:
            entries = [entry for entry in entries if entry[1]["type"] in types]
        entries = [entry for entry in entries if all(check(entry[1]["processed_at"]) for check in wanted)]
        more = len(entries) > limit
        entries = entries[:limit]
        return {
            "data": [event for _, event in entries],
            "next_page": encode_cursor(entries[-1][0]) if more else None,
        }

    def _put(self, event: Json) -> None:
        self._entries[event["id"]] = (next(self._numbers), event)
        self._publish(event)

    def _publish(self, event: Json) -> None:
        self._subscriptions = {subscription for subscription in self._subscriptions if subscription.put(event)}
        self.wake()


def _limit(value: str | None) -> int:
    if value is None:
        return _DEFAULT_LIMIT
    if not value.isdecimal() or not 1 <= int(value) <= _MAX_LIMIT:
        raise ApiError(400, f"limit: must be from 1 to {_MAX_LIMIT}")
    return int(value)


def _time_filters(query: Mapping[str, str]) -> list[Callable[[str | None], bool]]:
    def check(compare: Callable[[datetime, datetime], bool], bound: datetime) -> Callable[[str | None], bool]:
        return lambda at: at is not None and compare(datetime.fromisoformat(at), bound)

    filters = []
    for name, compare in (("gt", operator.gt), ("gte", operator.ge), ("lt", operator.lt), ("lte", operator.le)):
        value = query.get(f"created_at[{name}]")
        if value is None:
            continue
        try:
            bound = datetime.fromisoformat(value)
        except ValueError:
            raise ApiError(400, f"created_at[{name}]: not an RFC 3339 time") from None
        filters.append(check(compare, bound if bound.tzinfo else bound.replace(tzinfo=UTC)))
    return filters
