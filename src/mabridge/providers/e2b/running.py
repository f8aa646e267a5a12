"""A wrapper that runs in a sandbox, and its stream."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import anyio

from mabridge.providers.e2b.wrapper import CALLED, Wrapper

if TYPE_CHECKING:
    import e2b

    from mabridge.providers.e2b.sandbox import E2BSandbox

__all__ = ["CALL", "STOP", "Running", "Text"]

CALL = 30.0  # seconds for one request
STOP = 20.0  # seconds to kill a command, and to take the rest of its output
_UPLOAD = 300.0
_ENDING = 2.0
OnText = Callable[[str], None] | Callable[[str], Awaitable[None]]
_LONGEST = 96 * 1024  # bytes of bash; Linux takes 128 KiB in one argument


class Running:
    """One wrapper that is to run in a sandbox."""

    def __init__(self, sandbox: E2BSandbox) -> None:
        self._sandbox = sandbox
        self._left = self._killed = False
        self._handle: e2b.AsyncCommandHandle[None] | None = None
        self.wrapper = Wrapper.new()
        self.ended = anyio.Event()
        self.error: Exception | None = None
        """Why the stream ended, if it broke."""
        self.code: int | None = None
        """bash's own exit code, once it has ended; -1 if a signal killed it."""
        self.said = ""
        """The first of what bash itself had to say: the command's stderr is elsewhere."""

    async def start(self, text: str, on_stdout: OnText, *, stdin: bool = False) -> None:
        """Start it.

        Args:
            text: the bash.
            on_stdout: gets what it answers, and may hold it back.
            stdin: whether it has a stdin to `send` to.
        """
        if len(raw := text.encode()) > _LONGEST:
            text = f". {await self.upload('c', raw)}"
        # Shielded, for one that is started and not known of could not be killed.
        with anyio.CancelScope(shield=True), anyio.fail_after(CALL):
            self._handle = await self._sandbox.box.commands.run(
                text,
                background=True,
                envs={CALLED: self.wrapper.nonce},
                user=self._sandbox.user,
                cwd="/",
                stdin=stdin,
                timeout=0,
                request_timeout=CALL,
                on_stdout=on_stdout,
                on_stderr=self._note,
                retain_output=False,
            )
        self._sandbox.tasks.start_soon(self._wait)

    async def upload(self, kind: str, data: bytes) -> str:
        """Put a file there that the wrapper needs, and removes; return its path."""
        path = self.wrapper.path(kind)
        with anyio.fail_after(_UPLOAD):
            await self._sandbox.box.files.write(
                path, data, user=self._sandbox.user, request_timeout=_UPLOAD, use_octet_stream=True
            )
        return path

    async def send(self, data: bytes) -> None:
        """Write to its stdin, as fast as that is read."""
        assert self._handle is not None
        await self._handle.send_stdin(data, 0)

    async def send_eof(self) -> None:
        """Close its stdin."""
        assert self._handle is not None
        await self._handle.close_stdin(CALL)

    async def kill(self, *, and_wrapper: bool = False) -> None:
        """Kill the command with all that it started; the wrapper ends by that, or is killed too."""
        script = self.wrapper.kill(and_wrapper=and_wrapper)
        with anyio.CancelScope(shield=True), anyio.fail_after(STOP):
            await self._sandbox.box.commands.run(script, user=self._sandbox.user, cwd="/", timeout=STOP)
        self._killed = True

    async def try_to_kill(self, *, and_wrapper: bool = False) -> None:
        """Kill it where something else went wrong that is to be told: what is the matter may be the matter here too."""
        with contextlib.suppress(Exception):
            await self.kill(and_wrapper=and_wrapper)

    async def close(self) -> None:
        """Leave the stream. What runs is not affected."""
        with anyio.CancelScope(shield=True):
            if self._killed and self._handle is not None:
                with anyio.move_on_after(_ENDING):  # it ends by itself, which leaves the connection in order
                    await self.ended.wait()
            if self._handle is not None and not self.ended.is_set():
                self._left = True
                with anyio.move_on_after(STOP):
                    await self._handle.disconnect()

    def _note(self, text: str) -> None:
        self.said = (self.said + text)[:500]

    async def _wait(self) -> None:
        from e2b import CommandExitException

        assert self._handle is not None
        try:
            self.code = (await self._handle.wait()).exit_code
        except CommandExitException as exc:
            self.code = exc.exit_code
        except Exception as exc:  # noqa: BLE001 - for whoever waits
            self.error = exc
        except anyio.get_cancelled_exc_class():
            if not self._left:  # to leave the stream cancels the SDK's task, which is no cancellation of this one
                raise
        finally:
            self.ended.set()


class Text:
    """Keeps the first `limit` characters that it is given."""

    def __init__(self, limit: int) -> None:
        self._room = limit
        self._parts: list[str] = []

    def add(self, text: str) -> None:
        """Keep what there is room for."""
        self._parts.append(text[: self._room])
        self._room -= len(self._parts[-1])

    def take(self) -> str:
        """Return what was kept."""
        return "".join(self._parts)
