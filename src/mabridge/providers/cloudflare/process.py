"""A process held open in a container.

The bridge gives a command no stdin. So the process reads a FIFO, and to write to that is a command of its own: one
request. What the process says comes on the stream of the command that holds it, packed as lines of base64.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel

from mabridge.errors import SandboxError, SandboxGone, SandboxUnavailable
from mabridge.providers import _packed
from mabridge.providers.cloudflare.script import eof_argv, hold_argv, release_argv, send_argv, send_files_argv
from mabridge.providers.cloudflare.worker import PROVIDER
from mabridge.sandbox import Process

if TYPE_CHECKING:
    from mabridge.providers.cloudflare.sandbox import CloudflareSandbox

__all__ = ["CloudflareProcess"]

logger = logging.getLogger("mabridge.providers.cloudflare")

_PIECES = 16  # pieces of what it said, until the stream is held back
_LINE = 1024 * 1024  # bytes; those of base64 have 64 KiB
_START = 60.0  # seconds
_SEND = 300.0  # seconds: as long as it may take the process to read it
_STOP = 30.0  # seconds for everything that closing may take
_ENDING = 2.0  # seconds for the stream to end by itself, once all is killed: then its connection can be used again


class CloudflareProcess(Process):
    """A program, what packs its output, and the shell that holds both.

    Args:
        sandbox: where it is.
        name: names it, in letters and digits.
    """

    def __init__(self, sandbox: CloudflareSandbox, name: str) -> None:
        self._sandbox = sandbox
        self._name = name
        self._said, self._received = anyio.create_memory_object_stream[bytes](_PIECES)
        self._held = _packed.Held()
        self._scope = anyio.CancelScope()
        self._over = anyio.Event()
        self._error: SandboxError | None = None
        self._closed = False
        self._pending = 0

    async def start(self, argv: Sequence[str], cwd: str, variables: Sequence[str]) -> None:
        """Start it; on failure, and when cancelled, nothing is left."""
        held = _packed.hold_argv(argv, cwd, marker=self._name)
        self._sandbox.tasks.start_soon(self._follow, hold_argv(self._name, self._sandbox.instance, variables, held))
        try:
            # Shielded, for one that is started and not known of could not be killed.
            with anyio.CancelScope(shield=True), anyio.move_on_after(_START), contextlib.suppress(anyio.EndOfStream):
                while not self._is_known():
                    await self._take()
            await anyio.lowlevel.checkpoint_if_cancelled()
            if "g" in self._held.pids:
                raise self._sandbox.gone("open_process")
            if not self._is_known():
                raise await self._trouble("open_process", "it did not start")
        except BaseException:
            await self.aclose()
            raise

    async def send(self, data: bytes) -> None:
        self._check_running("send")
        if not data:
            return
        if (argv := send_argv(self._name, data)) is not None:
            await self._do("send", argv)
            return
        async with self._sandbox.uploaded("send", data) as files:
            await self._do("send", send_files_argv(self._name, files))

    async def send_eof(self) -> None:
        if not self._closed and not self._held.exited:
            await self._do("send_eof", eof_argv(self._name, self._held.pids["h"]))

    async def receive(self) -> bytes:
        while not self._closed:
            if (data := self._held.take()) or self._held.ended:
                return data
            # After the program's end only while more comes, for what it left may hold its output.
            try:
                with anyio.move_on_after(self._held.patience()) as waiting:
                    await self._take()
                self._held.ended = self._held.ended or waiting.cancelled_caught
            except anyio.EndOfStream:
                self._held.ended = self._held.exited
                if not self._held.exited:
                    raise await self._trouble("receive", "its stream ended") from None
            except anyio.ClosedResourceError:
                break
        raise self._broken("receive", "it was closed")

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._received.close()  # so that nothing is held back for a reader
        with anyio.CancelScope(shield=True), anyio.move_on_after(_STOP):
            try:
                if not self._held.packed and "g" not in self._held.pids:
                    await self._kill()
            except SandboxGone:
                logger.debug("%s: the sandbox went before a process in it was closed", self._sandbox.id)
            except SandboxError as exc:
                logger.warning("a process may go on, for it could not be killed: %s", exc)
            with anyio.move_on_after(_ENDING):
                await self._over.wait()
            self._scope.cancel()
            await self._over.wait()

    async def _follow(self, command: Sequence[str]) -> None:
        """Take what the holding command says, to its end."""
        try:
            with self._scope:
                await self._sandbox.worker.follow("open_process", self._sandbox.id, command, self._keep)
        except SandboxError as exc:
            self._error = exc
        finally:
            self._said.close()
            self._over.set()

    async def _keep(self, data: bytes) -> None:
        with contextlib.suppress(anyio.BrokenResourceError):  # of one that was closed nothing is kept
            await self._said.send(data)

    async def _take(self) -> None:
        """Take the next piece of what was said: nothing of it is lost by a cancellation."""
        data = await self._received.receive()
        self._pending = 0 if b"\n" in data else self._pending + len(data)
        if self._pending > _LINE:  # the sandbox is not trusted to keep to what packs it
            raise self._broken("receive", "its stream makes no sense")
        try:
            self._held.write(data.decode())
        except ValueError as exc:
            raise self._broken("receive", "its stream makes no sense") from exc

    def _is_known(self) -> bool:
        """Whether it is known what to kill."""
        return {"h", "p", "o"} <= self._held.pids.keys() or "g" in self._held.pids

    async def _kill(self) -> None:
        """Kill the program's process group, if it has not ended, and what packs its output: its holder ends by that."""
        if not self._is_known():
            await self._sandbox.cancel(self._name)
            return
        argv = release_argv(self._name, self._sandbox.instance, self._held.to_kill())
        await self._sandbox.worker.run("close", self._sandbox.id, argv, timeout=_STOP)

    async def _do(self, op: str, argv: Sequence[str]) -> None:
        code, _ = await self._sandbox.worker.run(op, self._sandbox.id, argv, timeout=_SEND)
        if code != 0:
            raise await self._trouble(op, "it reads no more")

    async def _trouble(self, op: str, why: str) -> SandboxError:
        if isinstance(self._error, SandboxGone) or await self._sandbox.went():
            return self._sandbox.gone(op)
        return self._error or self._broken(op, why)

    def _check_running(self, op: str) -> None:
        if self._closed or self._held.exited:
            raise self._broken(op, "it was closed" if self._closed else "it has ended")

    def _broken(self, op: str, why: str) -> SandboxUnavailable:
        return SandboxUnavailable(f"the process: {why}", provider=PROVIDER, op=op, sandbox_id=self._sandbox.id)
