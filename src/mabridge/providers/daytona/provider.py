"""Making and finding sandboxes."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, ClassVar, Self

import anyio

from mabridge.errors import CreateFailed, SandboxError, SandboxUnavailable
from mabridge.identity import KEY_LABEL
from mabridge.providers.daytona.options import (
    CREATOR_LABEL,
    OURS_LABEL,
    OWN_LABELS,
    WORKDIR_LABEL,
    DaytonaOptions,
    params_of,
    require_network,
)
from mabridge.providers.daytona.sandbox import DaytonaSandbox, make_ready
from mabridge.providers.daytona.service import (
    CALL,
    PROVIDER,
    SETTLE,
    connect,
    delete,
    is_gone,
    mapped,
    state_of,
    time_of,
    woken,
)
from mabridge.sandbox import Provider, Sandbox, SandboxInfo, SandboxSpec

if TYPE_CHECKING:
    from daytona import AsyncDaytona, AsyncSandbox, CreateSandboxFromImageParams, CreateSandboxFromSnapshotParams

__all__ = ["DaytonaProvider"]

logger = logging.getLogger("mabridge.providers.daytona")

_UNMAKE = 90.0  # seconds for what a request that was given up makes to be there, and to be removed
_LAG = 60.0  # seconds for which Daytona's list may not show a new sandbox
_GETS = 10


class DaytonaProvider(Provider):
    """Sandboxes of Daytona."""

    type: ClassVar[str] = PROVIDER
    Options = DaytonaOptions
    options: DaytonaOptions

    def __init__(self, options: DaytonaOptions | None = None) -> None:
        super().__init__(options or DaytonaOptions())
        self._stack = contextlib.AsyncExitStack()
        self._opened: AsyncDaytona | None = None
        self._recent: dict[str, float] = {}

    @property
    def can_suspend(self) -> bool:
        return not self.options.ephemeral

    async def __aenter__(self) -> Self:
        """Open a client.

        Raises:
            ConfigError: there is no API key.
        """
        self._opened = await self._stack.enter_async_context(connect(self.options))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close it. Sandboxes live on."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(10):
            await self._stack.aclose()

    async def create(self, spec: SandboxSpec) -> Sandbox:
        import daytona

        params = params_of(self.options, spec)
        with mapped("create"):
            until = anyio.current_time() + SETTLE
            while anyio.current_time() < until:
                try:
                    return await self._launch(await self._make(params), spec.workdir)
                except daytona.DaytonaConflictError:
                    found = await self._find(spec.key, "create")
                if found is not None:
                    ready = await woken(found)
                    if ready is not None:  # perhaps its maker has not come to that
                        await make_ready(ready, found.labels.get(WORKDIR_LABEL, spec.workdir))
                        return self._sandbox(ready)
                    await delete(found)
                await anyio.sleep(0.2)
        message = f"the sandbox {spec.key} neither could be made nor was there within {SETTLE:.0f} s"
        raise SandboxUnavailable(message, provider=PROVIDER, op="create")

    async def attach(self, key: str) -> Sandbox | None:
        with mapped("attach"), anyio.fail_after(SETTLE):
            found = await self._find(key, "attach")
            ready = None if found is None else await woken(found)
            return None if ready is None else self._sandbox(ready)

    async def list(self) -> AsyncIterator[SandboxInfo]:
        """See `Provider.list`. Daytona's own list is late, and may show again what is gone: each is asked for by id."""
        import daytona

        now = anyio.current_time()
        self._recent = {name: made for name, made in self._recent.items() if now - made < _LAG}
        names: dict[str, None] = dict.fromkeys(self._recent)
        confirmed: list[AsyncSandbox] = []
        slots = anyio.CapacityLimiter(_GETS)

        async def confirm(name: str) -> None:
            async with slots:
                found = await self._get(name)
            if found is not None and KEY_LABEL in found.labels:
                confirmed.append(found)

        with mapped("list"):
            query = daytona.ListSandboxesQuery(labels={OURS_LABEL: "true"}, limit=100)
            async for box in self._client.list(query, request_timeout=CALL):
                names[box.id] = None
            async with anyio.create_task_group() as group:
                for name in names:
                    group.start_soon(confirm, name)
        for box in {box.id: box for box in confirmed}.values():
            yield SandboxInfo(
                key=box.labels[KEY_LABEL],
                id=box.id,
                labels={name: value for name, value in box.labels.items() if name not in OWN_LABELS},
                state=state_of(box),
                created_at=time_of(box.created_at),
            )

    async def remove(self, info: SandboxInfo) -> None:
        with anyio.CancelScope(shield=True), mapped("teardown", info.id):
            found = await self._get(info.id)
            if found is not None:
                await delete(found)

    async def check(self) -> None:
        import daytona

        with mapped("check"), anyio.fail_after(CALL):
            async for _ in self._client.list(daytona.ListSandboxesQuery(limit=1), request_timeout=CALL):
                break
            if self.options.snapshot is not None:
                await self._client.snapshot.get(self.options.snapshot)

    @property
    def _client(self) -> AsyncDaytona:
        if self._opened is None:
            raise RuntimeError("a provider is entered before it is used: async with DaytonaProvider(...) as provider")
        return self._opened

    def _sandbox(self, box: AsyncSandbox) -> DaytonaSandbox:
        return DaytonaSandbox(box, workdir=box.labels.get(WORKDIR_LABEL, SandboxSpec.workdir))

    async def _get(self, name: str) -> AsyncSandbox | None:
        """Return a sandbox by name or id, unless it is gone or going."""
        import daytona

        try:
            with anyio.fail_after(CALL):
                found = await self._client.get(name)
        except daytona.DaytonaNotFoundError:
            return None
        return None if is_gone(found) else found

    async def _find(self, key: str, op: str) -> AsyncSandbox | None:
        found = await self._get(key)
        if found is not None and found.labels.get(KEY_LABEL) != key:
            message = f"there is a sandbox named {key} that mabridge did not make; remove or rename it"
            raise CreateFailed(message, provider=PROVIDER, op=op, sandbox_id=found.id)
        return found

    async def _make(self, params: CreateSandboxFromImageParams | CreateSandboxFromSnapshotParams) -> AsyncSandbox:
        """Make a sandbox and wait until it has started, or leave nothing behind.

        The request is not cut off: it may yet make a sandbox that nobody would know of.
        """
        import daytona

        made: list[AsyncSandbox] = []
        failed: list[daytona.DaytonaError] = []
        answered = anyio.Event()
        request = anyio.CancelScope(shield=True)

        async def create() -> None:
            with request:
                try:
                    made.append(await self._client.create(params, timeout=0))
                except daytona.DaytonaError as exc:
                    failed.append(exc)
            answered.set()

        name, labels = params.name or "", params.labels or {}
        params.labels = {**labels, CREATOR_LABEL: uuid.uuid4().hex}
        async with anyio.create_task_group() as group:
            group.start_soon(create)
            try:
                with anyio.fail_after(self.options.timeout):
                    await answered.wait()
            except BaseException:
                await self._unmake(name, params.labels[CREATOR_LABEL], answered)
                request.cancel()
                raise
        if failed:
            status = failed[0].status_code
            if status is None or status == 408 or status >= 500:  # it is not known that none was made
                await self._unmake(name, params.labels[CREATOR_LABEL], answered)
            raise failed[0]
        self._recent[made[0].id] = anyio.current_time()
        return made[0]

    async def _unmake(self, name: str, creator: str, answered: anyio.Event) -> None:
        """Remove what a request to create makes, as soon as it is there."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(_UNMAKE):
            while True:
                last = answered.is_set()
                try:
                    with mapped("create"):
                        found = await self._get(name)
                        if found is not None and found.labels.get(CREATOR_LABEL) == creator:
                            await delete(found)
                            return
                except SandboxError as exc:
                    logger.error("%s: whether a sandbox was left behind is not known; its ttl ends it: %s", name, exc)
                    return
                if last:
                    return
                await anyio.sleep(0.1)

    async def _launch(self, box: AsyncSandbox, workdir: str) -> Sandbox:
        """Finish a sandbox that we made, or leave nothing of it behind."""
        try:
            require_network(self.options, box)
            await make_ready(box, workdir)
        except BaseException:
            with anyio.CancelScope(shield=True):
                try:
                    with mapped("teardown", box.id):
                        await delete(box)
                except SandboxError as exc:
                    logger.error("%s; list() shows it", exc)
            raise
        return self._sandbox(box)
