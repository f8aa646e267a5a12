"""Whether a claimed work item is still ours, and if not, why.

The rules are the platform's: the first heartbeat claims the lease with ``NO_HEARTBEAT``, each later one echoes the
time of the one before, and a 412 says that this chain is not the item's any more.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping

import anyio
from anthropic import APIError, APIStatusError

from mabridge.control_plane.queue import ClaimedWork, is_transient
from mabridge.errors import LeaseLost

__all__ = ["Lease", "LeaseEnd"]

_NO_HEARTBEAT = "NO_HEARTBEAT"
_LONGEST_INTERVAL = 30.0
_SHORTEST_INTERVAL = 0.2
_FIRST_RETRY = 0.1
# Assumed until the platform has told; its default is 300 s.
_TTL_BEFORE_FIRST_BEAT = 60.0
_BEAT_DEADLINE = 10.0
# A lease that is let go lapses after this long, if the platform grants so little.
_LAST_TTL = 1
_LAST_TRIES = 3
_SOON = 15.0
# It goes on while the machine is suspended, where the system has such a clock: a lease lapses meanwhile all the same.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class LeaseEnd(enum.Enum):
    """Why a lease ended."""

    DONE = "the session was finished"
    STOP_REQUESTED = "the platform asked for the work item to be stopped"
    TAKEN = "the work item was given to someone else"
    LAPSED = "no heartbeat got through for as long as the lease lasts"
    REJECTED = "the platform rejected a heartbeat"
    HANDED_OVER = "the session was handed over to whoever claims it next"

    @property
    def lost(self) -> bool:
        """Whether the item may be someone else's now, so that it must not be touched."""
        return self in (LeaseEnd.TAKEN, LeaseEnd.LAPSED, LeaseEnd.HANDED_OVER)


class Lease:
    """The lease of one claimed work item.

    It is ours from `claim` until it is `ended`, and only while the clock agrees (`check`): a process that was
    suspended past the lease's time finds out before it does anything, not at its next heartbeat.
    """

    def __init__(self, work: ClaimedWork) -> None:
        self._work = work
        self._last = _NO_HEARTBEAT
        self._ttl = _TTL_BEFORE_FIRST_BEAT
        self._held_since = _now()
        self._outcome_unknown = False
        # Each heartbeat echoes the one before: two at once would be taken for two workers.
        self._beating = anyio.Lock()
        self._end: LeaseEnd | None = None
        self.ended = anyio.Event()

    @property
    def end(self) -> LeaseEnd | None:
        """Why it ended, or ``None`` while it is ours."""
        if self._end is None and _now() - self._held_since >= self._ttl:
            self.finish(LeaseEnd.LAPSED)
        return self._end

    @property
    def ttl(self) -> float:
        """Seconds that the lease lasts after a heartbeat."""
        return self._ttl

    def check(self) -> None:
        """Raise unless the lease is ours.

        Raises:
            LeaseLost: it is not.
        """
        if self.end is not None and self.end.lost:
            raise LeaseLost(f"the lease of {self._work.work_id} is lost: {self.end.value}")

    def finish(self, why: LeaseEnd) -> None:
        """End it. The first reason stands."""
        if self._end is None:
            self._end = why
            self.ended.set()

    async def claim(self) -> None:
        """Send the first heartbeat, until it is answered.

        Raises:
            LeaseLost: the item is not ours to serve.
        """
        await self._beat_until_answered()
        if self.end is not None:
            raise LeaseLost(f"{self._work.work_id} could not be claimed: {self.end.value}")

    async def keep(self) -> None:
        """Send heartbeats until it has ended."""
        while self.end is None:
            await self._pause(self._interval)
            await self._beat_until_answered()

    async def hand_over(self, *, only_if_soon: bool) -> bool:
        """Ask for the lease to lapse at once, so that the item is offered again, and end it here.

        The platform may grant a shorter time than usual (``desired_ttl_seconds``), or not care; its answer tells.

        Args:
            only_if_soon: keep the lease unless it lapses soon.

        Returns:
            whether it lapses soon.
        """
        answered = False
        for _ in range(_LAST_TRIES):
            answered = answered or (self.end is None and await self._beat(_LAST_TTL))
        soon = answered and self._end is None and self._ttl <= _SOON
        if soon or not only_if_soon:
            self.finish(LeaseEnd.HANDED_OVER)
        return soon

    async def _beat_until_answered(self) -> None:
        # One that failed is sent again soon: to wait a whole interval could cost the lease.
        pause = _FIRST_RETRY
        while self.end is None and not await self._beat():
            await self._pause(min(pause, self._interval / 4))
            pause *= 2

    @property
    def _interval(self) -> float:
        return min(max(self._ttl / 3, _SHORTEST_INTERVAL), _LONGEST_INTERVAL)

    async def _pause(self, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            await self.ended.wait()

    async def _beat(self, desired_ttl: int | None = None) -> bool:
        """Send one heartbeat and take note of the answer; ``False`` if it is worth sending again."""
        async with self._beating:
            return self.end is not None or await self._send_beat(desired_ttl)

    async def _send_beat(self, desired_ttl: int | None) -> bool:
        sent_at = _now()
        try:
            # One that is never answered must not eat up the lease.
            with anyio.fail_after(min(self._interval, _BEAT_DEADLINE)):
                answer = await self._work.heartbeat(self._last, desired_ttl=desired_ttl)
        except APIStatusError as error:
            if error.status_code == 412:
                return self._precondition_failed(error)
            if not is_transient(error):
                self.finish(LeaseEnd.REJECTED)
                return True
            self._outcome_unknown = True
            return False
        except (TimeoutError, APIError):
            self._outcome_unknown = True
            return False
        self._last = answer.last_heartbeat
        self._outcome_unknown = False
        if answer.ttl_seconds > 0:
            self._ttl = float(answer.ttl_seconds)
        if answer.state in ("stopping", "stopped") or not answer.lease_extended:
            self.finish(LeaseEnd.STOP_REQUESTED)
        else:
            self._held_since = sent_at
        return True

    def _precondition_failed(self, error: APIStatusError) -> bool:
        """Tell a lease that was taken from a heartbeat of ours whose answer got lost.

        If the beat before this one may have been recorded without our hearing of it, the platform holds a later
        time than we do, and the lease, which has not run out, is still ours: the time it holds is taken over.
        """
        current = _current_state(error)
        last = current.get("last_heartbeat")
        if self._outcome_unknown and isinstance(last, str) and last and current.get("state") in ("starting", "active"):
            self._outcome_unknown = False
            self._last = last
            return False
        self.finish(LeaseEnd.TAKEN)
        return True


def _now() -> float:
    return time.clock_gettime(_CLOCK)


def _current_state(error: APIStatusError) -> Mapping[str, object]:
    node: object = error.body
    for key in ("error", "details", "current_state"):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node if isinstance(node, Mapping) else {}
