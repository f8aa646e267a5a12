"""A command in a sandbox of Modal: how it is started so that its end is known, and its streams.

A stream of Modal's stays open while anything holds it, such as a child left in the background, so its end says nothing
about the command's. A small shell stays beside the command instead, and closes both streams with a mark: all that the
command wrote comes before it. The command gets a session of its own, by which it can be killed.
"""

from __future__ import annotations

import asyncio
import re
import shlex
import uuid
from collections.abc import Awaitable, Callable, Sequence

import anyio
from modal.container_process import ContainerProcess
from modal.io_streams import StreamReader

from mabridge.errors import SandboxUnavailable
from mabridge.providers import _shell
from mabridge.providers.modal.service import PROVIDER, call

__all__ = ["Command", "Running"]

_ARGV_MAX = 60_000  # bytes; the SDK refuses more than 65536 characters
_CHUNK = 1024 * 1024
_ASK = 1.0  # seconds until the service is asked as well for the end of a command
_CANCEL = 10.0  # seconds for a read that was cancelled to come to its end
_LAG = 2.0  # seconds for output that is still on its way when the service says that a command has ended

# $1 the mark, then the command. What the shell itself says of a death by signal is not the command's output.
_BESIDE = r"""
exec 3>&2 2>/dev/null
(
    shift
    exec 2>&3 3>&-
    if command -v setsid >/dev/null; then exec setsid "$@"; fi
    exec "$@"
)
set -- "$1" "$?"
printf '\036%s%s\036' "$1" "$2" >&3
printf '\036%s%s\036' "$1" "$2"
exit "$2"
"""
_NO_STDIN = "exec </dev/null"

# $1 a newline. A shell's read takes no byte more than the line, so the command finds its own stdin after it.
_FROM_STDIN = 'IFS= read -r MAB_ARGV; eval "unset MAB_ARGV; exec $MAB_ARGV"'


class Command:
    """What is sent to run a command.

    Args:
        argv: the program and its arguments.
        cwd: absolute path.
        stdin: its standard input, or the beginning of it; None is an empty one.
        held: whether it is to tell its process id as a line on stderr, which is dropped otherwise.

    Raises:
        ValueError: it cannot be run.
    """

    def __init__(self, argv: Sequence[str], cwd: str, stdin: bytes | None, *, held: bool = False) -> None:
        mark = uuid.uuid4().hex
        script = _BESIDE if stdin is not None else f"{_NO_STDIN}{_BESIDE}"
        inner = _shell.run_argv(argv, cwd, announce=held, quiet=held)
        self.argv = ["/bin/sh", "-c", script, "mab", mark, *inner]
        self.mark = b"\x1e" + mark.encode()
        self.stdin = stdin or b""
        self.eof = stdin is not None and not held
        if sum(len(arg.encode()) for arg in self.argv) > _ARGV_MAX:
            line = " ".join(shlex.quote(arg).replace("\n", "'\"$1\"'") for arg in self.argv)
            self.argv = ["/bin/sh", "-c", _FROM_STDIN, "mab", "\n"]
            self.stdin = line.encode() + b"\n" + self.stdin


class Running:
    """A started command.

    Attributes:
        code: its exit code, once that is known.
    """

    def __init__(self, process: ContainerProcess[bytes], command: Command, sandbox_id: str) -> None:
        self.process = process
        self.code: int | None = None
        self._command = command
        self._sandbox_id = sandbox_id
        self._left = {1, 2}
        self._drained = anyio.Event()
        self._ended = anyio.Event()
        self._writing = anyio.Lock()
        self._tail = _Tail(command.mark)
        self._coming: asyncio.Future[bytes] | None = None

    async def communicate(
        self, out: _shell.Capture, err: _shell.Capture, *, timeout: float, kill: Callable[[], Awaitable[None]]
    ) -> bool:
        """Bring it to its end, and return whether that was in time.

        Args:
            out: takes its stdout.
            err: takes its stderr.
            timeout: seconds.
            kill: ends it, and all that it started; called when its time is up, or when this call is cancelled.
        """
        async with anyio.create_task_group() as group:
            group.start_soon(self._feed)
            group.start_soon(self._capture, 1, self.process.stdout, out)
            group.start_soon(self._capture, 2, self.process.stderr, err)
            group.start_soon(self._watch)
            in_time = False
            try:
                with anyio.move_on_after(timeout):
                    await self._ended.wait()
                    in_time = True
            finally:
                if not in_time:
                    await kill()
            with anyio.move_on_after(_LAG):
                await self._drained.wait()
            group.cancel_scope.cancel()
        return in_time

    async def send(self, data: bytes, *, eof: bool = False) -> None:
        """Write to its stdin, as fast as it is taken. After a failure, how much arrived is not known."""
        async with self._writing:
            for start in range(0, len(data), _CHUNK):
                self.process.stdin.write(data[start : start + _CHUNK])
                await call(self.process.stdin.drain.aio())
            if eof:
                self.process.stdin.write_eof()
                await call(self.process.stdin.drain.aio())

    async def begin(self) -> None:
        """Send what it is to be sent at first."""
        if self._command.stdin or self._command.eof:
            await self.send(self._command.stdin, eof=self._command.eof)

    async def leader(self) -> int:
        """Return the process id, in the sandbox, of a command that is held, and of the session that it leads."""
        said = _shell.Capture(100)
        await self._pump(self.process.stderr, said.add, until=lambda: b"\n" in said.take())
        line = said.take().partition(b"\n")[0]
        if not line.isdigit():
            message = f"it did not start: {line.decode(errors='replace') or 'nothing is known of it'}"
            raise SandboxUnavailable(message, provider=PROVIDER, op="open_process", sandbox_id=self._sandbox_id)
        return int(line)

    async def receive(self) -> bytes:
        """Return what comes next on its stdout, or nothing once it has ended. To be cancelled loses nothing."""
        while not self._tail.ended:
            if self._coming is None:
                self._coming = asyncio.ensure_future(self.process.stdout.__anext__())
            await asyncio.wait([self._coming])
            if self._coming.cancelled():  # by release()
                return b""
            try:
                data = self._coming.result()
            except StopAsyncIteration:
                return self._tail.rest()
            self._coming = None  # but after an error it stays, to be told to whoever asks again
            if found := self._tail.feed(data):
                return found
        return b""

    async def release(self) -> None:
        """Read no further."""
        if self._coming is not None:
            self._coming.cancel()
            with anyio.CancelScope(shield=True), anyio.move_on_after(_CANCEL):
                await asyncio.wait([self._coming])
            if self._coming.done() and not self._coming.cancelled():
                self._coming.exception()  # nobody asks for it any more
        if self._coming is None or self._coming.done():
            await call(self.process.stdout.aclose())  # type: ignore[no-untyped-call]

    async def _feed(self) -> None:
        try:
            await self.begin()
        except Exception:
            # That it wanted no more is its own affair; but one that waits for what will not come must not wait on.
            if await call(self.process.poll.aio()) is None:
                raise

    async def _capture(self, number: int, reader: StreamReader[bytes], capture: _shell.Capture) -> None:
        tail = _Tail(self._command.mark)
        # What is more than is kept is left there: Modal buffers what nobody reads, and the command goes on. See
        # https://modal.com/docs/guide/sandbox-spawn
        await self._pump(
            reader, lambda data: capture.add(tail.feed(data)), until=lambda: tail.ended or capture.truncated
        )
        capture.add(tail.rest())
        self._left.discard(number)
        if tail.code is not None:
            self.code = tail.code
        if not self._left:
            self._drained.set()
            if self.code is not None:
                self._ended.set()

    @staticmethod
    async def _pump(stream: StreamReader[bytes], take: Callable[[bytes], None], *, until: Callable[[], bool]) -> None:
        while not until() and (data := await _next(stream)) is not None:
            take(data)
        await call(stream.aclose())  # type: ignore[no-untyped-call]

    async def _watch(self) -> None:
        """Ask the service for the end, for a shell that was killed leaves no mark, and a full stream is not read on."""
        with anyio.move_on_after(_ASK):
            await self._drained.wait()
            if self.code is not None:
                return
        code = await call(self.process.wait.aio())
        if code < 0:
            message = "Modal does not know how the command ended"
            raise SandboxUnavailable(message, provider=PROVIDER, op="exec", sandbox_id=self._sandbox_id)
        with anyio.move_on_after(_LAG):
            await self._drained.wait()
        if self.code is None:
            self.code = code
        self._ended.set()


class _Tail:
    """Finds the mark in a stream that comes in pieces.

    Attributes:
        code: the exit code that the mark tells.
        ended: whether the mark has come.
    """

    def __init__(self, mark: bytes) -> None:
        self._mark = mark
        self._pattern = re.compile(re.escape(mark) + rb"(\d{1,3})\x1e")
        self._partial = len(mark) + 3
        self._held = b""
        self.code: int | None = None
        self.ended = False

    def feed(self, data: bytes) -> bytes:
        """Return what is sure to be output; what could be the beginning of the mark is held back."""
        data = self._held + data
        self._held = b""
        if match := self._pattern.search(data):
            self.code, self.ended = int(match[1]), True
            return data[: match.start()]
        start = data.rfind(b"\x1e", max(0, len(data) - self._partial))
        rest = data[start:] if start >= 0 else b""
        if rest and (
            self._mark.startswith(rest) or (rest.startswith(self._mark) and rest[len(self._mark) :].isdigit())
        ):
            self._held = rest
            return data[:start]
        return data

    def rest(self) -> bytes:
        """Return what was held back, at the end of a stream without a mark."""
        held, self._held = self._held, b""
        return held


async def _next(stream: StreamReader[bytes]) -> bytes | None:
    """Return what comes next, or None at the end. Not by ``async for``, which the SDK cannot cancel in peace."""
    try:
        return await call(stream.__anext__())
    except StopAsyncIteration:
        return None
