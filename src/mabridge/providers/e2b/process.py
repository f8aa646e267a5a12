"""A process that is held open."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import anyio

from mabridge.errors import SandboxError, SandboxGone, SandboxUnavailable
from mabridge.providers.e2b.running import Running
from mabridge.providers.e2b.wrapper import decoded
from mabridge.sandbox import Process

if TYPE_CHECKING:
    from mabridge.providers.e2b.sandbox import E2BSandbox

__all__ = ["E2BProcess"]

logger = logging.getLogger("mabridge.providers.e2b")

_CHUNK = 256 * 1024
_HELD = 16  # chunks of what it said, until the stream is held back


class E2BProcess(Process):
    """A program whose stdin E2B takes byte by byte, and whose stdout comes as lines of base64, a mark at the end."""

    def __init__(self, sandbox: E2BSandbox) -> None:
        self._sandbox = sandbox
        self._running = Running(sandbox)
        self._said, self._received = anyio.create_memory_object_stream[str](_HELD)
        self._line = ""
        self._tail = b""
        self._ended = self._closed = False

    async def start(self, command: Sequence[str], cwd: str) -> None:
        """Start it; on failure nothing is left."""
        try:
            await self._running.start(self._running.wrapper.hold(command, cwd), self._keep, stdin=True)
        except BaseException:
            await self._running.try_to_kill(and_wrapper=True)
            self._said.close()
            self._received.close()
            raise
        self._sandbox.tasks.start_soon(self._close_after_end)

    async def send(self, data: bytes) -> None:
        for start in range(0, len(data), _CHUNK):
            await self._to_stdin("send", data[start : start + _CHUNK])

    async def send_eof(self) -> None:
        if not self._closed and not self._running.ended.is_set():
            await self._to_stdin("send_eof", None)

    async def receive(self) -> bytes:
        while not self._closed:
            line, newline, rest = self._line.partition("\n")
            if newline:
                self._line = rest
                if data := self._until_mark(decoded(line)):
                    return data
            elif self._ended:
                return b""
            else:
                try:
                    self._line += await self._received.receive()
                except anyio.EndOfStream:
                    self._ended = True
                    if self._running.error is not None:
                        async with self._sandbox.mapped("receive"):
                            raise self._running.error from None
                except anyio.ClosedResourceError:
                    break
        raise self._broken("receive", "it was closed")

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._received.close()  # so that nothing is held back for a reader
        try:
            if not self._running.ended.is_set():
                async with self._sandbox.mapped("close"):
                    await self._running.kill(and_wrapper=True)
        except SandboxGone:
            logger.debug("%s: the sandbox went before a process in it was closed", self._sandbox.id)
        except SandboxError as exc:
            logger.warning("a process may go on, for it could not be killed: %s", exc)
        finally:
            await self._running.close()

    async def _keep(self, text: str) -> None:
        # Of one that was closed nothing is kept. The SDK must not see the error: it would leave its stream half read.
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            await self._said.send(text)

    def _until_mark(self, data: bytes) -> bytes:
        """Return what comes before the mark, if that is there: then the program has ended."""
        if self._ended:
            return b""  # of a process that it left
        mark = self._running.wrapper.mark.encode()
        found = (self._tail + data).find(mark)
        if found >= 0:
            self._ended = True
            data = data[: max(0, found - len(self._tail))]
        self._tail = (self._tail + data)[-len(mark) :]
        return data

    async def _close_after_end(self) -> None:
        try:
            await self._running.ended.wait()
        finally:
            self._said.close()

    async def _to_stdin(self, op: str, data: bytes | None) -> None:
        from e2b import AuthenticationException, SandboxException, TimeoutException

        if self._closed or self._ended or self._running.ended.is_set():
            raise self._broken(op, "it was closed" if self._closed else "it has ended")
        async with self._sandbox.mapped(op):
            try:
                await (self._running.send_eof() if data is None else self._running.send(data))
            except (AuthenticationException, TimeoutException):
                raise  # of the connection, or of the sandbox
            except SandboxException as exc:
                raise self._broken(op, "it reads no more") from exc

    def _broken(self, op: str, why: str) -> SandboxUnavailable:
        return SandboxUnavailable(f"the process: {why}", provider="e2b", op=op, sandbox_id=self._sandbox.id)
