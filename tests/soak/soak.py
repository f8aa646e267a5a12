"""The soak: a local platform with faults, and one worker process after another that serves all of its sessions."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.abc

from mabridge.providers.local import LocalOptions, LocalProvider
from mabridge.testing import Agent, ControlPlane, Environment, Fault, Session

CONFIG = """\
[worker]
environment_id = "{environment}"
environment_key = {{ env = "SOAK_KEY" }}
base_url = "{url}"
max_sessions = {sessions}
max_idle = 1
drain_timeout = 10
reap_interval = 10
reap_grace = 5
[providers.local]
type = "local"
root = "{root}"
when_done = "teardown"
"""


@dataclass(kw_only=True)
class Plan:
    """How hard it is.

    Attributes:
        sessions: how many run at once, in one worker.
        turns: calls that each session makes, one after the other.
        restarts: how often the worker is replaced while they run: killed and told to stop, in turn.
        lease_ttl: seconds until the sessions of a killed worker are offered again.
        think: seconds between two calls of a session.
        timeout: seconds after which it has failed.
        seed: of the times at which the worker is replaced.
    """

    sessions: int
    turns: int
    restarts: int
    lease_ttl: float
    think: float = 0.5
    timeout: float = 600.0
    seed: int = 0


@dataclass(kw_only=True)
class Report:
    """What came of it. Whatever is not as it should be is in `wrong`."""

    seconds: float = 0.0
    calls: int = 0
    faults: int = 0
    most_at_once: int = 0
    memory_before: float = 0.0
    memory_peak: float = 0.0
    open_files_peak: int = 0
    events: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        each = (self.memory_peak - self.memory_before) / max(self.most_at_once, 1)
        return "\n".join(
            (
                f"{self.calls} calls in {self.seconds:.0f} s: {self.calls / self.seconds:.1f} calls/s",
                f"{self.most_at_once} sessions at once in one worker; {self.faults} requests failed on purpose",
                f"memory {self.memory_before:.0f} MB idle, {self.memory_peak:.0f} MB at most: {each:.2f} MB a session",
                f"{self.open_files_peak} open files at most",
                "events: " + ", ".join(f"{name} {count}" for name, count in sorted(self.events.items())),
                *(f"WRONG: {what}" for what in self.wrong[:20]),
            )
        )


class Soak:
    """One run of it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.report = Report()
        self._random = random.Random(plan.seed)
        self._begun: set[str] = set()
        self._all_begun = anyio.Event()

    async def run(self) -> Report:
        """Run it and return what came of it."""
        plan, report = self.plan, self.report
        started = anyio.current_time()
        with tempfile.TemporaryDirectory(prefix="mabridge-soak-") as directory:
            self._directory = Path(directory)
            async with ControlPlane(lease_ttl=plan.lease_ttl, lease_from="ack", grants_ttl=True) as plane:
                environment = plane.create_environment()
                self._configure(plane, environment)
                # Together they are every 20th request: half never arrive, half take effect and are not answered.
                faults = [
                    plane.faults.add(Fault(path="/v1/", every=40, times=None, status=503)),
                    plane.faults.add(Fault(path="/v1/", every=40, skip=20, times=None, cut=True, effect="after")),
                ]
                sessions: list[Session] = []
                try:
                    with anyio.fail_after(plan.timeout):
                        await self._serve(plane, environment, sessions)
                except TimeoutError:
                    report.wrong.append(f"it was not done in {plan.timeout:.0f} s")
                report.faults = sum(fault.hits for fault in faults)
                self._judge(sessions)
            await self._sweep()
        report.seconds = anyio.current_time() - started
        return report

    async def _sweep(self) -> None:
        """Tell of the sandboxes that are left, and remove them: their processes would live on."""
        async with LocalProvider(LocalOptions(root=self._root)) as provider:
            async for info in provider.list():
                self.report.wrong.append(f"left behind: {info.key}")
                await provider.remove(info)

    def _configure(self, plane: ControlPlane, environment: Environment) -> None:
        self._root = self._directory / "sandboxes"
        text = CONFIG.format(environment=environment.id, url=plane.url, sessions=self.plan.sessions, root=self._root)
        (self._directory / "mabridge.toml").write_text(text)
        self._key = environment.key

    async def _serve(self, plane: ControlPlane, environment: Environment, sessions: list[Session]) -> None:
        restarts = 0
        while True:
            async with self._worker() as process:
                if not sessions:
                    await plane.wait_until(lambda: bool(plane.requests), timeout=60)
                    self.report.memory_before = _memory(process.pid)
                    for _ in range(self.plan.sessions):
                        sessions.append(environment.create_session(self._brain, message="go"))
                if restarts < self.plan.restarts:
                    await self._all_begun.wait()
                    await self._at_work.wait()
                    await anyio.sleep(self._random.uniform(1.0, 2.0 + self.plan.think * 2))
                    process.send_signal(signal.SIGKILL if restarts % 2 == 0 else signal.SIGTERM)
                    await process.wait()
                    restarts += 1
                    continue
                for session in sessions:
                    await session.wait_idle(timeout=self.plan.timeout)
                await plane.wait_until(
                    lambda: all(item.state == "stopped" for item in environment.queue.items), timeout=120
                )
                await self._started.wait()  # it may have come when all was done already
                process.send_signal(signal.SIGTERM)
                if await process.wait() != 0:
                    self.report.wrong.append(f"the last worker ended with {process.returncode}")
                return

    @asynccontextmanager
    async def _worker(self) -> AsyncIterator[anyio.abc.Process]:
        process = await anyio.open_process(
            [sys.executable, "-m", "mabridge.cli", "run", "--log-format", "json"],
            cwd=self._directory,
            env={"PATH": os.environ["PATH"], "HOME": str(self._directory), "SOAK_KEY": self._key},
            stdout=subprocess.DEVNULL,
        )
        self._at_work, self._started = anyio.Event(), anyio.Event()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._read_log, process)
                tasks.start_soon(self._watch, process)
                yield process
        finally:
            if process.returncode is None:
                process.kill()
            with anyio.CancelScope(shield=True):
                await process.aclose()

    async def _read_log(self, process: anyio.abc.Process) -> None:
        assert process.stderr is not None
        serving, rest = 0, b""
        async for chunk in process.stderr:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in map(json.loads, lines):
                name = str(line.get("event", f"log.{line['level']}"))
                self.report.events[name] += 1
                if name == "worker.started":
                    self._started.set()
                if name == "call.answered":
                    self._at_work.set()
                if "traceback" in line:
                    self.report.wrong.append(f"a fault of ours: {line['traceback'].splitlines()[-1]}")
                serving += name == "session.claimed"
                serving -= name in ("session.released", "session.handed_over", "session.lost")
                self.report.most_at_once = max(self.report.most_at_once, serving)

    async def _watch(self, process: anyio.abc.Process) -> None:
        while process.returncode is None:
            self.report.memory_peak = max(self.report.memory_peak, _memory(process.pid))
            self.report.open_files_peak = max(self.report.open_files_peak, _open_files(process.pid))
            await anyio.sleep(0.5)

    async def _brain(self, agent: Agent) -> None:
        for turn in range(self.plan.turns):
            reply = await agent.call("bash", {"command": f"echo {turn} >> log"})
            if reply.is_error:
                self.report.wrong.append(f"{agent.session.id}: call {turn} failed: {reply.text[:200]}")
            self._begun.add(agent.session.id)
            if len(self._begun) == self.plan.sessions:
                self._all_begun.set()
            # No session goes on before all are in the middle of it: they are served at once, or not at all.
            await self._all_begun.wait()
            await agent.think(self.plan.think)
        log = (await agent.call("bash", {"command": "cat log"})).text.split()
        if log != [str(turn) for turn in range(self.plan.turns)]:
            self.report.wrong.append(f"{agent.session.id}: its calls left {log}")

    def _judge(self, sessions: list[Session]) -> None:
        for session in sessions:
            if session.open_calls or session.status != "idle":
                self.report.wrong.append(f"silent: {session.describe()}")
            for call in session.calls:
                accepted = len(session.results(call.id).accepted)
                self.report.calls += accepted
                if accepted != 1:
                    self.report.wrong.append(f"{session.id}: {accepted} results of call {call.id}")


def _memory(pid: int) -> float:
    """Return the resident memory of a process in MB; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS")), 0.0)


def _open_files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0
