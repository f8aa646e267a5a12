"""From the poll to the stop: sessions of the local platform, served by a worker in real sandboxes."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import pytest

from mabridge import ProviderConfig
from mabridge.testing import Agent, ControlPlane, Environment, Fault, ToolCall
from tests.images import BUSYBOX
from tests.worker.conftest import Serve

pytestmark = pytest.mark.anyio


async def test_session_runs_from_poll_to_stop(
    plane: ControlPlane, environment: Environment, serve: Serve, provider: ProviderConfig
):
    seen: dict[str, str] = {}

    async def brain(agent: Agent) -> None:
        await agent.call("write", {"file_path": "notes.txt", "content": "one\ntwo\n"})
        seen["bash"] = (await agent.call("bash", {"command": "wc -l < notes.txt; X=kept; cd /"})).text
        seen["again"] = (await agent.call("bash", {"command": "echo $X; pwd"})).text
        read, found, listed = await agent.calls(
            [("read", {"file_path": "notes.txt"}), ("grep", {"pattern": "tw."}), ("glob", {"pattern": "*.txt"})]
        )
        seen["read"], seen["grep"], seen["glob"] = read.text, found.text, listed.text
        await agent.call("edit", {"file_path": "notes.txt", "old_string": "two", "new_string": "2"})
        seen["edited"] = (await agent.call("read", {"file_path": "notes.txt"})).text
        failed = await agent.call("bash", {"command": "echo no >&2; exit 3"})
        seen["failed"] = f"{failed.is_error} {failed.text}"

    async with serve({"p": provider}) as watched:
        session = environment.create_session(brain, message="go")
        await session.wait_idle()
        await watched.until("session.released")
    assert seen["bash"].strip() == "2"
    assert seen["again"] == "kept\n/"
    assert seen["read"] == "one\ntwo\n"
    assert seen["grep"].endswith("notes.txt:2:two")
    assert seen["glob"].endswith("/notes.txt")
    assert seen["edited"] == "one\n2\n"
    assert seen["failed"].startswith("True no")
    assert all(len(session.results(call.id).accepted) == 1 for call in session.calls)
    assert environment.queue.get(session.id).state == "stopped"
    assert watched.named("sandbox.removed")


async def test_twenty_sessions_run_side_by_side(environment: Environment, serve: Serve, provider: ProviderConfig):
    everyone_is_here = anyio.Event()
    here: set[str] = set()

    async def brain(agent: Agent) -> None:
        mine = (await agent.call("bash", {"command": f"echo {agent.session.id} > me; cat me"})).text
        assert mine == agent.session.id
        here.add(mine)
        if len(here) == 20:
            everyone_is_here.set()
        # No session can end before all are in the middle of it: they are served at once, or not at all.
        await everyone_is_here.wait()
        assert (await agent.call("bash", {"command": "cat me"})).text == agent.session.id

    async with serve({"p": provider}, max_sessions=20) as watched:
        sessions = [environment.create_session(brain, message="go") for _ in range(20)]
        for session in sessions:
            await session.wait_idle(timeout=120)
        await watched.until("session.released", 20)


async def test_no_more_sessions_are_claimed_than_there_is_room_for(environment: Environment, serve: Serve):
    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "true"})

    async with serve(max_sessions=2) as watched:
        sessions = [environment.create_session(brain, message="go") for _ in range(5)]
        most = 0
        for count in range(1, 6):
            await watched.until("session.released", count)
            most = max(most, len(watched.worker.sessions))
        for session in sessions:
            await session.wait_idle()
    assert most <= 2
    running = 0
    for event in watched.events:
        running += (event.name == "session.claimed") - (event.name == "session.released")
        assert running <= 2


async def test_asked_for_call_waits_and_denied_ones_never_run(environment: Environment, serve: Serve):
    async def brain(agent: Agent) -> None:
        ok, no, never = await agent.calls(
            [
                ToolCall(name="bash", input={"command": "echo ok > ok"}, permission="ask"),
                ToolCall(name="bash", input={"command": "echo no > no"}, permission="ask"),
                ToolCall(name="bash", input={"command": "echo never > never"}, permission="deny"),
            ]
        )
        assert (ok.by, no.by, never.by) == ("worker", "denied", "denied")
        assert (await agent.call("bash", {"command": "ls"})).text == "ok"

    async with serve() as watched:
        session = environment.create_session(brain, message="go")
        await watched.until("call.held", 2)
        first, second = session.open_calls
        assert not watched.named("call.started")
        session.confirm(second.id, "deny")
        session.confirm(first.id, "allow")
        await session.wait_idle()


async def test_interrupt_stops_what_runs_and_the_session_goes_on(
    environment: Environment, serve: Serve, provider: ProviderConfig
):
    async def brain(agent: Agent) -> None:
        if agent.text == "again":
            reply = await agent.call("bash", {"command": "echo $KEPT; ps | grep -c '[s]leep 4242' || true"})
            assert reply.text.split() == ["yes", "0"]
        else:
            await agent.call("bash", {"command": "KEPT=yes"})
            await agent.call("bash", {"command": "echo before; sleep 4242"})

    async with serve({"p": provider}, max_idle=30) as watched:
        session = environment.create_session(brain, message="go")
        await watched.until("call.started", 2)
        session.interrupt()
        await watched.until("call.cancelled")
        await watched.until("call.ended", 2, timeout=10)
        await session.wait_idle()
        session.send_message("again")
        await session.wait_idle()


async def test_custom_tools_are_left_to_their_owner(environment: Environment, serve: Serve):
    async def brain(agent: Agent) -> None:
        ours, theirs = await agent.calls(
            [
                ToolCall(name="bash", input={"command": "echo ours"}),
                ToolCall(name="weather", input={}, custom=True),
            ]
        )
        assert (ours.text, theirs.text) == ("ours", "sunny")

    async with serve() as watched:
        session = environment.create_session(brain, message="go")
        await watched.until("call.answered")
        (open_call,) = session.open_calls
        assert open_call.name == "weather"
        session.answer(open_call.id, "sunny")
        await session.wait_idle()
    assert [event.tool for event in watched.named("call.skipped")] == ["weather"]


async def test_threads_work_side_by_side_each_in_its_own_shell(environment: Environment, serve: Serve):
    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "mkfifo pipe; WHO=primary"})
        one, two = await agent.thread("one"), await agent.thread("two")
        async with agent.idle(), anyio.create_task_group() as tasks:
            # Either can only end if the other runs at the same time.
            tasks.start_soon(one.call, "bash", {"command": "echo through > pipe; WHO=one"})
            tasks.start_soon(two.call, "bash", {"command": "cat pipe > got; echo $WHO > who"})
        assert (await agent.call("bash", {"command": "cat got; cat who; echo $WHO"})).text.split() == [
            "through",
            "primary",
        ]

    async with serve():
        await environment.create_session(brain, message="go").wait_idle()


async def test_another_worker_goes_on_where_one_that_died_was(serve: Serve, provider: ProviderConfig):
    replies: list[str] = []

    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "X=kept"})
        replies.append((await agent.call("bash", {"command": "echo ran >> log; sleep 3; cat log"})).text)
        replies.append((await agent.call("bash", {"command": "echo $X; wc -l < log"})).text)

    async with ControlPlane(lease_ttl=2.0) as plane:
        environment = plane.create_environment()
        async with serve({"p": provider}, environment=environment, clean_up=False) as first:
            session = environment.create_session(brain, message="go")
            await first.until("call.started", 2)
            # The worker dies in the middle of the command, which takes 3 s.
            await anyio.sleep(0.5)
        async with serve({"p": provider}, environment=environment) as second:
            await session.wait_idle(timeout=60)
            assert second.named("sandbox.attached")
    assert [text.split() for text in replies] == [["ran"], ["kept", "1"]]


async def test_skills_of_the_agent_are_in_the_sandbox_before_its_first_call(
    plane: ControlPlane, environment: Environment, serve: Serve, provider: ProviderConfig
):
    greet = plane.create_skill("greet", {"SKILL.md": "# Greet", "bin/greet.sh": "#!/bin/sh\necho hello\n"})

    async def brain(agent: Agent) -> None:
        assert (await agent.call("read", {"file_path": "skills/greet/SKILL.md"})).text == "# Greet"
        assert (await agent.call("bash", {"command": "sh skills/greet/bin/greet.sh"})).text == "hello"

    async with serve({"p": provider}) as watched:
        await environment.create_session(brain, message="go", skills=[greet]).wait_idle()
    assert watched.named("skill.installed")
    used = {record.credential for record in plane.requests if "/skills/" in record.path}
    assert used == {"environment_key"}


async def test_faults_repeat_no_call_and_lose_no_result(
    plane: ControlPlane, environment: Environment, serve: Serve, provider: ProviderConfig
):
    """Every call appends to a file; streams drop, and every seventh request fails, before or after it took effect."""
    turns = 12

    async def brain(agent: Agent) -> None:
        for turn in range(turns):
            reply = await agent.call("bash", {"command": f"echo {turn} >> log"})
            assert not reply.is_error, reply.text
            if turn % 4 == 3:
                plane.drop_streams()
        assert (await agent.call("bash", {"command": "cat log"})).text.split() == [str(n) for n in range(turns)]

    plane.faults.add(Fault(path="/v1/", every=7, times=None, status=503))
    plane.faults.add(Fault(path="/v1/", every=11, times=None, cut=True, effect="after"))
    async with serve({"p": provider}) as watched:
        sessions = [environment.create_session(brain, message="go") for _ in range(4)]
        for session in sessions:
            await session.wait_idle(timeout=120)
        plane.faults.clear()
        await watched.until("session.released", 4)
    for session in sessions:
        assert all(len(session.results(call.id).accepted) == 1 for call in session.calls)


@pytest.mark.docker
async def test_environment_key_is_nowhere_in_the_container(
    environment: Environment, serve: Serve, image: Callable[[str], str]
):
    key = environment.key
    assert key.startswith("sk-ant-oat01-")

    async def brain(agent: Agent) -> None:
        look = (
            "for f in /proc/[0-9]*/environ /proc/[0-9]*/cmdline; do tr '\\0' '\\n' < $f; done 2>/dev/null | "
            "grep -c 'sk-an[t]'; env"
        )
        reply = await agent.call("bash", {"command": look})
        assert reply.text.splitlines()[0] == "0", reply.text
        assert "ANTHROPIC" not in reply.text

    async with serve({"docker": ProviderConfig(type="docker", options={"image": image(BUSYBOX)})}) as watched:
        session = environment.create_session(brain, message="go")
        created = await watched.until("sandbox.created")
        await session.wait_idle()
        await watched.until("session.released")
        assert created.sandbox_id is not None
        await _assert_nowhere(created.sandbox_id, key)


async def _assert_nowhere(container_id: str, key: str) -> None:
    """Look from outside: the configuration, the logs and every file of the container."""
    import aiodocker

    async with aiodocker.Docker() as docker:
        container = await docker.containers.get(container_id)
        try:
            shown = await container.show()
            assert key not in str(shown)
            assert shown["HostConfig"]["LogConfig"]["Type"] == "none"  # so there are no logs that could hold it
            archive = await container.get_archive("/")
            files = [archive.extractfile(member) for member in archive.getmembers() if member.isreg()]
            assert files
            assert not any(key.encode() in file.read() for file in files if file is not None)
        finally:
            await container.delete(force=True)
