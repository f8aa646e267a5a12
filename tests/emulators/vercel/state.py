"""Sandboxes, their sessions, and the commands in them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.emulators import machine

TOKEN, TEAM, PROJECT = "vercel-test-token", "team_test", "prj_test"
LONGEST = 18_000_000  # milliseconds
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class ApiError(Exception):
    def __init__(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None, **more: Any
    ) -> None:
        self.response = web.json_response(
            {"error": {"code": code, "message": message, **more}}, status=status, headers=headers
        )


class Command:
    """A command: its log is kept, and read from the start by whoever follows it."""

    def __init__(self, body: dict[str, Any], session: Session, door: asyncio.subprocess.Process) -> None:
        self.id, self.body, self.session, self.door = f"cmd_{uuid.uuid4().hex}", body, session, door
        self.started = time.time()
        self.log: list[dict[str, str]] = []
        self.code: int | None = None
        self.written = 0
        self.changed = asyncio.Event()

    def payload(self) -> dict[str, Any]:
        return {
            "command": {
                "id": self.id,
                "name": self.body["command"],
                "args": self.body.get("args") or [],
                "cwd": self.body.get("cwd") or "/vercel/sandbox",
                "sessionId": self.session.id,
                "exitCode": self.code,
                "startedAt": int(self.started * 1000),
            }
        }

    def tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for name in ("stdout", "stderr"):
                group.create_task(self._pump(name, getattr(self.door, name)))
            if self.body.get("timeout"):
                clock = group.create_task(self._clock(self.body["timeout"] / 1000))
            code = await self.door.wait()
            if self.body.get("timeout"):
                clock.cancel()
        self.code = code if code >= 0 else 128 - code
        self.tell()

    async def signal(self, number: int) -> None:
        leader = await machine.Machine.leader(self.door)
        if leader and self.door.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(leader, number)

    async def _clock(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.signal(signal.SIGKILL)

    async def _pump(self, name: str, stream: asyncio.StreamReader) -> None:
        while data := await stream.read(32768):
            self.log.append({"stream": name, "data": data.decode(errors="replace")})
            self.tell()

    async def follow(self) -> AsyncIterator[dict[str, Any]]:
        at = 0
        while True:
            changed = self.changed
            while at < len(self.log):
                yield self.log[at]
                at += 1
            if not self.session.running:
                yield {"stream": "error", "data": {"code": "sandbox_stopped", "message": "Sandbox has stopped"}}
                return
            if self.code is not None:
                return
            await changed.wait()


@dataclass
class Session:
    sandbox: Sandbox
    id: str = field(default_factory=lambda: f"sbx_{uuid.uuid4().hex}")
    status: str = "pending"
    started: float = field(default_factory=time.time)
    limit: int = 300_000
    stopped: float | None = None
    commands: dict[str, Command] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        return self.status == "running"

    def payload(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "sourceSandboxName": self.sandbox.name,
            "projectId": PROJECT,
            "status": self.status,
            "cwd": "/vercel/sandbox",
            "timeout": self.limit,
            "networkPolicy": self.sandbox.policy,
            "requestedAt": int(self.started * 1000),
            "startedAt": int(self.started * 1000),
            **({"stoppedAt": int(self.stopped * 1000)} if self.stopped else {}),
        }


@dataclass
class Sandbox:
    name: str
    body: dict[str, Any]
    machine: machine.Machine
    session: Session = field(init=False)
    created: float = field(default_factory=time.time)

    @property
    def persistent(self) -> bool:
        return self.body.get("persistent", True)

    @property
    def policy(self) -> dict[str, Any]:
        given = self.body.get("networkPolicy") or {"mode": "allow-all"}
        return given if "mode" in given else {"mode": "custom", "allowedDomains": list(given.get("allow", ()))}

    def payload(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "currentSessionId": self.session.id,
            "status": self.session.status,
            "persistent": self.persistent,
            "projectId": PROJECT,
            "timeout": self.session.limit,
            "networkPolicy": self.policy,
            "createdAt": int(self.created * 1000),
            "tags": self.body.get("tags") or {},
        }
