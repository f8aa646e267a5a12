"""What the emulated E2B is made of: sandboxes, commands in them, and the forms of its answers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import secrets
import signal
import struct
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from aiohttp import web

from tests.emulators.machine import Machine

ENVD_VERSION = "0.6.4"
_CHUNK = 32 * 1024


@dataclass
class Fault:
    """What the next requests that begin so, such as ``POST /v2/sandboxes``, get instead of an answer.

    A `status` of 0 is a connection that is cut; with `after`, when what was asked for has been done.
    """

    begins: str
    status: int = 500
    body: bytes = b'{"code": 500, "message": "an emulated fault"}'
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    after: bool = False


@dataclass
class Vm:
    """One sandbox."""

    id: str
    machine: Machine
    template: str
    metadata: dict[str, str]
    env: dict[str, str]
    started: datetime
    ends: datetime
    auto_pause: bool
    network: dict[str, Any]
    state: str = "running"
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    processes: dict[int, Running] = field(default_factory=dict)

    @property
    def closed(self) -> bool:
        """Whether nothing outside may be reached. That only some may be is noted, and not enforced."""
        rules = self.network.get("network") or {}
        denied = self.network.get("allow_internet_access") is False or "0.0.0.0/0" in rules.get("denyOut", ())
        return denied and not rules.get("allowOut")


class Running:
    """A command, its output on the way to whoever listens, and its end."""

    def __init__(self, door: asyncio.subprocess.Process) -> None:
        self.door = door
        self.events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(1)
        self.listening = True
        self.reading: list[asyncio.Task[None]] = []

    async def pump(self, name: str, stream: asyncio.StreamReader) -> None:
        while data := await stream.read(_CHUNK):
            if self.listening:
                await self.events.put({"data": {name: base64.b64encode(data).decode()}})

    async def run(self) -> None:
        """Wait for the end of its output, or for a signal, and then for its own."""
        await asyncio.wait(self.reading)
        code = await self.door.wait()
        end = {"exitCode": code if code >= 0 else -1, "exited": code >= 0, "status": f"exit status {code}"}
        if code < 0:
            end["status"] = end["error"] = f"signal: {signal.Signals(-code).name}"
        elif code:
            end["error"] = end["status"]
        if self.listening:
            await self.events.put({"end": end})
            await self.events.put(None)

    async def leave(self) -> None:
        self.listening = False
        while not self.events.empty():
            self.events.get_nowait()

    async def kill(self) -> None:
        """SIGKILL to the first process, and no more reading of what its children still write."""
        leader = await Machine.leader(self.door)
        if leader:
            with contextlib.suppress(ProcessLookupError):
                os.kill(leader, signal.SIGKILL)
        for task in self.reading:
            task.cancel()


def described(vm: Vm) -> dict[str, Any]:
    return {
        "sandboxID": vm.id,
        "templateID": vm.template,
        "clientID": "6532622b",
        "envdVersion": ENVD_VERSION,
        "envdAccessToken": vm.token,
        "domain": None,
    }


def listed(vm: Vm) -> dict[str, Any]:
    return {
        "sandboxID": vm.id,
        "templateID": vm.template,
        "clientID": "6532622b",
        "envdVersion": ENVD_VERSION,
        "startedAt": vm.started.isoformat(),
        "endAt": vm.ends.isoformat(),
        "state": vm.state,
        "metadata": vm.metadata,
        "cpuCount": 2,
        "memoryMB": 512,
        "diskSizeMB": 2048,
    }


def cursor(vm: Vm) -> tuple[str, str]:
    return vm.started.isoformat(timespec="microseconds"), vm.id


def error(status: int, message: str, code: str | None = None) -> web.Response:
    body = {"code": status, "message": message} | ({"error_code": code} if code else {})
    return web.json_response(body, status=status)


def not_found(request: web.Request) -> web.Response:
    return error(404, f"Sandbox \"{request.match_info['id']}\" doesn't exist or you don't have access to it")


def connect_error(status: int, code: str, message: str) -> web.Response:
    return web.json_response({"code": code, "message": message}, status=status)


async def send(response: web.StreamResponse, message: dict[str, Any], flag: int = 0) -> None:
    data = json.dumps(message).encode()
    await response.write(struct.pack(">BI", flag, len(data)) + data)


async def end(response: web.StreamResponse, code: str = "", message: str = "") -> web.StreamResponse:
    await send(response, {"error": {"code": code, "message": message}} if code else {}, flag=2)
    await response.write_eof()
    return response
