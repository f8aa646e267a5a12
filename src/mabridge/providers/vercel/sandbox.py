"""One sandbox: commands, files and processes in it."""

from __future__ import annotations

import logging
import math
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

from mabridge.errors import MabridgeError, NotSupported, SandboxGone, SandboxUnavailable
from mabridge.providers import _packed, _shell
from mabridge.providers.vercel.errors import PROVIDER, is_lifecycle, mapped
from mabridge.providers.vercel.process import VercelProcess
from mabridge.providers.vercel.running import Running, Stream
from mabridge.sandbox import ExecResult, Process, Sandbox

if TYPE_CHECKING:
    from vercel import sandbox as sdk
    from vercel.sandbox import SandboxClient

__all__ = ["DEAD", "VercelSandbox", "is_over", "remove"]

logger = logging.getLogger("mabridge.providers.vercel")

DEAD = ("stopped", "failed", "aborted")
"""The states of a sandbox that does not run, and will not by itself."""

_CALL = 60.0  # seconds for one request
_STAGE = 300.0  # seconds for the upload of a command's stdin
_STOP = 40.0  # seconds for everything that stopping a command may take
_LINGER = 0.3  # seconds, after a program's end, for its output to end as well
_POLL = 0.25
_LONGEST = 18_000.0  # seconds: the most that Vercel takes as kill_after


class VercelSandbox(Sandbox):
    """A running sandbox. It keeps to the session it was found in: another would have other processes."""

    def __init__(self, client: SandboxClient, found: sdk.Sandbox) -> None:
        assert found.current_session is not None
        self.id = found.name
        self.workdir = ""
        self._client = client
        self._sandbox = found
        self._session = found.current_session

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
        marker, variables = uuid.uuid4().hex, _shell.check_env(env)
        staged = f"/tmp/.mab-{marker}" if stdin else ""  # noqa: S108 - the sandbox's
        running = Running(max_output)
        command = _packed.capture_argv(argv, cwd or self.workdir, marker=marker, nonce=running.nonce, stdin=staged)
        async with self.mapped("exec"):
            try:
                if stdin:
                    with anyio.fail_after(_STAGE):
                        await self._session.fs.write_bytes(staged, stdin)
                timed_out = await self._run(running, command, variables, marker, timeout)
            finally:
                if staged and running.leader is None:  # the command, which removes the file, has not begun
                    await self._tidy(staged)
            return running.result(self.id, timed_out=timed_out)

    async def open_process(
        self, argv: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        """Start a program and hold it open; see `mabridge.sandbox.SupportsProcess`."""
        command = _packed.hold_argv(argv, cwd or self.workdir, marker=uuid.uuid4().hex)
        variables = _shell.check_env(env)
        async with self.mapped("open_process"):
            # Shielded, for one that is started and not known of could not be killed.
            with anyio.CancelScope(shield=True), anyio.fail_after(_CALL):
                started = await self._session.create_process(
                    command[0], command[1:], cwd="/", env=variables, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
        process = VercelProcess(self, self._session, started)
        try:
            await anyio.lowlevel.checkpoint_if_cancelled()
        except BaseException:
            await process.aclose()
            raise
        return process

    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        return await _shell.read_file(self, path, max_bytes=max_bytes, provider=PROVIDER)

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        await _shell.write_file(self, path, data, mode=mode, provider=PROVIDER)

    async def teardown(self) -> None:
        with anyio.CancelScope(shield=True):
            async with mapped("teardown", self.id):
                await remove(self._sandbox)

    async def keep_alive(self, ttl: float) -> None:
        async with self.mapped("keep_alive"):
            with anyio.fail_after(_CALL):
                session = await self._session.refresh()
                if session.status != "running":
                    raise await self.stopped("keep_alive")
                began, limit = session.started_at or session.requested_at, session.execution_time_limit
                ends = began / 1000 + limit.total_seconds() if began and limit else time.time()
                missing = time.time() + ttl - ends
                if missing > 0:
                    await session.extend_execution_time_limit(max(math.ceil(missing), 1))

    async def suspend(self) -> None:
        """Stop it and keep its disk; see `mabridge.sandbox.SupportsSuspend`.

        Raises:
            NotSupported: the option ``persistent`` is false, so its disk would be lost.
        """
        if self._sandbox.persistent is False:
            message = "the option persistent is false, so that a stop loses the files"
            raise NotSupported(message, provider=PROVIDER, op="suspend", sandbox_id=self.id)
        from vercel import sandbox as sdk

        async with mapped("suspend", self.id):
            try:
                with anyio.fail_after(_CALL):
                    await self._session.stop()
            except sdk.SandboxApiError as exc:
                if not is_lifecycle(exc):
                    raise
                if isinstance(why := await self.stopped("suspend"), SandboxGone):
                    raise why from exc

    async def do(self, argv: Sequence[str], *, sudo: bool = False) -> tuple[int, str]:
        """Run something of our own, and return its exit code and its output, which is short text."""
        with anyio.fail_after(_CALL):
            done = await self._session.run_process(
                argv[0],
                argv[1:],
                cwd="/",
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                sudo=sudo,
                kill_after=_CALL,
            )
        return done.returncode, done.stdout or ""

    def mapped(self, op: str) -> AbstractAsyncContextManager[None]:
        """As `errors.mapped`, for this sandbox."""
        return mapped(op, self.id, self.stopped)

    async def stopped(self, op: str) -> SandboxGone | SandboxUnavailable:
        """Return why the session does not answer."""
        from vercel import sandbox as sdk

        where: dict[str, Any] = {"provider": PROVIDER, "op": op, "sandbox_id": self.id}
        try:
            with anyio.fail_after(_CALL):
                found = await self._client.get_sandbox(name=self.id)
        except sdk.SandboxApiError as exc:
            if exc.status_code == 404:
                return SandboxGone("the sandbox is not there", **where)
            raise
        if found.status in DEAD and is_over(found):
            return SandboxGone("its time was up, and Vercel stopped it", **where)
        if found.current_session_id != self._session.id:
            return SandboxUnavailable("it was started anew; attach finds it", **where)
        if found.status == "running":
            return SandboxUnavailable("Vercel lost the connection to it, or to a command in it", **where)
        return SandboxUnavailable(f"it is {found.status}; attach wakes a stopped one", **where)

    async def kill(self, argv: Sequence[str]) -> None:
        """Run a kill, again with more rights where the agent's are not enough."""
        for sudo in (False, True):
            code, _ = await self.do(argv, sudo=sudo)
            if code == 0:
                return
        message = "a command could not be killed"
        raise SandboxUnavailable(message, provider=PROVIDER, op="exec", sandbox_id=self.id)

    async def _run(
        self, running: Running, command: Sequence[str], env: Mapping[str, str], marker: str, timeout: float
    ) -> bool:
        """See a command through to its end; return whether that was its time-out."""
        async with anyio.create_task_group() as group:

            def drain(stream: Stream) -> None:
                group.start_soon(self._drain, marker, stream)

            running.on_full = drain
            group.start_soon(running.follow, self._session, command, env, min(timeout + _STOP, _LONGEST))
            try:
                with anyio.move_on_after(timeout) as clock:
                    await running.ended.wait()
            finally:
                await self._conclude(running, marker)
                group.cancel_scope.cancel()
        return clock.cancelled_caught

    async def _conclude(self, running: Running, marker: str) -> None:
        """See that a command has ended, and that its output has, with as much force as that takes."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(_STOP) as clock:
            try:
                if not running.ended.is_set():
                    with anyio.move_on_after(_STOP / 2):
                        await running.begun.wait()
                if running.code is None and running.leader is not None:
                    async with self.mapped("exec"):
                        await self.kill(_packed.kill_leader_argv(marker, running.leader))
                with anyio.move_on_after(_LINGER):
                    await running.finished.wait()
                if not running.finished.is_set():  # something in the background holds its output
                    async with self.mapped("exec"):
                        await self.do(_packed.flush_argv(marker))
                    await running.finished.wait()
            except MabridgeError as exc:
                running.trouble = running.trouble or exc
        if clock.cancelled_caught:
            message = f"a command could not be stopped within {_STOP:.0f} s"
            running.trouble = SandboxUnavailable(message, provider=PROVIDER, op="exec", sandbox_id=self.id)
        running.scope.cancel()

    async def _drain(self, marker: str, stream: Stream) -> None:
        """See that no more is sent of a stream of which there is enough."""
        command = _packed.drain_argv(marker, stream.name)
        try:
            async with self.mapped("exec"):
                with anyio.fail_after(_CALL):
                    await self._session.create_process(command[0], command[1:], cwd="/")
        except MabridgeError as exc:
            logger.debug("%s: output that nobody wants goes on: %s", self.id, exc)

    async def _tidy(self, staged: str) -> None:
        with anyio.CancelScope(shield=True), anyio.move_on_after(10):
            try:
                async with self.mapped("exec"):
                    await self.do(["rm", "-f", staged])
            except MabridgeError as exc:
                logger.debug("%s was left behind: %s", staged, exc)


def is_over(found: sdk.Sandbox) -> bool:
    """Whether a sandbox that does not run has no files any more, or ran until its time was up."""
    session = found.current_session
    if found.persistent is False or found.status != "stopped":
        return True
    if session is None or not session.started_at or not session.stopped_at or session.execution_time_limit is None:
        return False
    return session.stopped_at / 1000 >= session.started_at / 1000 + session.execution_time_limit.total_seconds()


async def remove(sandbox: sdk.Sandbox) -> None:
    """Remove a sandbox with its snapshots, stopped first where Vercel insists."""
    from vercel import sandbox as sdk

    with anyio.fail_after(_CALL):
        while True:
            try:
                await sandbox.destroy(delete_orphan_snapshots=True)
                return
            except sdk.SandboxApiError as exc:
                if exc.status_code == 404:
                    return
                if exc.status_code != 409:
                    raise
            try:
                await sandbox.stop()
            except sdk.SandboxApiError as exc:
                if exc.status_code != 404 and not is_lifecycle(exc):
                    raise
            await anyio.sleep(_POLL)
