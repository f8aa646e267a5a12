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
_WRITE = 'mkdir -p "$(dirname "$1")" && base64 -d > "$1"'


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

    def _machine(self, request: Request) -> Machine | None:
        container = self.containers.get(request.path_params["id"])
        return container.machine if container is not None and container.machine.running else None

    async def _start(self, request: Request) -> Response:
        if len(self.containers) >= self.max_instances:
            return PlainTextResponse("Maximum number of running container instances exceeded", status_code=503)
        self.started += 1
        container = Container(self._directory / f"c{self.started}")
        container.options = json.loads(await request.body())
        await asyncio.to_thread(container.start)
        self.containers[request.path_params["id"]] = container
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
        return JSONResponse({"message": "pong"}, status_code=503 if self._machine(request) is None else 200)

    async def _version(self, request: Request) -> Response:
        return JSONResponse({"version": "0.12.10"})

    async def _execute_stream(self, request: Request) -> Response:
        body = await request.json()
        machine = self._machine(request)
        if machine is None:
            return _error("CONTAINER_UNAVAILABLE", "Container is not running", 503)
        cwd = body.get("cwd") or "/workspace"
        if not machine.path(cwd).is_dir():
            return _error("COMMAND_EXECUTION_ERROR", f"Failed to change directory to '{cwd}'", 500)
        argv = ["/bin/bash", "-c", body["command"]]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        try:
            process = await machine.spawn(argv, cwd=cwd, env={**_ENV, **(body.get("env") or {})}, **pipes)
        except (OSError, ProcessLookupError) as exc:
            return _error("COMMAND_EXECUTION_ERROR", f"Failed to start command: {exc}", 500)
        running = _Running(process, body.get("timeoutMs"))
        task = asyncio.create_task(running.follow())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return StreamingResponse(running.told(), media_type="text/event-stream")

    async def _write(self, request: Request) -> Response:
        body = await request.json()
        machine = self._machine(request)
        if machine is None:
            return _error("CONTAINER_UNAVAILABLE", "Container is not running", 503)
        if len(body["content"]) * 3 // 4 > _WRITE_LIMIT:
            message = "Operation was interrupted while the runtime connection was closing"
            return _error("OPERATION_INTERRUPTED", message, 500)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = await machine.spawn(["/bin/sh", "-c", _WRITE, "sh", body["path"]], env=_ENV, **pipes)
        await process.communicate(base64.b64encode(base64.b64decode(body["content"])))
        if process.returncode != 0:
            return _error("FILESYSTEM_ERROR", f"Failed to write file '{body['path']}'", 500)
        return JSONResponse({"success": True, "exitCode": 0, "path": body["path"], "timestamp": ""})


class _Running:
    """A command that goes on whether or not anybody listens."""

    def __init__(self, process: asyncio.subprocess.Process, limit: float | None) -> None:
        self._process = process
        self._limit = limit
        self._events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(64)
        self._alone = False

    async def told(self) -> AsyncIterator[bytes]:
        try:
            while (event := await self._events.get()) is not None:
                yield f"data: {json.dumps(event)}\n\n".encode()
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


def _error(code: str, message: str, status: int) -> Response:
    return JSONResponse({"code": code, "message": message, "context": {}, "httpStatus": status}, status_code=status)
