"""One container: commands and files in it."""

from __future__ import annotations

import contextlib
import logging
import math
import posixpath
import uuid
from collections.abc import Mapping, Sequence

import anyio
import anyio.lowlevel

from mabridge.errors import FileTooLarge, NotSupported, SandboxError, SandboxGone, SandboxUnavailable
from mabridge.providers import _shell
from mabridge.providers._shell import check_env
from mabridge.providers.cloudflare.script import (
    COMMAND_LIMIT,
    OUTPUT_LIMIT,
    STATE,
    UPLOAD,
    Command,
    cancel_argv,
    is_gone,
    parse,
)
from mabridge.providers.cloudflare.worker import CREATE, PROVIDER, SLACK, Worker, register
from mabridge.sandbox import ExecResult, Sandbox

__all__ = ["CloudflareSandbox"]

logger = logging.getLogger("mabridge.providers.cloudflare")

_CHUNK = 8 * 1024 * 1024  # bytes of a file in one request: the bridge says 32 MiB, and fails from 12 on
_STOP = 30.0  # seconds for everything that stopping a command may take


class CloudflareSandbox(Sandbox):
    """A running container."""

    def __init__(
        self, worker: Worker, key: str, instance: str, *, workdir: str, env: Mapping[str, str], registered: bool
    ) -> None:
        self.id = key
        self.workdir = workdir
        self._worker = worker
        self._instance = instance
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
            instance=self._instance,
            argv=argv,
            cwd=self.workdir if cwd is None else cwd,
            variables=[f"{name}={value}" for name, value in {**self._env, **check_env(env)}.items()],
            timeout=timeout,
            max_output=max_output,
        )
        if command.size > COMMAND_LIMIT:
            message = f"a command and its variables may have {COMMAND_LIMIT:,} bytes, and these have {command.size:,}"
            raise NotSupported(message, provider=PROVIDER, op="exec", sandbox_id=self.id)
        stop = True
        try:
            files = 0
            if stdin and command.size + len(stdin) * 4 // 3 > COMMAND_LIMIT:
                files = await self._upload(call, stdin)
            most = 3 * max_output + 400_000  # base64 of both, and of what their pipes hold beyond the bound
            _, said = await self._worker.run(
                "exec", self.id, command.argv(stdin, files), timeout=timeout + SLACK, most=most, beats=True
            )
            if is_gone(said, call):
                raise self._gone("exec")
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
            if await self._went():
                stop = False
                raise self._gone("exec") from exc
            raise
        finally:
            if stop:
                await self._cancel(call)

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
        await self._worker.remove(self.id)

    async def keep_alive(self, ttl: float) -> None:
        if self._registered:
            path = f"{register(self.id)}/keep-alive"
            response = await self._worker.call("keep_alive", "POST", path, json={"ttl": ttl}, allow=(404,))
            if response.status_code == 404:
                raise self._gone("keep_alive")
            return
        # Any request puts the container's sleep off; this one tells whether it is still ours.
        code, out = await self._worker.run("keep_alive", self.id, ["cat", f"{STATE}/state"], timeout=CREATE)
        if code != 0 or not out.startswith(self._instance.encode() + b" "):
            raise self._gone("keep_alive")

    async def _upload(self, call: str, data: bytes) -> int:
        """Send a large stdin ahead of the command; return the number of files that it became."""
        starts = range(0, len(data), _CHUNK)
        for number, start in enumerate(starts):
            path = f"/v1/sandbox/{self.id}/file{UPLOAD.format(call=call, number=number)}"
            part = data[start : start + _CHUNK]
            # Shielded: if it were cut off, the file might be written after we had looked for it to remove it.
            with anyio.CancelScope(shield=True):
                await self._worker.call("exec", "PUT", path, content=part, sandbox_id=self.id)
            await anyio.lowlevel.checkpoint()
        return len(starts)

    async def _went(self) -> bool:
        """Whether the container is gone, which breaks connections too: the register knows, or will in a moment."""
        for pause in (0.1, 0.4, 1.5) if self._registered else ():
            with contextlib.suppress(SandboxUnavailable):
                response = await self._worker.call("exec", "GET", register(self.id), allow=(404,))
                if response.status_code == 404:
                    return True
            await anyio.sleep(pause)
        return False

    async def _cancel(self, call: str) -> None:
        """Kill what a call has started, or yet will start: nobody waits for it any more."""
        with anyio.CancelScope(shield=True):
            try:
                await self._worker.run("exec", self.id, cancel_argv(call), timeout=_STOP)
            except SandboxError as exc:
                logger.warning("a command may run on until its time is up: %s", exc)

    def _gone(self, op: str) -> SandboxGone:
        message = "its container has stopped, and its files are lost"
        return SandboxGone(message, provider=PROVIDER, op=op, sandbox_id=self.id)
