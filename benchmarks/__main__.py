"""The SDK's ``EnvironmentWorker`` and mabridge side by side, in one run, on the same local control plane.

Each worker runs in a process of its own. Figures are ratios to be read across a row: machines differ.

Usage: ``python -m benchmarks [--quick] [--only sdk,local,docker] [--vendors e2b,modal,...]``
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import anyio
import pytest
from rich.console import Console
from rich.table import Table
from tests.images import BUSYBOX, ImageMissing, ensure

from benchmarks.calls import many_at_once, one_by_one, raw_at_once
from benchmarks.vendors import LATENCY, VENDORS, one_vendor
from benchmarks.workers import IMAGE, resident_kb, until, worker
from mabridge.testing import Agent, ControlPlane, Environment

MB = 1024


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
            await until(lambda s=session: environment.queue.get(s.id).state != "queued", 30)
            taken.append(time.perf_counter() - queued)
            await until(lambda s=session: environment.queue.get(s.id).state == "stopped", 30)
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
        await until(lambda: ready == count, 120)
        busy = resident_kb(process)
        for session in running:
            session.terminate()
        await until(lambda: all(environment.queue.get(s.id).state == "stopped" for s in running), 60)
    return idle / MB, (busy - idle) / count / MB


async def workers_table(kinds: list[str], quick: bool) -> Table:
    """The SDK's worker and ours, over the whole way."""
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
    return table


async def calls_table(quick: bool) -> Table:
    """One call in a container, and many at once."""
    table = Table(title="a trivial bash call in a container")
    for column in ("", "mabridge", "instead", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    took = await one_by_one(IMAGE, 50 if quick else 300)
    pairs = (
        ("with its result posted, against the SDK's bash in its own process: ms", took["channel"], took["sdk"]),
        ("over the channel, against a raw docker exec: ms", took["channel alone"], took["raw exec"]),
    )
    for name, ours, instead in pairs:
        table.add_row(name, f"{ours:.1f}", f"{instead:.1f}", f"{ours / instead:.2f}")
    count = 200 if quick else 1000
    rate, p99 = await many_at_once(count)
    raw_rate, raw_p99 = await raw_at_once(IMAGE, 100 if quick else 200)
    name = f"{count} calls in 50 containers at once, whole way, against 50 raw execs at once: "
    table.add_row(name + "a second", f"{rate:.0f}", f"{raw_rate:.0f}", f"{rate / raw_rate:.1f}")
    table.add_row("the same, 99th percentile: ms", f"{p99:.0f}", f"{raw_p99:.0f}", f"{p99 / raw_p99:.2f}")
    return table


async def vendors_table(names: list[str], quick: bool) -> Table:
    """A command at each vendor's emulator."""
    table = Table(title=f"a trivial command at an emulated vendor, {LATENCY * 1000:.0f} ms away")
    for column in ("", "bare: ms", "Sandbox.exec: ms", "ratio", "bash over hands: ms", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for name in names:
        try:
            bare, execed, called = await one_vendor(name, 10 if quick else 40)
        except pytest.skip.Exception as missing:
            print(f"without {name}: {missing}")
            continue
        cells = (bare, execed, execed / bare, called, called / bare)
        table.add_row(name, *(f"{cell:.2f}" if index in (2, 4) else f"{cell:.1f}" for index, cell in enumerate(cells)))
    return table


async def main(kinds: list[str], vendors: list[str], quick: bool) -> None:
    console = Console(width=140)
    if "docker" in kinds and IMAGE == BUSYBOX:
        try:
            ensure(IMAGE)
        except ImageMissing as error:
            print(f"without docker: {error}")
            kinds = [kind for kind in kinds if kind != "docker"]
    if kinds:
        console.print(await workers_table(kinds, quick))
    if "docker" in kinds:
        console.print(await calls_table(quick))
    if vendors:
        console.print(await vendors_table(vendors, quick))


def _names(value: str) -> list[str]:
    return [name for name in value.split(",") if name]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sessions and calls")
    parser.add_argument("--only", default="sdk,local,docker", help="which workers, by commas; '' for none")
    parser.add_argument("--vendors", default=",".join(VENDORS), help="which emulators, by commas; '' for none")
    args = parser.parse_args()
    anyio.run(main, _names(args.only), _names(args.vendors), args.quick)
