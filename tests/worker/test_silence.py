"""No session is left silent: whatever fails, each open call of ours is answered before its item is let go."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from mabridge.testing import Agent, ControlPlane, Environment, Fault
from mabridge.tools import ToolLimits
from tests.worker.conftest import Serve
from tests.worker.places import Broken, Hanging

pytestmark = pytest.mark.anyio

# A call in a form that no platform should send, and that the ledger does not bear.
STRANGE = {
    "type": "agent.tool_use",
    "name": "bash",
    "input": {},
    "evaluated_permission": "allow",
    "session_thread_id": ["?"],
}


async def one_call(agent: Agent) -> None:
    agent.session.reply = await agent.call("bash", {"command": "echo done"})


async def test_fault_of_our_own_is_answered_again_and_again_and_then_the_session_is_given_up(
    environment: Environment, serve: Serve
):
    async def brain(agent: Agent) -> None:
        agent.session.replies = []
        for _ in range(2):
            agent.session.replies.append(await agent.call("bash", {"command": "sleep 4242"}))

    async with serve() as watched:
        session = environment.create_session(brain, message="go")
        await watched.until("call.started")
        session.emit(STRANGE)
        await watched.until("session.given_up")
        await session.wait_idle()
    assert len(watched.named("session.failed")) == 3
    for reply in session.replies:
        assert reply.is_error
        assert "failed (TypeError)" in reply.text
    # It is not stopped: the platform would not offer it again. Its lease lapses.
    assert environment.queue.get(session.id).state == "active"


async def test_session_goes_on_after_a_fault_that_passes(plane: ControlPlane, environment: Environment, serve: Serve):
    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "echo first"})
        await one_call(agent)

    session = environment.create_session(brain)
    half = {"id": session.id, "type": "session", "status": "idle"}
    plane.faults.add(Fault(method="GET", path=f"/sessions/{session.id}$", status=200, body=half))
    session.send_message("go")
    async with serve() as watched:
        await session.wait_idle()
        await watched.until("session.released")
    assert session.reply.text.endswith("done")
    assert "AttributeError" in (watched.named("session.failed")[0].reason or "")


async def test_fault_in_an_adapters_own_code_is_an_answer(environment: Environment, serve: Serve, tmp_path: Path):
    async with serve({"broken": Broken(tmp_path / "root")}, clean_up=False) as watched:
        session = environment.create_session(one_call, message="go")
        await session.wait_idle()
    assert session.reply.is_error
    assert "KeyError" in session.reply.text
    assert not watched.named("session.failed")


async def test_provider_that_never_answers_is_given_up_on(environment: Environment, serve: Serve, tmp_path: Path):
    place = Hanging(tmp_path / "root")

    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "echo first"})
        place.mood = "hanging"
        agent.session.reply = await agent.call("read", {"file_path": "/workspace/file"})

    limits = ToolLimits(file_timeout=0.5, provider_slack=1.0)
    async with serve({"hanging": place}, limits=limits, clean_up=False) as watched:
        session = environment.create_session(brain, message="go")
        await watched.until("call.ended", 2)
        await session.wait_idle()
    assert session.reply.is_error
    assert "did not answer within" in session.reply.text


async def test_rejected_heartbeat_answers_what_runs_and_does_not_stop_the_item(serve: Serve):
    async def brain(agent: Agent) -> None:
        agent.session.replies = await agent.calls(
            [("bash", {"command": "echo so far; sleep 4242"}), ("bash", {"command": "echo next"})]
        )

    async with ControlPlane(lease_ttl=5.0) as plane:
        environment = plane.create_environment()
        async with serve(environment=environment, max_sessions=1) as watched:
            session = environment.create_session(brain, message="go")
            await watched.until("sandbox.created")
            await watched.until("call.started")
            plane.faults.add(Fault(path="/poll$", status=503, times=None))
            plane.faults.add(Fault(path="/heartbeat$", status=403))
            await watched.until("session.released", timeout=30)
            await session.wait_idle()
    assert [reply.is_error for reply in session.replies] == [True, True]
    assert not any(record.path.endswith("/stop") for record in plane.requests)


async def test_platform_that_refuses_the_session_leaves_the_item_to_others(
    plane: ControlPlane, environment: Environment, serve: Serve
):
    session = environment.create_session(one_call, message="go")
    plane.faults.add(Fault(path=f"/sessions/{session.id}$", status=403))
    async with serve() as watched:
        await watched.until("session.released")
    assert watched.named("session.failed")
    assert environment.queue.get(session.id).state == "active"


async def test_deleted_session_is_let_go_for_good(plane: ControlPlane, environment: Environment, serve: Serve):
    session = environment.create_session(one_call)
    plane.faults.add(Fault(path=f"/sessions/{session.id}$", status=404))
    async with serve() as watched:
        await watched.until("session.released")
    assert environment.queue.get(session.id).state == "stopped"


async def test_item_that_a_dead_worker_took_and_never_claimed_is_served(environment: Environment, serve: Serve):
    """It is offered to nobody, and its session would wait for ever (anthropic-sdk-python #1746)."""
    session = environment.create_session(one_call, message="go")
    item = await environment.queue.poll(block=None, reclaim=None, worker_id="dead")
    assert item is not None
    environment.queue.ack(item.id)
    async with serve(reap_interval=0.5, reap_grace=0.1):
        await session.wait_idle()
    assert session.reply.text == "done"


async def test_rate_limited_poll_waits_as_long_as_it_is_told(plane: ControlPlane, serve: Serve):
    def polls() -> list[float]:
        return [record.at for record in plane.requests if record.path.endswith("/poll")]

    plane.faults.add(Fault(path="/poll$", status=429, headers={"retry-after": "3"}))
    async with serve() as watched:
        await watched.until("poll.failed")
        await plane.wait_until(lambda: len(polls()) >= 2)

    first, second, *_ = polls()
    assert second - first >= 3.0


async def test_worker_serves_on_through_everything_odd_in_the_queue(
    plane: ControlPlane, environment: Environment, serve: Serve
):
    environment.add_healthcheck()
    environment.queue.add("work_1", {}, has_secret=False)
    environment.queue.add("work_2", {"type": "session", "id": "../etc"}, has_secret=False)
    environment.create_session(one_call, message="go").delete()
    session = environment.create_session(one_call, message="go")
    plane.faults.add(Fault(path="/poll$", status=503))
    plane.faults.add(Fault(path="/poll$", cut=True))
    async with serve():
        await session.wait_idle()
    assert session.reply.text == "done"


async def test_item_whose_lease_is_taken_while_its_sandbox_is_removed_is_not_stopped(serve: Serve, tmp_path: Path):
    from mabridge.named_provider import NamedProvider

    place = Broken(tmp_path / "root", teardown=3.0, commands=False)
    async with ControlPlane(lease_ttl=5.0) as plane:
        environment = plane.create_environment()
        named = NamedProvider(name="", provider=place, when_done="teardown")
        async with serve({"p": named}, environment=environment, clean_up=False) as watched:
            session = environment.create_session(one_call, message="go")
            with anyio.fail_after(30):
                await place.tearing_down.wait()
            plane.faults.add(Fault(path="/poll$", status=503, times=None))
            environment.queue.lapse(session.id)
            await watched.until("session.lost")
        assert not any(record.path.endswith("/stop") for record in plane.requests)


async def test_nothing_new_is_begun_once_the_lease_has_ended(serve: Serve):
    """Not even while the results of what ran are being sent, which may take a while."""

    async def brain(agent: Agent) -> None:
        agent.session.replies = await agent.calls([("bash", {"command": "echo so far; sleep 4242"})])

    async with ControlPlane(lease_ttl=2.0) as plane:
        environment = plane.create_environment()
        async with serve(environment=environment) as watched:
            session = environment.create_session(brain, message="go")
            await watched.until("sandbox.created")
            await watched.until("call.started")
            slow = plane.faults.add(Fault(method="POST", path="/events$", hang=True))
            environment.queue.stop(session.id, force=False)
            await plane.wait_until(lambda: slow.hits == 1, timeout=30)
            late = session.emit({**STRANGE, "input": {"command": "touch late"}, "session_thread_id": None})
            await watched.until("session.released", timeout=40)
        assert late["id"] not in [event.call_id for event in watched.named("call.started")]
