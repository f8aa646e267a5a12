"""One container: commands and files in it."""

from __future__ import annotations

import contextlib
import logging
import math
import posixpath
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import anyio
import anyio.abc
import anyio.lowlevel

from mabridge.errors import FileTooLarge, NotSupported, SandboxError, SandboxGone, SandboxUnavailable
from mabridge.providers import _shell
from mabridge.providers._shell import check_env
from mabridge.providers.cloudflare.process import CloudflareProcess
from mabridge.providers.cloudflare.script import (
    COMMAND_LIMIT,
    OUTPUT_LIMIT,
    STATE,
    UPLOAD,
    Command,
    cancel_argv,
    is_gone,
    parse,
    size,
)
from mabridge.providers.cloudflare.worker import CREATE, PROVIDER, SLACK, Worker, register
from mabridge.sandbox import ExecResult, Process, Sandbox

__all__ = ["CloudflareSandbox"]

logger = logging.getLogger("mabridge.providers.cloudflare")

_CHUNK = 8 * 1024 * 1024  # bytes of a file in one request: the bridge says 32 MiB, and fails from 12 on
_STOP = 30.0  # seconds for everything that stopping a command may take


class CloudflareSandbox(Sandbox):
    """A running container."""

    def __init__(
        self,
        worker: Worker,
        tasks: anyio.abc.TaskGroup,
        key: str,
        instance: str,
        *,
        workdir: str,
        env: Mapping[str, str],
        registered: bool,
    ) -> None:
        self.id = key
        self.workdir = workdir
        self.worker = worker
        self.tasks = tasks
        self.instance = instance
        self._env = env
        self._registered = registered

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
        call = uuid.uuid4().hex
        max_output = min(max_output, OUTPUT_LIMIT)
        command = Command(
            call,
            instance=self.instance,
            argv=argv,
            cwd=self.workdir if cwd is None else cwd,
            variables=self._variables(env),
            timeout=timeout,
            max_output=max_output,
        )
        self._check_size("exec", command.size)
        stop = True
        files: list[str] = []
        try:
            if stdin and command.size + len(stdin) * 4 // 3 > COMMAND_LIMIT:
                files = _paths(call, stdin)
                await self._upload(files, stdin)
            most = 3 * max_output + 400_000  # base64 of both, and of what their pipes hold beyond the bound
            _, said = await self.worker.run(
                "exec", self.id, command.argv(stdin, len(files)), timeout=timeout + SLACK, most=most, beats=True
            )
            if is_gone(said, call):
                raise self.gone("exec")
            result = parse(said, call, max_output)
            if result is None:
                message = "the end of the command was not told"
                raise SandboxUnavailable(message, provider=PROVIDER, op="exec", sandbox_id=self.id)
            stop = False
            return result
        except SandboxGone:
            stop = False
            raise
        except SandboxUnavailable as exc:
            if await self.went():
                stop = False
                await self._discard("exec", files)  # from the container that the bridge alone has started
                raise self.gone("exec") from exc
            raise
        finally:
            if stop:
                await self.cancel(call)

    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        try:
            most = min(max_bytes, OUTPUT_LIMIT - 1)
            return await _shell.read_file(self, path, max_bytes=most, provider=PROVIDER)
        except FileTooLarge as exc:
            if exc.size is None or max_bytes < OUTPUT_LIMIT:
                raise
            size = exc.size
        if size > max_bytes:
            message = f"{path} holds {size:,} bytes, and at most {max_bytes:,} were to be read"
            raise FileTooLarge(
                message, provider=PROVIDER, op="read_file", sandbox_id=self.id, size=size, limit=max_bytes
            )
        parts = []
        for number in range(math.ceil(size / _CHUNK)):
            dd = ["dd", f"if={posixpath.join(self.workdir, path)}", f"bs={_CHUNK}", f"skip={number}", "count=1"]
            parts.append((await self.exec(dd, cwd="/", timeout=CREATE, max_output=_CHUNK)).stdout)
        data = b"".join(parts)
        if len(data) != size:
            message = f"{path} changed while it was read"
            raise SandboxUnavailable(message, provider=PROVIDER, op="read_file", sandbox_id=self.id)
        return data

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        await _shell.write_file(self, path, data, mode=mode, provider=PROVIDER)

    async def teardown(self) -> None:
        await self.worker.remove(self.id)

    async def keep_alive(self, ttl: float) -> None:
        if self._registered:
            path = f"{register(self.id)}/keep-alive"
            response = await self.worker.call("keep_alive", "POST", path, json={"ttl": ttl}, allow=(404,))
            if response.status_code == 404:
                raise self.gone("keep_alive")
            return
        if not await self._is_ours():  # any request puts the container's sleep off
            raise self.gone("keep_alive")

    async def open_process(
        self, argv: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        """Start a program and hold it open; see `mabridge.sandbox.SupportsProcess`."""
        variables = self._variables(env)
        self._check_size("open_process", size([*argv, *variables]))
        process = CloudflareProcess(self, uuid.uuid4().hex)
        await process.start(argv, self.workdir if cwd is None else cwd, variables)
        return process

    @asynccontextmanager
    async def uploaded(self, op: str, data: bytes) -> AsyncIterator[list[str]]:
        """Have `data` in the container as files, one after another; give their paths."""
        paths = _paths(uuid.uuid4().hex, data)
        try:
            await self._upload(paths, data)
            yield paths
        finally:
            await self._discard(op, paths)

    async def _upload(self, paths: Sequence[str], data: bytes) -> None:
        for number, path in enumerate(paths):
            part = data[number * _CHUNK : (number + 1) * _CHUNK]
            # Shielded: if it were cut off, the file might be written after we had looked for it to remove it.
            with anyio.CancelScope(shield=True):
                url = f"/v1/sandbox/{self.id}/file{path}"
                await self.worker.call("exec", "PUT", url, content=part, sandbox_id=self.id)
            await anyio.lowlevel.checkpoint()

    async def _discard(self, op: str, paths: Sequence[str]) -> None:
        if paths:
            with anyio.CancelScope(shield=True), contextlib.suppress(SandboxError):
                await self.worker.run(op, self.id, ["rm", "-f", *paths], timeout=_STOP)

    async def went(self) -> bool:
        """Whether the container is gone, which breaks connections too: the register knows, or will in a moment.

        The bridge alone starts another one.
        """
        for pause in (0.1, 0.3, 0.6) if self._registered else ():
            with contextlib.suppress(SandboxUnavailable):
                response = await self.worker.call("exec", "GET", register(self.id), allow=(404,))
                if response.status_code == 404:
                    return True
            await anyio.sleep(pause)
        with contextlib.suppress(SandboxUnavailable):
            return not await self._is_ours()
        return False

    async def _is_ours(self) -> bool:
        """Whether the container is still the one that it was, with what we have put there."""
        try:
            code, out = await self.worker.run("exec", self.id, ["cat", f"{STATE}/state"], timeout=CREATE)
        except SandboxGone:
            return False
        return code == 0 and out.startswith(self.instance.encode() + b" ")

    async def cancel(self, call: str) -> None:
        """Kill what a call has started, or yet will start: nobody waits for it any more."""
        with anyio.CancelScope(shield=True):
            try:
                await self.worker.run("exec", self.id, cancel_argv(call), timeout=_STOP)
            except SandboxError as exc:
                logger.warning("a command may run on until its time is up: %s", exc)

    def _variables(self, env: Mapping[str, str] | None) -> list[str]:
        return [f"{name}={value}" for name, value in {**self._env, **check_env(env)}.items()]

    def _check_size(self, op: str, taken: int) -> None:
        if taken > COMMAND_LIMIT:
            message = f"a command and its variables may have {COMMAND_LIMIT:,} bytes, and these have {taken:,}"
            raise NotSupported(message, provider=PROVIDER, op=op, sandbox_id=self.id)

    def gone(self, op: str) -> SandboxGone:
        message = "its container has stopped, and its files are lost"
        return SandboxGone(message, provider=PROVIDER, op=op, sandbox_id=self.id)


def _paths(call: str, data: bytes) -> list[str]:
    """Return where `data` is put that is too large for a request."""
    return [UPLOAD.format(call=call, number=number) for number in range(math.ceil(len(data) / _CHUNK))]
