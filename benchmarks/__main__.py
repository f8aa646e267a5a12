"""The SDK's ``EnvironmentWorker`` and mabridge side by side, in one run, on the same local control plane.

Each worker runs in a process of its own. Figures are ratios to be read across a row: machines differ.

Usage: ``python -m benchmarks [--quick] [--only sdk,local,docker]``
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from rich.console import Console
from rich.table import Table
from tests.images import BUSYBOX, ImageMissing, ensure

from mabridge.testing import Agent, ControlPlane, Environment

IMAGE = os.environ.get("MABRIDGE_BENCH_IMAGE", BUSYBOX)
WORKER = Path(__file__).with_name("worker_process.py")
MB = 1024


@asynccontextmanager
async def worker(kind: str, plane: ControlPlane, environment: Environment) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A worker of its own for `environment`, ready to claim."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(WORKER), kind, plane.url, environment.id],
        env={**os.environ, "ANTHROPIC_ENVIRONMENT_KEY": environment.key, "MABRIDGE_BENCH_IMAGE": IMAGE},
        stdin=subprocess.PIPE,
    )
    try:
        await _until(lambda: any(environment.id in r.path and r.path.endswith("/poll") for r in plane.requests), 60)
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await anyio.to_thread.run_sync(process.wait)


async def _until(condition: Callable[[], bool], seconds: float) -> None:
    with anyio.fail_after(seconds):
        while not condition():
            await anyio.sleep(0.005)


def resident_kb(process: subprocess.Popen[bytes]) -> int:
    """Resident memory of the process, in kB, as Linux tells it."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


async def throughput(kind: str, plane: ControlPlane, sessions: int, turns: int, think: float) -> float:
    """Seconds until `sessions` sessions of `turns` turns, with `think` seconds of thinking each, are at rest."""

    async def brain(agent: Agent) -> None:
        for turn in range(turns):
            await agent.think(think)
            reply = await agent.call("bash", {"command": f"echo turn {turn}"})
            assert not reply.is_error, reply.text

    environment = plane.create_environment()
    async with worker(kind, plane, environment):
        started = time.perf_counter()
        running = [environment.create_session(brain, message="go") for _ in range(sessions)]
        for session in running:
            await session.wait_idle(timeout=600)
        return time.perf_counter() - started


async def call_latency(kind: str, plane: ControlPlane, calls: int) -> list[float]:
    """Milliseconds of each of many trivial bash calls, as the platform sees them: from the event to the result."""
    taken: list[float] = []

    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "true"})
        for _ in range(calls):
            started = time.perf_counter()
            await agent.call("bash", {"command": "true"})
            taken.append((time.perf_counter() - started) * 1000)

    environment = plane.create_environment()
    async with worker(kind, plane, environment):
        await environment.create_session(brain, message="go").wait_idle(timeout=300)
    return taken


async def pick_up(kind: str, plane: ControlPlane, times: int) -> tuple[list[float], float]:
    """Seconds until an idle worker has claimed a session, and its polls a minute meanwhile."""
    taken: list[float] = []

    async def brain(agent: Agent) -> None:
        await agent.say("nothing to do")

    environment = plane.create_environment()
    rng = random.Random(7)
    polls = 0
    watched = 0.0
    async with worker(kind, plane, environment):
        for _ in range(times):
            began = time.perf_counter()
            before = _polls(plane, environment)
            await anyio.sleep(rng.uniform(2.0, 4.0))
            polls += _polls(plane, environment) - before
            watched += time.perf_counter() - began
            queued = time.perf_counter()
            session = environment.create_session(brain, message="go")
            await _until(lambda s=session: environment.queue.get(s.id).state != "queued", 30)
            taken.append(time.perf_counter() - queued)
            await _until(lambda s=session: environment.queue.get(s.id).state == "stopped", 30)
    return taken, polls / watched * 60


def _polls(plane: ControlPlane, environment: Environment) -> int:
    return sum(1 for r in plane.requests if environment.id in r.path and r.path.endswith("/poll"))


async def memory(kind: str, plane: ControlPlane, sessions: int) -> tuple[float, float]:
    """MB of an idle worker, and MB more for each session it serves (the SDK's serves one at a time)."""
    ready = 0

    async def brain(agent: Agent) -> None:
        nonlocal ready
        await agent.call("bash", {"command": "true"})
        ready += 1
        await agent.think(600)

    environment = plane.create_environment()
    async with worker(kind, plane, environment) as process:
        await anyio.sleep(1)
        idle = resident_kb(process)
        count = 1 if kind == "sdk" else sessions
        running = [environment.create_session(brain, message="go") for _ in range(count)]
        await _until(lambda: ready == count, 120)
        busy = resident_kb(process)
        for session in running:
            session.terminate()
        await _until(lambda: all(environment.queue.get(s.id).state == "stopped" for s in running), 60)
    return idle / MB, (busy - idle) / count / MB


async def main(kinds: list[str], quick: bool) -> None:
    if "docker" in kinds and IMAGE == BUSYBOX:
        try:
            ensure(IMAGE)
        except ImageMissing as error:
            print(f"without docker: {error}")
            kinds = [kind for kind in kinds if kind != "docker"]
    sessions, calls, times = (5, 50, 3) if quick else (20, 300, 12)
    table = Table(title="mabridge against the SDK's own worker, one run, one control plane")
    table.add_column("")
    for kind in kinds:
        table.add_column({"sdk": "SDK EnvironmentWorker"}.get(kind, f"mabridge {kind}"), justify="right")
    rows: dict[str, list[str]] = {}

    def put(row: str, value: str) -> None:
        rows.setdefault(row, []).append(value)

    for kind in kinds:
        async with ControlPlane() as plane:
            seconds = await throughput(kind, plane, sessions, turns=4, think=1.0)
            put(f"{sessions} sessions, 4 turns, 1 s of thinking: s", f"{seconds:.1f}")
            taken = sorted(await call_latency(kind, plane, calls))
            put("a trivial bash call, median: ms", f"{statistics.median(taken):.1f}")
            put("a trivial bash call, 99th percentile: ms", f"{taken[int(len(taken) * 0.99)]:.1f}")
            waits, polls = await pick_up(kind, plane, times)
            put("pick-up by an idle worker, mean: s", f"{statistics.mean(waits):.3f}")
            put("pick-up by an idle worker, worst: s", f"{max(waits):.3f}")
            put("polls a minute while idle", f"{polls:.0f}")
            idle, each = await memory(kind, plane, sessions)
            put("memory of an idle worker: MB", f"{idle:.0f}")
            put("memory more for a session: MB", f"{each:.2f}")
    for row, values in rows.items():
        table.add_row(row, *values)
    Console(width=120).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sessions and calls")
    parser.add_argument("--only", default="sdk,local,docker", help="which workers, by commas")
    args = parser.parse_args()
    anyio.run(main, args.only.split(","), args.quick)
