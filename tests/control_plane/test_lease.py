"""The lease of a work item under every fault the platform and the network have for it."""

from __future__ import annotations

from contextlib import asynccontextmanager

import anyio
import pytest
from anthropic import AsyncAnthropic

from mabridge.control_plane.lease import Lease, LeaseEnd
from mabridge.control_plane.queue import ClaimedWork, WorkQueue
from mabridge.errors import LeaseLost
from mabridge.testing import ControlPlane, Environment, Fault
from tests.control_plane.conftest import no_brain

pytestmark = pytest.mark.anyio


@pytest.fixture
async def work(queue: WorkQueue, environment: Environment) -> ClaimedWork:
    environment.create_session(no_brain)
    work = await queue.poll()
    assert work is not None
    await work.acknowledge()
    return work


@asynccontextmanager
async def kept(work: ClaimedWork):
    """A lease that is kept. The sleeps below are no guesses: the lease's own time of 2 s has to pass."""
    lease = Lease(work)
    await lease.claim()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lease.keep)
        yield lease
        lease.finish(LeaseEnd.DONE)


async def ended(lease: Lease, within: float = 5.0) -> LeaseEnd | None:
    with anyio.fail_after(within):
        await lease.ended.wait()
    return lease.end


async def test_lease_is_kept_past_its_time(work: ClaimedWork, environment: Environment):
    async with kept(work) as lease:
        assert lease.ttl == 2.0
        await anyio.sleep(3.0)
        assert lease.end is None
        assert environment.queue.get(work.work_id).state == "active"


async def test_lease_that_someone_else_holds_cannot_be_claimed(work: ClaimedWork):
    await work.heartbeat("NO_HEARTBEAT")
    with pytest.raises(LeaseLost, match="given to someone else"):
        await Lease(work).claim()


async def test_lease_taken_under_way_is_lost(work: ClaimedWork, plane: ControlPlane):
    async with kept(work) as lease:
        plane.faults.add(Fault(path="/heartbeat$", status=412))
        assert await ended(lease) is LeaseEnd.TAKEN
        with pytest.raises(LeaseLost):
            lease.check()


async def test_heartbeat_whose_answer_is_lost_does_not_cost_the_lease(work: ClaimedWork, plane: ControlPlane):
    async with kept(work) as lease:
        fault = plane.faults.add(Fault(path="/heartbeat$", cut=True, effect="after", times=2))
        await anyio.sleep(3.0)
        assert fault.hits == 2
        assert lease.end is None


async def test_first_heartbeat_whose_answer_is_lost_still_claims(work: ClaimedWork, plane: ControlPlane):
    plane.faults.add(Fault(path="/heartbeat$", status=502, effect="after"))
    lease = Lease(work)
    await lease.claim()
    assert lease.end is None


async def test_no_answer_for_the_whole_time_is_a_lost_lease(work: ClaimedWork, plane: ControlPlane):
    async with kept(work) as lease:
        plane.faults.add(Fault(path="/heartbeat$", status=503, times=None))
        assert await ended(lease) is LeaseEnd.LAPSED
        assert lease.end.lost


async def test_heartbeat_that_is_never_answered_is_sent_again_in_time(work: ClaimedWork, plane: ControlPlane):
    async with kept(work) as lease:
        fault = plane.faults.add(Fault(path="/heartbeat$", hang=True, times=1))
        await anyio.sleep(3.0)
        assert fault.hits == 1
        assert lease.end is None


async def test_rejected_heartbeat_ends_the_lease_but_does_not_lose_it(work: ClaimedWork, plane: ControlPlane):
    async with kept(work) as lease:
        plane.faults.add(Fault(path="/heartbeat$", status=403))
        assert await ended(lease) is LeaseEnd.REJECTED
        lease.check()


async def test_stop_of_an_operator_is_seen(work: ClaimedWork, environment: Environment):
    async with kept(work) as lease:
        environment.queue.stop(work.work_id, force=False)
        assert await ended(lease) is LeaseEnd.STOP_REQUESTED


async def test_worker_that_slept_through_its_lease_knows_before_it_acts(work: ClaimedWork, plane: ControlPlane):
    lease = Lease(work)
    await lease.claim()
    # Nothing keeps it: as after SIGSTOP, no heartbeat has told anything.
    await anyio.sleep(2.1)
    with pytest.raises(LeaseLost, match="no heartbeat got through"):
        lease.check()


async def test_lease_that_is_handed_over_is_free_at_once_where_the_platform_grants_it():
    async with ControlPlane(grants_ttl=True) as plane:
        environment = plane.create_environment()
        async with AsyncAnthropic(base_url=plane.url, api_key="x") as own:
            queue = WorkQueue(own, environment_id=environment.id, environment_key=environment.key, worker_id="w")
            environment.create_session(no_brain)
            work = await queue.poll()
            assert work is not None
            await work.acknowledge()
            async with kept(work) as lease:
                assert await lease.hand_over(only_if_soon=True)
                assert lease.end is LeaseEnd.HANDED_OVER
                assert lease.end.lost
            await plane.wait_until(lambda: environment.queue.get(work.work_id).state == "queued", timeout=5)


async def test_lease_is_kept_where_the_platform_grants_no_shorter_one():
    async with ControlPlane(lease_ttl=300) as plane:
        environment = plane.create_environment()
        async with AsyncAnthropic(base_url=plane.url, api_key="x") as own:
            queue = WorkQueue(own, environment_id=environment.id, environment_key=environment.key, worker_id="w")
            environment.create_session(no_brain)
            work = await queue.poll()
            assert work is not None
            await work.acknowledge()
            async with kept(work) as lease:
                assert not await lease.hand_over(only_if_soon=True)
                assert lease.end is None
                assert not await lease.hand_over(only_if_soon=False)
                assert lease.end is LeaseEnd.HANDED_OVER


async def test_heartbeats_that_meet_are_sent_one_after_the_other(work: ClaimedWork, plane: ControlPlane):
    """Two that echo one and the same heartbeat would cost the lease."""
    async with kept(work) as lease:
        plane.faults.add(Fault(path="/heartbeat$", delay=0.3, times=None))
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(lease._beat)
        assert lease.end is None


async def test_lease_that_is_not_extended_has_ended(work: ClaimedWork, plane: ControlPlane):
    async with kept(work) as lease:
        answer = {"type": "work_heartbeat", "last_heartbeat": "x", "lease_extended": False, "state": "active"}
        plane.faults.add(Fault(path="/heartbeat$", status=200, body={**answer, "ttl_seconds": 2}))
        assert await ended(lease) is LeaseEnd.STOP_REQUESTED
