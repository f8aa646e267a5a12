"""One container: commands, files and processes in it."""

from __future__ import annotations

import contextlib
import logging
import math
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import anyio
from aiodocker import Docker, DockerError
from aiodocker.containers import DockerContainer

from mabridge.errors import NotSupported, OutOfMemory, SandboxError, SandboxGone, SandboxUnavailable
from mabridge.providers import _shell
from mabridge.providers._guard import KEEP_ALIVE
from mabridge.providers.docker.engine import PROVIDER, can_half_close, mapped
from mabridge.providers.docker.options import GUARD_USER
from mabridge.providers.docker.running import Running
from mabridge.sandbox import ExecResult, Process, Sandbox

__all__ = ["DockerSandbox", "remove"]

logger = logging.getLogger("mabridge.providers.docker")

_KILL_ATTEMPTS = 5
_STOP = 30.0  # seconds for everything that stopping a command may take
_REMOVE = 60.0
_NOTICE = 3.0  # seconds until the engine has noticed that a container has ended
_KILL_GROUP = 'kill -9 "-$1"'


class DockerSandbox(Sandbox):
    """A running container."""

    def __init__(self, client: Docker, container_id: str, *, user: str, workdir: str) -> None:
        self.id = container_id[:12]
        self.workdir = workdir
        self._client = client
        self._container: DockerContainer = client.containers.container(container_id)
        self._user = user

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
        if stdin is not None and not can_half_close(self._client):
            argv = _shell.with_sized_stdin(argv, len(stdin))
        marker = uuid.uuid4().hex
        command = _shell.run_argv(argv, cwd or self.workdir, announce=True)
        variables = {**_shell.check_env(env), _shell.MARKER: marker}
        out, err = _shell.Capture(max_output), _shell.Capture(max_output)
        code: int | None = None
        with mapped("exec", self.id):
            async with self._started(command, variables, self._user, stdin=stdin is not None) as running:
                try:
                    with anyio.move_on_after(timeout):
                        await running.communicate(stdin, out, err)
                        code = await self._ended(running, "exec")
                finally:
                    if code is None:
                        await self._stop(running, marker, out, err)
        return ExecResult(
            exit_code=code,
            stdout=out.take(),
            stderr=err.take(),
            timed_out=code is None,
            truncated=out.truncated or err.truncated,
        )

    async def open_process(
        self, argv: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        """Start a program and hold it open; see `mabridge.sandbox.SupportsProcess`."""
        command = _shell.run_argv(argv, cwd or self.workdir, announce=True, quiet=True)
        variables = _shell.check_env(env)
        with mapped("open_process", self.id):
            running = await self._start(command, variables, self._user, stdin=True)
        return _DockerProcess(self, running)

    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        return await _shell.read_file(self, path, max_bytes=max_bytes, provider=PROVIDER)

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        await _shell.write_file(self, path, data, mode=mode, provider=PROVIDER)

    async def teardown(self) -> None:
        with anyio.CancelScope(shield=True), mapped("teardown", self.id):
            await remove(self._container)

    async def keep_alive(self, ttl: float) -> None:
        user = f"{GUARD_USER}:{GUARD_USER}"
        with mapped("keep_alive", self.id):
            code = await self._run(["/bin/sh", "-c", KEEP_ALIVE, "mab", str(math.ceil(ttl))], user, "keep_alive")
        if code != 0:
            message = f"its end could not be put off: the guard's file was not written (exit {code})"
            raise SandboxUnavailable(message, provider=PROVIDER, op="keep_alive", sandbox_id=self.id)

    async def kill_group(self, leader: int) -> None:
        """Kill a process that leads a session, with what it started and did not put into another."""
        await self._run(["/bin/sh", "-c", _KILL_GROUP, "mab", str(leader)], self._user, "open_process")

    async def absence(self, op: str) -> SandboxGone | OutOfMemory | None:
        """Return why the container is not there or not running, or None if it runs."""
        try:
            state = (await self._container.show())["State"]
        except DockerError as exc:
            if exc.status != 404:
                raise
            return SandboxGone("the container is not there", provider=PROVIDER, op=op, sandbox_id=self.id)
        if state["Running"]:
            return None
        if state.get("OOMKilled"):
            message = "the container ran out of memory and was killed; raise the option memory"
            return OutOfMemory(message, provider=PROVIDER, op=op, sandbox_id=self.id)
        return SandboxGone(f"the container is {state['Status']}", provider=PROVIDER, op=op, sandbox_id=self.id)

    async def _start(self, command: Sequence[str], env: Mapping[str, str], user: str, *, stdin: bool) -> Running:
        """Start a command. Shielded, for one that is started and not known of could not be killed."""
        with anyio.CancelScope(shield=True), anyio.fail_after(_STOP):
            exec_ = await self._container.exec(list(command), stdin=stdin, user=user, environment=env, workdir="/")
            running = Running(exec_)
            try:
                await running.stream._init()
            except BaseException:
                await running.close()
                raise
        return running

    @asynccontextmanager
    async def _started(
        self, command: Sequence[str], env: Mapping[str, str], user: str, *, stdin: bool
    ) -> AsyncIterator[Running]:
        running = await self._start(command, env, user, stdin=stdin)
        try:
            yield running
        finally:
            await running.close()

    async def _run(self, argv: Sequence[str], user: str, op: str) -> int:
        """Run something of our own, whose output does not matter."""
        command = _shell.run_argv(argv, "/", announce=True)
        async with self._started(command, {}, user, stdin=False) as running:
            nothing = _shell.Capture(2000)
            await running.communicate(None, nothing, nothing)
            return await self._ended(running, op)

    async def _ended(self, running: Running, op: str) -> int:
        """Return the exit code, once the streams have ended.

        A program may close its output and go on, so the engine is asked until it says that it ended.
        """
        pause = 0.01
        while True:
            try:
                state = await running.exec.inspect()
            except DockerError:
                if (why := await self.absence(op)) is not None:
                    raise why from None
                raise
            if not state["Running"]:
                break
            await anyio.sleep(pause)
            pause = min(pause * 2, 1.0)
        if running.leader is None:  # not even the shell began: what the engine says about it came as output
            if (why := await self._dying(op)) is not None:
                raise why
            said = running.early[:500].decode(errors="replace").strip()
            message = f"nothing could be started in the container: {said or 'the engine does not say why'}"
            raise SandboxUnavailable(message, provider=PROVIDER, op=op, sandbox_id=self.id)
        if state["ExitCode"] == 137 and not await self._lives() and (why := await self._dying(op)) is not None:
            raise why  # it was killed because everything was
        return int(state["ExitCode"])

    async def _lives(self) -> bool:
        """Whether something can be started in the container: its state tells late that its first process is dead."""
        with contextlib.suppress(DockerError):
            async with self._started(_shell.run_argv(["true"], "/", announce=True), {}, self._user, stdin=False) as run:
                await run.drain(_shell.Capture(0), _shell.Capture(0), watch=False)
                return run.leader is not None
        return False

    async def _dying(self, op: str) -> SandboxGone | OutOfMemory | None:
        """Return why the container is not there, as soon as the engine has noticed."""
        why = None
        with anyio.move_on_after(_NOTICE):
            while (why := await self.absence(op)) is None:  # noqa: ASYNC110 - the engine has to be asked
                await anyio.sleep(0.1)
        return why

    async def _stop(self, running: Running, marker: str, out: _shell.Capture, err: _shell.Capture) -> None:
        """Kill a command with all that it started, and take the output that is still on its way.

        The output is read meanwhile: the engine tells nobody that anything in the container has ended while it cannot
        get rid of output.
        """
        with anyio.CancelScope(shield=True), anyio.move_on_after(_STOP) as clock:
            if await self.absence("exec") is not None:
                return
            with anyio.move_on_after(_STOP / 3):
                while running.leader is None:
                    if not await running.pass_on(out, err):
                        return  # it never began
            async with anyio.create_task_group() as group:
                group.start_soon(running.drain, out, err)
                if running.leader is None or not await self._kill(marker, running.leader):
                    # Such as a fork bomb that holds every process id there may be. The disk survives this, but what is
                    # in memory does not.
                    logger.error("%s: a command could not be killed, so the container is restarted", self.id)
                    await self._container.restart(t=0)
        if clock.cancelled_caught:
            message = f"a command could not be stopped within {_STOP:.0f} s"
            raise SandboxUnavailable(message, provider=PROVIDER, op="exec", sandbox_id=self.id)

    async def _kill(self, marker: str, leader: int) -> bool:
        argv = _shell.kill_argv(marker, leader)
        with anyio.move_on_after(_STOP / 3):
            for _ in range(_KILL_ATTEMPTS):
                try:
                    if await self._run(argv, self._user, "exec") == 0:
                        return True
                except (SandboxUnavailable, DockerError) as exc:
                    # Where no process id is left, even the engine cannot always start something.
                    logger.warning("%s: killing a command failed: %s", self.id, exc)
                await anyio.sleep(0.1)  # it had no process id left, and has made some free
        return False


class _DockerProcess(Process):
    def __init__(self, sandbox: DockerSandbox, running: Running) -> None:
        self._sandbox = sandbox
        self._running = running
        self._ended = False
        self._closed = False

    async def send(self, data: bytes) -> None:
        if self._closed or self._ended:
            raise self._broken("send", "it has ended" if self._ended else "it was closed")
        with mapped("send", self._sandbox.id):
            await self._running.send(data)

    async def send_eof(self) -> None:
        if not can_half_close(self._sandbox._client):
            message = "stdin cannot be closed alone through TLS; reach the engine through ssh:// or unix://"
            raise NotSupported(message, provider=PROVIDER, op="send_eof", sandbox_id=self._sandbox.id)
        if not self._closed:
            self._running.send_eof()

    async def receive(self) -> bytes:
        if self._closed:
            raise self._broken("receive", "it was closed")
        if self._ended:
            return b""
        with mapped("receive", self._sandbox.id):
            while (got := await self._running.read()) is not None:
                if got[0] == 1:
                    return got[1]
            with anyio.move_on_after(5):
                await self._sandbox._ended(self._running, "receive")
                self._ended = True
                return b""
        raise self._broken("receive", "its output ended, but it did not")

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            with anyio.CancelScope(shield=True), anyio.move_on_after(_STOP), mapped("close", self._sandbox.id):
                if not self._ended:
                    await self._kill()
        except SandboxGone:
            logger.debug("%s: the container went before a process in it was closed", self._sandbox.id)
        except SandboxError as exc:
            logger.warning("a process may go on, for it could not be killed: %s", exc)
        finally:
            await self._running.close()

    async def _kill(self) -> None:
        nothing = _shell.Capture(0)
        while self._running.leader is None and await self._running.pass_on(nothing, nothing):
            pass
        if self._running.leader is not None and (await self._running.exec.inspect())["Running"]:
            await self._sandbox.kill_group(self._running.leader)

    def _broken(self, op: str, why: str) -> SandboxUnavailable:
        return SandboxUnavailable(f"the process: {why}", provider=PROVIDER, op=op, sandbox_id=self._sandbox.id)


async def remove(container: DockerContainer) -> None:
    """Remove a container, and wait until it is gone."""
    with anyio.fail_after(_REMOVE):
        pause = 0.02
        while True:
            try:
                await container.delete(force=True, v=True)
                return
            except DockerError as exc:
                if exc.status == 404:
                    return
                if exc.status != 409:
                    raise
            await anyio.sleep(pause)  # it is being removed already
            pause = min(pause * 2, 1.0)
