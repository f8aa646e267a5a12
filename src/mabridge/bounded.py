"""A sandbox whose provider is given so much time to answer, and no more: what hangs must not hold a session up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import anyio

from mabridge.errors import SandboxUnavailable
from mabridge.sandbox import ExecResult, Process, Sandbox, SupportsProcess

__all__ = ["bounded"]


def bounded(sandbox: Sandbox, *, provider: str, slack: float) -> Sandbox:
    """Return `sandbox` with a deadline on all that is asked of it, after which `SandboxUnavailable` is raised.

    Adapters have deadlines of their own, which know more. This one is for what they have overlooked.

    Args:
        sandbox: what is returned can hold a process open if this can.
        provider: its provider's type, for the error.
        slack: seconds for its provider to answer, beyond the time that a command may take.
    """
    return (_WithProcess if isinstance(sandbox, SupportsProcess) else _Bounded)(sandbox, provider, slack)


class _Bounded(Sandbox):
    def __init__(self, sandbox: Sandbox, provider: str, slack: float) -> None:
        self.id = sandbox.id
        self.workdir = sandbox.workdir
        self._sandbox = sandbox
        self._provider = provider
        self._slack = slack

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
        with self._within("exec", timeout + self._slack):
            return await self._sandbox.exec(argv, stdin=stdin, cwd=cwd, env=env, timeout=timeout, max_output=max_output)

    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        with self._within("read_file", self._slack):
            return await self._sandbox.read_file(path, max_bytes=max_bytes)

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        with self._within("write_file", self._slack):
            await self._sandbox.write_file(path, data, mode=mode)

    async def keep_alive(self, ttl: float) -> None:
        with self._within("keep_alive", self._slack):
            await self._sandbox.keep_alive(ttl)

    async def teardown(self) -> None:
        with self._within("teardown", self._slack):
            await self._sandbox.teardown()

    @contextmanager
    def _within(self, op: str, seconds: float) -> Iterator[None]:
        with anyio.move_on_after(seconds) as scope:
            yield
        if scope.cancelled_caught:
            message = f"the provider did not answer within {seconds:.0f} s, nor say that it would not"
            raise SandboxUnavailable(
                message, provider=self._provider, op=op, sandbox_id=self.id, retryable=False
            )  # it was given its time


class _WithProcess(_Bounded):
    async def open_process(
        self, argv: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        assert isinstance(self._sandbox, SupportsProcess)
        with self._within("open_process", self._slack):
            return await self._sandbox.open_process(argv, cwd=cwd, env=env)
