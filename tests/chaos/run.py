"""The chaos test itself: sessions at work, workers that die, and what must be true all the same."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
from anthropic import AsyncAnthropic

from mabridge.config import ProviderConfig
from mabridge.control_plane.queue import WorkQueue
from mabridge.identity import ENVIRONMENT_LABEL, sandbox_key
from mabridge.named_provider import NamedProvider
from mabridge.observe import Observers
from mabridge.plugins import make_provider
from mabridge.reaper import Reaper
from mabridge.sandbox import Provider
from mabridge.testing import Agent, BrainFailed, Environment, Fault, Session
from tests.chaos.crew import WorkerSettings, crew
from tests.chaos.killer import Killer, WatchedPlane
from tests.chaos.script import LOG, Writer, Wrong, check_log, settle_command

__all__ = ["Chaos", "Outcome", "run"]

_NOT_TAKEN = "The platform did not take the result of this call"
_REST = 300.0  # seconds for everything to come to its end once nobody is killed any more


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """What is to happen. The same again for the same seed, as far as the clock of the machine allows.

    Attributes:
        seed: decides on everything.
        provider: the type of the provider.
        options: its options.
        sessions: how many there are, all at once.
        workers: how many live at a time.
        kills: how many are killed.
        kill_pause: seconds between two of them, at most.
        think: seconds that an agent thinks before a turn, at most.
        lease_ttl: seconds after which a dead worker's sessions go to another.
    """

    seed: int
    provider: str
    options: dict[str, Any]
    sessions: int = 4
    workers: int = 2
    kills: int = 6
    kill_pause: float = 0.6
    think: float = 0.3
    lease_ttl: float = 2.0


@dataclass(kw_only=True)
class Outcome:
    """What has happened, when all went well."""

    kills: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    rounds: int = 0
    refused: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        moments = ", ".join(f"{name} {count}" for name, count in sorted(self.moments.items()))
        return (
            f"{self.kills} workers killed ({moments}); {self.calls} calls, each run once and answered once, in "
            f"{self.rounds} rounds; {self.refused} results sent a second time and refused; {self.seconds:.0f} s"
        )


class _Session:
    """One session: in each of its rounds, the agent works until it may stop, and looks at what has become of it."""

    def __init__(self, chaos: Chaos, number: int, killer: Killer) -> None:
        self.keeps = number % 3 != 0
        self._chaos = chaos
        self._killer = killer
        self._name = f"s{number}"
        self._random = random.Random(f"{chaos.seed} {self._name}")
        self._threads = 2 if number % 2 else 1
        self.writers: list[Writer] = []
        self.rounds = 0
        self.session: Session

    async def live(self, environment: Environment) -> None:
        """Go from round to round until nobody is killed any more."""
        self.session = environment.create_session(self._brain, metadata={"then": "keep" if self.keeps else "teardown"})
        while self.rounds < 2 or not self._killer.over.is_set():
            if self.writers and not self.keeps:
                self.writers = []
            # While the worker stops the item, a message would go to a worker that is leaving.
            with anyio.move_on_after(_REST) as scope:
                while not self._rests(environment):  # noqa: ASYNC110 - fifty that look at each request are too many
                    await anyio.sleep(0.1)
            if scope.cancelled_caught:
                raise Wrong(f"it is not put away: {self.session.describe()}")
            self.session.send_message("go")
            await self.session.wait_idle(timeout=self._chaos.kills * (self._chaos.kill_pause + 6) + _REST)
            self.rounds += 1

    def _rests(self, environment: Environment) -> bool:
        return self.rounds == 0 or environment.queue.get(self.session.id).state == "stopped"

    async def _brain(self, agent: Agent) -> None:
        if not self.writers:
            names = [f"{self._name}r{self.rounds}t{thread}" for thread in range(self._threads)]
            self.writers = [Writer(self._chaos.seed, name, longest=self._chaos.lease_ttl + 1.0) for name in names]
        turns = self._random.randint(2, 3)
        async with anyio.create_task_group() as tasks:
            for writer in self.writers:
                # A child is a new thread in each round, and so has a new shell.
                writer.new_round(new_shell=writer is not self.writers[0])
            for writer in self.writers[1:]:
                tasks.start_soon(self._work, await agent.thread("helper"), writer, turns, True)
            await self._work(agent, self.writers[0], turns, False)
        log = await agent.call("bash", {"command": settle_command(self.writers)})
        try:
            check_log(log.text.splitlines(), self.writers)
        except Wrong as wrong:
            raise Wrong(f"session {agent.session.id} ({self._name}): {wrong}\n{log.text}") from wrong

    async def _work(self, agent: Agent, writer: Writer, turns: int, child: bool) -> None:
        for _ in range(turns):
            await agent.think(writer.pause(self._chaos.think))
            steps = writer.turn()
            replies = await agent.calls([(step.tool, step.input) for step in steps])
            for step, reply in zip(steps, replies, strict=True):
                step.check(reply, fresh=not self.keeps and self.rounds > 0)
        if child:
            await agent.finish()


async def run(chaos: Chaos, directory: Path) -> Outcome:
    """Let it happen.

    Args:
        chaos: what.
        directory: for the logs of the workers.

    Raises:
        Wrong: a call was run twice, or not at all, or its result was not what it must be.
    """
    try:
        return await _run(chaos, directory)
    except Exception as error:
        raise Wrong(f"seed {chaos.seed}, {chaos.provider}: {_root(error)}") from error


async def _run(chaos: Chaos, directory: Path) -> Outcome:
    started = time.monotonic()
    # A worker that dies between the acknowledgement and the first heartbeat would else keep its item for good.
    async with WatchedPlane(lease_ttl=chaos.lease_ttl, lease_from="ack") as plane:
        environment = plane.create_environment()
        _add_faults(plane, chaos.seed)
        killer = Killer(plane, seed=chaos.seed, kills=chaos.kills, pause=chaos.kill_pause)
        sessions = [_Session(chaos, number, killer) for number in range(chaos.sessions)]
        settings = WorkerSettings(
            url=plane.url,
            environment_id=environment.id,
            environment_key=environment.key,
            provider=chaos.provider,
            options=chaos.options,
            logs=directory,
        )
        async with make_provider(ProviderConfig(type=chaos.provider, options=chaos.options), "chaos") as provider:
            try:
                async with crew(settings, chaos.workers, killer.on_event) as workers:
                    async with anyio.create_task_group() as tasks:
                        for session in sessions:
                            tasks.start_soon(session.live, environment)
                        tasks.start_soon(killer.run, workers)
                    await plane.wait_until(
                        lambda: all(item.state == "stopped" for item in environment.queue.items), timeout=_REST
                    )
                    killed = workers.killed
                plane.faults.clear()
                await _check_sandboxes(sessions, provider, environment)
                await _reap(provider, environment)
            finally:
                await _remove_all(provider, environment)
        outcome = Outcome(kills=killed, moments=killer.moments, seconds=time.monotonic() - started)
        for session in sessions:
            _check_results(session.session, outcome)
            outcome.rounds += session.rounds
        return outcome


def _root(error: BaseException) -> str:
    """Return what was wrong in the first place."""
    while isinstance(error, (BaseExceptionGroup, BrainFailed)):
        error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error
    return str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"


def _add_faults(plane: WatchedPlane, seed: int) -> None:
    result, often = "/sessions/[^/]+/events$", None
    for fault in (
        Fault(method="GET", path="/events/stream$", rate=0.2, seed=seed, drop_after=5, times=often),
        Fault(method="POST", path=result, rate=0.05, seed=seed, cut=True, effect="after", times=often),
        Fault(path="/(heartbeat|events|stop|ack)$", rate=0.03, seed=seed, status=503, times=often),
    ):
        plane.faults.add(fault)


async def _check_sandboxes(sessions: list[_Session], provider: Provider, environment: Environment) -> None:
    """Look into the sandboxes that were kept, past mabridge's tools; the others must be gone."""
    for session in sessions:
        sandbox = await provider.attach(sandbox_key(environment.id, session.session.id))
        if not session.keeps:
            if sandbox is not None:
                raise Wrong(f"the sandbox of {session.session.id} is still there")
            continue
        if sandbox is None:
            raise Wrong(f"the sandbox of {session.session.id} is gone")
        log = await sandbox.read_file(f"{sandbox.workdir}/{LOG}", max_bytes=1 << 24)
        check_log(log.decode().splitlines(), session.writers)


async def _reap(provider: Provider, environment: Environment) -> None:
    """Let the reaper remove what nobody works in any more: afterwards nothing is left."""
    async with AsyncAnthropic(base_url=environment.plane.url, auth_token="unused") as client:
        queue = WorkQueue(client, environment_id=environment.id, environment_key=environment.key, worker_id="reaper")
        named = NamedProvider(name="all", provider=provider)
        reaper = Reaper({"all": named}, queue, observers=Observers(), grace=0.0, older_than=0.0)
        swept = await reaper.sweep()
    left = [key async for key in _ours(provider, environment)]
    if left or swept.failures:
        raise Wrong(f"the reaper left {left}: {swept.failures}")


def _check_results(session: Session, outcome: Outcome) -> None:
    for call in session.calls:
        results = session.results(call.id)
        outcome.calls += 1
        outcome.refused += len(results.refused)
        if len(results.accepted) != 1:
            raise Wrong(f"{len(results.accepted)} results of call {call.id} were accepted: {session.describe()}")
        taken = results.accepted[0]["content"]
        for said, _ in results.refused:
            # Of a result whose answer got lost, a worker cannot know that it had arrived.
            if said["content"] != taken and not said["content"][0]["text"].startswith(_NOT_TAKEN):
                raise Wrong(f"two results were sent for call {call.id}, and they differ: {results}")


async def _ours(provider: Provider, environment: Environment) -> AsyncIterator[str]:
    infos = [info async for info in provider.list()]
    for info in infos:
        if info.labels.get(ENVIRONMENT_LABEL) == environment.id:
            yield info.key


async def _remove_all(provider: Provider, environment: Environment) -> None:
    with anyio.CancelScope(shield=True), anyio.move_on_after(60):
        infos = [info async for info in provider.list()]
        for info in infos:
            if info.labels.get(ENVIRONMENT_LABEL) == environment.id:
                await provider.remove(info)
