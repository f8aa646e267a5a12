"""What the engine has started, and the connection to it.

Where aiodocker has no call for something, its private attributes are used, here and nowhere else.
"""

from __future__ import annotations

import logging

import anyio
from aiodocker.containers import DockerContainer
from aiodocker.execs import Exec
from aiodocker.stream import Stream

from mabridge.errors import SandboxGone
from mabridge.providers import _shell
from mabridge.providers.docker.engine import PROVIDER

__all__ = ["Running", "start"]

logger = logging.getLogger("mabridge.providers.docker")

_CHUNK = 65536
_STARTED_BEFORE = 304
_READY = 10.0  # seconds for a container's first process to say that it runs


async def start(container: DockerContainer) -> bool:
    """Start a container whose first process says on its stdout that it runs, and wait for that.

    The engine calls a container running once its own init is, which is so with an image that has no shell as well.

    Returns:
        Whether it was said. If not, another worker has started the container before, or it is slow.

    Raises:
        SandboxGone: the container ended; with what was said instead.
    """
    said = b""
    stream = container.attach(stdout=True, stderr=True)
    try:
        await stream._init()
        # Not container.start(), which does not tell this answer.
        async with container.docker._query(f"containers/{container.id}/start", method="POST") as answer:
            if answer.status == _STARTED_BEFORE:
                return False
        with anyio.move_on_after(_READY):
            while (message := await stream.read_out()) is not None:
                if message.stream == 1:
                    return True
                said += message.data
            reason = said[:500].decode(errors="replace").strip() or "nothing was said why"
            raise SandboxGone(f"the container ended at once: {reason}", provider=PROVIDER, op="create")
    finally:
        await _close(stream)
    return False


class Running:
    """A started exec: its streams, without the line by which its shell says who it is."""

    def __init__(self, exec_: Exec) -> None:
        self.exec = exec_
        self.stream: Stream = exec_.start(detach=False)
        self.leader: int | None = None
        """The id, in the container, of the process and of the session that it leads."""
        self.early = b""
        """What came before that was known: if it stays unknown, what the engine has to say instead."""
        self._line = b""
        self._reads = 0

    async def read(self) -> tuple[int, bytes] | None:
        """Return the stream, 1 or 2, and its next bytes, none of them when `leader` has just become known.

        None is the end.
        """
        if self.leader is not None and self.early:
            early, self.early = self.early, b""
            return 1, early
        while (message := await self.stream.read_out()) is not None:
            self._reads += 1
            if self.leader is not None:
                return message.stream, message.data
            if message.stream == 1:
                self.early += message.data
                continue
            line, newline, rest = (self._line + message.data).partition(b"\n")
            if newline and line.isdigit():
                self.leader = int(line)
                return 2, rest
            self._line = rest if newline else line
            self.early += line + newline if newline else b""
        return None

    async def pass_on(self, out: _shell.Capture, err: _shell.Capture) -> bool:
        """Read once into the captures; return False at the end."""
        got = await self.read()
        if got is not None:
            (err if got[0] == 2 else out).add(got[1])
        return got is not None

    async def drain(self, out: _shell.Capture, err: _shell.Capture, *, watch: bool = True) -> None:
        """Read into the captures until the end.

        Args:
            out: for stdout.
            err: for stderr.
            watch: whether to ask the engine for the end as well. It does not close the connection of a command that
                left some of its stdin unread.
        """
        async with anyio.create_task_group() as group:
            if watch:
                group.start_soon(self._cancel_when_quiet, group.cancel_scope)
            while await self.pass_on(out, err):
                pass
            group.cancel_scope.cancel()

    async def _cancel_when_quiet(self, scope: anyio.CancelScope) -> None:
        """Cancel what reads, when the command has ended and all its output has been read."""
        pause, ended = 0.1, False
        while not ended:
            await anyio.sleep(pause)
            pause = min(pause * 2, 2.0)
            ended = self.leader is not None and not (await self.exec.inspect())["Running"]
        before = -1
        while before < self._reads:  # the engine says so once it has sent everything, which may be on its way
            before = self._reads
            await anyio.sleep(0.1)
        scope.cancel()

    async def communicate(self, stdin: bytes | None, out: _shell.Capture, err: _shell.Capture) -> None:
        """Send `stdin` and read the streams to their end."""

        async def feed(data: bytes) -> None:
            try:
                await self.send(data)
                self.send_eof()
            except (OSError, AssertionError):
                logger.debug("a command wanted no more of its stdin")  # its streams and exit code tell the rest

        async with anyio.create_task_group() as group:
            if stdin is not None:
                group.start_soon(feed, stdin)
            await self.drain(out, err, watch=stdin is not None)
            group.cancel_scope.cancel()

    async def send(self, data: bytes) -> None:
        """Write all of `data`, as fast as it is taken."""
        view = memoryview(data)
        for start in range(0, len(data), _CHUNK):
            await self.stream.write_in(bytes(view[start : start + _CHUNK]))

    def send_eof(self) -> None:
        """Half close the connection, unless it is TLS. aiodocker has no call for it."""
        response = self.stream._resp
        transport = None if response is None or response.connection is None else response.connection.transport
        if transport is not None and transport.can_write_eof():
            transport.write_eof()

    async def close(self) -> None:
        """Close the connection. What runs is not affected."""
        await _close(self.stream)


async def _close(stream: Stream) -> None:
    connection = None if stream._resp is None else stream._resp.connection
    if connection is None:
        stream._closed = True  # aiodocker's close asserts that there is one
    elif connection.transport is not None:
        connection.transport.abort()  # to close it in peace would wait until the engine has taken what was sent
    await stream.close()
