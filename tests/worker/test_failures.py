"""What goes wrong, and that no session is left silent by it."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from anthropic import AsyncAnthropic

from mabridge import ConfigError, ProviderConfig, Route, Worker
from mabridge.testing import Agent, ControlPlane, Environment, Fault
from tests.worker.conftest import Serve, remove_sandboxes

pytestmark = pytest.mark.anyio


async def one_call(agent: Agent) -> None:
    agent.session.reply = await agent.call("bash", {"command": "echo done"})


async def reply_to(environment: Environment, **session) -> str:
    created = environment.create_session(one_call, message="go", **session)
    await created.wait_idle()
    assert created.reply.is_error
    assert created.reply.by == "worker"
    return created.reply.text


async def test_session_with_memory_stores_is_told_that_they_cannot_be_mounted(
    environment: Environment, serve: Serve, plane: ControlPlane
):
    async with serve() as watched:
        text = await reply_to(environment, memory_stores=[plane.create_memory_store("notes", {"/a.md": "x"})])
    assert "memory stores" in text
    assert not watched.named("sandbox.created")


async def test_session_that_no_route_takes_is_told_why(environment: Environment, serve: Serve):
    async with serve(routes=[Route(agent="other-*", providers=("local",))]):
        assert "Route 1 does not match: the agent is" in await reply_to(environment)


async def test_session_goes_where_its_route_says(environment: Environment, serve: Serve, local: ProviderConfig):
    other = local.model_copy(update={"options": {"root": local.options["root"] + "-other"}})
    routes = [Route(metadata={"team": "data-*"}, providers=("other",)), Route(providers=("local",))]
    async with serve({"local": local, "other": other}, routes=routes) as watched:
        await environment.create_session(one_call, message="go", metadata={"team": "data-1"}).wait_idle()
        await environment.create_session(one_call, message="go").wait_idle()
    assert sorted(event.provider or "" for event in watched.named("sandbox.created")) == ["local", "other"]


@pytest.fixture
def broken(tmp_path: Path) -> ProviderConfig:
    """A provider that can make nothing: a file is where its directory should be."""
    (tmp_path / "file").write_text("")
    return ProviderConfig(type="local", options={"root": str(tmp_path / "file")})


async def test_provider_that_fails_gives_way_to_the_next(
    environment: Environment, serve: Serve, local: ProviderConfig, broken: ProviderConfig
):
    async with serve({"broken": broken, "local": local}) as watched:
        session = environment.create_session(one_call, message="go")
        await session.wait_idle()
    assert session.reply.text == "done"
    assert watched.named("sandbox.failed")[0].provider == "broken"


async def test_session_without_a_sandbox_is_told_why(environment: Environment, serve: Serve, broken: ProviderConfig):
    async with serve({"broken": broken}, create_timeout=0.5):
        text = await reply_to(environment)
    assert "no sandbox could be had" in text
    assert "broken:" in text


async def test_sandbox_that_is_gone_is_made_anew_and_the_agent_is_told(
    environment: Environment, serve: Serve, local: ProviderConfig
):
    texts: list[str] = []

    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "echo precious > file"})
        await remove_sandboxes(local, environment)
        for _ in range(3):
            texts.append((await agent.call("bash", {"command": "cat file 2>/dev/null || echo lost"})).text)

    async with serve() as watched:
        await environment.create_session(brain, message="go").wait_idle()
    assert watched.named("sandbox.gone")
    # The call that found out is not run again; the next one is told where it is; and from then on all is as usual.
    assert texts[0].startswith("The sandbox was lost while this ran")
    assert texts[1].startswith("[The sandbox of this session was lost.")
    assert texts[1].splitlines()[-1] == texts[2] == "lost"


async def test_result_that_the_platform_does_not_take_is_replaced_by_one_that_says_so(
    plane: ControlPlane, environment: Environment, serve: Serve
):
    plane.faults.add(Fault(method="POST", path="/events$", status=413))
    async with serve():
        text = await reply_to(environment)
    assert "did not take the result" in text
    assert "413" in text


async def test_lost_lease_stops_everything_and_touches_nothing(serve: Serve, local: ProviderConfig):
    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "echo begun > file; sleep 4242"})

    async with ControlPlane(lease_ttl=2.0) as plane:
        environment = plane.create_environment()
        async with serve(environment=environment) as watched:
            session = environment.create_session(brain, message="go")
            await watched.until("call.started")
            await watched.until("sandbox.created")
            plane.faults.add(Fault(path="/poll$", status=503, times=None))
            environment.queue.lapse(session.id)
            await watched.until("session.lost")
            assert len(list(Path(local.options["root"]).iterdir())) == 1
    assert not any(record.path.endswith("/stop") for record in plane.requests)
    assert not any(record.method == "POST" and record.path.endswith("/events") for record in plane.requests)
    assert not watched.named("sandbox.removed")


async def test_operators_stop_ends_the_call_and_the_session(serve: Serve):
    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "echo so far; sleep 4242"})

    async with ControlPlane(lease_ttl=2.0) as plane:
        environment = plane.create_environment()
        async with serve(environment=environment) as watched:
            session = environment.create_session(brain, message="go")
            await watched.until("call.started")
            environment.queue.stop(session.id, force=False)
            await watched.until("session.released", timeout=20)
        (call,) = session.calls
        (accepted,) = session.results(call.id).accepted
        assert accepted["is_error"] is True
        assert environment.queue.get(session.id).state == "stopped"


async def test_terminated_session_is_let_go(environment: Environment, serve: Serve):
    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "sleep 4242"})

    async with serve() as watched:
        session = environment.create_session(brain, message="go")
        await watched.until("call.started")
        await watched.until("sandbox.created")
        session.terminate()
        released = await watched.until("session.released", timeout=20)
    assert released.reason == "terminated"
    assert watched.named("sandbox.removed")


async def test_wrong_key_ends_the_worker_with_a_clear_error(environment: Environment, plane: ControlPlane, local):
    async with AsyncAnthropic(base_url=plane.url, api_key="unused") as client:
        worker = Worker(client, environment_id=environment.id, environment_key="wrong", providers={"local": local})
        with pytest.raises(ConfigError, match="rejected the environment key"):
            await worker.run()


async def test_revoked_key_ends_the_worker_after_the_sessions_that_it_serves(
    environment: Environment, plane: ControlPlane, local: ProviderConfig
):
    go_on = anyio.Event()

    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "true"})
        await go_on.wait()
        assert (await agent.call("bash", {"command": "echo last"})).text == "last"

    async with AsyncAnthropic(base_url=plane.url, api_key="unused") as client:
        worker = Worker(
            client,
            environment_id=environment.id,
            environment_key=environment.key,
            providers={"local": local},
            max_idle=0,
        )
        session = environment.create_session(brain, message="go")

        async def revoke() -> None:
            await session.wait_for(lambda event: event["type"] == "user.tool_result")
            environment.revoke_key()
            go_on.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(revoke)
            with pytest.raises(ConfigError, match="revoked"):
                await worker.run()
    assert session.status == "idle"
    assert not session.open_calls


async def test_draining_worker_serves_what_it_has_and_claims_no_more(environment: Environment, serve: Serve, local):
    go_on = anyio.Event()

    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "true"})
        await go_on.wait()
        await agent.call("bash", {"command": "true"})

    async with serve() as watched:
        first = environment.create_session(brain, message="go")
        await watched.until("call.answered")
        watched.worker.drain()
        second = environment.create_session(brain, message="go")
        go_on.set()
        await watched.until("worker.stopped")
    assert not first.open_calls
    assert environment.queue.get(second.id).state == "queued"


def test_route_to_a_provider_that_is_not_there_is_refused(local: ProviderConfig):
    with pytest.raises(ConfigError, match="routes name providers that there are not: nowhere"):
        Worker(
            AsyncAnthropic(api_key="x"),
            environment_id="env_1",
            environment_key="k",
            providers={"local": local},
            routes=[Route(providers=("nowhere",))],
        )
