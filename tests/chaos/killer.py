"""When a worker is killed: at any time, or at the very moment that something has happened to one of its sessions."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import anyio

from mabridge.testing import ControlPlane, Fault, RequestRecord
from tests.chaos.crew import Crew

__all__ = ["Killer", "WatchedPlane"]

_WAIT = 3.0  # seconds for the chosen moment to come; after that, a worker is killed as it is
_RESULT = re.compile(r"/sessions/[^/]+/events$")
_LATER = {
    # After an event of the worker's: at most so many seconds.
    "session.routed": 0.3,  # while it makes or finds the sandbox
    "sandbox.created": 0.1,  # while it puts the hands in
    "sandbox.attached": 0.1,
    "running": 0.4,
    "call.ended": 0.01,  # while the result is on its way
    "sandbox.kept": 0.0,
    "sandbox.removed": 0.0,
}
_MOMENTS = {
    "any": 3,
    "ack": 1,  # acknowledged, and no heartbeat yet
    "claim": 1,  # the first heartbeat took effect, and its answer does not come
    "answer": 3,  # a result was accepted, and nobody hears of it
    "lost answer": 3,  # a result did not arrive, and nobody hears of it
    "stop": 1,  # the item was stopped, and nobody hears of it
    "running": 6,  # a command that takes a while is in the middle of it
    "call.started": 2,
    "call.ended": 2,
    "session.routed": 1,
    "sandbox.created": 1,
    "sandbox.attached": 1,
    "sandbox.kept": 1,
    "sandbox.removed": 1,
}


class WatchedPlane(ControlPlane):
    """The platform, with somebody who looks at each request before it is answered."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.watcher: Callable[[RequestRecord], None] | None = None

    def record(self, request: RequestRecord) -> None:
        """Note a request."""
        super().record(request)
        if self.watcher is not None:
            self.watcher(request)


class Killer:
    """Kills workers until there were enough.

    Args:
        plane: the platform; its requests are looked at.
        seed: of the whole test.
        kills: how many.
        pause: seconds between two of them, at most.
    """

    def __init__(self, plane: WatchedPlane, *, seed: int, kills: int, pause: float) -> None:
        self._plane = plane
        self._random = random.Random(f"{seed} killer")
        self._kills = kills
        self._pause = pause
        self._armed: str | None = None
        self._struck = anyio.Event()
        self._victim: str | None = None
        self.crew: Crew | None = None
        self.moments = Counter[str]()
        """How often each kind of moment was met."""
        self.over = anyio.Event()
        """Set when nobody will be killed any more."""

    async def run(self, crew: Crew) -> None:
        """Kill, and start another for each that was killed."""
        self.crew = crew
        self._plane.watcher = self._on_request
        # Each kind once before any comes a third time, as far as there are kills for it.
        moments = list(_MOMENTS)
        self._random.shuffle(moments)
        moments = ["running", "running", *moments]
        moments += self._random.choices(list(_MOMENTS), list(_MOMENTS.values()), k=self._kills)
        for moment in moments[: self._kills]:
            await anyio.sleep(self._random.uniform(0, self._pause))
            await self._at(moment, self._random.random())
            await crew.start()
        self._plane.watcher = None
        self.over.set()

    def on_event(self, name: str, event: dict[str, Any]) -> None:
        """Take what a worker told."""
        meant = event["name"] == self._armed
        if self._armed == "running" and event["name"] == "call.started":
            call = self._plane.sessions[event["session"]].call(event["call"])
            slept = re.search(r"; sleep ([\d.]+)$", ((call and call.input) or {}).get("command", ""))
            meant = slept is not None and float(slept[1]) > self._plane.lease_ttl
        if meant:
            self._armed, self._victim = None, name
            self._struck.set()

    def _on_request(self, request: RequestRecord) -> None:
        """Look at a request whose answer is about to be sent."""
        done, result = request.status == 200, request.method == "POST" and _RESULT.search(request.path) is not None
        meant = {
            "ack": request.path.endswith("/ack") and done,
            "claim": request.path.endswith("/heartbeat") and "NO_HEARTBEAT" in request.query and done,
            "stop": request.path.endswith("/stop") and done,
            "answer": result and done,
            "lost answer": result and request.status is None,
        }.get(self._armed or "", False)
        # At once, so that the answer does not reach it.
        if meant and self.crew is not None and self.crew.kill(request.worker_id or ""):
            self._armed, self._victim = None, request.worker_id
            self._struck.set()

    async def _at(self, moment: str, when: float) -> None:
        assert self.crew is not None
        self._struck, self._victim = anyio.Event(), None
        fault = Fault(method="POST", path=_RESULT.pattern, cut=True, times=1)
        if moment == "lost answer":
            self._plane.faults.add(fault)
        if moment != "any":
            self._armed = moment
            # In each round, every thread begins with a command that can be killed under.
            with anyio.move_on_after(_WAIT * 10 if moment == "running" else _WAIT):
                await self._struck.wait()
            self._armed = None
        if self._victim is None:
            self.moments["any"] += 1
        else:
            self.moments[moment] += 1
            await anyio.sleep(_LATER.get(moment, 0.0) * when)
        if moment == "lost answer":
            self._plane.faults.remove(fault)
        if moment not in ("ack", "claim", "answer", "lost answer", "stop") or self._victim is None:
            names = list(self.crew.members)
            self.crew.kill(self._victim or names[int(when * len(names))])
