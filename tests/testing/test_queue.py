"""The work queue over HTTP, through the SDK's typed client."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anthropic import AsyncAnthropic, BadRequestError, ConflictError, NotFoundError
from anthropic.types.beta.environments import BetaHeartbeatPreconditionFailedError, BetaSelfHostedWork

from mabridge.testing import Agent, ControlPlane, Environment, Fault
from tests.testing.conftest import MakeClient, one_bash, silent, until_calls

pytestmark = pytest.mark.anyio


async def poll(client: AsyncAnthropic, environment: Environment, **options: Any) -> BetaSelfHostedWork | None:
    work: BetaSelfHostedWork | None = await client.beta.environments.work.poll(environment.id, **options)
    return work


async def claim(client: AsyncAnthropic, environment: Environment) -> str:
    """Poll, acknowledge and beat once; returns the heartbeat."""
    item = await poll(client, environment, block_ms=999)
    assert item is not None
    work = client.beta.environments.work
    await work.ack(item.id, environment_id=environment.id)
    beat = await work.heartbeat(item.id, environment_id=environment.id, expected_last_heartbeat="NO_HEARTBEAT")
    return beat.last_heartbeat


async def test_item_has_the_session_id_and_moves_through_its_states(
    client: AsyncAnthropic, environment: Environment
) -> None:
    session = environment.create_session(one_bash)
    work = client.beta.environments.work

    item = await poll(client, environment)
    assert item is not None
    assert (item.id, item.data.id, item.data.type, item.state) == (session.id, session.id, "session", "queued")
    assert item.environment_id == environment.id
    acked = await work.ack(item.id, environment_id=environment.id)
    assert acked.state == "starting"
    assert acked.acknowledged_at
    assert acked.secret is None
    beat = await work.heartbeat(item.id, environment_id=environment.id, expected_last_heartbeat="NO_HEARTBEAT")
    assert (beat.state, beat.lease_extended, beat.ttl_seconds) == ("active", True, 1)
    stopping = await work.stop(item.id, environment_id=environment.id)
    assert stopping.state == "stopping"
    beat = await work.heartbeat(item.id, environment_id=environment.id, expected_last_heartbeat="whatever")
    assert (beat.state, beat.lease_extended) == ("stopping", False)
    stopped = await work.stop(item.id, environment_id=environment.id, force=True)
    assert stopped.state == "stopped"
    beat = await work.heartbeat(item.id, environment_id=environment.id, expected_last_heartbeat="whatever")
    assert beat.state == "stopped"
    with pytest.raises(ConflictError):
        await work.stop(item.id, environment_id=environment.id, force=True)


async def test_long_poll_wakes_when_work_arrives(client: AsyncAnthropic, environment: Environment) -> None:
    answered: list[tuple[BetaSelfHostedWork | None, float]] = []

    async def wait() -> None:
        answered.append((await poll(client, environment, block_ms=999), time.monotonic()))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await environment.plane.wait_until(lambda: environment.queue.pollers == 1)
        created = time.monotonic()
        session = environment.create_session(silent)
    item, at = answered[0]
    assert item is not None
    assert item.id == session.id
    assert at - created < 0.5


async def test_poll_of_an_empty_queue_answers_null_after_block_ms(
    client: AsyncAnthropic, environment: Environment
) -> None:
    start = time.monotonic()
    assert await poll(client, environment, block_ms=300) is None
    assert 0.3 <= time.monotonic() - start < 0.9
    start = time.monotonic()
    assert await poll(client, environment) is None
    assert time.monotonic() - start < 0.25


@pytest.mark.parametrize("block_ms", [0, 1000])
async def test_block_ms_out_of_bounds_is_refused(
    client: AsyncAnthropic, environment: Environment, block_ms: int
) -> None:
    with pytest.raises(BadRequestError):
        await poll(client, environment, block_ms=block_ms)


async def test_unacknowledged_item_is_offered_again_only_after_the_reclaim_time(
    client: AsyncAnthropic, environment: Environment
) -> None:
    session = environment.create_session(silent)
    assert await poll(client, environment) is not None
    assert await poll(client, environment) is None
    assert await poll(client, environment, reclaim_older_than_ms=5000) is None
    again = await poll(client, environment, block_ms=999, reclaim_older_than_ms=100)
    assert again is not None
    assert again.id == session.id


async def test_lapsed_lease_puts_the_item_back_and_breaks_the_chain(
    client: AsyncAnthropic, environment: Environment
) -> None:
    session = environment.create_session(silent)
    last = await claim(client, environment)
    assert await poll(client, environment) is None
    with anyio.fail_after(5):
        while (item := await poll(client, environment, block_ms=999)) is None:
            pass
    assert (item.id, item.state, item.latest_heartbeat_at) == (session.id, "queued", None)
    with pytest.raises(BetaHeartbeatPreconditionFailedError) as caught:
        await client.beta.environments.work.heartbeat(
            item.id, environment_id=environment.id, expected_last_heartbeat=last
        )
    state = caught.value.details.current_state
    assert (state.state, state.last_heartbeat, state.lease_extended, state.ttl_seconds) == ("queued", None, False, 1)


async def test_heartbeats_keep_the_lease(client: AsyncAnthropic, environment: Environment) -> None:
    session = environment.create_session(silent)
    last = await claim(client, environment)
    for _ in range(3):
        assert await poll(client, environment, block_ms=500) is None
        beat = await client.beta.environments.work.heartbeat(
            session.id, environment_id=environment.id, expected_last_heartbeat=last
        )
        last = beat.last_heartbeat


async def test_second_claim_of_a_held_lease_is_refused_with_the_lease_state(
    client: AsyncAnthropic, environment: Environment
) -> None:
    session = environment.create_session(silent)
    last = await claim(client, environment)
    with pytest.raises(BetaHeartbeatPreconditionFailedError) as caught:
        await client.beta.environments.work.heartbeat(
            session.id, environment_id=environment.id, expected_last_heartbeat="NO_HEARTBEAT"
        )
    assert caught.value.details.current_state.last_heartbeat == last
    assert caught.value.details.current_state.state == "active"


async def test_next_heartbeat_can_be_made_to_fail(
    plane: ControlPlane, client: AsyncAnthropic, environment: Environment
) -> None:
    session = environment.create_session(silent)
    last = await claim(client, environment)
    plane.faults.add(Fault(method="POST", path=r"/heartbeat$", status=412))
    with pytest.raises(BetaHeartbeatPreconditionFailedError) as caught:
        await client.beta.environments.work.heartbeat(
            session.id, environment_id=environment.id, expected_last_heartbeat=last
        )
    assert caught.value.details.current_state.lease_extended is False


async def test_acknowledged_item_without_heartbeat_is_stuck(client: AsyncAnthropic, environment: Environment) -> None:
    session = environment.create_session(silent)
    await poll(client, environment)
    await client.beta.environments.work.ack(session.id, environment_id=environment.id)
    await anyio.sleep(1.1)  # longer than the lease
    assert await poll(client, environment, reclaim_older_than_ms=1) is None
    assert environment.queue.items[0].state == "starting"


async def test_stopped_session_is_queued_again_by_a_message_or_an_interrupt(
    client: AsyncAnthropic, environment: Environment
) -> None:
    session = environment.create_session(silent)
    wakes: list[Callable[[], Any]] = [lambda: session.send_message("hello"), session.interrupt]
    for wake in wakes:
        await claim(client, environment)
        await client.beta.environments.work.stop(session.id, environment_id=environment.id, force=True)
        assert await poll(client, environment) is None
        wake()
    assert await poll(client, environment) is not None


async def test_poll_of_a_deleted_session_is_404_once(
    client: AsyncAnthropic, owner: AsyncAnthropic, environment: Environment
) -> None:
    session = environment.create_session(silent)
    other = environment.create_session(silent)
    await owner.beta.sessions.delete(session.id)
    with pytest.raises(NotFoundError, match="EnvironmentInstance not found for session"):
        await poll(client, environment)
    item = await poll(client, environment)
    assert item is not None
    assert item.id == other.id


async def test_item_of_a_deleted_session_can_be_offered_instead(make_client: MakeClient) -> None:
    async with ControlPlane(vanished="offered") as plane:
        environment = plane.create_environment()
        session = environment.create_session(silent)
        session.delete()
        item = await poll(make_client(environment.key).with_options(base_url=plane.url), environment)
        assert item is not None
        assert item.id == session.id


async def test_lease_can_be_made_to_lapse_from_the_acknowledgement(make_client: MakeClient) -> None:
    async with ControlPlane(lease_ttl=1.0, lease_from="ack") as plane:
        environment = plane.create_environment()
        session = environment.create_session(silent)
        client = make_client(environment.key).with_options(base_url=plane.url)
        await poll(client, environment)
        await client.beta.environments.work.ack(session.id, environment_id=environment.id)
        with anyio.fail_after(5):
            while await poll(client, environment, block_ms=999) is None:
                pass


@pytest.mark.parametrize("requeue", [False, True])
async def test_stopped_session_whose_agent_calls_a_tool_is_queued_only_if_asked_for(requeue: bool) -> None:
    async with ControlPlane(requeue_on_call=requeue) as plane:
        environment = plane.create_environment()
        thinking = anyio.Event()

        async def brain(agent: Agent) -> None:
            await thinking.wait()
            await agent.call("bash", {"command": "true"})

        session = environment.create_session(brain, message="go")
        environment.queue.stop(session.id, force=True)
        thinking.set()
        await until_calls(session)
        assert environment.queue.get(session.id).state == ("queued" if requeue else "stopped")


async def test_stats_list_retrieve_and_update(
    client: AsyncAnthropic, owner: AsyncAnthropic, environment: Environment
) -> None:
    sessions = [environment.create_session(silent) for _ in range(3)]
    await client.beta.environments.work.poll(environment.id, anthropic_worker_id="w1")
    stats = await owner.beta.environments.work.stats(environment.id)
    assert (stats.depth, stats.pending, stats.workers_polling) == (2, 1, 1)
    assert stats.oldest_queued_at
    listed = [item.id async for item in client.beta.environments.work.list(environment.id, limit=2)]
    assert listed == [session.id for session in sessions]
    update = owner.beta.environments.work.update
    await update(sessions[0].id, environment_id=environment.id, metadata={"a": "1", "b": "2"})
    await update(sessions[0].id, environment_id=environment.id, metadata={"a": None})
    item = await owner.beta.environments.work.retrieve(sessions[0].id, environment_id=environment.id)
    assert item.metadata == {"b": "2"}


async def test_healthcheck_item_names_no_session(environment: Environment, make_client: MakeClient) -> None:
    environment.add_healthcheck()
    lenient = make_client(environment.key).copy()  # a copy does not check strictly
    item = await poll(lenient, environment)
    assert item is not None
    assert item.data.type != "session"


def test_lease_shorter_than_the_api_can_tell_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 second"):
        ControlPlane(lease_ttl=0.5)
