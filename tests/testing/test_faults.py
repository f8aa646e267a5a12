"""Faults on demand, and the record of requests."""

from __future__ import annotations

import time

import anyio
import httpx2
import pytest
from anthropic import (
    APIConnectionError,
    APITimeoutError,
    AsyncAnthropic,
    BadRequestError,
    InternalServerError,
    RateLimitError,
)

from mabridge.testing import ControlPlane, Environment, Fault
from tests.testing.conftest import MakeClient, one_bash, silent, tool_result, until_calls

pytestmark = pytest.mark.anyio


async def statuses(client: AsyncAnthropic, environment: Environment, count: int) -> list[int]:
    found = []
    for _ in range(count):
        try:
            await client.beta.environments.work.poll(environment.id)
            found.append(200)
        except InternalServerError as error:
            found.append(error.status_code)
    return found


async def test_fault_strikes_so_many_times_and_is_over(
    plane: ControlPlane, client: AsyncAnthropic, environment: Environment
) -> None:
    fault = plane.faults.add(Fault(method="GET", path=r"/poll$", status=503, times=2, skip=1))
    assert await statuses(client, environment, 5) == [200, 503, 503, 200, 200]
    assert fault.hits == 2


async def test_every_nth_and_random_faults_are_repeatable(
    plane: ControlPlane, client: AsyncAnthropic, environment: Environment
) -> None:
    fault = plane.faults.add(Fault(path=r"/poll$", status=500, times=None, every=3))
    assert await statuses(client, environment, 6) == [200, 200, 500, 200, 200, 500]
    plane.faults.remove(fault)
    runs = []
    for _ in range(2):
        plane.faults.clear()
        plane.faults.add(Fault(path=r"/poll$", status=500, times=None, rate=0.5, seed=7))
        runs.append(await statuses(client, environment, 12))
    assert runs[0] == runs[1]
    assert set(runs[0]) == {200, 500}


async def test_fault_carries_headers(plane: ControlPlane, client: AsyncAnthropic, environment: Environment) -> None:
    plane.faults.add(Fault(path=r"/poll$", status=429, headers={"Retry-After": "7"}))
    with pytest.raises(RateLimitError) as caught:
        await client.beta.environments.work.poll(environment.id)
    assert caught.value.response.headers["retry-after"] == "7"


@pytest.mark.parametrize("answer", [{"status": 502}, {"cut": True}])
async def test_answer_lost_after_the_effect(
    plane: ControlPlane, client: AsyncAnthropic, environment: Environment, answer: dict[str, int]
) -> None:
    session = environment.create_session(one_bash, message="go")
    (call,) = await until_calls(session)
    plane.faults.add(Fault(method="POST", path=r"/events$", effect="after", **answer))  # type: ignore[arg-type]
    with pytest.raises((InternalServerError, APIConnectionError)):
        await client.beta.sessions.events.send(session.id, events=[tool_result(call)])
    assert len(session.results(call).accepted) == 1
    with pytest.raises(BadRequestError):
        await client.beta.sessions.events.send(session.id, events=[tool_result(call)])


async def test_connection_cut_before_the_effect(
    plane: ControlPlane, client: AsyncAnthropic, environment: Environment
) -> None:
    session = environment.create_session(one_bash, message="go")
    (call,) = await until_calls(session)
    plane.faults.add(Fault(method="POST", path=r"/events$", cut=True))
    with pytest.raises(APIConnectionError) as caught:
        await client.beta.sessions.events.send(session.id, events=[tool_result(call)])
    assert not isinstance(caught.value, APITimeoutError)
    assert session.results(call).accepted == []
    assert plane.requests[-1].status is None


async def test_hanging_request_is_never_answered(
    plane: ControlPlane, environment: Environment, make_client: MakeClient
) -> None:
    plane.faults.add(Fault(path=r"/poll$", hang=True))
    client = make_client(environment.key).with_options(timeout=0.3)
    with pytest.raises(APITimeoutError):
        await client.beta.environments.work.poll(environment.id)
    await client.beta.environments.work.poll(environment.id)


async def test_plane_closes_quickly_with_a_hanging_request_and_an_open_stream(make_client: MakeClient) -> None:
    async with anyio.create_task_group() as tasks:
        async with ControlPlane() as plane:
            environment = plane.create_environment()
            session = environment.create_session(silent)
            client = make_client(environment.key).with_options(base_url=plane.url)
            plane.faults.add(Fault(path=r"/poll$", hang=True))

            async def hang() -> None:
                with pytest.raises(APIConnectionError):
                    await client.beta.environments.work.poll(environment.id)

            async def listen() -> None:
                async with await client.beta.sessions.events.stream(session.id) as stream:
                    assert [event async for event in stream] == []

            tasks.start_soon(hang)
            tasks.start_soon(listen)
            await plane.wait_until(lambda: len(plane.requests) == 2)
            start = time.monotonic()
        assert time.monotonic() - start < 2


async def test_delayed_answer_is_otherwise_as_usual(
    plane: ControlPlane, client: AsyncAnthropic, environment: Environment
) -> None:
    plane.faults.add(Fault(path=r"/poll$", delay=0.3))
    start = time.monotonic()
    assert await client.beta.environments.work.poll(environment.id) is None
    assert time.monotonic() - start >= 0.3


async def test_stream_breaks_after_so_many_events(
    plane: ControlPlane, client: AsyncAnthropic, environment: Environment
) -> None:
    session = environment.create_session(silent)
    plane.faults.add(Fault(path=r"/events/stream$", drop_after=2))
    seen = []
    with pytest.raises(httpx2.TransportError):  # noqa: PT012
        async with await client.beta.sessions.events.stream(session.id) as stream:
            session.send_message("hello")
            async for event in stream:
                seen.append(event.type)
    assert seen == ["user.message", "session.status_running"]


async def test_streams_can_be_ended_in_good_order(
    plane: ControlPlane, client: AsyncAnthropic, environment: Environment
) -> None:
    session = environment.create_session(silent)
    async with await client.beta.sessions.events.stream(session.id) as stream:
        assert session.log.streams == 1
        assert plane.drop_streams(cut=False) == 1
        assert [event async for event in stream] == []


async def test_requests_are_recorded_with_who_called_what(
    plane: ControlPlane, client: AsyncAnthropic, environment: Environment
) -> None:
    await client.beta.environments.work.poll(environment.id, anthropic_worker_id="w1", block_ms=10)
    record = plane.requests[-1]
    assert (record.method, record.status, record.credential, record.worker_id) == ("GET", 200, "environment_key", "w1")
    assert record.path.endswith("/work/poll")
    assert record.query == "block_ms=10"
    assert record.seconds >= 0.01
    environment.revoke_key()
    with pytest.raises(Exception, match="401"):
        await client.beta.environments.work.poll(environment.id)
    assert (plane.requests[-1].status, plane.requests[-1].credential) == (401, None)


async def test_error_in_the_body_comes_out_as_it_is() -> None:
    async def serve() -> None:
        async with ControlPlane() as plane:
            plane.create_environment().create_session(one_bash, message="go")
            raise LookupError("of the test itself")

    with pytest.raises(LookupError):
        await serve()


async def test_plane_can_be_cancelled() -> None:
    async with anyio.create_task_group() as tasks, ControlPlane() as plane:
        plane.create_environment().create_session(one_bash, message="go")
        tasks.cancel_scope.cancel()
        await anyio.sleep_forever()


def test_contradictory_fault_is_refused() -> None:
    with pytest.raises(ValueError, match="one of status, cut and hang"):
        Fault(status=500, hang=True)
