"""Worker processes that can be killed at any moment, and what they tell of their work."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import anyio
from anthropic import AsyncAnthropic
from anyio.abc import TaskGroup

from mabridge import Event, ProviderConfig, Route, Worker

__all__ = ["Crew", "WorkerSettings"]

# Each worker is forked from a process that has everything imported, so that a new one is there at once.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.chaos.crew"])


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What all workers have in common. Everything in it can be sent to another process.

    Attributes:
        url: of the platform.
        environment_id: whose sessions they serve.
        environment_key: its key.
        provider: the type of the provider.
        options: its options.
        logs: the directory for their logs.
    """

    url: str
    environment_id: str
    environment_key: str
    provider: str
    options: dict[str, Any]
    logs: Path


def _work(name: str, settings: WorkerSettings, told: Connection) -> None:
    """Be a worker until killed."""
    logging.basicConfig(
        filename=settings.logs / f"{name}.log", level=logging.INFO, format="%(asctime)s %(name)s %(message)s"
    )
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    anyio.run(_serve, name, settings, told)


async def _serve(name: str, settings: WorkerSettings, told: Connection) -> None:
    def tell(event: Event) -> None:
        if event.name == "call.skipped":  # each call of the history, at each takeover
            return
        line = {"name": event.name, "session": event.session_id, "call": event.call_id, "reason": event.reason}
        os.write(told.fileno(), json.dumps(line).encode() + b"\n")

    config = {"type": settings.provider, "options": settings.options}
    # The header is on every request, so the platform's record says whose it was.
    async with AsyncAnthropic(
        base_url=settings.url, auth_token="unused", default_headers={"Anthropic-Worker-ID": name}
    ) as client:
        await Worker(
            client,
            environment_id=settings.environment_id,
            environment_key=settings.environment_key,
            worker_id=name,
            providers={
                "keep": ProviderConfig(**config, when_done="keep"),
                "teardown": ProviderConfig(**config, when_done="teardown"),
            },
            routes=[Route(metadata={"then": then}, providers=(then,)) for then in ("keep", "teardown")],
            max_sessions=64,
            max_idle=0.2,
            observers=[tell],
        ).run()


@dataclass(eq=False)
class _Member:
    process: BaseProcess
    sessions: set[str] = field(default_factory=set)


class Crew:
    """The workers. Made by `crew`.

    Attributes:
        members: those that live, by name.
        killed: how many were killed.
    """

    def __init__(self, settings: WorkerSettings, tasks: TaskGroup, on_event: Callable[[str, dict[str, Any]], None]):
        self._settings = settings
        self._tasks = tasks
        self._on_event = on_event
        self._started = 0
        self.members: dict[str, _Member] = {}
        self.killed = 0

    async def start(self) -> str:
        """Start one more worker and return its name."""
        self._started += 1
        name = f"worker-{self._started}"
        mine, theirs = _forks.Pipe(duplex=False)
        process = _forks.Process(target=_work, args=(name, self._settings, theirs), name=name, daemon=True)
        await anyio.to_thread.run_sync(process.start)
        theirs.close()
        self.members[name] = _Member(process)
        self._tasks.start_soon(self._listen, name, mine)
        return name

    def kill(self, name: str) -> bool:
        """Kill a worker, at this very moment; return whether there was one of that name."""
        member = self.members.pop(name, None)
        if member is None:
            return False
        member.process.kill()
        self.killed += 1
        self._tasks.start_soon(_bury, member.process)
        return True

    async def _listen(self, name: str, pipe: Connection) -> None:
        rest = b""
        with pipe:
            while True:
                await anyio.wait_readable(pipe.fileno())
                data = os.read(pipe.fileno(), 65536)
                if not data:
                    break
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._on_event(name, json.loads(line))
        if name in self.members:
            log = (self._settings.logs / f"{name}.log").read_text()
            raise AssertionError(f"{name} ended though nobody had killed it:\n{log[-3000:]}")


async def _bury(process: BaseProcess) -> None:
    await anyio.wait_readable(process.sentinel)
    process.join()
    process.close()


@asynccontextmanager
async def crew(
    settings: WorkerSettings, size: int, on_event: Callable[[str, dict[str, Any]], None]
) -> AsyncIterator[Crew]:
    """Run `size` workers; those that are left at the end are killed."""
    async with anyio.create_task_group() as tasks:
        made = Crew(settings, tasks, on_event)
        try:
            for _ in range(size):
                await made.start()
            yield made
        finally:
            for name in tuple(made.members):
                made.kill(name)
