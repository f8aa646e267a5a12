"""One sandbox of Modal: commands, files and processes in it."""

from __future__ import annotations

import base64
import logging
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import anyio
import modal
from anyio.abc import TaskGroup
from modal.exception import NotFoundError, SandboxTimeoutError

from mabridge.errors import CreateFailed, SandboxError, SandboxGone, SandboxUnavailable
from mabridge.identity import KEY_LABEL
from mabridge.providers import _shell
from mabridge.providers._guard import KEEP_ALIVE
from mabridge.providers.modal.running import Command, Running
from mabridge.providers.modal.service import PROVIDER, call, mapped
from mabridge.sandbox import ExecResult, Process, Sandbox, SandboxInfo

__all__ = ["ModalSandbox", "describe", "own_tags"]

logger = logging.getLogger("mabridge.providers.modal")

_CALL = 60.0  # seconds for a call that must not be cut off
_STARTUP = 300.0  # seconds for a new sandbox to run its first command; it may wait for a machine
_STOP = 30.0  # seconds for everything that stopping a command may take
_REMOVE = 60.0
_GRACE = 60  # seconds after which Modal kills a command whose worker did not

_WORKDIR, _CREATED, _UNTIL = "mabridge.workdir", "mabridge.created", "mabridge.until"
WORKDIR_MAX = 47
"""Bytes of a working directory's path that a tag has room for."""


def own_tags(workdir: str, timeout: int) -> dict[str, str]:
    """Return the tags by which a sandbox that is attached to is known. A tag takes 63 of ``A-Za-z0-9._-``."""
    now = time.time()
    path = base64.urlsafe_b64encode(workdir.encode()).decode().rstrip("=")
    return {_WORKDIR: path, _CREATED: f"{now:.6f}", _UNTIL: f"{now + timeout:.0f}"}


def describe(sandbox_id: str, tags: Mapping[str, str]) -> SandboxInfo:
    """Return what the tags of a running sandbox tell."""
    return SandboxInfo(
        key=tags[KEY_LABEL],
        id=sandbox_id,
        labels={name: value for name, value in tags.items() if name not in (_WORKDIR, _CREATED, _UNTIL)},
        state="running",
        created_at=datetime.fromtimestamp(float(tags[_CREATED]), UTC) if _CREATED in tags else None,
    )


class ModalSandbox(Sandbox):
    """A running sandbox.

    Args:
        sandbox: as the SDK knows it.
        tags: those that it was made with.
        tasks: where what its held processes say is read.
    """

    def __init__(self, sandbox: modal.Sandbox, tags: Mapping[str, str], tasks: TaskGroup) -> None:
        self.id = sandbox.object_id
        encoded = tags.get(_WORKDIR, "")
        self.workdir = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode() or "/workspace"
        self._created = tags.get(_CREATED)
        self._until = float(tags.get(_UNTIL, "inf"))
        self._sandbox = sandbox
        self._tasks = tasks
        self._warned = False

    def made_with(self, tags: Mapping[str, str]) -> bool:
        """Whether it came from the very call that set these."""
        return self._created == tags[_CREATED]

    async def prepare(self) -> None:
        """Make the working directory, as soon as the sandbox runs commands.

        Raises:
            SandboxGone: it ended instead.
            CreateFailed: the directory cannot be written.
        """
        script = 'mkdir -p "$1" && cd "$1" && [ -w . ]'
        command = Command(["/bin/sh", "-c", script, "mab", self.workdir], "/", None)
        async with mapped("create", self.id, self._absence):
            running = await self._started(command, {}, int(_STARTUP), within=_STARTUP)
            said = _shell.Capture(500)
            if not await running.communicate(_shell.Capture(0), said, timeout=_CALL, kill=_leave) or running.code != 0:
                why = said.take().decode(errors="replace").strip() or f"exit {running.code}"
                message = f"the working directory {self.workdir} cannot be written ({why}); has the image a /bin/sh?"
                raise CreateFailed(message, provider=PROVIDER, op="create", sandbox_id=self.id)

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float,
        max_output: int,
    ) -> ExecResult:
        marker = uuid.uuid4().hex
        command = Command(argv, cwd or self.workdir, stdin or None)
        variables = {**_shell.check_env(env), _shell.MARKER: marker}
        out, err = _shell.Capture(max_output), _shell.Capture(max_output)
        async with mapped("exec", self.id, self._absence):
            running = await self._start(command, variables, math.ceil(timeout) + _GRACE)

            async def kill() -> None:
                await self._stop(running, marker)

            in_time = await running.communicate(out, err, timeout=timeout, kill=kill)
        return ExecResult(
            exit_code=running.code if in_time else None,
            stdout=out.take(),
            stderr=err.take(),
            timed_out=not in_time,
            truncated=out.truncated or err.truncated,
        )

    async def open_process(
        self, argv: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        """Start a program and hold it open; see `mabridge.sandbox.SupportsProcess`."""
        marker = uuid.uuid4().hex
        command = Command(argv, cwd or self.workdir, b"", held=True)
        variables = {**_shell.check_env(env), _shell.MARKER: marker}
        async with mapped("open_process", self.id, self._absence):
            running = await self._start(command, variables, None)
            try:
                with anyio.fail_after(_CALL):
                    await running.begin()
                    leader = await running.leader()
            except BaseException:
                await self._stop(running, marker)
                raise
        process = _ModalProcess(self, running, leader)
        self._tasks.start_soon(process.read_on)
        return process

    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        return await _shell.read_file(self, path, max_bytes=max_bytes, provider=PROVIDER)

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        await _shell.write_file(self, path, data, mode=mode, provider=PROVIDER)

    async def teardown(self) -> None:
        with anyio.CancelScope(shield=True):
            async with mapped("teardown", self.id):
                try:
                    await call(self._sandbox.terminate.aio(wait=True), within=_REMOVE)
                except (NotFoundError, SandboxTimeoutError):
                    logger.debug("%s: it was gone already", self.id)

    async def keep_alive(self, ttl: float) -> None:
        if time.time() + ttl > self._until and not self._warned:
            self._warned = True
            left = max(0, self._until - time.time())
            logger.warning("%s: Modal ends it in %.0f s (the option timeout), which cannot be put off", self.id, left)
        result = await self.run_own(["/bin/sh", "-c", KEEP_ALIVE, "mab", str(math.ceil(ttl))], "keep_alive")
        if result != 0:
            message = f"its end could not be put off: the deadline was not written (exit {result})"
            raise SandboxUnavailable(message, provider=PROVIDER, op="keep_alive", sandbox_id=self.id)

    async def run_own(self, argv: Sequence[str], op: str) -> int | None:
        """Run something of our own, whose output does not matter; return its exit code, or None after too long."""
        nothing = _shell.Capture(0), _shell.Capture(0)
        async with mapped(op, self.id, self._absence):
            running = await self._start(Command(argv, "/", None), {}, int(_STOP))
            await running.communicate(*nothing, timeout=_STOP, kill=_leave)
        return running.code

    async def _start(self, command: Command, env: Mapping[str, str], timeout: int | None) -> Running:
        """Start a command. Shielded, for one that is started and not known of could not be killed."""
        with anyio.CancelScope(shield=True):
            running = await self._started(command, env, timeout, within=_CALL)
        return running  # noqa: RET504 - within the scope, mypy would take it for swallowed

    async def _started(
        self, command: Command, env: Mapping[str, str], timeout: int | None, *, within: float
    ) -> Running:
        started = self._sandbox.exec.aio(*command.argv, env={**env}, timeout=timeout, text=False)
        process = await call(started, within=within)
        return Running(process, command, self.id)

    async def _absence(self) -> str | None:
        """Return why the sandbox is definitely not there, if so."""
        code: int | None = None
        try:
            with anyio.CancelScope(shield=True):
                code = await call(self._sandbox.poll.aio(), within=_STOP / 3)
        except NotFoundError as exc:
            return str(exc)
        except Exception:  # noqa: BLE001 - whatever it is, it does not say that the sandbox is gone
            return None
        reasons = {124: "it was ended when the option timeout had passed", 137: "it was terminated"}
        return None if code is None else reasons.get(code, f"its first process ended with {code}")

    async def _stop(self, running: Running, marker: str) -> None:
        """Kill a command with all that it started. Modal has no call for it, so it is done from inside."""
        argv = _shell.kill_argv(marker)
        with anyio.CancelScope(shield=True), anyio.move_on_after(_STOP) as clock:
            try:
                # Until the service says so, for a command that has yet to appear is not found.
                while await self.run_own(argv, "exec") != 0 or await call(running.process.poll.aio()) is None:  # noqa: ASYNC110
                    await anyio.sleep(0.1)
            except SandboxGone:
                return
        if clock.cancelled_caught:
            message = f"a command could not be stopped within {_STOP:.0f} s"
            raise SandboxUnavailable(message, provider=PROVIDER, op="exec", sandbox_id=self.id)


class _ModalProcess(Process):
    def __init__(self, sandbox: ModalSandbox, running: Running, leader: int) -> None:
        self._sandbox = sandbox
        self._running = running
        self._leader = leader
        self._give, self._take = anyio.create_memory_object_stream[bytes](4)
        self._reading = anyio.CancelScope()
        self._error: SandboxError | None = None
        self._ended = False
        self._closed = False

    async def read_on(self) -> None:
        """Pass its stdout to `receive`, until it ends. What goes wrong is told there."""
        with self._reading:
            async with self._give:
                try:
                    async with mapped("receive", self._sandbox.id, self._sandbox._absence):
                        await self._running.read(self._give.send)
                except SandboxError as exc:
                    self._error = exc

    async def send(self, data: bytes) -> None:
        if self._closed or self._ended:
            raise self._broken("send", "it has ended" if self._ended else "it was closed")
        async with mapped("send", self._sandbox.id, self._sandbox._absence):
            await self._running.send(data)

    async def send_eof(self) -> None:
        if not self._closed and not self._ended:
            async with mapped("send_eof", self._sandbox.id, self._sandbox._absence):
                await self._running.send(b"", eof=True)

    async def receive(self) -> bytes:
        if self._closed:
            raise self._broken("receive", "it was closed")
        try:
            return await self._take.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            if self._closed:
                raise self._broken("receive", "it was closed") from None
        if self._error is not None:
            raise self._error
        self._ended = True
        return b""

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._reading.cancel()
        self._take.close()
        if self._ended:
            return
        try:
            with anyio.CancelScope(shield=True), anyio.move_on_after(_STOP):
                # By its session alone: nobody carries this marker.
                await self._sandbox.run_own(_shell.kill_argv(uuid.uuid4().hex, self._leader), "close")
        except SandboxGone:
            logger.debug("%s: the sandbox went before a process in it was closed", self._sandbox.id)
        except SandboxError as exc:
            logger.warning("a process may go on, for it could not be killed: %s", exc)

    def _broken(self, op: str, why: str) -> SandboxUnavailable:
        return SandboxUnavailable(f"the process: {why}", provider=PROVIDER, op=op, sandbox_id=self._sandbox.id)


async def _leave() -> None:
    """Modal's own clock ends it."""
