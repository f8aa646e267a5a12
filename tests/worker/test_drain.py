"""A worker that is told to stop: what it finishes, what it hands over, and that others lose nothing by it."""

from __future__ import annotations

import contextlib

import anyio
import pytest

from mabridge import ProviderConfig
from mabridge.testing import Agent, ControlPlane
from tests.worker.conftest import Serve, Watched

pytestmark = pytest.mark.anyio


async def test_call_that_runs_is_let_end_and_then_another_worker_goes_on_at_once(serve: Serve, local: ProviderConfig):
    """The lease would last for five minutes, were it not handed over."""
    drained = anyio.Event()

    async def brain(agent: Agent) -> None:
        first = await agent.call("bash", {"command": "X=kept; echo begun; sleep 1.5; echo ended"})
        assert first.text.split() == ["begun", "ended"]
        await drained.wait()  # the agent thinks while the worker goes
        assert (await agent.call("bash", {"command": "echo $X"})).text == "kept"

    async with ControlPlane(lease_ttl=300.0, grants_ttl=True) as plane:
        environment = plane.create_environment()
        async with serve(environment=environment, max_idle=30, drain_timeout=3600, clean_up=False) as first:
            session = environment.create_session(brain, message="go")
            await first.until("call.started")
            await first.until("sandbox.created")
            first.worker.drain()
            await first.until("worker.stopped")
        assert first.named("call.answered")
        assert [event.session_id for event in first.named("session.handed_over")] == [session.id]
        assert not first.named("sandbox.removed")
        drained.set()
        async with serve(environment=environment) as second:
            await session.wait_idle(timeout=30)
            assert second.named("sandbox.attached")


async def test_call_that_outlasts_the_drain_is_finished_by_the_next_worker(serve: Serve):
    replies: list[str] = []

    async def brain(agent: Agent) -> None:
        replies.append((await agent.call("bash", {"command": "echo ran >> log; sleep 3; cat log"})).text)

    async with ControlPlane(lease_ttl=300.0, grants_ttl=True) as plane:
        environment = plane.create_environment()
        async with serve(environment=environment, drain_timeout=0.5, clean_up=False) as first:
            session = environment.create_session(brain, message="go")
            await first.until("sandbox.created")
            await first.until("call.started")
            await anyio.sleep(0.5)  # the command is in the sandbox by then; if it were not, it would be run later
            first.worker.drain()
            await first.until("worker.stopped", timeout=20)
        assert not first.named("call.answered")
        async with serve(environment=environment):
            await session.wait_idle(timeout=30)
    assert [text.split() for text in replies] == [["ran"]]
    (call,) = session.calls
    assert len(session.results(call.id).accepted) == 1


async def test_platform_that_grants_no_short_lease_is_served_on_until_the_session_rests(serve: Serve):
    drained = anyio.Event()

    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "true"})
        await drained.wait()
        assert (await agent.call("bash", {"command": "echo more"})).text == "more"

    async with ControlPlane(lease_ttl=300.0, grants_ttl=False) as plane:
        environment = plane.create_environment()
        async with serve(environment=environment, max_idle=3600) as watched:
            session = environment.create_session(brain, message="go")
            await watched.until("call.answered")
            watched.worker.drain()
            drained.set()
            # It goes as soon as the agent's turn has ended, and does not wait for max_idle.
            await watched.until("worker.stopped", timeout=20)
        assert session.status == "idle"
        assert watched.named("session.released")
        assert not watched.named("session.handed_over")
        assert environment.queue.get(session.id).state == "stopped"


async def test_held_call_does_not_keep_a_draining_worker(serve: Serve):
    async def brain(agent: Agent) -> None:
        assert (await agent.call("bash", {"command": "echo ok"}, permission="ask")).text == "ok"

    async with ControlPlane(lease_ttl=300.0, grants_ttl=True) as plane:
        environment = plane.create_environment()
        async with serve(environment=environment, clean_up=False) as first:
            session = environment.create_session(brain, message="go")
            await first.until("call.held")
            first.worker.drain()
            await first.until("worker.stopped", timeout=20)
        async with serve(environment=environment) as second:
            await second.until("call.held")
            session.confirm(session.open_calls[0].id, "allow")
            await session.wait_idle()


async def test_rolling_replacement_of_three_workers_loses_and_repeats_nothing(serve: Serve):
    turns, workers, sessions = 6, 3, 9

    async def brain(agent: Agent) -> None:
        for turn in range(turns):
            reply = await agent.call("bash", {"command": f"echo {turn} >> log; sleep 0.1"})
            assert not reply.is_error, reply.text
            await agent.think(0.1)
        assert (await agent.call("bash", {"command": "cat log"})).text.split() == [str(n) for n in range(turns)]

    async with ControlPlane(lease_ttl=20.0, grants_ttl=True) as plane, contextlib.AsyncExitStack() as stack:
        environment = plane.create_environment()
        options = {"environment": environment, "max_sessions": sessions, "clean_up": False}
        running: list[Watched] = [await stack.enter_async_context(serve(**options)) for _ in range(workers)]
        everyone = [*running]
        created = [environment.create_session(brain, message="go") for _ in range(sessions)]
        await running[0].until("call.answered")
        for old in running:
            everyone.append(await stack.enter_async_context(serve(**options)))
            old.worker.drain()
            await old.until("worker.stopped")
        for session in created:
            await session.wait_idle(timeout=60)
        async with serve(environment=environment):  # removes the sandboxes at its end
            pass
    for session in created:
        assert all(len(session.results(call.id).accepted) == 1 for call in session.calls)
    assert any(old.named("session.handed_over") for old in running)
    assert not any(watched.named("session.lost") for watched in everyone)
