"""The routes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import json
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from tests.emulators import machine
from tests.emulators.vercel.state import LONGEST, PATH, PROJECT, TEAM, TOKEN, ApiError, Command, Sandbox, Session


class VercelEmulator:
    """``async with VercelEmulator() as emulator``: the API on loopback. The attributes are switches."""

    def __init__(self) -> None:
        self.url = ""
        self.latency = 0.0
        """Seconds before each request is looked at."""
        self.page_size = 20
        self.start_delay = 0.0
        self.stop_delay = 0.0
        self.delete_needs_stop = False
        self.echo_policy = True
        self.enforce_network = False
        self.cut_after: int | None = None
        """Each stream is cut after that many records that were not sent before."""
        self.refuse_logs = 0
        """How many times the log of a command is refused with a broken connection."""
        self.requests: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.sandboxes: dict[str, Sandbox] = {}
        self._faults: list[tuple[Callable[[web.Request], bool], int, dict[str, str]]] = []
        self._lost: list[str] = []
        self._transports: set[asyncio.Transport] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def options(self) -> dict[str, Any]:
        """The provider's options to reach it by. The variable ``VERCEL_EMULATOR_WRONG`` has a token that is refused."""
        token = {"env": "VERCEL_EMULATOR_TOKEN"}
        return {"token": token, "team_id": TEAM, "project_id": PROJECT, "base_url": self.url}

    async def __aenter__(self) -> Self:
        os.environ |= {"VERCEL_EMULATOR_TOKEN": TOKEN, "VERCEL_EMULATOR_WRONG": "wrong"}
        self._directory = Path(tempfile.mkdtemp(prefix="vercel-emulator-"))
        self._directory.chmod(0o755)
        app = web.Application(middlewares=[self._front])
        v2 = "/api/v2/sandboxes"
        session, command = v2 + "/sessions/{sid}", v2 + "/sessions/{sid}/cmd"
        app.add_routes(
            [
                web.post("/api/v3/sandboxes", self._create),
                web.get(v2, self._list),
                web.get(v2 + "/{name}", self._get),
                web.delete(v2 + "/{name}", self._delete),
                web.get(session, self._get_session),
                web.post(session + "/stop", self._stop_session),
                web.post(session + "/extend-timeout", self._extend),
                web.post(session + "/fs/write", self._write),
                web.post(command, self._command),
                web.get(command + "/{cid}", self._get_command),
                web.get(command + "/{cid}/logs", self._logs),
                web.post(command + "/{cid}/stdin", self._stdin),
                web.post(command + "/{cid}/kill", self._kill),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}/api"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for sandbox in list(self.sandboxes.values()):
            self._remove(sandbox)
        await self._runner.cleanup()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    def fail(self, times: int, status: int, path: str = "", method: str = "", **headers: str) -> None:
        """Answer the next requests so, if their path ends with `path` and they are of that method."""
        for _ in range(times):
            self._faults.append((lambda r: r.path.endswith(path) and method in ("", r.method), status, headers))

    def lose(self, path: str) -> None:
        """Do what the next request to a path that ends so asks for, and break the connection instead of answering."""
        self._lost.append(path)

    def cut(self) -> None:
        """Break every connection."""
        for transport in self._transports:
            transport.abort()

    @web.middleware
    async def _front(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.transport is not None:
            self._transports = {t for t in self._transports if not t.is_closing()} | {request.transport}
        self.requests.append(f"{request.method} {request.path}")
        try:
            if self.latency:
                await asyncio.sleep(self.latency)
            for fault in self._faults:
                if fault[0](request):
                    self._faults.remove(fault)
                    raise ApiError(fault[1], "rate_limited" if fault[1] == 429 else "internal", "Fault", fault[2])
            if request.headers.get("authorization") != f"Bearer {TOKEN}" or request.query.get("teamId") != TEAM:
                raise ApiError(403, "forbidden", "Not authorized", invalidToken=True)
            if request.query.get("projectId", request.query.get("project", PROJECT)) != PROJECT:
                raise ApiError(404, "not_found", "Project not found")
            response = await handler(request)
            for path in self._lost:
                if request.path.endswith(path):
                    self._lost.remove(path)
                    assert request.transport is not None
                    request.transport.abort()
            return response
        except ApiError as exc:
            return exc.response

    def _sandbox(self, name: str) -> Sandbox:
        if name not in self.sandboxes:
            raise ApiError(404, "not_found", "Sandbox not found")
        return self.sandboxes[name]

    def _session(self, request: web.Request, *, running: bool = True) -> Session:
        for sandbox in self.sandboxes.values():
            if sandbox.session.id == request.match_info["sid"]:
                session = sandbox.session
                if running and session.status in ("stopping", "snapshotting"):
                    raise ApiError(409, f"sandbox_{session.status}", "Sandbox is stopping")
                if running and not session.running:
                    raise ApiError(410, "sandbox_stopped", "Sandbox has stopped")
                return session
        raise ApiError(404, "not_found", "Session not found")

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        if body["projectId"] != PROJECT:
            raise ApiError(404, "not_found", "Project not found")
        if body["name"] in self.sandboxes:
            raise ApiError(409, "conflict", "A sandbox with this name already exists")
        if not 1 <= body.get("timeout", 300_000) <= LONGEST:
            raise ApiError(400, "bad_request", f"timeout must be at most {LONGEST}")
        if len(body.get("tags") or {}) > 5:
            raise ApiError(400, "bad_request", "at most 5 tags")
        if body.get("image") not in (None, "vercel/sandbox/universal:latest"):
            raise ApiError(400, "image_not_found", "Image not found")
        name = body["name"]
        sandbox = Sandbox(name, body, machine.Machine(self._directory / uuid.uuid4().hex))
        self.sandboxes[name] = sandbox
        self._start(sandbox)
        return web.json_response(self._whole(sandbox))

    def _whole(self, sandbox: Sandbox) -> dict[str, Any]:
        whole = {"sandbox": sandbox.payload(), "session": sandbox.session.payload(), "routes": []}
        if not self.echo_policy:
            del whole["sandbox"]["networkPolicy"], whole["session"]["networkPolicy"]
        return whole

    def _start(self, sandbox: Sandbox) -> None:
        sandbox.session = session = Session(sandbox, limit=sandbox.body.get("timeout", 300_000))
        if self.start_delay:
            asyncio.get_running_loop().call_later(self.start_delay, self._boot, session)
        else:
            self._boot(session)

    def _boot(self, session: Session) -> None:
        sandbox = session.sandbox
        if self.sandboxes.get(sandbox.name) is not sandbox:
            return
        sandbox.machine.start()
        for name in ("home/vercel-sandbox", "vercel/sandbox"):
            (sandbox.machine.tree / name).mkdir(parents=True, exist_ok=True)
            if os.geteuid() == 0:
                os.chown(sandbox.machine.tree / name, sandbox.machine.uid, sandbox.machine.uid)
        if os.geteuid() == 0:
            os.chown(sandbox.machine.tree, 0, 0)
        session.status = "running"
        session.started = time.time()
        self._arm(session)

    def _arm(self, session: Session) -> None:
        if session.timer is not None:
            session.timer.cancel()
        left = session.started + session.limit / 1000 - time.time()
        session.timer = asyncio.get_running_loop().call_later(max(left, 0), self._stop, session)

    def _stop(self, session: Session) -> None:
        if not session.running:
            return
        sandbox = session.sandbox
        session.status = "snapshotting" if sandbox.persistent and self.stop_delay else "stopped"
        session.stopped = time.time()
        if session.timer is not None:
            session.timer.cancel()
        sandbox.machine.stop()
        for command in session.commands.values():
            command.tell()
        if not sandbox.persistent:
            sandbox.machine.remove()
        if session.status == "snapshotting":
            asyncio.get_running_loop().call_later(self.stop_delay, setattr, session, "status", "stopped")

    def _remove(self, sandbox: Sandbox) -> None:
        self._stop(sandbox.session)
        self.sandboxes.pop(sandbox.name, None)
        sandbox.machine.remove()

    async def _list(self, request: web.Request) -> web.Response:
        query = request.query
        found = sorted(name for name in self.sandboxes if name.startswith(query.get("namePrefix", "")))
        if tags := query.get("tags"):
            key, _, value = tags.partition(":")
            found = [name for name in found if (self.sandboxes[name].body.get("tags") or {}).get(key) == value]
        found = [name for name in found if name > query.get("cursor", "")]
        size = min(int(query.get("limit", self.page_size)), self.page_size)
        page, more = found[:size], len(found) > size
        return web.json_response(
            {
                "sandboxes": [self.sandboxes[name].payload() for name in page],
                "pagination": {"count": len(page), "next": page[-1] if more else None, "prev": None},
            }
        )

    async def _get(self, request: web.Request) -> web.Response:
        sandbox = self._sandbox(request.match_info["name"])
        if request.query.get("resume") == "true" and not sandbox.session.running:
            if sandbox.session.status == "snapshotting":
                raise ApiError(409, "sandbox_snapshotting", "Sandbox is snapshotting")
            if sandbox.session.status == "stopped":
                self._start(sandbox)
        return web.json_response(self._whole(sandbox))

    async def _delete(self, request: web.Request) -> web.Response:
        sandbox = self._sandbox(request.match_info["name"])
        if self.delete_needs_stop and sandbox.session.status != "stopped":
            raise ApiError(409, "sandbox_running", "Stop the sandbox first")
        self._remove(sandbox)
        return web.json_response(self._whole(sandbox))

    async def _get_session(self, request: web.Request) -> web.Response:
        return web.json_response({"session": self._session(request, running=False).payload()})

    async def _stop_session(self, request: web.Request) -> web.Response:
        session = self._session(request)
        self._stop(session)
        return web.json_response({"session": session.payload(), "sandbox": session.sandbox.payload()})

    async def _extend(self, request: web.Request) -> web.Response:
        session, duration = self._session(request), (await request.json())["duration"]
        if duration < 1000 or session.limit + duration > LONGEST:
            raise ApiError(400, "bad_request", f"duration is too short, or the timeout would be more than {LONGEST}")
        session.limit += duration
        self._arm(session)
        return web.json_response({"session": session.payload()})

    async def _write(self, request: web.Request) -> web.Response:
        session, body = self._session(request), await self._all(request)
        pipe = subprocess.PIPE
        argv = ["tar", "-xzf", "-", "-C", request.headers["x-cwd"]]
        tar = await session.sandbox.machine.spawn(argv, env={"PATH": PATH}, stdin=pipe, stdout=pipe, stderr=pipe)
        _, said = await tar.communicate(body)
        if tar.returncode != 0:
            raise ApiError(400, "bad_request", f"Could not write: {said.decode(errors='replace')}")
        return web.json_response({})

    @staticmethod
    async def _all(request: web.Request) -> bytes:
        return b"".join([chunk async for chunk in request.content.iter_chunked(1 << 20)])

    async def _command(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        session = self._session(request)
        sandbox = session.sandbox
        inside = copy.copy(sandbox.machine)
        if body.get("sudo") and os.geteuid() == 0:
            inside.uid = 0
        env = {
            "PATH": PATH,
            "HOME": "/root" if body.get("sudo") else "/home/vercel-sandbox",
            "LANG": "C.UTF-8",
            **(sandbox.body.get("env") or {}),
            **(body.get("env") or {}),
        }
        pipe = subprocess.PIPE
        argv = inside.argv([body["command"], *(body.get("args") or [])], cwd=body.get("cwd") or "/vercel/sandbox")
        if self.enforce_network and sandbox.policy["mode"] != "allow-all":
            argv = ["unshare", "--net", "--", *argv]
        argv[0] = shutil.which(argv[0]) or argv[0]  # not by the command's own PATH
        door = await asyncio.create_subprocess_exec(
            *argv,
            env=env,
            start_new_session=True,
            stdin=pipe if body.get("attachStdin") else subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
        )
        command = Command(body, session, door)
        session.commands[command.id] = command
        task = asyncio.get_running_loop().create_task(command.run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if request.query.get("wait") != "true":
            return web.json_response(command.payload())
        return await self._stream(request, command, whole=True)

    async def _stream(self, request: web.Request, command: Command, *, whole: bool) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/x-ndjson"})
        await response.prepare(request)

        async def send(record: dict[str, Any]) -> None:
            await response.write(json.dumps(record).encode() + b"\n")

        with contextlib.suppress(ConnectionError):
            if whole:
                await send(command.payload())
            sent = 0
            async for record in command.follow():
                await send(record)
                sent += 1
                if self.cut_after is not None and sent > self.cut_after:
                    self.cut_after += 1
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                if record["stream"] == "error":
                    return response
            if whole:
                await send(command.payload())
        return response

    def _its_command(self, request: web.Request) -> Command:
        session = self._session(request)
        if request.match_info["cid"] not in session.commands:
            raise ApiError(404, "not_found", "Command not found")
        return session.commands[request.match_info["cid"]]

    async def _get_command(self, request: web.Request) -> web.Response:
        command = self._its_command(request)
        if request.query.get("wait") == "true":
            async for _ in command.follow():
                pass
        return web.json_response(command.payload())

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        if self.refuse_logs:
            self.refuse_logs -= 1
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return await self._stream(request, self._its_command(request), whole=False)

    async def _stdin(self, request: web.Request) -> web.Response:
        command, body = self._its_command(request), await request.json()
        pipe = command.door.stdin
        if pipe is None or command.code is not None:
            raise ApiError(400, "command_stdin_unavailable", "The command has no stdin")
        data = base64.b64decode(body.get("data", ""))[max(command.written - body.get("offset", command.written), 0) :]
        try:
            for start in range(0, len(data), 65536):
                pipe.write(data[start : start + 65536])
                async with asyncio.timeout(5):
                    await pipe.drain()
                command.written += len(data[start : start + 65536])
            if body.get("close"):
                pipe.close()
        except TimeoutError:
            raise ApiError(504, "timeout", "The command does not read", bytesWritten=command.written) from None
        except ConnectionError:
            raise ApiError(400, "command_stdin_unavailable", "The command has no stdin") from None
        return web.json_response({**command.payload(), "bytesWritten": command.written})

    async def _kill(self, request: web.Request) -> web.Response:
        command = self._its_command(request)
        await command.signal((await request.json())["signal"])
        return web.json_response(command.payload())
