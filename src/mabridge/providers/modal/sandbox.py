"""One sandbox of Modal: commands and files in it, and its end."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import modal
from modal.exception import NotFoundError, SandboxTimeoutError

from mabridge.errors import CreateFailed, NotSupported, SandboxGone, SandboxUnavailable
from mabridge.identity import KEY_LABEL
from mabridge.providers import _shell
from mabridge.providers._guard import KEEP_ALIVE
from mabridge.providers.modal.place import Place
from mabridge.providers.modal.process import ModalProcess
from mabridge.providers.modal.running import Command, Running
from mabridge.providers.modal.service import CALL, PROVIDER, call, mapped
from mabridge.providers.modal.shelf import Kept
from mabridge.providers.modal.tags import CREATED, ENV, UNTIL, WOKEN_FROM, workdir_of
from mabridge.sandbox import ExecResult, Process, Sandbox

__all__ = ["ModalSandbox"]

logger = logging.getLogger("mabridge.providers.modal")

_STARTUP = 300.0  # seconds for a new sandbox to run its first command; it may wait for a machine
_STOP = 30.0  # seconds for everything that stopping a command may take
_REMOVE = 60.0
_GRACE = 60  # seconds after which Modal kills a command whose worker did not
_SNAPSHOT = 50  # seconds for a snapshot


class ModalSandbox(Sandbox):
    """A running sandbox.

    Args:
        sandbox: as the SDK knows it.
        tags: those that it was made with.
        place: where it was made.

    Attributes:
        key: its key.
        woken_from: the snapshot that it was made from, if it had been suspended.
    """

    def __init__(self, sandbox: modal.Sandbox, tags: Mapping[str, str], place: Place) -> None:
        self.id = sandbox.object_id
        self.key = tags[KEY_LABEL]
        self.workdir = workdir_of(tags)
        self.woken_from = tags.get(WOKEN_FROM)
        self._tags = tags
        self._until = float(tags.get(UNTIL, "inf"))
        self._sandbox = sandbox
        self._place = place
        self._warned = False
        self._suspended = False

    def made_with(self, tags: Mapping[str, str]) -> bool:
        """Whether it came from the very call that set these."""
        return self._tags.get(CREATED) == tags[CREATED]

    async def prepare(self) -> None:
        """Make the working directory, as soon as the sandbox runs commands.

        Raises:
            SandboxGone: it ended instead.
            CreateFailed: the directory cannot be written.
        """
        script = 'mkdir -p "$1" && cd "$1" && [ -w . ]'
        command = Command(["/bin/sh", "-c", script, "mab", self.workdir], "/", None)
        async with self.mapped("create"):
            running = await self._started(command, {}, int(_STARTUP), within=_STARTUP)
            said = _shell.Capture(500)
            if not await running.communicate(_shell.Capture(0), said, timeout=CALL, kill=_leave) or running.code != 0:
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
        async with self.mapped("exec"):
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
        async with self.mapped("open_process"):
            running = await self._start(command, variables, None)
            try:
                with anyio.fail_after(CALL):
                    await running.begin()
                    leader = await running.leader()
            except BaseException:
                await self._stop(running, marker)
                raise
        return ModalProcess(self, running, leader, self._place.held)

    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        return await _shell.read_file(self, path, max_bytes=max_bytes, provider=PROVIDER)

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        await _shell.write_file(self, path, data, mode=mode, provider=PROVIDER)

    async def teardown(self) -> None:
        """Remove it, suspended or not, with its snapshots; see `mabridge.sandbox.Sandbox.teardown`."""
        with anyio.CancelScope(shield=True):
            try:
                with mapped("teardown"):
                    shelf = await self._place.shelf()
                    images = {kept.image for kept in await shelf.forget_all(self.key)}
            finally:
                await self.terminate()
            with mapped("teardown"):
                # One that was suspended may have been woken, and is another to Modal then.
                if self._suspended and (woken := await self._place.named(self.key)) is not None:
                    images.add(woken[1].get(WOKEN_FROM, ""))
                    await ModalSandbox(*woken, self._place).terminate()
                self._suspended = False
                images.add(self.woken_from or "")
                await self._place.delete_snapshots(images - {""})

    async def terminate(self) -> None:
        """End it. What is remembered of it stays."""
        with anyio.CancelScope(shield=True), mapped("teardown", self.id):
            try:
                await call(self._sandbox.terminate.aio(wait=True), within=_REMOVE)
            except (NotFoundError, SandboxTimeoutError):
                logger.debug("%s: it was gone already", self.id)

    async def suspend(self) -> None:
        """Take a snapshot of its files and end it; see `mabridge.sandbox.SupportsSuspend`.

        The order loses nothing, wherever it is cut off: the snapshot is remembered before the sandbox is ended, and as
        long as that runs, it and not the snapshot is what `Provider.attach` finds.

        Raises:
            NotSupported: it was made with variables of its own, which a snapshot does not keep.
        """
        if self._suspended:
            return
        if ENV in self._tags:
            message = "it was made with variables (SandboxSpec.env), which a snapshot does not keep; see the option env"
            raise NotSupported(message, provider=PROVIDER, op="suspend", sandbox_id=self.id)
        try:
            async with self.mapped("suspend"):
                image = await self._snapshot()
            with anyio.CancelScope(shield=True):
                await self._put_by(image)
        except SandboxGone:
            with mapped("suspend"):
                if await (await self._place.shelf()).find(self.key) is None:
                    raise
        self._suspended = True

    async def _snapshot(self) -> str:
        ttl = self._place.options.snapshot_ttl + self._place.options.timeout
        try:
            taken = self._sandbox.snapshot_filesystem.aio(_SNAPSHOT, ttl=ttl)
            return (await call(taken, within=_SNAPSHOT + 5)).object_id
        except (modal.exception.TimeoutError, TimeoutError) as exc:
            message = f"the snapshot took longer than {_SNAPSHOT} s; the sandbox runs on"
            raise SandboxUnavailable(message, provider=PROVIDER, op="suspend", sandbox_id=self.id) from exc

    async def _put_by(self, image: str) -> None:
        """Remember the snapshot, and end the sandbox."""
        now = time.time()
        until = int(now + self._place.options.snapshot_ttl)
        kept = Kept(key=self.key, image=image, since=now, until=until, tags=self._tags)
        with mapped("suspend"):
            shelf = await self._place.shelf()
            await shelf.keep(kept)
        # Should this fail, it may have ended all the same: the record stays.
        await self.terminate()

    @asynccontextmanager
    async def mapped(self, op: str) -> AsyncIterator[None]:
        """`service.mapped`, and what there is to know of the sandbox's own state."""
        try:
            with mapped(op, self.id):
                yield
        except (SandboxGone, SandboxUnavailable) as exc:
            where: dict[str, Any] = {"provider": PROVIDER, "op": op, "sandbox_id": self.id}
            if self._suspended:
                raise SandboxUnavailable("it is suspended; to attach to it wakes it", **where) from exc.__cause__
            if isinstance(exc, SandboxUnavailable) and (why := await self._absence()) is not None:
                raise SandboxGone(why, **where) from exc.__cause__
            raise

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
        async with self.mapped(op):
            running = await self._start(Command(argv, "/", None), {}, int(_STOP))
            await running.communicate(*nothing, timeout=_STOP, kill=_leave)
        return running.code

    async def _start(self, command: Command, env: Mapping[str, str], timeout: int | None) -> Running:
        """Start a command. Shielded, for one that is started and not known of could not be killed."""
        with anyio.CancelScope(shield=True):
            running = await self._started(command, env, timeout, within=CALL)
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


async def _leave() -> None:
    """Modal's own clock ends it."""
