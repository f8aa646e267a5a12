"""Making and finding sandboxes.

A sandbox is found again by its name, which is unique in a project. Its files outlast its session, which is what Vercel
calls the time that it runs: so the end of that time is told apart from a stop by what the session says of itself.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Self

import anyio
import anyio.lowlevel

from mabridge.errors import CreateFailed, NotSupported, SandboxError, SandboxUnavailable
from mabridge.identity import KEY_LABEL
from mabridge.providers import _packed
from mabridge.providers.vercel.errors import PROVIDER, is_lifecycle, mapped
from mabridge.providers.vercel.options import VercelOptions, connect, create_options
from mabridge.providers.vercel.sandbox import DEAD, VercelSandbox, is_over, remove
from mabridge.sandbox import Provider, Sandbox, SandboxInfo, SandboxSpec

if TYPE_CHECKING:
    from vercel import sandbox as sdk
    from vercel.sandbox import SandboxClient

__all__ = ["VercelProvider"]

logger = logging.getLogger("mabridge.providers.vercel")

_CALL = 60.0  # seconds for one request
_CREATE = 120.0
_POLL = 0.25
_ATTEMPTS = 3
_WORKDIR = "MABRIDGE_WORKDIR"
_PASSING = ("pending", "stopping", "snapshotting")

# Ends with 3 where only root can make the directory.
_PREPARE = r"""
for p in "$@"; do command -v "$p" >/dev/null || missing="$missing $p"; done
echo "$(id -u):$(id -g)$missing"
printf %s "$MABRIDGE_WORKDIR"
mkdir -p "$MABRIDGE_WORKDIR" 2>/dev/null
[ -d "$MABRIDGE_WORKDIR" ] && [ -w "$MABRIDGE_WORKDIR" ] || exit 3
"""
_MAKE_DIRECTORY = 'mkdir -p "$1" && chown "$2" "$1"'


class VercelProvider(Provider):
    """Sandboxes of a Vercel project, with no network unless the options say otherwise.

    Vercel stops a sandbox whose time is up, even if every worker is dead, and keeps its record and its snapshot. Those
    are removed by whichever worker meets them next, in `create`, `attach` or `list`.
    """

    type: ClassVar[str] = PROVIDER
    Options = VercelOptions
    options: VercelOptions

    def __init__(self, options: VercelOptions | None = None) -> None:
        super().__init__(options or VercelOptions())
        self._opened: SandboxClient | None = None

    @property
    def can_suspend(self) -> bool:
        return self.options.persistent

    async def __aenter__(self) -> Self:
        """Open a client.

        Raises:
            ConfigError: a credential that the options name is not there.
        """
        self._opened = connect(self.options)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close it. Sandboxes live on."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(10):
            await self._client.aclose()

    async def create(self, spec: SandboxSpec) -> Sandbox:
        async with mapped("create"):
            arguments = create_options(self.options, spec, {_WORKDIR: spec.workdir})
            deadline, pause = anyio.current_time() + _CREATE, _POLL
            trouble: SandboxUnavailable | None = None
            for attempt in itertools.count(1):
                try:
                    made = await self._new(spec.key, arguments)
                    if made is not None:
                        async with mapped("start", made.name):
                            return await self._launch(made)
                    async with mapped("attach"):
                        found = await self._find(spec.key)
                        if found is not None and (sandbox := await self._woken(found)) is not None:
                            return sandbox
                except SandboxUnavailable as exc:  # the name tells whether it was made all the same
                    if attempt >= _ATTEMPTS or not exc.retryable:
                        raise
                    trouble = exc
                if anyio.current_time() > deadline:
                    break
                await anyio.sleep(pause)
                pause = min(pause * 2, 2.0)
        message = f"the sandbox {spec.key} neither could be made nor was there within {_CREATE:.0f} s"
        raise trouble or SandboxUnavailable(message, provider=self.type, op="create")

    async def attach(self, key: str) -> Sandbox | None:
        async with mapped("attach"):
            found = await self._find(key)
            return None if found is None else await self._woken(found)

    async def list(self) -> AsyncIterator[SandboxInfo]:
        from vercel.sandbox import SandboxQueryByName

        infos = []
        async with mapped("list"):
            # By the beginning of the name, for a filter by tag takes one value; and the tags, which are five at most,
            # are left to the labels.
            query = SandboxQueryByName(sort_order="asc", name_prefix="mab")
            with anyio.fail_after(_CREATE):
                async for listed in self._client.query_sandboxes(query=query):
                    tags = listed.tags or {}
                    if tags.get(KEY_LABEL) != listed.name:
                        continue
                    if listed.status in DEAD and await self._sweep(listed.name):
                        continue
                    made = None if listed.created_at is None else datetime.fromtimestamp(listed.created_at / 1000, UTC)
                    state = str(listed.status or "unknown")
                    infos.append(
                        SandboxInfo(key=listed.name, id=listed.name, labels=tags, state=state, created_at=made)
                    )
        for info in infos:
            yield info

    async def check(self) -> None:
        async with mapped("check"):
            with anyio.fail_after(_CALL):
                await anext(self._client.query_sandboxes(page_size=1), None)

    @property
    def _client(self) -> SandboxClient:
        if self._opened is None:
            raise RuntimeError("a provider is entered before it is used: async with VercelProvider(...) as provider")
        return self._opened

    async def _new(self, key: str, arguments: Mapping[str, Any]) -> sdk.Sandbox | None:
        """Make the sandbox, or return None if there is one of that name."""
        from vercel import sandbox as sdk

        async with mapped("create"):
            try:
                # Shielded, for a call that is cut off may yet make a sandbox that nobody would know of.
                with anyio.CancelScope(shield=True), anyio.fail_after(_CREATE):
                    made = await self._client.create_sandbox(name=key, **arguments)
            except sdk.SandboxApiError as exc:
                if exc.status_code == 409:
                    return None
                raise
            except sdk.SandboxTerminalStateError as exc:
                await self._destroy(key)
                message = f"the sandbox was {exc.status} before it ran; has the image {self.options.image} a /bin/sh?"
                raise CreateFailed(message, provider=self.type, op="create") from exc
        return made

    async def _launch(self, made: sdk.Sandbox) -> Sandbox:
        """Make ready a sandbox that we made, or leave nothing of it behind."""
        try:
            await anyio.lowlevel.checkpoint_if_cancelled()
            asked = self.options.mode
            got = made.network_policy or (made.current_session and made.current_session.network_policy)
            if asked != "allow-all" and (not got or got.mode != asked):
                message = f"network_policy: {asked} was asked for, and Vercel says {got.mode if got else 'nothing'}"
                raise NotSupported(message, provider=self.type, op="create", sandbox_id=made.name)
            return await self._ready(made)
        except BaseException:
            with anyio.CancelScope(shield=True):
                try:
                    async with mapped("teardown", made.name):
                        await remove(made)
                except SandboxError as exc:
                    logger.error("%s; it stops when its time is up", exc)
            raise

    async def _find(self, key: str) -> sdk.Sandbox | None:
        from vercel import sandbox as sdk

        try:
            with anyio.fail_after(_CALL):
                found = await self._client.get_sandbox(name=key)
        except sdk.SandboxApiError as exc:
            if exc.status_code == 404:
                return None
            raise
        if (found.tags or {}).get(KEY_LABEL) != key:
            message = f"there is a sandbox {key} that mabridge did not make; remove it"
            raise CreateFailed(message, provider=self.type, op="attach", sandbox_id=key)
        return found

    async def _woken(self, found: sdk.Sandbox | None) -> Sandbox | None:
        """Return the sandbox if it runs or was suspended; remove it if its time is up."""
        from vercel import sandbox as sdk

        deadline = anyio.current_time() + _CREATE
        while found is not None:
            name = found.name
            if found.status == "running" and found.current_session is not None:
                try:
                    return await self._ready(found)
                except (sdk.SandboxApiError, sdk.SandboxStreamError) as exc:  # it was stopped in that moment
                    if not is_lifecycle(exc) or anyio.current_time() > deadline:
                        raise
                    await anyio.sleep(_POLL)
                    found = await self._find(name)
                    continue
            if anyio.current_time() > deadline:
                message = f"it was still {found.status} after {_CREATE:.0f} s"
                raise SandboxUnavailable(message, provider=self.type, op="attach", sandbox_id=found.name)
            if found.status in _PASSING:
                await anyio.sleep(_POLL)
                found = await self._find(name)
            elif await self._sweep(name):
                return None
            else:
                try:
                    with anyio.fail_after(_CALL):
                        found = await self._client.resume_sandbox(name=name)
                except sdk.SandboxApiError as exc:
                    if (exc.status_code, exc.code) != (410, "snapshot_not_found"):
                        raise
                    await self._destroy(name)
                    return None
        return None

    async def _sweep(self, name: str) -> bool:
        """Whether the time of a sandbox is up; then it is removed. Asked anew: another worker may be faster."""
        found = await self._find(name)
        if found is None:
            return True
        if found.status not in DEAD or not is_over(found):
            return False
        await self._destroy(name)
        return True

    async def _destroy(self, name: str) -> None:
        if (found := await self._find(name)) is not None:
            await remove(found)

    async def _ready(self, found: sdk.Sandbox) -> Sandbox:
        """Return the sandbox once its working directory is there. Done by two workers at once, it is done as well."""
        sandbox = VercelSandbox(self._client, found)
        code, said = await sandbox.do(["/bin/sh", "-c", _PREPARE, "mab", *_packed.REQUIRED])
        about, _, sandbox.workdir = said.partition("\n")
        user, _, missing = about.partition(" ")
        if missing:
            message = f"the image {self.options.image or ''} lacks {missing}; choose one that has them"
            raise CreateFailed(message, provider=self.type, op="create", sandbox_id=sandbox.id)
        if code == 3:
            code, _ = await sandbox.do(["/bin/sh", "-c", _MAKE_DIRECTORY, "mab", sandbox.workdir, user], sudo=True)
        if code >= 128:
            message = "a command in it was killed"
            raise SandboxUnavailable(message, provider=self.type, op="create", sandbox_id=sandbox.id)
        if code != 0 or not sandbox.workdir:
            message = f"{sandbox.workdir or 'the working directory'} could not be made there (exit code {code})"
            raise CreateFailed(message, provider=self.type, op="create", sandbox_id=sandbox.id)
        return sandbox
