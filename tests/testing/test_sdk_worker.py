"""Fidelity: the SDK's own worker, unmodified, serves sessions of the local platform.

Its empty polls are followed by a pause of one to three seconds, so a test that makes it poll twice takes that long.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anthropic import AsyncAnthropic, NotFoundError
from anthropic.lib.tools.agent_toolset import beta_agent_toolset_20260401

from mabridge.testing import Agent, ControlPlane, Environment, Fault, ToolCall
from tests.testing.conftest import MakeClient, one_bash, silent, until_calls

pytestmark = pytest.mark.anyio

Work = Callable[..., AbstractAsyncContextManager[None]]


@pytest.fixture
async def plane() -> AsyncIterator[ControlPlane]:
    async with ControlPlane(lease_ttl=2.0) as plane:
        yield plane


@pytest.fixture
def work(environment: Environment, make_client: MakeClient, tmp_path: Path) -> Work:
    """Runs the SDK's worker for the length of a block."""

    @asynccontextmanager
    async def run(*, retries: int = 0, **options: Any) -> AsyncIterator[None]:
        client = make_client(environment.key).with_options(max_retries=retries)
        worker = client.beta.environments.work.worker(
            environment_id=environment.id,
            environment_key=environment.key,
            workdir=tmp_path,
            max_idle=0.2,
            tools=beta_agent_toolset_20260401,
            **options,
        )
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run)
            yield
            tasks.cancel_scope.cancel()

    return run


async def until_state(environment: Environment, state: str) -> None:
    await environment.plane.wait_until(lambda: [item.state for item in environment.queue.items] == [state])


async def test_serves_turns_with_parallel_calls_and_stops_the_item_when_idle(
    work: Work, environment: Environment, tmp_path: Path
) -> None:
    said = []

    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "cd sub 2>/dev/null || mkdir sub && cd sub; export X=kept"})
        written, where = await agent.calls(
            [("write", {"file_path": "a.txt", "content": agent.text}), ("bash", {"command": "echo $X; basename $PWD"})]
        )
        failed = await agent.call("bash", {"command": "exit_code() { return 3; }; exit_code"})
        said.append((written.text, where.text, failed.is_error))

    session = environment.create_session(brain, message="one")
    async with work():
        await session.wait_idle()
        session.send_message("two!")
        await session.wait_idle()
        await until_state(environment, "stopped")
    assert said[0] == ("wrote 3 bytes to a.txt", "kept\nsub", True)
    assert said[1][0] == "wrote 4 bytes to a.txt"
    assert (tmp_path / "a.txt").read_text() == "two!"
    assert len(session.calls) == 8
    assert all(not session.results(call.id).refused for call in session.calls)


async def test_uses_the_environment_key_to_claim_and_the_token_for_the_session(
    work: Work, plane: ControlPlane, environment: Environment
) -> None:
    session = environment.create_session(one_bash, message="go")
    async with work():
        await session.wait_idle()
        await until_state(environment, "stopped")
    used = {record.path.rpartition("/")[2]: record.credential for record in plane.requests}
    assert used["poll"] == used["ack"] == "environment_key"
    assert {used[name] for name in (session.id, "heartbeat", "stop", "events", "stream")} == {"sessions_token"}
    assert all(record.status == 200 for record in plane.requests)


async def test_asks_runs_after_allow_and_never_after_deny(work: Work, environment: Environment, tmp_path: Path) -> None:
    async def brain(agent: Agent) -> None:
        await agent.calls(
            [
                ToolCall(name="bash", input={"command": "touch allowed"}, permission="ask"),
                ToolCall(name="bash", input={"command": "touch refused"}, permission="ask"),
                ToolCall(name="bash", input={"command": "touch denied"}, permission="deny"),
                ToolCall(name="bash", input={"command": "touch plain"}),
            ]
        )

    session = environment.create_session(brain, message="go")
    async with work():
        await session.wait_for(lambda e: e["type"] == "user.tool_result")
        asked = [call.id for call in session.open_calls]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]
        session.confirm(asked[0], "allow")
        session.confirm(asked[1], "deny")
        await session.wait_idle()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["allowed", "plain"]
    assert [call.reply.by for call in session.calls if call.reply] == ["worker", "denied", "denied", "worker"]


async def test_leaves_custom_calls_to_their_owner(work: Work, environment: Environment) -> None:
    async def brain(agent: Agent) -> None:
        await agent.calls(
            [
                ToolCall(name="lookup", input={"q": 1}, custom=True),
                ToolCall(name="bash", input={"command": "echo mine"}),
            ]
        )

    session = environment.create_session(brain, message="go")
    async with work():
        await session.wait_for(lambda e: e["type"] == "user.tool_result")
        await session.wait_for(
            lambda e: e.get("stop_reason", {}).get("event_ids") == [call.id for call in session.open_calls]
        )
        assert [call.name for call in session.open_calls] == ["lookup"]
        session.answer(session.open_calls[0].id, "from the application")
        await session.wait_idle()


async def test_answers_a_server_tool_not_at_all(work: Work, environment: Environment) -> None:
    async def brain(agent: Agent) -> None:
        found = await agent.server_call("web_search", {"query": "x"}, result="found")
        assert found.text == "found"
        await agent.call("bash", {"command": "true"})

    session = environment.create_session(brain, message="go")
    async with work():
        await session.wait_idle()
    assert [call.reply.by for call in session.calls if call.reply] == ["server", "worker"]


@pytest.mark.parametrize("secret", [False, True])
async def test_downloads_skills_with_the_environment_key_but_not_with_the_token(
    work: Work, plane: ControlPlane, environment: Environment, secret: bool
) -> None:
    skill = plane.create_skill("pdf", {"SKILL.md": "how to", "scripts/run.sh": "#!/bin/sh\necho ran\n"})
    replies = []

    async def brain(agent: Agent) -> None:
        replies.append(await agent.call("bash", {"command": "cat skills/pdf/SKILL.md && skills/pdf/scripts/run.sh"}))

    session = environment.create_session(brain, message="go", skills=[skill], secret=secret)
    async with work():
        await session.wait_idle()
    assert replies[0].is_error == secret
    if not secret:
        assert replies[0].text == "how toran"


async def test_healthcheck_is_stopped_without_a_session(work: Work, environment: Environment) -> None:
    environment.add_healthcheck()
    async with work():
        await until_state(environment, "stopped")


async def test_lost_lease_leaves_the_item_and_the_next_claim_goes_on(
    work: Work, plane: ControlPlane, environment: Environment
) -> None:
    release = anyio.Event()

    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "true"})
        await release.wait()
        await agent.call("bash", {"command": "true"})

    session = environment.create_session(brain, message="go")
    async with work():
        await session.wait_for(lambda e: e["type"] == "user.tool_result")
        environment.queue.lapse(session.id)
        await plane.wait_until(lambda: environment.queue.get(session.id).deliveries == 2)
        lost = [record.status for record in plane.requests if record.path.endswith("/heartbeat")]
        assert lost[-1] == 412
        assert not [record for record in plane.requests if record.path.endswith("/stop")]
        release.set()
        await session.wait_idle()


async def test_lapsed_lease_of_a_dead_worker_hands_the_session_to_the_next(
    work: Work, environment: Environment, client: AsyncAnthropic
) -> None:
    session = environment.create_session(one_bash, message="go")
    await until_calls(session)
    item = await client.beta.environments.work.poll(environment.id)
    assert item is not None
    await client.beta.environments.work.ack(item.id, environment_id=environment.id)
    await client.beta.environments.work.heartbeat(
        item.id, environment_id=environment.id, expected_last_heartbeat="NO_HEARTBEAT"
    )
    async with work():
        await session.wait_idle()
    assert environment.queue.get(session.id).deliveries == 2


@pytest.mark.parametrize("cut", [False, True])
async def test_dropped_streams_lose_no_call(
    work: Work, plane: ControlPlane, environment: Environment, cut: bool
) -> None:
    async def brain(agent: Agent) -> None:
        for index in range(3):
            await agent.call("bash", {"command": f"echo {index}"})
            plane.drop_streams(cut=cut)

    session = environment.create_session(brain, message="go")
    async with work():
        await session.wait_idle()
    assert [len(session.results(call.id).accepted) for call in session.calls] == [1, 1, 1]


async def test_result_whose_answer_was_lost_is_sent_again_and_refused(
    work: Work, plane: ControlPlane, environment: Environment
) -> None:
    plane.faults.add(Fault(method="POST", path=r"/events$", effect="after", status=503))
    session = environment.create_session(one_bash, message="go")
    async with work(retries=1):
        await session.wait_for(lambda e: e["type"] == "user.tool_result")
        await plane.wait_until(lambda: bool(session.results(session.calls[0].id).refused))
        await session.wait_idle()
    assert len(session.results(session.calls[0].id).accepted) == 1


async def test_interrupt_ends_the_turn_and_the_late_result_is_refused(
    work: Work, environment: Environment, tmp_path: Path
) -> None:
    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "touch started; sleep 0.5"})

    session = environment.create_session(brain, message="go")
    async with work():
        await environment.plane.wait_until(lambda: (tmp_path / "started").exists())
        session.interrupt()
        await session.wait_idle()
        (call,) = session.calls
        assert call.reply is not None
        assert call.reply.by == "interrupted"
        await environment.plane.wait_until(lambda: bool(session.results(call.id).refused))
    assert session.results(call.id).accepted == []


async def test_child_threads_are_answered_until_they_terminate(work: Work, environment: Environment) -> None:
    async def brain(agent: Agent) -> None:
        first, second = await agent.thread("first"), await agent.thread("second")
        async with agent.idle(), anyio.create_task_group() as tasks:
            tasks.start_soon(first.call, "bash", {"command": "echo 1"})
            tasks.start_soon(second.call, "bash", {"command": "echo 2"})
        await first.terminate()

    session = environment.create_session(brain, message="go")
    async with work():
        await session.wait_idle()
    assert sorted(call.reply.text for call in session.calls if call.reply) == ["1", "2"]
    assert len({call.thread.id for call in session.calls}) == 2


async def test_terminated_session_is_skipped(work: Work, plane: ControlPlane, environment: Environment) -> None:
    session = environment.create_session(silent)
    session.terminate()
    async with work():
        await until_state(environment, "stopped")
    assert not [record for record in plane.requests if record.path.endswith("/events")]


async def test_poll_that_meets_a_deleted_session_ends_the_sdk_worker(work: Work, environment: Environment) -> None:
    environment.create_session(silent).delete()
    with pytest.RaisesGroup(pytest.RaisesExc(NotFoundError, match="EnvironmentInstance not found")):
        async with work():
            await anyio.sleep(10)
