"""One sandbox: commands, files and processes in it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from mabridge.errors import CreateFailed, SandboxUnavailable
from mabridge.providers import _shell
from mabridge.providers.e2b.options import E2BOptions
from mabridge.providers.e2b.process import E2BProcess
from mabridge.providers.e2b.running import CALL, STOP, Running, Text
from mabridge.sandbox import ExecResult, Process, Sandbox

if TYPE_CHECKING:
    import e2b

__all__ = ["CREATE", "E2BSandbox", "Service"]

CREATE = 90.0  # seconds for a sandbox to be made, paused or woken
_PATIENCE = 10  # looks at a working directory that may not be written in
_SMALL = 48 * 1024  # bytes of stdin that travel with the command itself

_PREPARE = '[ -e "$1" ] || mkdir -p "$1" 2>/dev/null || { id -u; exit 9; }; [ -d "$1" ] && [ -w "$1" ] && [ -x "$1" ]'


class Service(Protocol):
    """What a sandbox needs of its provider."""

    options: E2BOptions
    tasks: TaskGroup

    @property
    def arguments(self) -> dict[str, Any]:
        """What every call of the SDK is given."""

    def mapped(self, op: str, sandbox_id: str | None = None) -> AbstractAsyncContextManager[None]:
        """Raise the SDK's errors as ours."""


class E2BSandbox(Sandbox):
    """A running sandbox."""

    def __init__(self, service: Service, box: e2b.AsyncSandbox, workdir: str) -> None:
        self._service = service
        self.box = box
        self.id = box.sandbox_id
        self.workdir = workdir
        self.user = service.options.user
        self.tasks = service.tasks

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
        command = self._command(argv, cwd, env)
        running = Running(self)
        answer = Text(running.wrapper.most(max_output))
        async with self.mapped("exec"):
            try:
                source = await running.upload("i", stdin) if stdin and len(stdin) > _SMALL else stdin
                await running.start(running.wrapper.run(*command, stdin=source, max_output=max_output), answer.add)
                with anyio.move_on_after(timeout):
                    await running.ended.wait()
                if timed_out := not running.ended.is_set():
                    await running.kill()
                    with anyio.move_on_after(STOP):
                        await running.ended.wait()
                if running.error is not None:
                    raise running.error
            except BaseException:
                await running.try_to_kill()
                raise
            finally:
                await running.close()
        result = running.wrapper.result(answer.take(), max_output, timed_out=timed_out)
        if result is None and (timed_out or running.code in (-1, 137)):  # it was killed with all that there was
            result = ExecResult(exit_code=None if timed_out else 137, timed_out=timed_out)
        if result is None:
            why = " ".join(running.said.split()) or f"exit code {running.code}"
            message = f"bash did not run the command in the sandbox: {why}"
            raise SandboxUnavailable(message, provider="e2b", op="exec", sandbox_id=self.id)
        return result

    async def open_process(
        self, argv: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        """Start a program and hold it open; see `mabridge.sandbox.SupportsProcess`."""
        process = E2BProcess(self)
        command = self._command(argv, cwd, env)
        async with self.mapped("open_process"):
            await process.start(*command)
        return process

    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        return await _shell.read_file(self, path, max_bytes=max_bytes, provider="e2b")

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        await _shell.write_file(self, path, data, mode=mode, provider="e2b")

    async def teardown(self) -> None:
        from e2b import AsyncSandbox

        with anyio.CancelScope(shield=True):
            async with self.mapped("teardown"):
                with anyio.fail_after(CALL):
                    await AsyncSandbox.kill(self.id, **self._service.arguments)

    async def keep_alive(self, ttl: float) -> None:
        """Put the end off. E2B has a longest life, of 24 hours or of one: beyond it nothing is put off."""
        from e2b import AsyncSandbox

        async with self.mapped("keep_alive"):
            with anyio.fail_after(CALL):  # set_timeout() would bring it nearer, too
                await AsyncSandbox.connect(self.id, math.ceil(ttl), **self._service.arguments)

    async def suspend(self) -> None:
        """Pause it, memory and all; see `mabridge.sandbox.SupportsSuspend`. A paused one has no end of its own."""
        from e2b import AsyncSandbox

        async with self.mapped("suspend"):
            with anyio.fail_after(CREATE):
                await AsyncSandbox.pause(self.id, **{**self._service.arguments, "request_timeout": CREATE})

    async def prepare(self) -> None:
        """Make the working directory, as root if need be.

        Raises:
            CreateFailed: it cannot be, or the user of the commands may not write in it.
        """
        from e2b import CommandExitException

        argv = ["/bin/sh", "-c", _PREPARE, "mab", self.workdir]
        why = "it is there, and the user of the commands may not write in it"
        for _ in range(_PATIENCE):
            made = await self.exec(argv, cwd="/", timeout=CALL, max_output=1000)
            if made.exit_code == 0:
                return
            if made.exit_code == 9 and made.stdout.strip().isdigit():
                path, owner = shlex.quote(self.workdir), made.stdout.decode().strip()
                script = f"mkdir -p {path} && chown {owner} {path}"
                try:
                    # Shielded, for of a call that is cut off the SDK forgets a task, whose error the loop complains of.
                    with anyio.CancelScope(shield=True), anyio.fail_after(CALL):
                        await self.box.commands.run(script, user="root", cwd="/", timeout=CALL)
                except CommandExitException as exc:
                    why = " ".join(str(exc.stderr).split())[-200:]
                    break
                await anyio.lowlevel.checkpoint_if_cancelled()
                return
            await anyio.sleep(0.1)  # another worker makes it, and it is not the user's yet
        message = f"the working directory {self.workdir} cannot be used: {why}; set workdir, or the option user"
        raise CreateFailed(message, provider="e2b", op="create", sandbox_id=self.id)

    def mapped(self, op: str) -> AbstractAsyncContextManager[None]:
        """Raise the SDK's errors as ours, with the sandbox's id."""
        return self._service.mapped(op, self.id)

    def _command(
        self, argv: Sequence[str], cwd: str | None, env: Mapping[str, str] | None
    ) -> tuple[Sequence[str], str]:
        """Return the argv and its directory, or refuse them: what is not Unicode cannot be sent."""
        cwd = cwd or self.workdir
        _shell.run_argv(argv, cwd)  # for what it refuses
        command = _shell.with_env(argv, env)
        "".join((cwd, *command)).encode()
        return command, cwd
