"""A process that is held open in a sandbox of Modal."""

from __future__ import annotations

import logging
import uuid
from typing import TYPE_CHECKING

import anyio

from mabridge.errors import SandboxError, SandboxGone, SandboxUnavailable
from mabridge.providers import _shell
from mabridge.providers.modal.running import Running
from mabridge.providers.modal.service import PROVIDER
from mabridge.sandbox import Process

if TYPE_CHECKING:
    from mabridge.providers.modal.sandbox import ModalSandbox

__all__ = ["ModalProcess"]

logger = logging.getLogger("mabridge.providers.modal")

_STOP = 30.0  # seconds


class ModalProcess(Process):
    """A program whose stdout is read as it is asked for.

    Args:
        sandbox: where it runs.
        running: as it was started.
        leader: its process id in the sandbox, and that of the session that it leads.
        held: the processes that are held open, of which it is one until it is closed.
    """

    def __init__(self, sandbox: ModalSandbox, running: Running, leader: int, held: set[ModalProcess]) -> None:
        self._sandbox = sandbox
        self._running = running
        self._leader = leader
        self._held = held
        self._ended = self._closed = False
        held.add(self)

    async def send(self, data: bytes) -> None:
        if self._closed or self._ended:
            raise self._broken("send", "it has ended" if self._ended else "it was closed")
        async with self._sandbox.mapped("send"):
            await self._running.send(data)

    async def send_eof(self) -> None:
        if not self._closed and not self._ended:
            async with self._sandbox.mapped("send_eof"):
                await self._running.send(b"", eof=True)

    async def receive(self) -> bytes:
        data = b""
        if not self._closed and not self._ended:
            async with self._sandbox.mapped("receive"):
                data = await self._running.receive()
        if self._closed:
            raise self._broken("receive", "it was closed")
        self._ended = not data
        return data

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            await self.release()
            if not self._ended:
                with anyio.CancelScope(shield=True), anyio.move_on_after(_STOP):
                    # By its session alone: nobody carries this marker.
                    await self._sandbox.run_own(_shell.kill_argv(uuid.uuid4().hex, self._leader), "close")
        except SandboxGone:
            logger.debug("%s: the sandbox went before a process in it was closed", self._sandbox.id)
        except SandboxError as exc:
            logger.warning("a process may go on, for it could not be killed: %s", exc)

    async def release(self) -> None:
        """Read no further, and leave it as it is."""
        self._closed = True
        self._held.discard(self)
        await self._running.release()

    def _broken(self, op: str, why: str) -> SandboxUnavailable:
        return SandboxUnavailable(f"the process: {why}", provider=PROVIDER, op=op, sandbox_id=self._sandbox.id)
