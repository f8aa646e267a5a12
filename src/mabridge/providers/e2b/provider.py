"""Making and finding sandboxes, and what E2B's errors mean."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import re
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Self

import anyio
import anyio.abc

from mabridge.errors import AtCapacity, ConfigError, CreateFailed, SandboxError, SandboxGone, SandboxUnavailable
from mabridge.identity import KEY_LABEL
from mabridge.providers import _shell
from mabridge.providers._env import read_env
from mabridge.providers.e2b.options import ALL, E2BOptions
from mabridge.providers.e2b.running import CALL
from mabridge.providers.e2b.sandbox import CREATE, E2BSandbox
from mabridge.sandbox import Provider, Sandbox, SandboxInfo, SandboxSpec

if TYPE_CHECKING:
    import e2b

__all__ = ["E2BProvider"]

logger = logging.getLogger("mabridge.providers.e2b")

_SETTLE = 15.0  # seconds for a new sandbox to be listed
_QUIET = 0.1
_BUSY = 1.0  # E2B's least interval between two creates; the SDK keeps what the server said of it to itself

_OURS = {"mabridge.managed": "true"}  # metadata of this adapter's own; a list can only be asked for by exact values
_WORKDIR, _TTL, _MADE = "mabridge.workdir", "mabridge.ttl", "mabridge.made"
_HIDDEN = frozenset({*_OURS, _WORKDIR, _TTL, _MADE})


class E2BProvider(Provider):
    """Sandboxes of E2B.

    E2B has no names. A sandbox is found by its metadata, and of several that were made for one key at the same time the
    one that started first is kept; the others are removed by those who made them.
    """

    type: ClassVar[str] = "e2b"
    Options = E2BOptions
    options: E2BOptions

    def __init__(self, options: E2BOptions | None = None) -> None:
        super().__init__(options or E2BOptions())
        self._stack = contextlib.AsyncExitStack()
        self._arguments: dict[str, Any] | None = None
        self.tasks: anyio.abc.TaskGroup

    @property
    def can_suspend(self) -> bool:
        return True

    async def __aenter__(self) -> Self:
        """Read the key, and make ready to hold streams open. Nothing is sent yet.

        Raises:
            ConfigError: there is no key.
        """
        import e2b  # noqa: F401 - so that it is missed here, if it is missing

        options = self.options
        self._arguments = {
            "api_key": options.api_key.read(),
            "domain": options.domain,
            "api_url": options.api_url,
            "sandbox_url": options.sandbox_url,
            "debug": False,  # E2B_DEBUG would turn create and kill into nothing
            "request_timeout": CALL,
            "retries": options.retries,
        }
        self.tasks = await self._stack.enter_async_context(anyio.create_task_group())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close the streams. Sandboxes live on."""
        self.tasks.cancel_scope.cancel()  # what waits there does nothing more once it is cancelled
        await self._stack.aclose()
        # The SDK's HTTP client has threads of its own, and nothing to end them by. One that is not done with its last
        # request when the interpreter ends aborts the process (https://github.com/PyO3/pyo3-async-runtimes/issues/40).
        await anyio.sleep(_QUIET)

    async def create(self, spec: SandboxSpec) -> Sandbox:
        if not re.fullmatch(r"/[^\0]*[^/\0][^\0]*", spec.workdir):
            raise ConfigError(f"e2b: workdir {spec.workdir!r} must be an absolute path, and not /")
        async with self.mapped("create"):
            if (found := await self._attach(spec.key)) is not None:
                return found
            mark = uuid.uuid4().hex
            try:
                made = await self._new(spec, mark)
                if await self._is_first(spec.key, mark):
                    sandbox = E2BSandbox(self, made, spec.workdir)
                    await sandbox.prepare()
                    return sandbox
            except BaseException:
                with anyio.CancelScope(shield=True), anyio.move_on_after(CALL):
                    await self._discard(spec.key, mark, quiet=True)
                raise
            logger.info("%s: another worker's sandbox was first", spec.key)
            with anyio.CancelScope(shield=True), anyio.fail_after(CALL):
                await self._discard(spec.key, mark)
            if (found := await self._attach(spec.key)) is not None:
                return found
        message = "the sandbox that another worker made first was removed meanwhile"
        raise SandboxUnavailable(message, provider=self.type, op="create")

    async def attach(self, key: str) -> Sandbox | None:
        async with self.mapped("attach"):
            return await self._attach(key)
        raise AssertionError("every error is raised")

    async def list(self) -> AsyncIterator[SandboxInfo]:
        async with self.mapped("list"):
            found = await self._listed({})
        for info in found:
            metadata = info.metadata
            yield SandboxInfo(
                key=metadata.get(KEY_LABEL, ""),
                id=info.sandbox_id,
                labels={name: value for name, value in metadata.items() if name not in _HIDDEN},
                state=info.state.value,
                created_at=info.started_at,
            )

    async def check(self) -> None:
        from e2b import AsyncSandbox

        async with self.mapped("check"):
            with anyio.fail_after(CALL):
                await AsyncSandbox.list(limit=1, **self.arguments).next_items()

    @property
    def arguments(self) -> dict[str, Any]:
        """What every call of the SDK is given."""
        if self._arguments is None:
            raise RuntimeError("a provider is entered before it is used: async with E2BProvider(...) as provider")
        return self._arguments

    async def _new(self, spec: SandboxSpec, mark: str) -> e2b.AsyncSandbox:
        from e2b import AsyncSandbox

        options = self.options
        env = read_env(options.env)
        ours = {KEY_LABEL: spec.key, _WORKDIR: spec.workdir, _TTL: str(math.ceil(spec.ttl)), _MADE: mark}
        rules = {name: list(value) for name, value in options.network.model_dump().items() if value}
        if not options.allow_internet_access:  # said in both ways, for E2B takes no domains to allow without the second
            rules["deny_out"] = sorted({*rules.get("deny_out", ()), ALL})
        # Shielded, for a call that is cut off may yet make a sandbox.
        with anyio.CancelScope(shield=True), anyio.fail_after(CREATE):
            return await AsyncSandbox.create(
                options.template,
                timeout=math.ceil(spec.ttl),
                metadata={**spec.labels, **_OURS, **ours},
                envs=_shell.check_env({**env, **spec.env}),
                allow_internet_access=None if options.allow_internet_access else False,
                network=rules or None,  # type: ignore[arg-type]
                lifecycle={"on_timeout": "kill"},
                volume_mounts=dict(options.volume_mounts) or None,
                idempotency_key=mark,
                **self.arguments,
            )
        raise AssertionError("neither scope is cancelled without an error")

    async def _is_first(self, key: str, mark: str) -> bool:
        """Whether the sandbox with that mark is the first of its key, once it is listed."""
        pause, marks = 0.05, list[str | None]()
        with anyio.fail_after(_SETTLE):
            while mark not in marks:
                if marks:
                    await anyio.sleep(pause)
                    pause = min(pause * 2, 1.0)
                marks = [info.metadata.get(_MADE) for info in await self._listed({KEY_LABEL: key})] or [None]
        return marks[0] == mark

    async def _discard(self, key: str, mark: str, *, quiet: bool = False) -> None:
        """Remove the sandbox with that mark, if there is one."""
        from e2b import AsyncSandbox

        try:
            for info in await self._listed({KEY_LABEL: key, _MADE: mark}):
                await AsyncSandbox.kill(info.sandbox_id, **self.arguments)
        except Exception as exc:
            if not quiet:
                raise
            logger.warning("%s: a sandbox that was not finished may be left until its time is up: %s", key, exc)

    async def _attach(self, key: str) -> E2BSandbox | None:
        from e2b import AsyncSandbox, SandboxNotFoundException, SandboxState

        for info in await self._listed({KEY_LABEL: key}):
            # To connect never brings the end nearer, and wakes what is paused. A running one keeps the time it has.
            seconds = max(0, int((info.end_at - datetime.now(UTC)).total_seconds()))
            if info.state is SandboxState.PAUSED:
                seconds = int(info.metadata.get(_TTL, "3600"))
            try:
                with anyio.fail_after(CREATE):
                    opened = await AsyncSandbox.connect(info.sandbox_id, seconds, **self.arguments)
                sandbox = E2BSandbox(self, opened, info.metadata.get(_WORKDIR, "/workspace"))
                await sandbox.prepare()
                return sandbox
            except (SandboxNotFoundException, SandboxGone):
                logger.debug("%s: %s ended while it was attached to", key, info.sandbox_id)
        return None

    async def _listed(self, metadata: Mapping[str, str]) -> Sequence[e2b.SandboxInfo]:
        """Return our sandboxes, running and paused, in the order in which they started.

        One that starts anew meanwhile moves to the end, so none is missed.
        """
        from e2b import AsyncSandbox, SandboxQuery, SandboxState

        query = SandboxQuery(metadata={**_OURS, **metadata}, state=[SandboxState.RUNNING, SandboxState.PAUSED])
        pages = AsyncSandbox.list(query=query, limit=100, order="asc", **self.arguments)
        found: dict[str, e2b.SandboxInfo] = {}
        while pages.has_next:
            with anyio.fail_after(CALL):
                found.update((info.sandbox_id, info) for info in await pages.next_items())
        return sorted(found.values(), key=lambda info: (info.started_at, info.sandbox_id))

    @asynccontextmanager
    async def mapped(self, op: str, sandbox_id: str | None = None) -> AsyncIterator[None]:
        """Raise the SDK's errors, and those that it lets through, as ours."""
        try:
            yield
        except (SandboxError, ConfigError):
            raise
        except Exception as exc:
            raise await self._explained(exc, op, sandbox_id) from exc

    async def _explained(self, exc: Exception, op: str, sandbox_id: str | None) -> Exception:
        import e2b

        said = " ".join(str(exc).split())[:400] or f"no answer in time ({type(exc).__name__})"
        where: dict[str, Any] = {"provider": self.type, "op": op, "sandbox_id": sandbox_id}
        match exc:
            case e2b.SandboxNotRunningException():  # it was killed, its time is up, or it is paused
                return await self._absence(said, where)
            case e2b.SandboxNotFoundException() if sandbox_id is not None:
                return SandboxGone("the sandbox is not there", **where)
            case e2b.NotEnoughSpaceException():
                return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp")  # noqa: S108
            case e2b.RateLimitException():
                return AtCapacity(said, retry_after=_BUSY, **where)
            case e2b.ServiceBusyException():
                return (AtCapacity if op == "create" else SandboxUnavailable)(said, **where)
            case e2b.AuthenticationException() if sandbox_id is None:
                message = f"E2B refuses the key in {self.options.api_key.env}: {said}"
                return ConfigError(f"e2b: {message}") if op == "check" else CreateFailed(message, **where)
            case e2b.InvalidArgumentException() if op == "create":
                return CreateFailed(said, **where)
            case e2b.SandboxException(status_code=int(status)) if op == "create" and status < 500 and status != 409:
                return CreateFailed(said, **where)
        return SandboxUnavailable(said, **where)

    async def _absence(self, said: str, where: dict[str, Any]) -> SandboxError:
        """Ask the control plane why a sandbox does not answer."""
        from e2b import AsyncSandbox, SandboxNotFoundException, SandboxState

        try:
            with anyio.fail_after(CALL):
                info = await AsyncSandbox.get_info(where["sandbox_id"], **self.arguments)
        except SandboxNotFoundException:
            return SandboxGone("the sandbox is not there: it was removed, or its time was up", **where)
        except Exception:
            logger.debug("%s: the control plane does not answer either", where["sandbox_id"], exc_info=True)
            return SandboxUnavailable(said, **where)
        if info.state is SandboxState.PAUSED:
            said = "the sandbox is paused; attach wakes it"
        return SandboxUnavailable(said, **where)
