"""A terminal of a sandbox of the Daytona emulator, over a websocket.

As in the daemon's last public source (github.com/daytonaio/daytona, v0.190, ``toolbox/process/pty``) and the SDK that
speaks to it: a login shell in a terminal of its own, whose output is read as it comes and queued for the client. When
256 pieces are queued the next one is lost, and the connection closed; pieces after the lost one may get through. When
the shell has ended it is closed too, whatever is queued. A client that goes away does not end the shell.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import struct
import termios
from collections.abc import Callable, Mapping, Sequence

from aiohttp import WSCloseCode, WSMsgType, web

from tests.emulators.machine import Machine

_TELLS_EXIT = "X-Daytona-Pty-Exit-Control"  # of the SDK; with it, the end is a message before it closes the connection
_QUEUED = 256
_READ = 32 * 1024
_MESSAGE = 64 * 1024
_WRITE_WAIT = 10.0


class Terminal:
    """One terminal and its client. What a client sends arrives after `latency()` seconds."""

    def __init__(self, machine: Machine, latency: Callable[[], float]) -> None:
        self._machine = machine
        self._latency = latency
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(_QUEUED)
        self._typed: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(1024)
        self._ended = asyncio.Event()
        self._door: asyncio.subprocess.Process | None = None
        self._leader = 0

    async def serve(
        self, request: web.Request, argv: Sequence[str], cwd: str | None, env: Mapping[str, str], size: tuple[int, int]
    ) -> web.WebSocketResponse:
        """Run it until its shell has ended."""
        ours, theirs = os.openpty()
        if os.geteuid() == 0:
            os.fchown(theirs, self._machine.uid, -1)
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        pipes = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        argv = ["setsid", "--ctty", *argv]
        self._door = await self._machine.spawn(argv, cwd=cwd or "/home/daytona", env=env, **pipes)
        os.close(theirs)
        os.set_blocking(ours, False)
        self._leader = await self._machine.leader(self._door)
        socket = web.WebSocketResponse(max_msg_size=_MESSAGE, protocols=(_TELLS_EXIT,))
        await socket.prepare(request)
        await socket.send_json({"type": "control", "status": "connected"})
        loop = asyncio.get_running_loop()
        loop.add_reader(ours, self._read, ours, socket)
        tasks = [loop.create_task(work) for work in (self._send(socket), self._write(ours), self._receive(socket))]
        try:
            await self._door.wait()
        finally:
            self._ended.set()
            loop.remove_reader(ours)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            os.close(ours)
        code = self._door.returncode
        if socket.ws_protocol == _TELLS_EXIT:
            with contextlib.suppress(ConnectionError):
                await socket.send_json({"type": "control", "status": "exited", "exitCode": code})
        await self._close(socket, WSCloseCode.OK if code == 0 else WSCloseCode.INTERNAL_ERROR, {"exitCode": code})
        return socket

    async def kill(self) -> None:
        """Kill the shell."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._leader, signal.SIGKILL)
        await self._ended.wait()

    def _read(self, ours: int, socket: web.WebSocketResponse) -> None:
        try:
            data = os.read(ours, _READ)
        except BlockingIOError:
            return
        except OSError:  # nobody has it open on the other side
            asyncio.get_running_loop().remove_reader(ours)
            return
        try:
            self._queue.put_nowait(data)
        except asyncio.QueueFull:
            task = asyncio.get_running_loop().create_task(
                self._close(socket, WSCloseCode.POLICY_VIOLATION, "slow consumer")
            )
            task.add_done_callback(lambda _: None)

    async def _send(self, socket: web.WebSocketResponse) -> None:
        while True:
            async with asyncio.timeout(_WRITE_WAIT):
                await socket.send_bytes(await self._queue.get())

    async def _receive(self, socket: web.WebSocketResponse) -> None:
        loop = asyncio.get_running_loop()
        while not socket.closed:
            message = await socket.receive()
            if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                data = message.data if isinstance(message.data, bytes) else message.data.encode()
                await self._typed.put((loop.time() + self._latency(), data))

    async def _write(self, ours: int) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, data = await self._typed.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            while data:
                try:
                    data = data[os.write(ours, data) :]
                except BlockingIOError:
                    await self._writable(ours)

    @staticmethod
    async def _writable(ours: int) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_writer(ours, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_writer(ours)

    @staticmethod
    async def _close(socket: web.WebSocketResponse, code: int, why: object) -> None:
        said = why if isinstance(why, str) else json.dumps(why)
        with contextlib.suppress(ConnectionError, RuntimeError):
            await socket.close(code=code, message=said.encode())
