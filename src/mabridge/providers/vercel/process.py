"""A process held open in a sandbox."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import anyio

from mabridge.errors import MabridgeError, SandboxGone, SandboxUnavailable
from mabridge.providers import _packed
from mabridge.providers.vercel.errors import PROVIDER
from mabridge.sandbox import Process

if TYPE_CHECKING:
    from vercel import sandbox as sdk

    from mabridge.providers.vercel.sandbox import VercelSandbox

__all__ = ["VercelProcess"]

logger = logging.getLogger("mabridge.providers.vercel")

_CALL = 60.0  # seconds for one request
_STOP = 30.0  # seconds for everything that closing may take


class VercelProcess(Process):
    def __init__(self, sandbox: VercelSandbox, session: sdk.SandboxRuntimeSession, started: sdk.Process) -> None:
        self._sandbox = sandbox
        self._session = session
        self._process = started
        self._stdin = started.stdin
        self._stdout = started.stdout
        self._lines = 0
        self._held = _packed.Held()
        self._closed = False

    async def send(self, data: bytes) -> None:
        if self._closed or self._held.exited:
            raise self._broken("send", "it was closed" if self._closed else "it has ended")
        assert self._stdin is not None
        async with self._sandbox.mapped("send"):
            await self._stdin.send(data)

    async def send_eof(self) -> None:
        assert self._stdin is not None
        if not self._closed:
            async with self._sandbox.mapped("send_eof"):
                with anyio.fail_after(_CALL):
                    await self._stdin.aclose()

    async def receive(self) -> bytes:
        if self._closed:
            raise self._broken("receive", "it was closed")
        async with self._sandbox.mapped("receive"):
            while not (data := self._held.take()) and not self._held.ended:
                await self._read()
        return data

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        with anyio.CancelScope(shield=True), anyio.move_on_after(_STOP):
            try:
                async with self._sandbox.mapped("close"):
                    if not self._held.packed:
                        await self._kill()
            except SandboxGone:
                logger.debug("%s: the sandbox went before a process in it was closed", self._sandbox.id)
            except MabridgeError as exc:
                logger.warning("a process may go on, for it could not be killed: %s", exc)
            finally:
                if self._stdout is not None:
                    await self._stdout.aclose()

    async def _read(self) -> None:
        """Take one line; after the program's end, only while more comes, for what it left may hold its output."""
        with anyio.move_on_after(self._held.patience()):
            line = await self._line()
            if line:
                self._held.write(line)
            elif self._held.exited:
                self._held.ended = True
            else:
                raise await self._sandbox.stopped("receive")
            return
        self._held.ended = True

    async def _line(self) -> str:
        """Return the next line. A reader whose read was cancelled is of no use; the next starts at the beginning."""
        reader, self._stdout = self._stdout, None
        if reader is None:
            reader = (await self._session.get_process(self._process.id)).stdout
            assert reader is not None
            for _ in range(self._lines):
                await reader.readline()
        line = await reader.readline()
        self._stdout = reader
        self._lines += 1
        return line

    async def _kill(self) -> None:
        """Kill it with its process group, if it has not ended, and what packs its output."""
        while "p" not in self._held.pids and not self._held.ended:
            await self._read()
        if targets := self._held.to_kill():
            await self._sandbox.do(["/bin/sh", "-c", 'kill -9 "$@"', "mab", *targets])

    def _broken(self, op: str, why: str) -> SandboxUnavailable:
        return SandboxUnavailable(f"the process: {why}", provider=PROVIDER, op=op, sandbox_id=self._sandbox.id)
