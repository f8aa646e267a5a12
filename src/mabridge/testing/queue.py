"""The work queue of one self-hosted environment: items, leases, and what a worker may do with them.

Read in the platform's documentation (self-hosted sandboxes, operations), in
`anthropic.resources.beta.environments.work` and in `anthropic.lib.environments`. Where the live platform is not known,
the harsher reading is taken:

* an item that was acknowledged but never had a heartbeat stays ``starting`` for good (anthropic-sdk-python #1746),
  unless the queue was made with ``lease_from="ack"``;
* a second acknowledgement of an item that is ``starting`` is answered like the first: who holds the item is decided by
  the first heartbeat alone;
* an item that is ``queued`` has no lease to claim, so any heartbeat for it is a 412.

Leases lapse by the clock whenever the queue is looked at, so no timer runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import anyio

from mabridge.testing.wire import ApiError, Clock, Json

__all__ = ["LeaseFrom", "WorkItem", "WorkQueue", "WorkState"]

WorkState: TypeAlias = Literal["queued", "starting", "active", "stopping", "stopped"]
LeaseFrom: TypeAlias = Literal["heartbeat", "ack"]

NO_HEARTBEAT = "NO_HEARTBEAT"
_DEFAULT_RECLAIM = 5.0
_POLLING_WINDOW = 30.0


@dataclass(kw_only=True)
class WorkItem:
    """One item of work. For a session its id is the session's, each time that it is queued.

    Attributes:
        data: what is to be served; a healthcheck's has no session.
        has_secret: whether a poll hands out a credential of the item's own.
        deliveries: how often a poll has returned it, since it was first queued.
    """

    id: str
    environment_id: str
    data: Json
    has_secret: bool
    created_at: str
    state: WorkState = "queued"
    metadata: dict[str, str] = field(default_factory=dict)
    acknowledged_at: str | None = None
    started_at: str | None = None
    latest_heartbeat_at: str | None = None
    stop_requested_at: str | None = None
    stopped_at: str | None = None
    deliveries: int = 0
    polled: float | None = None
    lease_until: float | None = None

    def to_json(self, *, secret: str | None = None) -> Json:
        """Return the item as the API shows it; only a poll gives a `secret`."""
        return {
            "id": self.id,
            "type": "work",
            "environment_id": self.environment_id,
            "state": self.state,
            "data": dict(self.data),
            "metadata": dict(self.metadata),
            "secret": secret,
            "created_at": self.created_at,
            "acknowledged_at": self.acknowledged_at,
            "started_at": self.started_at,
            "latest_heartbeat_at": self.latest_heartbeat_at,
            "stop_requested_at": self.stop_requested_at,
            "stopped_at": self.stopped_at,
        }


class WorkQueue:
    """The items of one environment.

    Args:
        environment_id: whose queue it is.
        clock: the platform's clock.
        lease_ttl: seconds that a heartbeat keeps the lease.
        lease_from: from when a lease can lapse; see the module.
        is_gone: whether an item's session has vanished, in which case the poll that meets it takes it out and
            answers 404.

    Attributes:
        pollers: how many polls are waiting for work now.
    """

    def __init__(
        self,
        environment_id: str,
        *,
        clock: Clock,
        lease_ttl: float,
        lease_from: LeaseFrom,
        is_gone: Callable[[WorkItem], bool],
    ) -> None:
        self.environment_id = environment_id
        self.lease_ttl = lease_ttl
        self._clock = clock
        self._lease_from: LeaseFrom = lease_from
        self.pollers = 0
        self._is_gone = is_gone
        self._items: dict[str, WorkItem] = {}
        self._seen_polling: dict[str, float] = {}
        self._changed = anyio.Event()

    @property
    def items(self) -> list[WorkItem]:
        """All items, in the order in which they were queued."""
        self._lapse()
        return list(self._items.values())

    def add(self, item_id: str, data: Json, *, has_secret: bool) -> WorkItem:
        """Queue work. An item of that id that is not stopped yet is the one: there is never a second."""
        self._lapse()
        item = self._items.get(item_id)
        if item is not None and item.state != "stopped":
            return item
        deliveries = 0 if item is None else item.deliveries
        self._items.pop(item_id, None)
        item = WorkItem(
            id=item_id,
            environment_id=self.environment_id,
            data=data,
            has_secret=has_secret,
            created_at=self._clock.stamp(),
            deliveries=deliveries,
        )
        self._items[item_id] = item
        self._notify()
        return item

    def get(self, item_id: str) -> WorkItem:
        """Return an item.

        Raises:
            ApiError: 404.
        """
        self._lapse()
        try:
            return self._items[item_id]
        except KeyError:
            raise ApiError(404, f"work item {item_id} not found") from None

    async def poll(self, *, block: float | None, reclaim: float | None, worker_id: str | None) -> WorkItem | None:
        """Return the oldest item that is free, waiting up to `block` seconds for one.

        Args:
            block: seconds, or ``None`` to answer at once.
            reclaim: seconds after which an item that was polled but not acknowledged is free again.
            worker_id: who asks.

        Raises:
            ApiError: 404, when the item's session is gone; the item is taken out of the queue.
        """
        reclaim = _DEFAULT_RECLAIM if reclaim is None else reclaim
        deadline = self._clock.monotonic() + (block or 0.0)
        while True:
            now = self._clock.monotonic()
            if worker_id:
                self._seen_polling[worker_id] = now
            self._lapse()
            changed = self._changed
            free = [item for item in self._items.values() if item.state == "queued"]
            for item in free:
                if item.polled is not None and now - item.polled < reclaim:
                    continue
                if self._is_gone(item):
                    del self._items[item.id]
                    raise ApiError(404, f"EnvironmentInstance not found for session {item.data.get('id')}")
                item.polled = now
                item.deliveries += 1
                return item
            if now >= deadline:
                return None
            again = [item.polled + reclaim for item in free if item.polled is not None]
            again += [item.lease_until for item in self._items.values() if item.lease_until is not None]
            self.pollers += 1
            try:
                with anyio.move_on_after(min([deadline, *again]) - now):
                    await changed.wait()
            finally:
                self.pollers -= 1

    def ack(self, item_id: str) -> WorkItem:
        """Take an item out of the queue: ``queued`` becomes ``starting``.

        Raises:
            ApiError: 404; 409 if it is past that.
        """
        item = self.get(item_id)
        if item.state == "starting":
            return item
        if item.state != "queued":
            raise ApiError(409, f"work item {item_id} is {item.state}: it cannot be acknowledged")
        item.state = "starting"
        item.acknowledged_at = self._clock.stamp()
        if self._lease_from == "ack":
            item.lease_until = self._clock.monotonic() + self.lease_ttl
        return item

    def heartbeat(self, item_id: str, *, expected: str | None, ttl: float | None = None) -> Json:
        """Claim or extend the lease of an item, by `ttl` seconds instead of the usual, and return the answer's body.

        Raises:
            ApiError: 404; 412 when `expected` is not what is stored, with the lease as it stands.
        """
        item = self.get(item_id)
        ttl = self.lease_ttl if ttl is None else ttl
        extended = False
        if item.state in ("queued", "starting", "active"):
            stored = item.latest_heartbeat_at or NO_HEARTBEAT
            if item.state == "queued" or (expected is not None and expected != stored):
                raise self._precondition_failed(item)
            item.state = "active"
            item.started_at = item.started_at or self._clock.stamp()
            item.latest_heartbeat_at = self._clock.stamp()
            item.lease_until = self._clock.monotonic() + ttl
            extended = True
            if ttl < self.lease_ttl:
                self._notify()  # polls that wait may have less long to wait
        return {
            "type": "work_heartbeat",
            "last_heartbeat": item.latest_heartbeat_at or "",
            "lease_extended": extended,
            "state": item.state,
            "ttl_seconds": int(ttl),
        }

    def stop(self, item_id: str, *, force: bool) -> WorkItem:
        """Stop an item at once (`force`), or ask whoever serves it to.

        Raises:
            ApiError: 404; 409 if it has stopped already.
        """
        item = self.get(item_id)
        if item.state == "stopped":
            raise ApiError(409, f"work item {item_id} is already stopped")
        item.stop_requested_at = item.stop_requested_at or self._clock.stamp()
        if force or item.state == "queued":
            self._stopped(item)
        else:
            item.state = "stopping"
        return item

    def lapse(self, item_id: str) -> WorkItem:
        """Let an item's lease lapse now: it goes back into the queue, and its holder's next heartbeat meets 412."""
        item = self.get(item_id)
        self._requeue(item)
        return item

    def update_metadata(self, item_id: str, patch: dict[str, str | None]) -> WorkItem:
        """Merge `patch` into an item's metadata; a null deletes a key."""
        item = self.get(item_id)
        item.metadata = {key: value for key, value in {**item.metadata, **patch}.items() if value is not None}
        return item

    def stats(self) -> Json:
        """Return the answer of the stats endpoint."""
        self._lapse()
        waiting = [item for item in self._items.values() if item.state == "queued"]
        since = self._clock.monotonic() - _POLLING_WINDOW
        return {
            "type": "work_queue_stats",
            "depth": sum(item.polled is None for item in waiting),
            "pending": sum(item.polled is not None for item in waiting),
            "oldest_queued_at": min((item.created_at for item in waiting), default=None),
            "workers_polling": sum(seen >= since for seen in self._seen_polling.values()),
        }

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def _stopped(self, item: WorkItem) -> None:
        item.state = "stopped"
        item.stopped_at = self._clock.stamp()
        item.lease_until = None

    def _requeue(self, item: WorkItem) -> None:
        item.state = "queued"
        item.polled = item.lease_until = None
        item.acknowledged_at = item.started_at = item.latest_heartbeat_at = None
        self._notify()

    def _lapse(self) -> None:
        now = self._clock.monotonic()
        for item in list(self._items.values()):
            if item.lease_until is None or now < item.lease_until:
                continue
            if item.state == "stopping":
                self._stopped(item)
            else:
                self._requeue(item)

    def _precondition_failed(self, item: WorkItem) -> ApiError:
        return ApiError(
            412,
            "expected_last_heartbeat does not match the stored heartbeat",
            details={
                "error_code": "heartbeat_precondition_failed",
                "current_state": {
                    "state": item.state,
                    "last_heartbeat": item.latest_heartbeat_at,
                    "lease_extended": False,
                    "ttl_seconds": int(self.lease_ttl),
                },
            },
        )
