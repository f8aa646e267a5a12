"""One sandbox: commands and files in it."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import anyio

from mabridge.errors import CreateFailed, NotSupported, SandboxError, SandboxGone, SandboxUnavailable, first_error
from mabridge.providers import _shell
from mabridge.providers.daytona import script
from mabridge.providers.daytona.options import minutes
from mabridge.providers.daytona.process import DaytonaProcess
from mabridge.providers.daytona.service import CALL, PROVIDER, SETTLE, delete, is_gone, mapped, state_of, time_of
from mabridge.sandbox import ExecResult, Process, Sandbox

if TYPE_CHECKING:
    from daytona import AsyncSandbox

__all__ = ["DaytonaSandbox", "make_ready"]

logger = logging.getLogger("mabridge.providers.daytona")

_REACH = 20.0  # seconds for a sandbox that has started to take its first command
_STOP = 30.0  # seconds for everything that stopping a command may take
_BACKSTOP = 120  # seconds after ours until Daytona's own time-out, which loses the output
_UPLOAD = 300
_LATE = 5.0  # seconds for the answer to a command that was called off before it began
_INLINE = 60_000  # bytes of stdin that go with the command
_KILLED = -1  # Daytona's exit code of what was killed by a signal


@dataclass(frozen=True)
class _Answer:
    """What the script of a command said, how it ended, and whether the command was killed for its time."""

    said: str
    code: int
    late: bool = False


class DaytonaSandbox(Sandbox):
    """A sandbox of Daytona's that has started."""

    def __init__(self, box: AsyncSandbox, *, workdir: str) -> None:
        self.id = box.id
        self.workdir = workdir
        self._box = box

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
        marker, end = uuid.uuid4().hex, uuid.uuid4().hex
        upload = stdin if stdin is not None and len(stdin) > _INLINE else None
        command = script.exec_command(
            argv,
            cwd or self.workdir,
            env,
            marker=marker,
            end=end,
            keep=max_output,
            stdin=None if upload is not None else stdin or b"",
        )
        async with self.reaching("exec"):
            answer = await self._run(command, marker, upload, timeout)
            timed_out = answer.late
            code, out, err = script.unpack(answer.said, end)
            if code is None and not timed_out:
                if answer.code != _KILLED:
                    message = f"the command was not run: {answer.said.strip()[:300] or f'exit code {answer.code}'}"
                    raise SandboxUnavailable(message, provider=PROVIDER, op="exec", sandbox_id=self.id)
                await self.require_started("exec")
                code = 137  # such as by `kill -9 -1`, which takes the script and the output too
        return ExecResult(
            exit_code=None if timed_out else code,
            stdout=out[:max_output],
            stderr=err[:max_output],
            timed_out=timed_out,
            truncated=len(out) > max_output or len(err) > max_output,
        )

    async def open_process(
        self, argv: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        """Start a program and hold it open; see `mabridge.sandbox.SupportsProcess`."""
        process = DaytonaProcess(self, self._box)
        async with self.reaching("open_process"):
            await process.start(argv, cwd or self.workdir, env)
        return process

    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        return await _shell.read_file(self, path, max_bytes=max_bytes, provider=PROVIDER)

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        await _shell.write_file(self, path, data, mode=mode, provider=PROVIDER)

    async def teardown(self) -> None:
        with anyio.CancelScope(shield=True), mapped("teardown", self.id):
            await delete(self._box)

    async def keep_alive(self, ttl: float) -> None:
        with mapped("keep_alive", self.id), anyio.fail_after(CALL):
            await self._box.refresh_data()
            if is_gone(self._box):
                raise SandboxGone("it is removed", provider=PROVIDER, op="keep_alive", sandbox_id=self.id)
            end = time_of(self._box.auto_destroy_at)
            if end is None or end < datetime.now(UTC) + timedelta(seconds=ttl):
                await self._box.set_ttl(minutes(ttl))

    async def suspend(self) -> None:
        """Stop it and keep its disk; see `mabridge.sandbox.SupportsSuspend`.

        Raises:
            NotSupported: it is ephemeral.
        """
        import daytona

        with mapped("suspend", self.id), anyio.fail_after(SETTLE):
            while True:
                await self._box.refresh_data()
                if is_gone(self._box):
                    raise SandboxGone("it is removed", provider=PROVIDER, op="suspend", sandbox_id=self.id)
                if state_of(self._box) in ("stopped", "archiving", "archived", "paused"):
                    return
                if self._box.auto_delete_interval == 0:
                    message = "it is ephemeral: Daytona removes it when it stops; set ephemeral to false"
                    raise NotSupported(message, provider=PROVIDER, op="suspend", sandbox_id=self.id)
                try:
                    await self._box.stop(timeout=0)
                except daytona.DaytonaConflictError:
                    await anyio.sleep(0.2)

    async def _run(self, command: str, marker: str, upload: bytes | None, timeout: float) -> _Answer:
        """Run the script of a command, and kill the command when its time is over."""
        limit = math.ceil(timeout) + _BACKSTOP
        answer: _Answer | None = None
        answered = anyio.Event()

        async def call() -> None:
            nonlocal answer
            if upload is not None:
                await self._box.fs.upload_file(upload, script.stdin_path(marker), timeout=_UPLOAD)
            response = await self._box.process.exec(command, env=script.ENV, timeout=limit)
            answer = _Answer(response.result, response.exit_code)
            answered.set()

        late = killed = False
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(call)
                with anyio.move_on_after(timeout):
                    await answered.wait()
                if answer is None:
                    late = True
                    began = await self._kill(marker)
                    killed = True
                    with anyio.move_on_after(_STOP if began else _LATE):
                        await answered.wait()
                    if answer is None and began:
                        raise TimeoutError("a command was killed, and did not end")
                    group.cancel_scope.cancel()
        finally:
            if answer is None and not killed:
                await self.abandon(marker)
        return _Answer("" if answer is None else answer.said, 0 if answer is None else answer.code, late)

    async def _kill(self, marker: str) -> bool:
        """Kill a command with all that it started; return False if it had not begun, and now never will."""
        with anyio.fail_after(_STOP):
            result = await self._box.process.exec(script.kill_command(marker), timeout=int(_STOP))
        if result.exit_code != 0:
            raise TimeoutError("a command could not be killed")
        return script.NEVER not in result.result

    async def abandon(self, marker: str) -> None:
        """Kill a command of whose end nobody will hear."""
        with anyio.CancelScope(shield=True):
            try:
                async with self.reaching("exec"):
                    await self._kill(marker)
            except SandboxGone:
                logger.debug("%s: the sandbox went while a command ran in it", self.id)
            except SandboxError as exc:
                logger.warning("a command may go on, for it could not be killed: %s", exc)

    @asynccontextmanager
    async def reaching(self, op: str) -> AsyncIterator[None]:
        """Say of a request that the sandbox did not take, whether that is because it is not there.

        What stands before the sandbox tells nothing: it answers 400, 401, 404 or 502 for one that is gone or stopped.
        """
        with mapped(op, self.id):
            try:
                yield
            except Exception as exc:
                import daytona

                error = first_error(exc)
                if isinstance(error, daytona.DaytonaError) and not isinstance(error, daytona.DaytonaRateLimitError):
                    await self.require_started(op)
                raise

    async def require_started(self, op: str) -> None:
        """Ask whether it is there, and raise why not."""
        with anyio.fail_after(CALL):
            await self._box.refresh_data()
        if is_gone(self._box):
            raise SandboxGone("it is removed", provider=PROVIDER, op=op, sandbox_id=self.id)
        if (state := state_of(self._box)) != "started":
            message = f"it is {state}; to attach to it wakes it"
            raise SandboxUnavailable(message, provider=PROVIDER, op=op, sandbox_id=self.id)


async def make_ready(box: AsyncSandbox, workdir: str) -> None:
    """Make the directory, and see that the image has what is needed; done twice, it is done as well.

    Raises:
        CreateFailed: it has not.
    """
    import daytona

    until = anyio.current_time() + _REACH
    while True:
        try:
            with anyio.fail_after(CALL):
                result = await box.process.exec(script.ready_command(workdir), timeout=int(CALL))
            break
        except daytona.DaytonaError as exc:  # what started a moment ago may not be reached yet
            if anyio.current_time() > until or isinstance(exc, daytona.DaytonaRateLimitError):
                raise
        await anyio.sleep(0.3)
    if result.exit_code != 0:
        message = f"the sandbox cannot be used: {result.result.strip()[:300] or 'its shell failed'}"
        raise CreateFailed(message, provider=PROVIDER, op="create", sandbox_id=box.id)
