"""E2B on loopback: its control plane and the daemon (envd) of each sandbox, for the unpatched SDK.

Read from the open sources of the service, github.com/e2b-dev/infra (Apache-2.0), at commit 54693ff35 of August 2026:
``packages/api/internal/handlers`` (create, connect, list, pause, kill, timeout), ``orchestrator/keep_alive.go``,
``packages/shared/pkg/proxy`` (the 502 of a sandbox that is not there), ``packages/envd/internal/services/process``
(start, input, signals, the handler) and ``packages/envd/internal/api`` (files). What hurts is kept:

* there are no names, only metadata: creators of one key all succeed;
* a time-out and a signal reach the command's first process only, and its children live on;
* a call lasts as long as any process holds its stdout or stderr; output that nobody reads is held back;
* a client that goes away leaves the command running, and what it would have read is dropped;
* the proxy answers alike for a sandbox that was killed, that ended, and that is paused;
* a start time is new after a resume; ``connect`` only lengthens, ``timeout`` shortens too.

Idempotency keys are newer than that commit: how they answer is put together from the SDK's model of errors. Requests
are read by the SDK's own models of the API, which are made from E2B's OpenAPI and protobuf files, and refused where
they do not fit; answers are read by the same models in the client. Not here: templates and their builds, volumes,
egress rules that allow something (they are noted), memory that outlives a pause.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import secrets
import shutil
import tempfile
import urllib.parse
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from aiohttp import web
from e2b.api.client.models import ConnectSandboxV2, NewSandboxV2, SandboxTimeoutRequest
from e2b.envd.process import process_pb

from tests.emulators.e2b_vm import (
    Fault,
    Running,
    Vm,
    connect_error,
    cursor,
    described,
    end,
    error,
    listed,
    not_found,
    send,
)
from tests.emulators.machine import Machine

_USER = "user"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# As envd starts a command, see handler.go.
_WRAPPER = 'echo 100 > /proc/$$/oom_score_adj && exec ionice -c 2 -n 4 nice -n 0 "${@}"'


class E2BEmulator:
    """The service. An async context manager; `url` is both the ``api_url`` and the ``sandbox_url``.

    Attributes:
        latency: seconds that are added to each request.
        start_delay: seconds that a sandbox takes to start.
        list_lag: seconds until a new sandbox is listed.
        max_sandboxes: how many may run at once.
        max_hours: the longest life of a sandbox.
        page: how many sandboxes a page of the list has at most.
        calls: ``POST /v2/sandboxes`` and so on, of all requests.
    """

    def __init__(self) -> None:
        self.api_key = f"e2b_{secrets.token_hex(20)}"
        self.templates = {"base"}
        self.latency = self.start_delay = self.list_lag = 0.0
        self.max_sandboxes, self.max_hours, self.page = 1000, 24, 100
        self.faults: list[Fault] = []
        self.calls: list[str] = []
        self.vms: dict[str, Vm] = {}
        self.url = ""
        self._answers: dict[str, tuple[str, dict[str, Any] | None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._transports: set[asyncio.BaseTransport] = set()
        self._root = Path()

    async def __aenter__(self) -> Self:
        self._root = Path(tempfile.mkdtemp(prefix="e2b-emulator-"))
        self._root.chmod(0o755)
        app = web.Application(middlewares=[self._middleware], client_max_size=200 * 1024 * 1024)
        app.add_routes(
            [
                web.post("/v2/sandboxes", self._create),
                web.get("/v2/sandboxes", self._list),
                web.get("/sandboxes/{id}", self._get),
                web.delete("/sandboxes/{id}", self._delete),
                web.post("/sandboxes/{id}/timeout", self._timeout),
                web.post("/sandboxes/{id}/pause", self._pause),
                web.post("/v2/sandboxes/{id}/connect", self._connect),
                web.get("/health", self._health),
                web.post("/files", self._upload),
                web.post("/process.Process/Start", self._start),
                web.post("/process.Process/SendInput", self._send_input),
                web.post("/process.Process/CloseStdin", self._close_stdin),
                web.post("/process.Process/SendSignal", self._send_signal),
            ]
        )
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        self._spawn(self._expire())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for vm in list(self.vms.values()):
            await self._remove(vm)
        await self._runner.cleanup()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        shutil.rmtree(self._root, ignore_errors=True)

    def fail(self, begins: str, status: int = 500, **rest: Any) -> None:
        """Let the next requests that begin so fail."""
        body = json.dumps({"code": status, "message": rest.pop("message", "an emulated fault")}).encode()
        self.faults.append(Fault(begins, status, rest.pop("body", body), **rest))

    def drop_connections(self) -> None:
        """Cut every connection that is open."""
        for transport in list(self._transports):
            transport.abort()

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @web.middleware
    async def _middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        assert request.transport is not None
        transport = request.transport
        self._transports.add(transport)
        name = f"{request.method} {request.path}"
        self.calls.append(name)
        try:
            if self.latency:
                await asyncio.sleep(self.latency)
            for fault in self.faults:
                if name.startswith(fault.begins) and fault.times > 0:
                    fault.times -= 1
                    if fault.after:
                        await handler(request)
                    if fault.status == 0:
                        transport.abort()
                    return web.Response(
                        status=fault.status or 500,
                        body=fault.body,
                        headers={"Content-Type": "application/json", **fault.headers},
                    )
            of_sandbox = request.path.startswith(("/process.", "/files", "/health"))
            if not of_sandbox and request.headers.get("X-API-Key") != self.api_key:
                return error(401, "Invalid API key: api key doesn't exist")
            return await handler(request)
        finally:
            self._transports.discard(transport)

    # The control plane.

    async def _create(self, request: web.Request) -> web.Response:
        text = await request.text()
        model = NewSandboxV2.from_dict(json.loads(text))
        if model.additional_properties:
            return error(400, f"validation error: unknown fields {sorted(model.additional_properties)}")
        body = model.to_dict()
        key = request.headers.get("Idempotency-Key")
        if key in self._answers:
            asked, answer = self._answers[key]
            if asked != text:
                return error(422, "the idempotency key was used for another request", "idempotency_request_mismatch")
            if answer is None:
                return error(409, "a request with that key is under way", "idempotency_in_progress")
            return web.json_response(answer, status=201)
        if body["templateID"] not in self.templates:
            return error(404, f"template '{body['templateID']}' not found")
        if body["timeout"] > self.max_hours * 3600:
            return error(400, f"Timeout cannot be greater than {self.max_hours} hours")
        rules = body.get("network") or {}
        if "0.0.0.0/0" not in rules.get("denyOut", ()) and any(
            re.search("[a-z]", to) for to in rules.get("allowOut", ())
        ):
            return error(
                400, "When specifying allowed domains in allow out, you must include 'ALL_TRAFFIC' in deny out"
            )
        if len([vm for vm in self.vms.values() if vm.state == "running"]) >= self.max_sandboxes:
            return error(
                429, f"you have reached the maximum number of concurrent E2B sandboxes ({self.max_sandboxes})."
            )
        if key is not None:
            self._answers[key] = (text, None)
        # Once begun it is finished, whoever asked for it.
        return await asyncio.shield(self._spawn(self._made(text, body, key)))

    async def _made(self, text: str, body: dict[str, Any], key: str | None) -> web.Response:
        await asyncio.sleep(self.start_delay)
        name = "i" + secrets.token_hex(10)
        machine = Machine(self._root / name)
        machine.start()
        home = machine.path(f"/home/{_USER}")
        home.mkdir(parents=True)
        if os.geteuid() == 0:
            os.chown(home, machine.uid, machine.uid)
            for owned in (".", "home", "root"):
                os.chown(machine.tree / owned, 0, 0)
        now = datetime.now(UTC)
        vm = self.vms[name] = Vm(
            id=name,
            machine=machine,
            template=body["templateID"],
            metadata=body.get("metadata") or {},
            env=body.get("envVars") or {},
            started=now,
            ends=now + timedelta(seconds=body["timeout"]),
            auto_pause=bool(body.get("autoPause")),
            network={key: body[key] for key in ("network", "allow_internet_access", "volumeMounts") if key in body},
        )
        if key is not None:
            self._answers[key] = (text, described(vm))
        return web.json_response(described(vm), status=201)

    async def _list(self, request: web.Request) -> web.Response:
        query = request.query
        # Keys and values were encoded one by one, and then the whole.
        pairs = urllib.parse.parse_qsl(query.get("metadata", ""))
        wanted = {urllib.parse.unquote(name): urllib.parse.unquote(value) for name, value in pairs}
        states = query.get("state", "running,paused").split(",")
        seen = datetime.now(UTC) - timedelta(seconds=self.list_lag)
        found = [
            vm
            for vm in self.vms.values()
            if vm.state in states and wanted.items() <= vm.metadata.items() and (not self.list_lag or vm.started < seen)
        ]
        falling = query.get("order", "desc") == "desc"
        found.sort(key=lambda vm: (vm.started, vm.id), reverse=falling)
        limit = min(int(query.get("limit", self.page)), self.page)
        if token := query.get("nextToken"):
            after = tuple(json.loads(base64.urlsafe_b64decode(token)))
            found = [vm for vm in found if (cursor(vm) < after if falling else cursor(vm) > after)]
        headers = {}
        if len(found) > limit:
            found = found[:limit]
            headers["X-Next-Token"] = base64.urlsafe_b64encode(json.dumps(cursor(found[-1])).encode()).decode()
        return web.json_response([listed(vm) for vm in found], headers=headers)

    async def _get(self, request: web.Request) -> web.Response:
        vm = self.vms.get(request.match_info["id"])
        if vm is None:
            return not_found(request)
        return web.json_response({**listed(vm), "envdAccessToken": vm.token, "domain": None})

    async def _delete(self, request: web.Request) -> web.Response:
        vm = self.vms.get(request.match_info["id"])
        if vm is None:
            return not_found(request)
        await self._remove(vm)
        return web.Response(status=204)

    async def _timeout(self, request: web.Request) -> web.Response:
        vm = self.vms.get(request.match_info["id"])
        if vm is None or vm.state != "running":
            return not_found(request)
        body = SandboxTimeoutRequest.from_dict(await request.json())
        vm.ends = datetime.now(UTC) + timedelta(seconds=body.timeout)
        return web.Response(status=204)

    async def _pause(self, request: web.Request) -> web.Response:
        vm = self.vms.get(request.match_info["id"])
        if vm is None:
            return not_found(request)
        if vm.state != "running":
            return error(409, f"Error pausing sandbox - sandbox '{vm.id}' is already paused")
        vm.state = "paused"
        vm.machine.stop()  # the real one keeps its memory too
        return web.Response(status=204)

    async def _connect(self, request: web.Request) -> web.Response:
        body = ConnectSandboxV2.from_dict(await request.json())
        vm = self.vms.get(request.match_info["id"])
        if vm is None:
            return not_found(request)
        seconds = body.timeout if isinstance(body.timeout, int) else 300
        if seconds > self.max_hours * 3600:
            return error(400, f"Timeout cannot be greater than {self.max_hours} hours")
        ends = datetime.now(UTC) + timedelta(seconds=seconds)
        if vm.state == "running":
            vm.ends = max(vm.ends, ends)
            return web.json_response(described(vm))
        await asyncio.sleep(self.start_delay)
        vm.machine.start()
        if os.geteuid() == 0:
            for owned in (".", "home", "root"):
                os.chown(vm.machine.tree / owned, 0, 0)
        vm.state, vm.started, vm.ends = "running", datetime.now(UTC), ends
        return web.json_response(described(vm), status=201)

    async def _remove(self, vm: Vm) -> None:
        self.vms.pop(vm.id, None)
        await asyncio.to_thread(vm.machine.remove)

    async def _expire(self) -> None:
        while True:
            now = datetime.now(UTC)
            for vm in list(self.vms.values()):
                if vm.state == "running" and vm.ends <= now:
                    if vm.auto_pause:
                        vm.state = "paused"
                        vm.machine.stop()
                    else:
                        await self._remove(vm)
            await asyncio.sleep(0.1)

    # The daemon in a sandbox, behind the proxy.

    def _vm(self, request: web.Request) -> Vm:
        name = request.headers.get("E2b-Sandbox-Id", "")
        vm = self.vms.get(name)
        if vm is None or vm.state != "running":
            answer = json.dumps({"sandboxId": name, "message": "The sandbox was not found", "code": 502})
            raise web.HTTPBadGateway(text=answer, content_type="application/json")
        if request.headers.get("X-Access-Token") != vm.token:
            raise web.HTTPUnauthorized(
                text='{"code": "unauthenticated", "message": "unauthorized access"}', content_type="application/json"
            )
        return vm

    async def _health(self, request: web.Request) -> web.Response:
        self._vm(request)
        return web.Response(status=204)

    async def _upload(self, request: web.Request) -> web.Response:
        vm = self._vm(request)
        path = vm.machine.path(os.path.join(f"/home/{_USER}", request.query["path"]))
        if path.is_dir():
            return error(400, f"path is a directory: {request.query['path']}")
        if request.content_type == "multipart/form-data":
            part = await (await request.multipart()).next()
            data = bytes(await part.read())  # type: ignore[union-attr]
        else:
            data = await request.read()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o644)
        if os.geteuid() == 0:
            os.chown(path, vm.machine.uid, vm.machine.uid)
        return web.json_response([{"name": path.name, "type": "file", "path": request.query["path"]}])

    async def _start(self, request: web.Request) -> web.StreamResponse:
        vm = self._vm(request)
        raw = await request.read()
        message = process_pb.StartRequest.from_json(raw[5:])
        config = message.process
        assert config is not None
        cwd = config.cwd or f"/home/{_USER}"
        response = web.StreamResponse(headers={"Content-Type": "application/connect+json"})
        if not vm.machine.path(cwd).is_dir():
            await response.prepare(request)
            return await end(response, "invalid_argument", f"cwd '{cwd}' does not exist")
        user = base64.b64decode(request.headers.get("Authorization", "Basic ").split(" ", 1)[1]).decode().rstrip(":")
        if user not in ("", _USER, "root"):
            await response.prepare(request)
            return await end(response, "unauthenticated", f"invalid username: '{user}'")
        await response.prepare(request)
        # Started and read to its end whatever becomes of this request.
        running = await asyncio.shield(self._spawn(self._begin(vm, config, cwd, user, bool(message.stdin))))
        if running is None:
            return await end(response, "unavailable", "the sandbox was stopped")
        timeout = int(request.headers.get("Connect-Timeout-Ms", 0)) / 1000
        clock = self._spawn(self._stop_after(timeout, running)) if timeout else None
        keepalive = float(request.headers.get("Keepalive-Ping-Interval", 90))
        try:
            await send(response, {"event": {"start": {"pid": running.door.pid}}})
            while True:
                try:
                    event = await asyncio.wait_for(running.events.get(), keepalive)
                except TimeoutError:
                    event = {"keepalive": {}}
                if event is None:
                    break
                await send(response, {"event": event})
        finally:
            if clock is not None:
                clock.cancel()
            await running.leave()
        if vm.id not in self.vms or vm.state != "running":
            request.transport.abort()  # type: ignore[union-attr]
        return await end(response)

    async def _begin(
        self, vm: Vm, config: process_pb.ProcessConfig, cwd: str, user: str, stdin: bool
    ) -> Running | None:
        machine, pipe = vm.machine, asyncio.subprocess.PIPE
        kept = machine.uid
        try:
            machine.uid = 0 if user == "root" and os.geteuid() == 0 else kept
            argv = machine.argv(["/bin/sh", "-c", _WRAPPER, "--", config.cmd, *config.args], cwd=cwd)
        except ProcessLookupError:
            return None
        finally:
            machine.uid = kept
        if vm.closed and os.geteuid() == 0:
            argv = ["unshare", "--net", "--", *argv]
        home = "/root" if user == "root" else f"/home/{_USER}"
        env = {"PATH": _PATH, "HOME": home, "USER": user or _USER, "LOGNAME": user or _USER}
        door = await asyncio.create_subprocess_exec(
            *argv,
            env={**env, **vm.env, **(config.envs or {})},
            stdin=pipe if stdin else asyncio.subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,
        )
        children = Path(f"/proc/{door.pid}/task/{door.pid}/children")
        with contextlib.suppress(OSError):  # it ended at once
            while door.returncode is None and not children.read_text():  # noqa: ASYNC110
                await asyncio.sleep(0.001)  # envd tells of a process once it is there
        running = vm.processes[door.pid] = Running(door)
        assert door.stdout is not None
        assert door.stderr is not None
        running.reading = [
            self._spawn(running.pump("stdout", door.stdout)),
            self._spawn(running.pump("stderr", door.stderr)),
        ]
        self._spawn(self._finish(vm, running))
        return running

    async def _finish(self, vm: Vm, running: Running) -> None:
        try:
            await running.run()
        finally:
            vm.processes.pop(running.door.pid, None)
            running.door._transport.close()  # type: ignore[attr-defined]

    async def _stop_after(self, timeout: float, running: Running) -> None:
        await asyncio.sleep(timeout)
        await running.kill()

    async def _send_input(self, request: web.Request) -> web.Response:
        message = process_pb.SendInputRequest.from_json(await request.read())
        running = self._running(request, message)
        assert message.input is not None
        stdin = running.door.stdin
        if stdin is None or stdin.is_closing():
            return connect_error(500, "internal", "error writing to stdin: stdin not enabled or closed")
        try:
            stdin.write(message.input.input.value)
            await stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            return connect_error(500, "internal", "error writing to stdin: broken pipe")
        return web.json_response({})

    async def _close_stdin(self, request: web.Request) -> web.Response:
        running = self._running(request, process_pb.CloseStdinRequest.from_json(await request.read()))
        if running.door.stdin is not None:
            running.door.stdin.close()
        return web.json_response({})

    async def _send_signal(self, request: web.Request) -> web.Response:
        running = self._running(request, process_pb.SendSignalRequest.from_json(await request.read()))
        await running.kill()
        return web.json_response({})

    def _running(self, request: web.Request, message: Any) -> Running:
        pid = message.process.selector.value
        running = self._vm(request).processes.get(pid)
        if running is None:
            answer = {"code": "not_found", "message": f"process with pid {pid} not found"}
            raise web.HTTPNotFound(text=json.dumps(answer), content_type="application/json")
        return running
