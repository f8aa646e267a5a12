"""Which provider a session ends up with when some of them fail, and that it stays there."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from mabridge.breaker import Breaker
from mabridge.named_provider import NamedProvider
from mabridge.testing import Agent, ControlPlane, Environment
from tests.worker.conftest import Serve
from tests.worker.places import Place

pytestmark = pytest.mark.anyio


async def one_call(agent: Agent) -> None:
    agent.session.reply = await agent.call("bash", {"command": "echo done"})


@pytest.fixture
def first(tmp_path: Path) -> Place:
    return Place(tmp_path / "first")


@pytest.fixture
def second(tmp_path: Path) -> Place:
    return Place(tmp_path / "second")


@pytest.mark.parametrize("mood", ["down", "full", "buggy"])
async def test_provider_that_cannot_serve_gives_way_to_the_next(
    environment: Environment, serve: Serve, first: Place, second: Place, mood: str
):
    first.mood = mood
    async with serve({"first": first, "second": second}, clean_up=False) as watched:
        session = environment.create_session(one_call, message="go")
        await session.wait_idle()
    assert session.reply.text == "done"
    fell_back = watched.named("sandbox.fell_back")[0]
    assert fell_back.provider == "second"
    assert (fell_back.reason or "").startswith("first: place ")
    assert not first.keys


@pytest.mark.parametrize("mood", ["hanging", "stuck"])
async def test_provider_that_hangs_leaves_the_next_its_share_of_the_time(
    environment: Environment, serve: Serve, first: Place, second: Place, mood: str
):
    first.mood = mood
    async with serve({"first": first, "second": second}, create_timeout=9.0, clean_up=False) as watched:
        session = environment.create_session(one_call, message="go")
        created = await watched.until("sandbox.created")
        claimed = watched.named("session.claimed")[0]
        await session.wait_idle()
    assert session.reply.text == "done"
    assert "no answer in time" in (watched.named("sandbox.failed")[0].reason or "")
    assert created.at - claimed.at < 8.0  # it would be 9, had the first one had it all


async def test_create_that_failed_and_made_one_all_the_same_leaves_only_one(
    environment: Environment, serve: Serve, first: Place, second: Place
):
    first.mood = "unclear"
    go_on = anyio.Event()

    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "echo precious > file"})
        await go_on.wait()
        agent.session.reply = await agent.call("bash", {"command": "cat file"})

    async with serve({"first": first, "second": second}, clean_up=False) as watched:
        session = environment.create_session(brain, message="go")
        await watched.until("call.answered")
        assert first.keys == second.keys != set()
        first.mood = "well"
        await environment.plane.wait_until(lambda: not first.keys)
        go_on.set()
        await session.wait_idle()
    assert session.reply.text == "precious"
    assert second.keys


async def test_create_that_failed_is_looked_for_before_another_is_made(
    environment: Environment, serve: Serve, first: Place
):
    first.mood = "unclear"
    async with serve({"first": first}, clean_up=False) as watched:
        session = environment.create_session(one_call, message="go")
        await session.wait_idle()
    assert session.reply.text == "done"
    assert watched.named("sandbox.attached")
    assert first.asked.count("create") == 1


async def test_session_stays_with_its_sandbox_while_its_provider_is_down(
    environment: Environment, serve: Serve, first: Place, second: Place
):
    """It is idle, and resumed while its provider cannot be asked: another sandbox would not have its files."""

    async def brain(agent: Agent) -> None:
        if agent.text == "go":
            await agent.call("bash", {"command": "echo precious > file"})
        else:
            agent.session.reply = await agent.call("bash", {"command": "cat file"})

    async with serve({"first": first, "second": second}, clean_up=False) as watched:
        session = environment.create_session(brain, message="go")
        await watched.until("session.released")
        first.mood = "down"
        session.send_message("again")
        await watched.until("sandbox.failed")
        first.mood = "well"
        await session.wait_idle(timeout=60)
    assert session.reply.text == "precious"
    assert not second.keys


async def test_resumed_session_whose_provider_stays_down_is_told_so(
    environment: Environment, serve: Serve, first: Place, second: Place
):
    async with serve({"first": first, "second": second}, create_timeout=2.0, clean_up=False) as watched:
        session = environment.create_session(one_call, message="go")
        await watched.until("session.released")
        first.mood = "down"
        session.send_message("again")
        await watched.until("session.claimed", 2)
        await session.wait_idle(timeout=60)
    assert "first: place attach: " in session.reply.text
    assert session.reply.is_error
    assert not second.keys


async def test_dead_provider_is_left_alone_after_three_failures(
    environment: Environment, serve: Serve, first: Place, second: Place
):
    first.mood = "down"
    async with serve({"first": first, "second": second}, clean_up=False) as watched:
        for _ in range(6):
            await environment.create_session(one_call, message="go").wait_idle()
    assert len(first.asked) == 3
    assert len(watched.named("provider.down")) == 1
    assert "left alone for" in (watched.named("sandbox.failed")[-1].reason or "")


def test_breaker_lets_one_try_after_a_while_and_rests_longer_each_time():
    breaker = Breaker()
    assert [breaker.failed("x", 0.0) for _ in range(3)] == [False, False, True]
    assert breaker.wait(5.0) == 10.0
    assert breaker.wait(15.0) == 0.0
    assert breaker.wait(15.0) > 0  # the others wait for what comes of that one
    breaker.failed("x", 16.0)
    assert breaker.wait(16.0) == 30.0
    assert breaker.wait(46.0) == 0.0
    breaker.succeeded()
    assert not breaker.tripped
    assert breaker.wait(47.0) == breaker.wait(47.0) == 0.0


async def test_no_more_sandboxes_than_allowed_are_used_at_a_provider(
    environment: Environment, serve: Serve, first: Place, second: Place
):
    go_on = anyio.Event()

    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "true"})
        await go_on.wait()

    providers = {"first": NamedProvider(name="", provider=first, max_sandboxes=1), "second": second}
    async with serve(providers, clean_up=False) as watched:
        for _ in range(3):
            environment.create_session(brain, message="go")
        await watched.until("call.answered", 3)
        assert (len(first.keys), len(second.keys)) == (1, 2)
        go_on.set()
        await watched.until("session.released", 3)
        environment.create_session(brain, message="go")
        await watched.until("session.released", 4)
    assert len(first.keys) == 2  # the place was free again


async def test_no_more_sessions_are_claimed_than_may_have_a_sandbox(
    environment: Environment, serve: Serve, first: Place
):
    go_on = anyio.Event()

    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "true"})
        await go_on.wait()

    async with serve({"first": NamedProvider(name="", provider=first, max_sandboxes=2)}, clean_up=False) as watched:
        sessions = [environment.create_session(brain, message="go") for _ in range(3)]
        await watched.until("call.answered", 2)
        assert len(watched.worker.sessions) == 2
        go_on.set()
        for session in sessions:
            await session.wait_idle()


async def test_session_waits_for_a_place_at_the_only_provider_that_may_serve_it(
    plane: ControlPlane, environment: Environment, serve: Serve, first: Place, second: Place
):
    from mabridge import Route

    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "sleep 0.5"})

    providers = {"first": NamedProvider(name="", provider=first, max_sandboxes=1), "second": second}
    async with serve(providers, routes=[Route(providers=("first",))], clean_up=False) as watched:
        sessions = [environment.create_session(brain, message="go") for _ in range(3)]
        for session in sessions:
            await session.wait_idle(timeout=60)
    assert not any(event.is_error for event in watched.named("call.ended"))
    assert not second.keys
