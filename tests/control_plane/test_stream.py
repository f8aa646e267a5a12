"""Events in, each once, across broken connections; results out, until they are accepted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from mabridge.control_plane.lease import Lease, LeaseEnd
from mabridge.control_plane.queue import ClaimedWork, WorkQueue
from mabridge.control_plane.stream import SessionUnreachable, follow, send_result
from mabridge.errors import LeaseLost
from mabridge.testing import Agent, ControlPlane, Environment, Fault, Session

pytestmark = pytest.mark.anyio


class Sink:
    """Notes what it is given, and lets a test wait for it."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.histories = 0
        self.reading = False
        self._changed = anyio.Event()

    def history_begins(self) -> None:
        self.reading = True

    def history_ends(self) -> None:
        self.reading = False
        self.histories += 1
        self._changed.set()

    def receive(self, event: Any) -> None:
        self.seen.append(event.id)
        self._changed.set()

    async def until(self, condition, *, timeout: float = 15.0) -> None:
        with anyio.fail_after(timeout):
            while not condition(self):
                self._changed = anyio.Event()
                await self._changed.wait()


@pytest.fixture
def session(environment: Environment) -> Session:
    async def brain(agent: Agent) -> None:
        if agent.text == "go":
            await agent.call("bash", {"command": "true"})

    return environment.create_session(brain)


@pytest.fixture
async def work(queue: WorkQueue, session: Session) -> ClaimedWork:
    work = await queue.poll()
    assert work is not None
    await work.acknowledge()
    return work


@asynccontextmanager
async def following(work: ClaimedWork) -> AsyncIterator[Sink]:
    sink = Sink()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow, work, sink)
        yield sink
        tasks.cancel_scope.cancel()


def ids(session: Session) -> set[str]:
    return {event["id"] for event in session.events}


async def test_history_comes_first_and_then_what_happens(work: ClaimedWork, session: Session):
    session.send_message("before")
    async with following(work) as sink:
        await sink.until(lambda s: s.histories == 1)
        session.send_message("after")
        await sink.until(lambda s: ids(session) <= set(s.seen))
    assert not sink.reading


async def test_history_of_many_pages_is_read_whole(work: ClaimedWork, session: Session):
    for n in range(1100):
        session.emit({"type": "agent.message", "content": [{"type": "text", "text": str(n)}]})
    async with following(work) as sink:
        await sink.until(lambda s: s.histories == 1)
        assert ids(session) <= set(sink.seen)


@pytest.mark.parametrize("cut", [True, False])
async def test_nothing_is_missed_when_the_stream_drops(
    work: ClaimedWork, session: Session, plane: ControlPlane, cut: bool
):
    async with following(work) as sink:
        for n in range(4):
            await sink.until(lambda s, n=n: s.histories > n)
            plane.drop_streams(cut=cut)
            session.emit({"type": "agent.message", "content": [{"type": "text", "text": "in the gap"}]})
        await sink.until(lambda s: ids(session) <= set(s.seen))


@pytest.mark.parametrize(
    "fault",
    [
        {"path": "/events/stream$", "status": 503},
        {"path": "/events$", "method": "GET", "status": 500},
        {"path": "/events$", "method": "GET", "cut": True},
        {"path": "/events/stream$", "cut": True},
    ],
    ids=str,
)
async def test_failed_read_is_repeated(work: ClaimedWork, session: Session, plane: ControlPlane, fault: dict[str, Any]):
    plane.faults.add(Fault(times=2, **fault))
    session.send_message("hello")
    async with following(work) as sink:
        await sink.until(lambda s: s.histories == 1)
        assert ids(session) <= set(sink.seen)


async def test_stream_that_is_never_answered_is_opened_again(work: ClaimedWork, session: Session, plane: ControlPlane):
    plane.faults.add(Fault(path="/events/stream$", hang=True))
    async with following(work) as sink:
        await sink.until(lambda s: s.histories == 1, timeout=30)


@pytest.mark.parametrize("status", [403, 404])
async def test_refusal_for_good_ends_it(work: ClaimedWork, plane: ControlPlane, status: int):
    plane.faults.add(Fault(path="/events/stream$", status=status))
    with pytest.raises(ExceptionGroup) as caught:
        async with following(work):
            await anyio.sleep_forever()
    assert caught.group_contains(SessionUnreachable)


# ---- results


@pytest.fixture
async def call_id(work: ClaimedWork, session: Session) -> str:
    session.send_message("go")
    return (await session.wait_for(lambda event: event["type"] == "agent.tool_use"))["id"]


@pytest.fixture
async def lease(work: ClaimedWork) -> AsyncIterator[Lease]:
    lease = Lease(work)
    await lease.claim()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lease.keep)
        yield lease
        lease.finish(LeaseEnd.DONE)


def answer(call_id: str) -> dict[str, Any]:
    return {"type": "user.tool_result", "tool_use_id": call_id, "content": [{"type": "text", "text": "ok"}]}


async def test_result_is_sent_until_it_gets_through(
    work: ClaimedWork, lease: Lease, session: Session, plane: ControlPlane, call_id: str
):
    plane.faults.add(Fault(method="POST", path="/events$", status=503, times=1))
    plane.faults.add(Fault(method="POST", path="/events$", cut=True, times=1))
    assert await send_result(work, lease, answer(call_id), lambda: True) is None
    assert len(session.results(call_id).accepted) == 1


async def test_result_whose_acceptance_was_not_heard_of_is_given_up_once_the_stream_shows_it(
    work: ClaimedWork, lease: Lease, session: Session, plane: ControlPlane, call_id: str
):
    plane.faults.add(Fault(method="POST", path="/events$", status=502, effect="after"))
    assert await send_result(work, lease, answer(call_id), lambda: not session.results(call_id).accepted) is None
    assert session.results(call_id).refused == []


async def test_refused_result_says_why(work: ClaimedWork, lease: Lease, session: Session, call_id: str):
    session.terminate()
    refused = await send_result(work, lease, answer(call_id), lambda: True)
    assert refused is not None
    assert refused.startswith("400: ")


async def test_conflict_is_not_repeated_for_ever(work: ClaimedWork, lease: Lease, plane: ControlPlane, call_id: str):
    fault = plane.faults.add(Fault(method="POST", path="/events$", status=409, times=None))
    refused = await send_result(work, lease, answer(call_id), lambda: True)
    assert refused is not None
    assert 2 <= fault.hits <= 6


async def test_no_result_is_sent_without_the_lease(work: ClaimedWork, lease: Lease, session: Session, call_id: str):
    lease.finish(LeaseEnd.TAKEN)
    with pytest.raises(LeaseLost):
        await send_result(work, lease, answer(call_id), lambda: True)
    assert session.results(call_id).accepted == []
