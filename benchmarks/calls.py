"""What a call costs: in a container over mabridge's channel, by a raw ``docker exec``, and in the SDK's own process."""

from __future__ import annotations

import statistics
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from aiodocker import Docker
from anthropic import AsyncAnthropic
from anthropic.lib.tools.agent_toolset import AgentToolContext, beta_agent_toolset_20260401

from benchmarks.workers import worker
from mabridge import SandboxSpec, sandbox_key
from mabridge.hands import Hands
from mabridge.providers.docker import DockerOptions, DockerProvider
from mabridge.testing import Agent, ControlPlane, ToolCall
from mabridge.tools import SandboxTools

__all__ = ["many_at_once", "one_by_one", "raw_at_once"]

_TRUE = {"command": "true"}
_AT_ONCE = 50

Run = Callable[[str], Awaitable[Any]]


async def one_by_one(image: str, calls: int) -> dict[str, float]:
    """Return the median milliseconds of a trivial bash call: with its result posted, and without; and of a raw exec."""
    async with ControlPlane() as plane, DockerProvider(DockerOptions(image=image)) as provider, Docker() as docker:
        sandbox = await provider.create(_spec())
        try:
            async with Hands(sandbox) as hands:
                tools = SandboxTools(sandbox, hands)

                async def ours(call_id: str) -> Any:
                    result = await tools.call("bash", _TRUE, call_id=call_id)
                    await tools.accepted(call_id)
                    return result.content

                with tempfile.TemporaryDirectory() as directory:
                    async with AgentToolContext(workdir=directory) as context:
                        bash = next(tool for tool in beta_agent_toolset_20260401(context) if tool.name == "bash")

                        async def sdk(_: str) -> Any:
                            return await bash.call(_TRUE)

                        return {
                            "sdk": await _posted(plane, sdk, calls),
                            "channel": await _posted(plane, ours, calls),
                            "channel alone": await _alone(ours, calls),
                            "raw exec": await _alone(lambda _: _raw(docker, sandbox.id), max(calls // 10, 10)),
                        }
        finally:
            await sandbox.teardown()


async def _posted(plane: ControlPlane, run: Run, calls: int) -> float:
    """Median milliseconds from a call to its accepted result, as the SDK's client sends it."""

    async def brain(agent: Agent) -> None:
        await agent.calls([ToolCall(name="bash", input=_TRUE) for _ in range(calls)])

    session = plane.create_environment().create_session(brain, message="go")
    await plane.wait_until(lambda: len(session.open_calls) == calls)
    async with AsyncAnthropic(base_url=plane.url, api_key=plane.api_key) as client:

        async def run_and_post(call_id: str) -> None:
            await run(call_id)
            content = [{"type": "text", "text": "x"}]
            result: Any = {"type": "user.tool_result", "tool_use_id": call_id, "content": content}
            await client.beta.sessions.events.send(session.id, events=[result])

        return await _median([call.id for call in session.open_calls], run_and_post)


async def _alone(run: Run, calls: int) -> float:
    return await _median([f"alone_{number}" for number in range(calls)], run)


async def _median(ids: list[str], run: Run) -> float:
    await run(ids[0])
    taken = []
    for call_id in ids[1:]:
        started = time.perf_counter()
        await run(call_id)
        taken.append((time.perf_counter() - started) * 1000)
    return statistics.median(taken)


async def _raw(docker: Docker, container_id: str) -> None:
    execution = await docker.containers.container(container_id).exec(["true"])
    async with execution.start(detach=False) as stream:
        while await stream.read_out() is not None:
            pass
    await execution.inspect()


async def many_at_once(calls: int) -> tuple[float, float]:
    """Return calls a second, and the 99th percentile in ms, of as many sessions in containers that all call at once."""
    ready, taken = 0, list[float]()
    go = anyio.Event()

    async def brain(agent: Agent) -> None:
        nonlocal ready
        await agent.call("bash", _TRUE)
        ready += 1
        await go.wait()
        for _ in range(calls // _AT_ONCE):
            started = time.perf_counter()
            reply = await agent.call("bash", _TRUE)
            taken.append((time.perf_counter() - started) * 1000)
            assert not reply.is_error, reply.text

    async with ControlPlane() as plane:
        environment = plane.create_environment()
        async with worker("docker", plane, environment):
            sessions = [environment.create_session(brain, message="go") for _ in range(_AT_ONCE)]
            await plane.wait_until(lambda: ready == _AT_ONCE, timeout=300)
            began = time.perf_counter()
            go.set()
            for session in sessions:
                await session.wait_idle(timeout=300)
            seconds = time.perf_counter() - began
    return len(taken) / seconds, _p99(taken)


async def raw_at_once(image: str, calls: int) -> tuple[float, float]:
    """Return the same of raw execs, as many at once, in one container without limits."""
    options, taken = DockerOptions(image=image, cpus=0, pids_limit=0), list[float]()
    async with DockerProvider(options) as provider, Docker() as docker:
        docker.connector._limit = 0
        sandbox = await provider.create(_spec())

        async def caller() -> None:
            for _ in range(max(calls // _AT_ONCE, 1)):
                started = time.perf_counter()
                await _raw(docker, sandbox.id)
                taken.append((time.perf_counter() - started) * 1000)

        try:
            began = time.perf_counter()
            async with anyio.create_task_group() as tasks:
                for _ in range(_AT_ONCE):
                    tasks.start_soon(caller)
            seconds = time.perf_counter() - began
        finally:
            await sandbox.teardown()
    return len(taken) / seconds, _p99(taken)


def _spec() -> SandboxSpec:
    return SandboxSpec(key=sandbox_key("env_bench", uuid.uuid4().hex), ttl=600)


def _p99(taken: list[float]) -> float:
    return sorted(taken)[int(len(taken) * 0.99)]
