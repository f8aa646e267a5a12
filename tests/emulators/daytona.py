"""Daytona's API and what runs in its sandboxes, on loopback, for the real SDK.

What it does was read in the SDK's source (0.226), whose generated models check the requests here and the answers there,
and in the last public source of the service (github.com/daytonaio/daytona, v0.190): the API's sandbox service, the
proxy and the runner before a sandbox, and the daemon in it. What hurts is here too:

- A command's text is the stdin of a shell. Its stdout and stderr are one text, invalid UTF-8 is replaced, and nothing
  is bounded. A time-out kills the process group and loses the output. A caller that goes away changes nothing.
- The answer waits for whoever holds the output open.
- A terminal runs a login shell, and cuts off whoever reads slower than it writes: see `daytona_terminal`.
- The list is late, for what is new and for what is gone, which it may show again as started (their issue 5138).
- While a sandbox changes its state, another change is refused with 409. A deleted one has no name from then on, but an
  id, until it is destroyed.
- The proxy says 401 of a sandbox that does not exist, and 400 of one that is stopped.
- Every answer may be late, an error, or none: `latency`, `fail`, `break_connections`.

The image's user is not root, and has ``/workspace``. Not emulated: the network's restrictions, quotas, regions,
archives. A TTL of one minute passes in `minute` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from aiohttp import web
from daytona import AsyncDaytona  # noqa: F401 - a second of importing, or ten on a busy machine: not at a test's expense
from daytona_api_client_async import CreateSandbox
from daytona_toolbox_api_client_async import ExecuteRequest

from tests.emulators.daytona_terminal import Terminal
from tests.emulators.machine import Machine

KEY = "dtn_emulated"
GONE = ("destroying", "destroyed")


class Box:
    """A sandbox: what the database knows, and the machine."""

    def __init__(self, asked: CreateSandbox, machine: Machine) -> None:
        self.id = str(uuid.uuid4())
        self.name = asked.name or self.id
        self.asked = asked
        self.machine = machine
        self.state = "creating"
        self.desired = "started"
        self.pending = True
        self.created = time.time()
        self.gone_at: float | None = None
        self.ends: float | None = None
        self.error: str | None = None

    @property
    def env(self) -> dict[str, str]:
        """The daemon's own variables, which commands have too."""
        own = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/home/daytona", "LANG": "C.UTF-8", "USER": "daytona"}
        return {**own, **(self.asked.env or {})}

    def shown(self, base: str) -> dict[str, Any]:
        asked = self.asked
        ends = datetime.fromtimestamp(self.ends, UTC).isoformat() if self.ends else None
        known = {
            "id": self.id,
            "organizationId": "11111111-1111-1111-1111-111111111111",
            "name": self.name,
            "snapshot": asked.snapshot,
            "user": asked.user or "daytona",
            "env": asked.env or {},
            "labels": asked.labels or {},
            "public": False,
            "networkBlockAll": bool(asked.network_block_all),
            "networkAllowList": asked.network_allow_list,
            "domainAllowList": asked.domain_allow_list,
            "kvm": False,
            "target": asked.target or "us",
            "cpu": asked.cpu or 1,
            "gpu": asked.gpu or 0,
            "memory": asked.memory or 1,
            "disk": asked.disk or 3,
            "state": self.state,
            "desiredState": self.desired,
            "errorReason": self.error,
            "recoverable": False,
            "autoStopInterval": asked.auto_stop_interval,
            "autoDeleteInterval": asked.auto_delete_interval,
            "autoDestroyAt": ends,
            "createdAt": datetime.fromtimestamp(self.created, UTC).isoformat().replace("+00:00", "Z"),
            "toolboxProxyUrl": f"{base}/toolbox",
        }
        return {name: value for name, value in known.items() if value is not None}


class DaytonaEmulator:
    """The service. ``async with DaytonaEmulator() as emulator``; the API is at `url`, and takes the key `KEY`."""

    def __init__(self) -> None:
        self.latency = 0.0
        """Seconds added to each request."""
        self.start_delay = 0.05
        """Seconds until a new sandbox, or one that is started again, has started."""
        self.reach_delay = 0.0
        """Seconds from then until the proxy finds it."""
        self.list_lag = 0.0
        """Seconds by which the list is late."""
        self.page = 100
        """The most that a page of the list holds."""
        self.minute = 60.0
        """Seconds that a TTL of one minute takes."""
        self.shell = "/bin/bash"
        """What commands are given to; the service takes the first there is of zsh, bash and what SHELL says."""
        self.restrictions = True
        """Whether it knows the network's restrictions; one that does not ignores them."""
        self.snapshots = {"mine"}
        """Those that there are, beside the default one."""
        self.images = {"debian:13"}
        """What its registry has."""
        self.requests: list[str] = []
        """The method and path of each, in order."""
        self.boxes: dict[str, Box] = {}
        self.terminals: dict[str, Terminal] = {}
        """Those that are open, by the id that was asked for."""
        self.url = self._base = ""
        self.api_key = KEY
        self._faults: list[tuple[re.Pattern[str], int, dict[str, str], str]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._open: dict[int, web.Request] = {}

    async def __aenter__(self) -> Self:
        self._directory = tempfile.TemporaryDirectory(prefix="daytona-", ignore_cleanup_errors=True)
        Path(self._directory.name).chmod(0o755)
        app = web.Application(middlewares=[self._middleware], client_max_size=1 << 30)
        one = "/api/sandbox/{name}"
        app.add_routes(
            [
                web.post("/api/sandbox", self._create),
                web.get("/api/sandbox", self._list),
                web.get(one, self._get),
                web.delete(one, self._delete),
                web.post(one + "/start", self._start),
                web.post(one + "/stop", self._stop),
                web.post(one + "/ttl/{minutes}", self._set_ttl),
                web.get("/api/snapshots/{name}", self._snapshot),
                web.post("/toolbox/{id}/process/execute", self._execute),
                web.post("/toolbox/{id}/files/bulk-upload", self._upload),
                web.get("/toolbox/{id}/process/pty/create-connect", self._open_terminal),
                web.delete("/toolbox/{id}/process/pty/{terminal}", self._kill_terminal),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        self._base = f"http://127.0.0.1:{port}"
        self.url = f"{self._base}/api"
        self._spawn(self._end_what_is_over())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for box in self.boxes.values():
            box.machine.remove()
        await self._runner.cleanup()
        self._directory.cleanup()

    def fail(
        self, pattern: str, status: int, *, times: int = 1, headers: dict[str, str] | None = None, body: str = ""
    ) -> None:
        """Answer the next requests whose "METHOD path" matches with an error; 0 is to close, -1 to do it and close."""
        self._faults += [(re.compile(pattern), status, headers or {}, body)] * times

    async def break_connections(self) -> None:
        """Cut every connection on which an answer is awaited."""
        for request in list(self._open.values()):
            if request.transport is not None:
                request.transport.abort()

    @property
    def living(self) -> list[Box]:
        return [box for box in self.boxes.values() if box.state not in GONE]

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        said = f"{request.method} {request.path}"
        self.requests.append(said)
        await asyncio.sleep(self.latency)
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return error(401, "Unauthorized")
        fault = next((fault for fault in self._faults if fault[0].search(said)), None)
        if fault is not None:
            self._faults.remove(fault)
            _, status, headers, body = fault
            if status == -1:
                await handler(request)
            if status <= 0:
                if request.transport is not None:
                    request.transport.abort()
                raise web.HTTPServiceUnavailable
            if body:
                return web.Response(status=status, text=body, headers=headers, content_type="text/html")
            return error(status, "emulated", headers)
        self._open[id(request)] = request
        try:
            return await handler(request)
        except Refused as exc:
            return error(exc.status, str(exc))
        finally:
            del self._open[id(request)]

    # The API.

    async def _create(self, request: web.Request) -> web.Response:
        asked = CreateSandbox.from_dict(await request.json())
        assert asked is not None
        if asked.additional_properties:
            raise Refused(400, f"properties {list(asked.additional_properties)} should not exist")
        if asked.snapshot is not None and asked.snapshot not in self.snapshots:
            raise Refused(400, f"Snapshot {asked.snapshot} not found. Did you add it through the Daytona Dashboard?")
        if any(box.name == asked.name for box in self.boxes.values()):
            raise Refused(409, f"Sandbox with name {asked.name} already exists")
        if not self.restrictions:
            asked.network_block_all = asked.network_allow_list = asked.domain_allow_list = None
        box = Box(asked, Machine(Path(self._directory.name) / uuid.uuid4().hex))
        if asked.ttl_minutes:
            box.ends = box.created + self._seconds(asked.ttl_minutes)
        self.boxes[box.id] = box
        build = (asked.build_info.dockerfile_content or "").split() if asked.build_info is not None else []
        if build and build[1] not in self.images:  # FROM image
            self._spawn(self._fail(box))
        else:
            self._spawn(self._bring_up(box))
        return web.json_response(box.shown(self._base))

    async def _bring_up(self, box: Box) -> None:
        await asyncio.sleep(self.start_delay)
        box.machine.start()
        for place in ("home/daytona", "workspace"):
            (box.machine.tree / place).mkdir(exist_ok=True)
            os.chown(box.machine.tree / place, box.machine.uid, box.machine.uid)
        if os.geteuid() == 0:
            os.chown(box.machine.tree, 0, 0)
        box.state, box.pending, box.started = "started", False, time.time()

    async def _fail(self, box: Box) -> None:
        box.state = "pending_build"
        await asyncio.sleep(self.start_delay)
        box.state, box.pending, box.error = "build_failed", False, "the image could not be pulled"

    async def _list(self, request: web.Request) -> web.Response:
        labels = json.loads(request.query.get("labels", "{}"))
        limit = min(int(request.query.get("limit", self.page)), self.page)
        cursor = float(request.query.get("cursor", 0))
        now = time.time()
        items = []
        for box in sorted(self.boxes.values(), key=lambda box: box.created):
            shown = box.shown(self._base)
            if box.created <= cursor or box.created + self.list_lag > now:
                continue
            if box.gone_at is not None:
                since = now - box.gone_at
                if since > self.list_lag or self.list_lag / 3 < since < self.list_lag / 2:
                    continue
                shown["state"], shown["desiredState"] = "started", "started"  # it is shown, hidden, and shown again
            if (box.asked.labels or {}).items() >= labels.items():
                items.append(shown)
        more = items[limit:]
        items = items[:limit]
        for item in items:
            item.pop("env")
        next_cursor = str(self.boxes[items[-1]["id"]].created) if more else None
        return web.json_response({"items": items, "nextCursor": next_cursor})

    async def _get(self, request: web.Request) -> web.Response:
        return web.json_response(self._box(request).shown(self._base))

    async def _delete(self, request: web.Request) -> web.Response:
        box = self._box(request)
        if box.pending:
            raise Refused(409, "Sandbox state change in progress")
        self._destroy(box)
        return web.json_response(box.shown(self._base))

    def _destroy(self, box: Box) -> None:
        box.name, box.pending, box.desired = f"DESTROYED_{box.name}_{time.time_ns()}", True, "destroyed"
        self._spawn(self._take_down(box, "destroyed"))

    async def _take_down(self, box: Box, state: str) -> None:
        await asyncio.sleep(0.02)
        box.state = "destroying" if state == "destroyed" else "stopping"
        await asyncio.to_thread(box.machine.remove if state == "destroyed" else box.machine.stop)
        await asyncio.sleep(0.03)
        box.state, box.pending = state, False
        if state == "destroyed":
            box.gone_at = time.time()

    async def _start(self, request: web.Request) -> web.Response:
        box = self._box(request)
        if box.state == box.desired == "started":
            return web.json_response(box.shown(self._base))
        if box.state != box.desired or box.pending:
            raise Refused(409, "Sandbox state change in progress")
        box.state, box.desired, box.pending = "starting", "started", True
        self._spawn(self._bring_up(box))
        return web.json_response(box.shown(self._base))

    async def _stop(self, request: web.Request) -> web.Response:
        box = self._box(request)
        if box.state != box.desired or box.pending:
            raise Refused(409, "Sandbox state change in progress")
        if box.state != "started":
            raise Refused(400, "Sandbox is not in a stoppable state")
        if box.asked.auto_delete_interval == 0:
            self._destroy(box)
        else:
            box.pending, box.desired = True, "stopped"
            self._spawn(self._take_down(box, "stopped"))
        return web.json_response(box.shown(self._base))

    async def _set_ttl(self, request: web.Request) -> web.Response:
        box = self._box(request)
        minutes = float(request.match_info["minutes"])
        box.ends = time.time() + self._seconds(minutes) if minutes else None
        return web.json_response(box.shown(self._base))

    async def _snapshot(self, request: web.Request) -> web.Response:
        raise Refused(404, f"Snapshot {request.match_info['name']} not found")

    def _seconds(self, minutes: float) -> float:
        return self.minute if minutes == 1 else minutes * 60

    def _box(self, request: web.Request) -> Box:
        name = request.match_info["name"]
        for box in self.boxes.values():
            if name in (box.id, box.name) and box.state != "destroyed":
                return box
        raise Refused(404, f"Sandbox with ID or name {name} not found")

    async def _end_what_is_over(self) -> None:
        while True:
            await asyncio.sleep(0.2)
            for box in self.living:
                if box.ends is not None and box.ends < time.time() and not box.pending:
                    self._destroy(box)

    # The proxy before a sandbox, and the daemon in it.

    def _machine(self, request: web.Request) -> Box:
        box = self.boxes.get(request.match_info["id"])
        if box is None or box.state == "destroyed":
            raise Refused(401, "authentication failed: Bearer token is invalid")
        if not box.machine.running or time.time() < box.started + self.reach_delay:
            raise Refused(400, "no IP address found. Is the Sandbox started?")
        return box

    async def _open_terminal(self, request: web.Request) -> web.StreamResponse:
        box = self._machine(request)
        name, size = request.query["id"], (int(request.query["rows"]), int(request.query["cols"]))
        if name in self.terminals:
            raise Refused(409, f"PTY session with ID '{name}' already exists")
        env = {**box.env, "TERM": "xterm-256color"}
        terminal = self.terminals[name] = Terminal(box.machine, lambda: self.latency)
        try:
            return await terminal.serve(request, [self.shell, "-i", "-l"], request.query.get("cwd"), env, size)
        finally:
            del self.terminals[name]

    async def _kill_terminal(self, request: web.Request) -> web.Response:
        self._machine(request)
        terminal = self.terminals.get(request.match_info["terminal"])
        if terminal is None:
            raise Refused(404, "PTY session not found")
        await terminal.kill()
        return web.json_response({"message": "PTY session deleted"})

    async def _execute(self, request: web.Request) -> web.Response:
        asked = ExecuteRequest.from_dict(await request.json())
        assert asked is not None
        box = self._machine(request)
        if not asked.command.strip():
            raise Refused(400, "command cannot be empty or whitespace-only")
        env = {**box.env, **(asked.envs or {})}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        door = await box.machine.spawn([self.shell], cwd=asked.cwd or "/home/daytona", env=env, **pipes)
        late = False

        def kill() -> None:
            nonlocal late
            late = True
            box.machine.kill_group(door, signal.SIGKILL)

        timer = asyncio.get_running_loop().call_later(asked.timeout, kill) if asked.timeout else None
        # A caller that goes away does not stop it.
        work = asyncio.ensure_future(door.communicate(asked.command.encode()))
        self._tasks.add(work)
        work.add_done_callback(self._tasks.discard)
        output, _ = await asyncio.shield(work)
        if timer is not None:
            timer.cancel()
        if not box.machine.running:
            raise Refused(502, "error proxying the request: EOF")
        if late:
            raise Refused(408, "command execution timeout")
        code = door.returncode if door.returncode is not None and door.returncode >= 0 else -1
        return web.json_response({"exitCode": code, "result": output.decode(errors="replace")})

    async def _upload(self, request: web.Request) -> web.Response:
        box = self._machine(request)
        path = ""
        async for part in await request.multipart():
            if part.name.endswith(".path"):
                path = (await part.text()).strip()
                continue
            script = 'mkdir -p "${1%/*}" && cat > "$1"'
            env = {"PATH": "/usr/bin:/bin"}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            door = await box.machine.spawn(["/bin/sh", "-c", script, "sh", path], env=env, **pipes)
            assert door.stdin is not None
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                while chunk := await part.read_chunk(1 << 18):
                    door.stdin.write(chunk)
                    await door.stdin.drain()
            door.stdin.close()
            if await door.wait() != 0:
                return web.json_response({"errors": [f"{path}: create: permission denied"]}, status=400)
        return web.json_response({"files": [{"path": path}]})


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    body = {"statusCode": status, "message": message, "timestamp": datetime.now(UTC).isoformat()}
    return web.json_response(body, status=status, headers=headers)
