"""Cloudflare's bridge, and our Worker around it, in Python: for where Node or its packages cannot be had.

The routes, statuses and bodies are those of npm ``@cloudflare/sandbox`` 0.12.10 (its ``bridge``) and of
``examples/cloudflare``, as far as mabridge uses them; ``test_cloudflare_bridge.py`` compares them with the real ones.
What is below, the containers and the server in them, is the same (`control.py`).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import anyio
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mabridge.testing.server import Server
from tests.emulators.cloudflare.control import Control, Refused
from tests.emulators.machine import require

__all__ = ["BridgeInPython"]

_MOST = 32 * 1024 * 1024
_PAGE = 20
_METHODS = ["GET", "POST", "PUT", "DELETE"]
_NAMES = {"COMMAND_EXECUTION_ERROR": "CommandError", "OPERATION_INTERRUPTED": "OperationInterruptedError"}
_SAFE = re.compile(r"[A-Za-z0-9@%+=:,./-]+")
_OURS = re.compile(r"mab[a-z2-7]{24}")


class Refusal(Exception):
    def __init__(self, error: str, code: str, status: int) -> None:
        super().__init__(error)
        self.response = JSONResponse({"error": error, "code": code}, status_code=status)


@dataclass
class Entry:
    """What our register remembers of a sandbox. Times are milliseconds since the epoch."""

    labels: dict[str, str]
    created: int
    deadline: int
    container: str


@dataclass
class Fault:
    path: str
    status: int
    body: str
    headers: dict[str, str] = field(default_factory=dict)


class BridgeInPython:
    """What `CloudflareEmulator` is, without Node; see there."""

    def __init__(
        self, worker: Literal["ours", "vendor"] = "ours", *, bindings: Mapping[str, str | None] | None = None
    ) -> None:
        self.api_key = "an-api-key-of-the-rig"
        self.latency = 0.0
        self.url = ""
        self.control: Control
        self._ours = worker == "ours"
        self._bindings = {"SANDBOX_API_KEY": self.api_key, **(bindings or {})}
        self._assigned: dict[str, str] = {}
        self._entries: dict[str, Entry] = {}
        self._starting: dict[str, asyncio.Task[bool]] = {}
        self._known_most: int | None = None
        self._faults: list[Fault] = []
        self._open: list[Scope] = []
        self._clients: set[Any] = set()
        sandbox = "/v1/sandbox/{id}"
        register = "/mabridge/v1/sandboxes"
        self._app = Starlette(
            routes=[
                Route("/health", _health),
                Route("/v1/pool/stats", self._stats),
                Route(sandbox + "/exec", self._exec, methods=["POST"]),
                Route(sandbox + "/file/{path:path}", self._put, methods=["PUT"]),
                Route(sandbox + "/running", self._running),
                Route(sandbox, self._delete, methods=["DELETE"]),
                Route(sandbox + "/{path:path}", self._nothing, methods=_METHODS),
                *(
                    (
                        Route("/mabridge/v1", _register),
                        Route(register, self._page),
                        Route(register + "/{id}", self._find, methods=["GET"]),
                        Route(register + "/{id}", self._create, methods=["PUT"]),
                        Route(register + "/{id}/keep-alive", self._keep_alive, methods=["POST"]),
                    )
                    if self._ours
                    else ()
                ),
                Route("/{path:path}", self._other, methods=_METHODS),
            ],
            exception_handlers={Refusal: lambda _, refusal: refusal.response},
        )

    async def __aenter__(self) -> Self:
        require()
        self._directory = Path(tempfile.mkdtemp(prefix="mabridge-cloudflare-"))
        self.control = Control(self._directory)

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:  # uvicorn takes no method for such
            await self._serve(scope, receive, send)

        self._server = Server(serve)
        self._serving = asyncio.create_task(self._server.serve(task_status=anyio.TASK_STATUS_IGNORED))
        self._alarms = asyncio.create_task(self._ring())
        self.url = self._server.url
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        with anyio.CancelScope(shield=True):
            self._alarms.cancel()
            await asyncio.wait([self._alarms])
            await self.control.close()
            await self._server.stop()
            await self._serving
            shutil.rmtree(self._directory, ignore_errors=True)

    async def connections(self) -> int:
        """How many connections were opened, ever."""
        return len(self._clients)

    async def fail_next(
        self, path: str, status: int, *, times: int = 1, body: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer the next requests whose path holds `path` with a status, and do nothing else of them."""
        self._faults = [Fault(path, status, body, dict(headers or {})) for _ in range(times)]

    async def cut(self) -> None:
        """Break every connection."""
        for scope in tuple(self._open):
            self._server.cut(scope)

    async def lose_containers(self) -> None:
        """End every container, as their sleeping does."""
        for key in tuple(self.control.containers):
            await self.control.end(key)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._open.append(scope)
        self._clients.add(scope["client"])
        try:
            await asyncio.sleep(self.latency)
            fault = next((fault for fault in self._faults if fault.path in scope["path"]), None)
            if fault is not None:
                self._faults.remove(fault)
                await PlainTextResponse(fault.body, fault.status, fault.headers)(scope, receive, send)
                return
            refusal = self._door(Request(scope))
            with contextlib.suppress(ClientDisconnect):
                await (refusal or self._app)(scope, receive, send)
        finally:
            self._open.remove(scope)

    def _door(self, request: Request) -> Response | None:
        """Whether the key, and the id of the sandbox, let a request in."""
        path, key = request.url.path, self._bindings["SANDBOX_API_KEY"]
        given = re.sub("^bearer ", "", request.headers.get("authorization", ""), flags=re.IGNORECASE)
        unauthorized = Refusal("Unauthorized", "unauthorized", 401).response
        if self._ours and path != "/health":
            if not key:
                return Refusal("SANDBOX_API_KEY is not set", "unconfigured", 503).response
            if given != key:
                return unauthorized
        parts = path.split("/")
        if path.startswith("/v1/sandbox/") and not re.fullmatch("[a-z2-7]{1,128}", parts[3]):
            return Refusal("Invalid sandbox ID format", "invalid_request", 400).response
        if path.startswith(("/v1/sandbox/", "/v1/pool/")) and key and given != key:
            return unauthorized
        return None

    async def _container(self, request: Request) -> str:
        """The container that the pool has for a request: one is started if there is none."""
        sandbox = request.path_params["id"]
        if self._ours and _OURS.fullmatch(sandbox):
            entry = await self._lookup(sandbox)
            if entry is None:
                raise Refusal(f"pool error: mabridge: there is no sandbox {sandbox}", "pool_error", 502)
            return entry.container
        return await self._allocate(sandbox)

    async def _allocate(self, sandbox: str) -> str:
        existing = self._assigned.get(sandbox)
        if existing is not None and self.control.is_running(existing):
            return existing
        self._assigned.pop(sandbox, None)
        container = str(uuid.uuid4())
        try:
            if self._known_most is not None and len(self._assigned) >= self._known_most:
                raise Refused("", "", 503)
            options = {"enableInternet": self._bindings.get("ENABLE_INTERNET") == "true"}
            await self.control.start(container, options)
        except Refused as refused:
            self._known_most = most = len(self._assigned)
            message = (
                f"Cannot start container: instance limit reached ({most}/{most}). All container slots are in use. "
            )
            raise Refusal(message + "Wait for existing containers to stop.", "capacity_exceeded", 503) from refused
        # Of two requests at once, each starts one, and the last is found from then on.
        self._assigned[sandbox] = container
        return container

    async def _exec(self, request: Request) -> Response:
        container = await self._container(request)
        try:
            body = await request.json()
        except ValueError:
            raise Refusal("Invalid JSON body", "invalid_request", 400) from None
        argv = body.get("argv")
        if not isinstance(argv, list) or not argv:
            raise Refusal("argv must be a non-empty array", "invalid_request", 400)
        cwd = body.get("cwd")
        if isinstance(cwd, str):
            cwd = _in_workspace(cwd)
            if cwd is None:
                raise Refusal("cwd must resolve to a location within /workspace", "invalid_request", 403)
        command = " ".join(map(_quoted, argv))
        told = self._told(container, command, cwd, body.get("timeout_ms"))
        return StreamingResponse(told, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def _told(self, container: str, command: str, cwd: str | None, timeout: float | None) -> AsyncIterator[bytes]:
        try:
            running = await self.control.execute(container, command, cwd, timeout)
        except Refused as refused:
            yield _event("error", {"error": f"exec failed: {_named(refused)}", "code": "exec_transport_error"})
            return
        async for event in running.told():
            if event["type"] == "complete":
                yield _event("exit", {"exit_code": event["exitCode"]})
            else:
                yield _event(event["type"], base64.b64encode(event["data"].encode()).decode())

    async def _put(self, request: Request) -> Response:
        container = await self._container(request)
        path = _in_workspace("/" + request.path_params["path"])
        if path is None:
            raise Refusal("path must resolve to a location within /workspace", "invalid_request", 403)
        data = await request.body()
        if len(data) > _MOST:
            said = f"payload too large: {len(data)} bytes exceeds the {_MOST}-byte limit"
            raise Refusal(said, "payload_too_large", 413)
        try:
            await self.control.write(container, path, data)
        except Refused as refused:
            raise Refusal(f"write failed: {_named(refused)}", "workspace_archive_write_error", 502) from refused
        return JSONResponse({"ok": True})

    async def _running(self, request: Request) -> Response:
        return JSONResponse({"running": self.control.is_running(await self._container(request))})

    async def _delete(self, request: Request) -> Response:
        await self.control.end(await self._container(request))  # one that is not there is started for it
        self._assigned.pop(request.path_params["id"], None)
        return Response(status_code=204)

    async def _nothing(self, request: Request) -> Response:
        await self._container(request)
        return PlainTextResponse("404 Not Found", 404)

    async def _stats(self, request: Request) -> Response:
        config = {"warmTarget": 0, "refreshInterval": 10000, "maxInstances": 0, "scaleBatchSize": 5}
        count = len(self._assigned)
        return JSONResponse(
            {"warm": 0, "assigned": count, "total": count, "config": config, "maxInstances": self._known_most}
        )

    async def _other(self, request: Request) -> Response:
        if request.url.path.startswith("/v1/"):
            return PlainTextResponse("404 Not Found", 404)
        if not self._ours:
            return PlainTextResponse("OK")
        raise Refusal("No such route", "not_found", 404)

    # What our Worker adds.

    async def _lookup(self, sandbox: str) -> Entry | None:
        entry = self._entries.get(sandbox)
        if entry is None:
            return None
        if entry.deadline <= _now():
            await self._remove(sandbox, entry)
        elif self._assigned.get(sandbox) == entry.container and self.control.is_running(entry.container):
            return entry
        self._entries.pop(sandbox, None)
        return None

    async def _remove(self, sandbox: str, entry: Entry) -> None:
        await self.control.end(entry.container)
        if self._assigned.get(sandbox) == entry.container:
            del self._assigned[sandbox]
        self._entries.pop(sandbox, None)

    async def _find(self, request: Request) -> Response:
        sandbox = _checked(request)
        entry = await self._lookup(sandbox)
        if entry is None:
            raise _missing(sandbox)
        return JSONResponse({"id": sandbox, **asdict(entry)})

    async def _create(self, request: Request) -> Response:
        sandbox = _checked(request)
        body = await _ttl(request)
        starting = self._starting.get(sandbox)
        if starting is not None:
            await asyncio.wait([starting])
            created = False
        else:
            starting = self._starting[sandbox] = asyncio.create_task(
                self._begin(sandbox, body.get("labels") or {}, body["ttl"])
            )
            try:
                created = await starting
            finally:
                del self._starting[sandbox]
        return JSONResponse({"id": sandbox, "created": created}, status_code=201 if created else 200)

    async def _begin(self, sandbox: str, labels: dict[str, str], ttl: float) -> bool:
        if await self._lookup(sandbox) is not None:
            return False
        container = await self._allocate(sandbox)
        now = _now()
        self._entries[sandbox] = Entry(labels, now, now + int(ttl * 1000), container)
        return True

    async def _keep_alive(self, request: Request) -> Response:
        sandbox = _checked(request)
        body = await _ttl(request)
        entry = await self._lookup(sandbox)
        if entry is None:
            raise _missing(sandbox)
        entry.deadline = max(entry.deadline, _now() + int(body["ttl"] * 1000))
        return JSONResponse({"id": sandbox})

    async def _page(self, request: Request) -> Response:
        cursor = request.query_params.get("cursor", "")
        names = [name for name in sorted(self._entries) if name > cursor][:_PAGE]
        listed = []
        for name in names:
            entry = self._entries[name]
            if entry.deadline > _now() and self._assigned.get(name) == entry.container:
                known = {key: value for key, value in asdict(entry).items() if key != "container"}
                listed.append({"id": name, **known})
        return JSONResponse({"sandboxes": listed, "cursor": names[-1] if len(names) == _PAGE else None})

    async def _ring(self) -> None:
        while True:
            await asyncio.sleep(int(self._bindings.get("WARM_POOL_REFRESH_INTERVAL") or "10000") / 1000)
            for sandbox, container in tuple(self._assigned.items()):
                if not self.control.is_running(container):
                    del self._assigned[sandbox]
            if self._ours:
                for sandbox in tuple(self._entries):
                    await self._lookup(sandbox)
                self._known_most = None


def _named(refused: Refused) -> str:
    """A refusal as the SDK says it."""
    return f"{_NAMES.get(refused.code, 'SandboxError')}: {refused.message}"


async def _health(request: Request) -> Response:
    return JSONResponse({"ok": True})


async def _register(request: Request) -> Response:
    return JSONResponse({"mabridge": 1})


async def _ttl(request: Request) -> dict[str, Any]:
    body: Any = None
    with contextlib.suppress(ValueError):
        body = await request.json()
    ttl = body.get("ttl") if isinstance(body, dict) else None
    if not isinstance(ttl, (int, float)) or not ttl > 0:
        raise Refusal("ttl must be a number of seconds", "invalid_request", 400)
    return body


def _checked(request: Request) -> str:
    sandbox: str = request.path_params["id"]
    if not _OURS.fullmatch(sandbox):
        raise Refusal("Invalid sandbox ID format", "invalid_request", 400)
    return sandbox


def _missing(sandbox: str) -> Refusal:
    return Refusal(f"There is no sandbox {sandbox}", "not_found", 404)


def _now() -> int:
    return int(time.time() * 1000)


def _event(name: str, data: object) -> bytes:
    said = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return f"event: {name}\ndata: {said}\n\n".encode()


def _quoted(argument: str) -> str:
    if _SAFE.fullmatch(argument):
        return argument
    for character, written in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        argument = argument.replace(character, written)
    return f"$'{argument}'"


def _in_workspace(path: str) -> str | None:
    parts: list[str] = []
    for part in (path if path.startswith("/") else f"/workspace/{path}").split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/" + "/".join(parts) if parts[:1] == ["workspace"] else None
