"""The lease of a work item under every fault the platform and the network have for it."""

from __future__ import annotations

from contextlib import asynccontextmanager

import anyio
import pytest

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
