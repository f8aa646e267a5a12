"""What runs inside Cloudflare's containers, and the platform that starts them, on loopback.

The routes are those that the SDK's ``http`` transport calls (npm ``@cloudflare/sandbox`` 0.12.10, its clients). The
vendor's own server is not on npm; how it behaves was measured on its official image: it runs a command in a bash, with
stdin empty and without a session's state; it decodes output as UTF-8 and replaces what is not; its time limit kills the
process group and says so on stderr, with exit code 124; a client that goes away kills nothing; a missing working
directory is an error and not an exit code; a write of 12 MiB fails. A call lasts until its output is closed.
"""

from __future__ import annotations

import asyncio
import base64
import codecs
import json
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.emulators.machine import Machine

_ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
_WRITE_LIMIT = 11 * 1024 * 1024  # of the file's bytes
_WRITE = 'mkdir -p "$(dirname "$1")" && cat > "$1"'


class Refused(Exception):
    """What the server in a container, or the platform, has against a request."""

    def __init__(self, code: str, message: str, status: int) -> None:
        super().__init__(message)
        self.code, self.message, self.status = code, message, status


class Container:
    """One container: a machine, and an event for its end."""

    def __init__(self, tree: Path) -> None:
        self.machine = Machine(tree, uid=0)
        self.options: dict[str, Any] = {}
        self.ended = asyncio.Event()

    def start(self) -> None:
        self.machine.start()
        self.machine.path("/workspace").mkdir(exist_ok=True)


class Control:
    """The platform, as an ASGI application.

    Attributes:
        max_instances: how many containers may run at once.
        containers: those that run, by the ids of their Durable Objects.
        started: how many were ever started.
    """

    def __init__(self, directory: Path) -> None:
        self.max_instances = 1000
        self.containers: dict[str, Container] = {}
        self.started = 0
        self._directory = directory
        self._tasks: set[asyncio.Task[None]] = set()
        container = "/containers/{id}"
        api = container + "/port/3000/api"
        self.app = Starlette(
            routes=[
                Route(container + "/start", self._start, methods=["POST"]),
                Route(container + "/wait", self._wait),
                Route(container + "/signal/{number:int}", self._end, methods=["POST"]),
                Route(container, self._end, methods=["DELETE"]),
                Route(api + "/execute/stream", self._execute_stream, methods=["POST"]),
                Route(api + "/execute", self._execute, methods=["POST"]),
                Route(api + "/write", self._write, methods=["POST"]),
                Route(api + "/version", self._version),
                Route(container + "/port/3000/{rest:path}", self._alive),
                Route(container + "/port/3000", self._alive),
            ]
        )

    async def end(self, key: str) -> None:
        """Stop a container. Cloudflare keeps nothing of its disk."""
        container = self.containers.pop(key, None)
        if container is not None:
            await asyncio.to_thread(container.machine.remove)
            container.ended.set()

    async def close(self) -> None:
        """End everything."""
        for key in tuple(self.containers):
            await self.end(key)
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def start(self, key: str, options: dict[str, Any]) -> None:
        """Start a container, if there is room for one more."""
        if len(self.containers) >= self.max_instances:
            raise Refused("", "Maximum number of running container instances exceeded", 503)
        self.started += 1
        container = Container(self._directory / f"c{self.started}")
        container.options = options
        await asyncio.to_thread(container.start)
        self.containers[key] = container

    async def execute(
        self, key: str, command: str, cwd: str | None, timeout_ms: float | None, env: dict[str, str] | None = None
    ) -> Running:
        """Run a line of bash in a container."""
        machine = self._machine(key)
        cwd = cwd or "/workspace"
        if not machine.path(cwd).is_dir():
            raise Refused("COMMAND_EXECUTION_ERROR", f"Failed to change directory to '{cwd}'", 500)
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        try:
            argv = ["/bin/bash", "-c", command]
            process = await machine.spawn(argv, cwd=cwd, env={**_ENV, **(env or {})}, **pipes)
        except (OSError, ProcessLookupError) as exc:
            raise Refused("COMMAND_EXECUTION_ERROR", f"Failed to start command: {exc}", 500) from exc
        running = Running(process, timeout_ms)
        task = asyncio.create_task(running.follow())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return running

    async def write(self, key: str, path: str, data: bytes) -> None:
        """Write a file in a container."""
        machine = self._machine(key)
        if len(data) > _WRITE_LIMIT:
            message = "Operation was interrupted while the runtime connection was closing"
            raise Refused("OPERATION_INTERRUPTED", message, 500)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = await machine.spawn(["/bin/sh", "-c", _WRITE, "sh", path], env=_ENV, **pipes)
        await process.communicate(data)
        if process.returncode != 0:
            raise Refused("FILESYSTEM_ERROR", f"Failed to write file '{path}'", 500)

    def is_running(self, key: str) -> bool:
        """Whether there is such a container."""
        container = self.containers.get(key)
        return container is not None and container.machine.running

    def _machine(self, key: str) -> Machine:
        if not self.is_running(key):
            raise Refused("CONTAINER_UNAVAILABLE", "Container is not running", 503)
        return self.containers[key].machine

    async def _start(self, request: Request) -> Response:
        try:
            await self.start(request.path_params["id"], json.loads(await request.body()))
        except Refused as refused:
            return PlainTextResponse(refused.message, status_code=refused.status)
        return Response(status_code=204)

    async def _wait(self, request: Request) -> Response:
        container = self.containers.get(request.path_params["id"])
        if container is not None:
            await container.ended.wait()
        return Response(status_code=204)

    async def _end(self, request: Request) -> Response:
        await self.end(request.path_params["id"])
        return Response(status_code=204)

    async def _alive(self, request: Request) -> Response:
        alive = self.is_running(request.path_params["id"])
        return JSONResponse({"message": "pong"}, status_code=200 if alive else 503)

    async def _version(self, request: Request) -> Response:
        return JSONResponse({"version": "0.12.10"})

    async def _execute_stream(self, request: Request) -> Response:
        body = await request.json()
        try:
            running = await self.execute(
                request.path_params["id"], body["command"], body.get("cwd"), body.get("timeoutMs"), body.get("env")
            )
        except Refused as refused:
            return _error(refused)

        async def told() -> AsyncIterator[bytes]:
            async for event in running.told():
                yield f"data: {json.dumps(event)}\n\n".encode()

        return StreamingResponse(told(), media_type="text/event-stream")

    async def _execute(self, request: Request) -> Response:
        body = await request.json()
        said: dict[str, Any] = {"stdout": "", "stderr": ""}
        try:
            running = await self.execute(request.path_params["id"], body["command"], body.get("cwd"), None)
        except Refused as refused:
            return _error(refused)
        async for event in running.told():
            if event["type"] == "complete":
                said["exitCode"] = event["exitCode"]
            else:
                said[event["type"]] += event["data"]
        return JSONResponse({"success": said["exitCode"] == 0, "command": body["command"], "timestamp": "", **said})

    async def _write(self, request: Request) -> Response:
        body = await request.json()
        try:
            await self.write(request.path_params["id"], body["path"], base64.b64decode(body["content"]))
        except Refused as refused:
            return _error(refused)
        return JSONResponse({"success": True, "exitCode": 0, "path": body["path"], "timestamp": ""})


class Running:
    """A command that goes on whether or not anybody listens."""

    def __init__(self, process: asyncio.subprocess.Process, limit: float | None) -> None:
        self._process = process
        self._limit = limit
        self._events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(64)
        self._alone = False

    async def told(self) -> AsyncIterator[dict[str, Any]]:
        """What it says, and how it ends. Whoever stops listening hears nothing more of it."""
        try:
            while (event := await self._events.get()) is not None:
                yield event
        finally:
            self._alone = True
            while not self._events.empty():
                self._events.get_nowait()

    async def follow(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        reading = asyncio.gather(self._read(self._process.stdout, "stdout"), self._read(self._process.stderr, "stderr"))
        code = 124
        try:
            await asyncio.wait_for(asyncio.shield(reading), None if self._limit is None else self._limit / 1000)
            code = await self._process.wait()
        except TimeoutError:
            Machine.kill_group(self._process, signal.SIGKILL)
            reading.cancel()
            await asyncio.wait([reading])
            await self._put({"type": "stderr", "data": f"Command timed out after {self._limit}ms"})
            await self._process.wait()
        except asyncio.CancelledError:
            Machine.kill_group(self._process, signal.SIGKILL)
            reading.cancel()
            await asyncio.wait([reading])
            raise
        await self._put({"type": "complete", "exitCode": 128 - code if code < 0 else code})
        await self._put(None)

    async def _read(self, stream: asyncio.StreamReader, name: str) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while data := await stream.read(65536):
            if text := decoder.decode(data):
                await self._put({"type": name, "data": text})
        if text := decoder.decode(b"", True):
            await self._put({"type": name, "data": text})

    async def _put(self, event: dict[str, Any] | None) -> None:
        if not self._alone:
            await self._events.put(event)


def _error(refused: Refused) -> Response:
    body = {"code": refused.code, "message": refused.message, "context": {}, "httpStatus": refused.status}
    return JSONResponse(body, status_code=refused.status)
