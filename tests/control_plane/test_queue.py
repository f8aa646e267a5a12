"""Polling the queue, and the credential of each call, against the local platform."""

from __future__ import annotations

import pytest
from anthropic import APIStatusError, AsyncAnthropic

from mabridge.control_plane.queue import WorkQueue
from mabridge.control_plane.stream import SessionUnreachable, fetch_session
from mabridge.errors import ConfigError
from mabridge.testing import ControlPlane, Environment, Fault
from tests.control_plane.conftest import no_brain

pytestmark = pytest.mark.anyio


async def test_poll_gives_the_session_that_was_queued(queue: WorkQueue, environment: Environment):
    session = environment.create_session(no_brain)
    work = await queue.poll()
    assert work is not None
    assert work.session_id == session.id


async def test_poll_waits_and_gives_none_when_nothing_is_queued(queue: WorkQueue):
    assert await queue.poll() is None


@pytest.mark.parametrize("secret", [True, False])
async def test_each_call_carries_the_credential_it_is_for(
    queue: WorkQueue, plane: ControlPlane, environment: Environment, secret: bool
):
    environment.create_session(no_brain, secret=secret)
    work = await queue.poll()
    assert work is not None
    await work.acknowledge()
    await work.heartbeat("NO_HEARTBEAT")
    await fetch_session(work)
    await work.stop()
    used = {r.path.rsplit("/", 1)[-1]: r.credential for r in plane.requests}
    for_item = "sessions_token" if secret else "environment_key"
    assert used == {
        "poll": "environment_key",
        "ack": "environment_key",
        "heartbeat": for_item,
        work.session_id: for_item,
        "stop": for_item,
    }


async def test_credentials_in_the_clients_own_headers_are_not_sent(plane: ControlPlane, environment: Environment):
    headers = {"x-api-key": "sk-of-the-parent", "authorization": "Bearer of-the-parent"}
    async with AsyncAnthropic(base_url=plane.url, api_key=plane.api_key, default_headers=headers) as client:
        queue = WorkQueue(client, environment_id=environment.id, environment_key=environment.key, worker_id="w")
        environment.create_session(no_brain)
        work = await queue.poll()
        assert work is not None
        await fetch_session(work)
    assert [r.credential for r in plane.requests] == ["environment_key", "sessions_token"]


async def test_token_that_ran_out_gives_way_to_the_environment_key(environment: Environment, client: AsyncAnthropic):
    async with ControlPlane(token_ttl=0.0) as plane:
        environment = plane.create_environment()
        async with AsyncAnthropic(base_url=plane.url, api_key="x") as client:
            queue = WorkQueue(client, environment_id=environment.id, environment_key=environment.key, worker_id="w")
            session = environment.create_session(no_brain)
            work = await queue.poll()
            assert work is not None
            assert (await fetch_session(work)).id == session.id
        assert plane.requests[-1].credential == "environment_key"


async def test_wrong_key_says_what_to_do(client: AsyncAnthropic, environment: Environment):
    queue = WorkQueue(client, environment_id=environment.id, environment_key="sk-ant-oat01-wrong", worker_id="w")
    with pytest.raises(ConfigError, match=r"rejected the environment key \(401\).*Console") as caught:
        await queue.poll()
    assert "sk-ant-oat01-wrong" not in str(caught.value)


async def test_unknown_environment_says_what_to_do(queue: WorkQueue, plane: ControlPlane):
    plane.faults.add(Fault(path="/poll$", status=404))
    with pytest.raises(ConfigError, match=r"there is no environment env_.*Console"):
        await queue.poll()


async def test_malformed_environment_id_is_refused_before_anything_is_sent(client: AsyncAnthropic, plane: ControlPlane):
    with pytest.raises(ConfigError, match="is not the id of an environment"):
        WorkQueue(client, environment_id="../../v1/agents", environment_key="k", worker_id="w")
    assert not plane.requests


async def test_vanished_session_is_skipped(queue: WorkQueue, environment: Environment):
    environment.create_session(no_brain).delete()
    kept = environment.create_session(no_brain)
    assert await queue.poll() is None
    work = await queue.poll()
    assert work is not None
    assert work.session_id == kept.id


async def test_healthcheck_is_stopped_and_not_served(queue: WorkQueue, environment: Environment):
    item = environment.add_healthcheck()
    assert await queue.poll() is None
    assert item.state == "stopped"


async def test_platform_that_fails_is_an_api_error(queue: WorkQueue, plane: ControlPlane):
    plane.faults.add(Fault(path="/poll$", status=529))
    with pytest.raises(APIStatusError):
        await queue.poll()


async def test_stop_is_repeated_until_it_gets_through(queue: WorkQueue, plane: ControlPlane, environment: Environment):
    environment.create_session(no_brain)
    work = await queue.poll()
    assert work is not None
    await work.acknowledge()
    await work.heartbeat("NO_HEARTBEAT")
    plane.faults.add(Fault(path="/stop$", status=500, times=2))
    await work.stop()
    assert environment.queue.get(work.work_id).state == "stopped"
    await work.stop()  # a 409: stopped already


async def test_deleted_session_cannot_be_fetched(queue: WorkQueue, environment: Environment):
    session = environment.create_session(no_brain)
    work = await queue.poll()
    assert work is not None
    session.delete()
    with pytest.raises(SessionUnreachable, match=session.id):
        await fetch_session(work)


async def test_work_is_not_shown_with_its_token(queue: WorkQueue, environment: Environment):
    environment.create_session(no_brain)
    work = await queue.poll()
    assert repr(work) == f"ClaimedWork({work.work_id})"


async def test_items_of_no_use_are_taken_out_of_the_queue_and_not_served(queue: WorkQueue, environment: Environment):
    no_data = environment.queue.add("work_1", {}, has_secret=False)
    no_id = environment.queue.add("work_2", {"type": "session"}, has_secret=False)
    strange = environment.queue.add("work_3", {"type": "session", "id": "../../etc"}, has_secret=False)
    for _ in range(3):
        assert await queue.poll() is None
    assert {no_data.state, no_id.state, strange.state} == {"stopped"}


async def test_items_that_are_not_ours_are_neither_served_nor_touched(
    queue: WorkQueue, environment: Environment, plane: ControlPlane
):
    foreign = environment.queue.add("work_1", {"type": "session", "id": "sesn_1"}, has_secret=False)
    foreign.environment_id = "env_other"
    environment.queue.add("../../../v1/agents", {"type": "session", "id": "sesn_2"}, has_secret=False)
    for _ in range(2):
        assert await queue.poll() is None
    assert {record.path.rsplit("/", 1)[-1] for record in plane.requests} == {"poll"}


async def test_item_that_was_taken_and_never_claimed_is_found(queue: WorkQueue, environment: Environment):
    for _ in range(3):
        environment.create_session(no_brain)
    taken, claimed = await queue.poll(), await queue.poll()
    assert taken is not None
    assert claimed is not None
    await taken.acknowledge()
    await claimed.acknowledge()
    await claimed.heartbeat("NO_HEARTBEAT")
    assert [work.session_id for work in await queue.unclaimed(longer_than=0)] == [taken.session_id]
    assert not await queue.unclaimed(longer_than=60)


async def test_item_that_is_not_ours_any_more_is_not_stopped(
    queue: WorkQueue, plane: ControlPlane, environment: Environment
):
    environment.create_session(no_brain)
    work = await queue.poll()
    assert work is not None
    await work.acknowledge()
    fault = plane.faults.add(Fault(path="/stop$", status=503))
    await work.stop(still_ours=lambda: not fault.hits)
    assert environment.queue.get(work.work_id).state == "starting"
