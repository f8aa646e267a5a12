"""Processes of this machine, with their bytes bounded and their descendants found."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import anyio
import anyio.to_thread

from mabridge.errors import SandboxUnavailable
from mabridge.providers import _shell
from mabridge.sandbox import ExecResult, Process

__all__ = ["HeldProcess", "communicate", "kill_marked"]

logger = logging.getLogger("mabridge.providers.local")

_CHUNK = 65536
_REAP = 10.0  # seconds to wait for what was killed


async def communicate(
    process: subprocess.Popen[bytes], *, stdin: bytes | None, marker: str, timeout: float, max_output: int
) -> ExecResult:
    """Bring a process to its end, as `mabridge.sandbox.Sandbox.exec` does.

    Args:
        process: leads a session of its own, and its pipes do not block.
        stdin: what it is sent, if it has a pipe for it.
        marker: the value of `MARKER` in its environment.
        timeout: seconds after which it is killed, with all that it started.
        max_output: bytes kept of each stream.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    streams = [(process.stdout.fileno(), out := _shell.Capture(max_output))]
    streams.append((process.stderr.fileno(), err := _shell.Capture(max_output)))
    ended = False
    try:
        with anyio.move_on_after(timeout):
            async with anyio.create_task_group() as group:
                if process.stdin is not None:
                    group.start_soon(_feed, process.stdin, stdin or b"")
                for fd, capture in streams:
                    group.start_soon(_drain, fd, capture)
                await _exited(process)
                ended = True
                group.cancel_scope.cancel()  # a background process may hold the pipes for as long as it likes
    finally:
        if not ended:
            await _kill_tree(process, marker)
        for fd, capture in streams:
            _take_rest(fd, capture)
        _close(process)
    return ExecResult(
        exit_code=_exit_code(process) if ended else None,
        stdout=out.take(),
        stderr=err.take(),
        timed_out=not ended,
        truncated=out.truncated or err.truncated,
    )


class HeldProcess(Process):
    """A process of this machine, with pipes that do not block."""

    def __init__(self, sandbox_id: str, process: subprocess.Popen[bytes], *, provider: str = "local") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._sandbox_id = sandbox_id
        self._provider = provider
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout.fileno()
        self._closed = False

    async def send(self, data: bytes) -> None:
        if self._stdin.closed:
            raise self._broken("send", "its stdin is closed")
        try:
            await _write(self._stdin.fileno(), data)
        except (OSError, anyio.ClosedResourceError) as exc:
            raise self._broken("send", "it reads no more") from exc

    async def send_eof(self) -> None:
        if not self._stdin.closed:
            anyio.notify_closing(self._stdin)
            self._stdin.close()

    async def receive(self) -> bytes:
        while not self._closed:
            ended = self._process.poll() is not None  # before the read: what is there then is all there is
            try:
                return os.read(self._stdout, _CHUNK)
            except BlockingIOError:
                if ended:
                    return b""
            await _readable_or_exited(self._stdout, self._process)
        raise self._broken("receive", "it was closed")

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        with anyio.CancelScope(shield=True), anyio.move_on_after(_REAP):
            if self._process.poll() is None:
                _signal(os.killpg, self._process.pid)
            await _exited(self._process)
        for end in (self._stdin, self._process.stdout):
            if end is not None and not end.closed:
                anyio.notify_closing(end)
        _close(self._process)

    def _broken(self, op: str, why: str) -> SandboxUnavailable:
        return SandboxUnavailable(f"the process: {why}", provider=self._provider, op=op, sandbox_id=self._sandbox_id)


async def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view[:_CHUNK]) :]
        except BlockingIOError:
            await anyio.wait_writable(fd)


async def _feed(pipe: IO[bytes], data: bytes) -> None:
    try:
        await _write(pipe.fileno(), data)
    except BrokenPipeError:
        pass  # it wanted no more, which is its own affair
    finally:
        pipe.close()


async def _drain(fd: int, capture: _shell.Capture) -> None:
    while True:
        await anyio.wait_readable(fd)
        data = os.read(fd, _CHUNK)
        if not data:
            return
        capture.add(data)


def _take_rest(fd: int, capture: _shell.Capture) -> None:
    """Take what is in the pipe, without waiting for its end."""
    while not capture.truncated:
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return
        if not data:
            return
        capture.add(data)


async def _exited(process: subprocess.Popen[bytes]) -> None:
    """Wait for the process itself: neither asyncio's wait nor end of file says so while a child holds its pipes."""
    if process.poll() is not None:
        return
    try:
        fd = os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # not Linux, or not allowed
        await anyio.to_thread.run_sync(process.wait, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))
        return
    try:
        await anyio.wait_readable(fd)
    finally:
        os.close(fd)
    process.wait()


async def _readable_or_exited(fd: int, process: subprocess.Popen[bytes]) -> None:
    """Wait for output, the process's end, or the end of the pipe by `HeldProcess.aclose`."""
    async with anyio.create_task_group() as group:

        async def readable() -> None:
            with contextlib.suppress(anyio.ClosedResourceError):
                await anyio.wait_readable(fd)
            group.cancel_scope.cancel()

        group.start_soon(readable)
        await _exited(process)
        group.cancel_scope.cancel()


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    code = process.returncode
    return code if code >= 0 else 128 - code


def _close(process: subprocess.Popen[bytes]) -> None:
    for end in (process.stdin, process.stdout, process.stderr):
        if end is not None:
            end.close()


async def _kill_tree(process: subprocess.Popen[bytes], marker: str) -> None:
    with anyio.CancelScope(shield=True), anyio.move_on_after(_REAP):
        await anyio.to_thread.run_sync(kill_marked, f"{_shell.MARKER}={marker}", process.pid)
        await _exited(process)


def kill_marked(variable: str, session: int | None = None) -> None:
    """Kill every process with `variable`, as ``NAME=value``, in its environment, and those in `session`.

    Where there is no ``/proc``, only the session's process group.
    """
    if not Path("/proc/self/environ").exists():
        if session is not None:
            _signal(os.killpg, session)
        return
    for _ in range(20):
        found = _watch.look(os.fsencode(variable))
        victims = found.marked[os.fsencode(variable)].copy()
        if session is not None:
            victims |= found.sessions.get(session, set())
        if not victims:
            return
        # Stopped first, for a shell would go on with its next line when its child is killed.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in sorted(victims):
                _signal(os.kill, pid, number)
    logger.error("processes marked %s survived being killed: %s", variable, victims)


class _Processes:
    """The processes that there were when this was made, by what they can be found by."""

    def __init__(self, variables: Iterable[bytes]) -> None:
        self.marked: dict[bytes, set[int]] = {variable: set() for variable in variables}
        self.sessions: defaultdict[int, set[int]] = defaultdict(set)
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # it ended, or is another user's
                self._add(int(name))

    def _add(self, pid: int) -> None:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, _, _, session = file.read().rpartition(b") ")[2].split(maxsplit=4)[:4]
        if state == b"Z":
            return
        self.sessions[int(session)].add(pid)
        with open(f"/proc/{pid}/environ", "rb") as file:
            for variable in self.marked.keys() & file.read().split(b"\0"):
                self.marked[variable].add(pid)


class _Watch:
    """Looks at the processes once for all the threads that wait to know: there may be thousands of either."""

    def __init__(self) -> None:
        self._wanted: list[bytes] = []
        self._lock = threading.Lock()
        self._last: tuple[float, _Processes] | None = None

    def look(self, variable: bytes) -> _Processes:
        """Return the processes, those with `variable` marked, as they were at some time after this was called."""
        self._wanted.append(variable)
        asked = time.monotonic()
        try:
            with self._lock:
                if self._last is None or self._last[0] <= asked or variable not in self._last[1].marked:
                    self._last = time.monotonic(), _Processes(tuple(self._wanted))
                return self._last[1]
        finally:
            self._wanted.remove(variable)


_watch = _Watch()


def _signal(send: Callable[[int, int], None], pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        send(pid, number)
