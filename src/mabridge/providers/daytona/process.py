"""A process that is held open, by a terminal."""

from __future__ import annotations

import binascii
import contextlib
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import anyio

from mabridge.errors import SandboxUnavailable
from mabridge.providers.daytona import held
from mabridge.providers.daytona.service import CALL, PROVIDER
from mabridge.sandbox import Process

if TYPE_CHECKING:
    from daytona import AsyncSandbox
    from daytona.handle.async_pty_handle import AsyncPtyHandle

    from mabridge.providers.daytona.sandbox import DaytonaSandbox

__all__ = ["DaytonaProcess"]

_READY = 20.0  # seconds for a login shell to have read its profile, and to take a line
_MOST = 1_000_000  # bytes that are kept: what its profile says, or a few windows
_CHUNK = 32 * 1024  # bytes; Daytona takes no message of more than 64 KiB
_STOP = 30.0


class DaytonaProcess(Process):
    """A program whose stdin and stdout pass through a raw terminal, see `held`."""

    def __init__(self, sandbox: DaytonaSandbox, box: AsyncSandbox) -> None:
        self._sandbox = sandbox
        self._box = box
        self._marker, self._mark = uuid.uuid4().hex, uuid.uuid4().hex
        self._terminal: AsyncPtyHandle | None = None
        self._said = bytearray()
        self._news = anyio.Event()
        self._unacknowledged = self._windows = 0
        self._ended = self._closed = False

    async def start(self, argv: Sequence[str], cwd: str, env: Mapping[str, str] | None) -> None:
        """Start it; on failure nothing is left."""
        command = held.hold_command(argv, cwd, env, marker=self._marker, mark=self._mark)
        try:
            await self._ask("open_process", command)
            try:
                with anyio.fail_after(_READY):
                    await self._open_terminal()
            except BaseException:
                await self._kill_terminal()
                raise
        except BaseException:
            await self.aclose()
            raise

    async def send(self, data: bytes) -> None:
        for start in range(0, len(data), _CHUNK):
            await self._type("send", data[start : start + _CHUNK])

    async def send_eof(self) -> None:
        if not self._closed and not self._ended:
            await self._type("send_eof", b"")

    async def receive(self) -> bytes:
        while not self._closed and not self._ended:
            line = self._next_line()
            if line is None:
                async with self._sandbox.reaching("receive"):
                    await self._hear_more()
                continue
            self._unacknowledged += len(line)
            try:
                data, mark, _ = binascii.a2b_base64(line, strict_mode=True).partition(self._mark.encode())
            except binascii.Error as exc:
                raise self._broken("receive", "something else wrote to its terminal") from exc
            self._ended = bool(mark)
            if data:
                return data
        if self._closed:
            raise self._broken("receive", "it was closed")
        return b""

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        with anyio.CancelScope(shield=True):
            await self._sandbox.abandon(self._marker)
            if self._terminal is not None:
                with anyio.move_on_after(_STOP):
                    await self._terminal.disconnect()

    async def _ask(self, op: str, command: str) -> None:
        with anyio.fail_after(CALL):
            result = await self._box.process.exec(command, timeout=int(CALL))
        if result.exit_code != 0:
            raise self._broken(op, result.result.strip()[:300] or f"exit code {result.exit_code}")

    async def _open_terminal(self) -> None:
        from daytona import DaytonaNotFoundError, PtySize

        size = PtySize(cols=60, rows=10)  # in a larger one, a zsh without settings would ask for them
        open_ = self._box.process.create_pty_session
        try:
            self._terminal = await open_(self._marker, self._hear, cwd="/", pty_size=size)
        except DaytonaNotFoundError as exc:
            await self._sandbox.require_started("open_process")
            raise self._broken("open_process", "this Daytona opens no terminal") from exc
        await self._terminal.send_input(held.terminal_line(self._marker))
        ready = self._mark.encode() + b"\n"
        while (at := self._said.find(ready)) < 0:  # the prompt, and what the profile says
            await self._hear_more()
        del self._said[: at + len(ready)]

    async def _kill_terminal(self) -> None:
        """End a terminal whose login shell may not have taken the line, and would wait for ever."""
        from daytona import DaytonaError

        with anyio.CancelScope(shield=True), anyio.move_on_after(CALL), contextlib.suppress(DaytonaError):
            await self._box.process.kill_pty_session(self._marker)

    def _hear(self, data: bytes) -> None:
        # What writes to the terminal itself keeps to no window. An error here ends the SDK's reading.
        if len(self._said) + len(data) > _MOST:
            raise ValueError("more was said than there is room for")
        self._said += data
        self._news.set()

    async def _hear_more(self) -> None:
        """Wait until something was said, once all was taken that had been.

        Raises:
            SandboxUnavailable: the terminal was closed.
        """
        if self._unacknowledged >= held.WINDOW:
            await self._ask("receive", held.ack_command(self._marker, self._windows + 1))
            self._windows += 1
            self._unacknowledged = 0
        terminal = self._terminal
        assert terminal is not None

        async def wait_for_end() -> None:
            await terminal.wait()
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(wait_for_end)
            await self._news.wait()
            group.cancel_scope.cancel()
        if not self._news.is_set():
            await self._sandbox.require_started("receive")
            raise self._broken("receive", f"its terminal was closed ({terminal.error or 'the connection broke'})")
        self._news = anyio.Event()

    def _next_line(self) -> bytes | None:
        end = self._said.find(b"\n")
        if end < 0:
            return None
        line = bytes(self._said[:end])
        del self._said[: end + 1]
        return line

    async def _type(self, op: str, data: bytes) -> None:
        if self._closed or self._ended:
            raise self._broken(op, "it was closed" if self._closed else "it has ended")
        assert self._terminal is not None
        async with self._sandbox.reaching(op):
            await self._terminal.send_input(held.typed(data))

    def _broken(self, op: str, why: str) -> SandboxUnavailable:
        return SandboxUnavailable(f"the process: {why}", provider=PROVIDER, op=op, sandbox_id=self._sandbox.id)
