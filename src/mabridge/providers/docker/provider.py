"""Making and finding containers."""

from __future__ import annotations

import contextlib
import json
import logging
import posixpath
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Self

import anyio

from mabridge.errors import CreateFailed, NotSupported, SandboxError, SandboxGone, SandboxUnavailable
from mabridge.identity import KEY_LABEL
from mabridge.providers.docker.options import (
    DockerOptions,
    container_config,
    is_mounted,
    labels_of,
    layout,
    workdir_of,
)
from mabridge.sandbox import Provider, Sandbox, SandboxInfo, SandboxSpec

if TYPE_CHECKING:
    from aiodocker import Docker
    from aiodocker.containers import DockerContainer

    from mabridge.providers.docker.sandbox import DockerSandbox

__all__ = ["DockerProvider"]

logger = logging.getLogger("mabridge.providers.docker")

_CALL = 60.0  # seconds for a call that must not be cut off
_SETTLE = 30.0  # seconds for what another worker does with the same container to come to an end
_ENDING = 2.0  # seconds for a container that ended to be removed by the engine, or started again by another worker

# What the engine says about itself, and which option it cannot keep without it.
_ENFORCED = {"MemoryLimit": "memory", "CpuCfsQuota": "cpus", "PidsLimit": "pids_limit"}


class DockerProvider(Provider):
    """Containers of a Docker engine, with no network and as few rights as they can do with.

    A container is removed when its time is up, even if every worker is dead: its first process sees to that, as a user
    that the agent cannot touch. How much the agent writes to disk has no bound: the engine has none by default.
    """

    type: ClassVar[str] = "docker"
    Options = DockerOptions
    options: DockerOptions

    def __init__(self, options: DockerOptions | None = None) -> None:
        super().__init__(options or DockerOptions())
        self._stack = contextlib.AsyncExitStack()
        self._opened: Docker | None = None
        self._enforces = False

    async def __aenter__(self) -> Self:
        """Open a client.

        Raises:
            ConfigError: the host or the context is not one that can be used.
        """
        from mabridge.providers.docker.engine import connect

        self._opened = await self._stack.enter_async_context(connect(self.options.host))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close it. Containers live on."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(10):
            await self._stack.aclose()

    async def create(self, spec: SandboxSpec) -> Sandbox:
        from aiodocker import DockerError

        from mabridge.providers.docker.engine import mapped, pull
        from mabridge.providers.docker.sandbox import remove

        config = container_config(self.options, spec)
        with mapped("create"):
            await self._require_enforcement()
            if self.options.pull == "always":
                await pull(self._client, self.options.image)
            deadline, pause = anyio.current_time() + _SETTLE, 0.02
            while anyio.current_time() < deadline:
                made = await self._new(config, spec.key)
                if made is not None:
                    return await self._launch(made, spec.workdir)
                found = await self._find(spec.key, "create")
                if found is not None and (sandbox := await self._woken(found)) is not None:
                    return sandbox
                try:
                    if found is not None and found["State"]["Status"] == "created":
                        return await self._finish(found, workdir_of(found["Config"]["Labels"]))
                    if found is not None:
                        await remove(found)
                        continue
                except DockerError as exc:  # its maker, or its end, was faster
                    if exc.status not in (404, 409):
                        raise
                except SandboxGone:
                    logger.debug("%s: the container went while it was being finished", spec.key)
                await anyio.sleep(pause)  # the engine reserves a name some time before it knows the container
                pause = min(pause * 2, 1.0)
        message = f"the container {spec.key} neither could be made nor was there within {_SETTLE:.0f} s"
        raise SandboxUnavailable(message, provider=self.type, op="create")

    async def attach(self, key: str) -> Sandbox | None:
        from mabridge.providers.docker.engine import mapped

        with mapped("attach"):
            found = await self._find(key, "attach")
            # One that was never started holds nothing, and create() goes on with it.
            return None if found is None else await self._woken(found)

    async def list(self) -> AsyncIterator[SandboxInfo]:
        from mabridge.providers.docker.engine import mapped

        with mapped("list"):
            containers = await self._client.containers.list(all=True, filters=json.dumps({"label": [KEY_LABEL]}))
        for container in containers:
            yield SandboxInfo(
                key=container["Labels"][KEY_LABEL],
                id=container.id[:12],
                labels=labels_of(container["Labels"]),
                state=container["State"],
                created_at=datetime.fromtimestamp(container["Created"], UTC),
            )

    async def remove(self, info: SandboxInfo) -> None:
        from mabridge.providers.docker.engine import mapped
        from mabridge.providers.docker.sandbox import remove

        # By its id: `attach` finds nothing in a container that was made and never started.
        with anyio.CancelScope(shield=True), mapped("teardown", info.id):
            await remove(self._client.containers.container(info.id))

    async def check(self) -> None:
        from aiodocker import DockerError

        from mabridge.providers.docker.engine import mapped

        with mapped("check"):
            await self._require_enforcement()
            if self.options.pull == "never":
                try:
                    await self._client.images.inspect(self.options.image)
                except DockerError as exc:
                    if exc.status != 404:
                        raise
                    raise self._no_image("check") from exc

    @property
    def _client(self) -> Docker:
        if self._opened is None:
            raise RuntimeError("a provider is entered before it is used: async with DockerProvider(...) as provider")
        return self._opened

    async def _require_enforcement(self) -> None:
        """Refuse an engine that would only warn, and go on, where it cannot do what the options ask for."""
        if self._enforces:
            return
        info = await self._client.system.info()
        missing = [f"it runs {info.get('OSType')} containers, not Linux's"] if info.get("OSType") != "linux" else []
        missing += [
            f"it cannot enforce the option {option} (its kernel or its rights lack {ability}); 0 is no limit"
            for ability, option in _ENFORCED.items()
            if getattr(self.options, option) and not info.get(ability)
        ]
        runtimes = info.get("Runtimes") or {}
        if self.options.runtime is not None and self.options.runtime not in runtimes:
            missing.append(f"it has no runtime {self.options.runtime!r}, only {', '.join(sorted(runtimes))}")
        if missing:
            raise NotSupported(f"this Docker engine will not do: {'; '.join(missing)}", provider=self.type, op="check")
        self._enforces = True

    async def _new(self, config: dict[str, Any], name: str) -> DockerContainer | None:
        """Make the container, or return None if there is one of that name."""
        from aiodocker import DockerError

        from mabridge.providers.docker.engine import pull

        for attempt in ("as it is", "pulled"):
            try:
                # Shielded, for a call that is cut off may yet make a container that nobody would know of.
                with anyio.CancelScope(shield=True), anyio.fail_after(_CALL):
                    return await self._client.containers.create(config, name=name)
            except DockerError as exc:
                if exc.status == 409:
                    return None
                if exc.status != 404 or "image" not in exc.message.lower() or attempt == "pulled":
                    raise
                if self.options.pull == "never":
                    raise self._no_image("create") from exc
            await pull(self._client, self.options.image)
        return None

    async def _launch(self, container: DockerContainer, workdir: str) -> Sandbox:
        """Finish a container that we made, or leave nothing of it behind."""
        from mabridge.providers.docker.engine import mapped
        from mabridge.providers.docker.sandbox import remove

        try:
            try:
                return await self._finish(container, workdir)
            except SandboxGone as exc:
                message = f"{exc.message}; has the image {self.options.image} a /bin/sh that works?"
                raise CreateFailed(message, provider=self.type, op="create") from exc
        except BaseException:
            with anyio.CancelScope(shield=True):
                try:
                    with mapped("teardown", container.id[:12]):
                        await remove(container)
                except SandboxError as exc:
                    logger.error("%s; list() shows it, and it was not started", exc)
            raise

    async def _finish(self, container: DockerContainer, workdir: str) -> Sandbox:
        """Lay out a container and start it. Done by two workers at once, it is done as well."""
        from mabridge.providers.docker.running import start

        if not self.options.read_only:
            await container.put_archive("/", layout(self.options, workdir))  # type: ignore[no-untyped-call]
        ready = await start(container)
        sandbox = self._sandbox(container, workdir)
        # A directory that was laid out right below / can be worked in. To look all the same would be an exec, which
        # takes a third of the time that the start does.
        deeper = posixpath.dirname(posixpath.normpath(workdir)) != "/"
        if not ready or deeper or is_mounted(self.options, workdir):
            test = await sandbox.exec(["/bin/sh", "-c", "[ -w . ]"], timeout=_CALL, max_output=1000)
            if test.exit_code != 0:
                message = f"{workdir} is not a directory that the user {self.options.user} may write; is it on a mount?"
                raise CreateFailed(message, provider=self.type, op="create", sandbox_id=sandbox.id)
        return sandbox

    async def _find(self, key: str, op: str) -> DockerContainer | None:
        """Return the container of that name, with its state; one that is ending gets a moment to have ended."""
        from aiodocker import DockerError

        deadline = anyio.current_time() + _ENDING
        while True:
            try:
                found = await self._client.containers.get(key)
            except DockerError as exc:
                if exc.status == 404:
                    return None
                raise
            if found["Config"]["Labels"].get(KEY_LABEL) != key:
                message = f"there is a container {key} that mabridge did not make; remove or rename it"
                raise CreateFailed(message, provider=self.type, op=op, sandbox_id=found.id[:12])
            if found["State"]["Status"] in ("running", "paused", "created") or anyio.current_time() > deadline:
                return found
            await anyio.sleep(0.1)

    async def _woken(self, container: DockerContainer) -> Sandbox | None:
        """Return the sandbox of a container that runs, or can run on."""
        if container["State"]["Status"] == "paused":
            await container.unpause()
        elif container["State"]["Status"] != "running":
            return None
        return self._sandbox(container, workdir_of(container["Config"]["Labels"]))

    def _sandbox(self, container: DockerContainer, workdir: str) -> DockerSandbox:
        from mabridge.providers.docker.sandbox import DockerSandbox

        return DockerSandbox(self._client, container.id, user=self.options.user, workdir=workdir)

    def _no_image(self, op: str) -> CreateFailed:
        message = f"the image {self.options.image} is not on this engine, and pull is never; pull or build it there"
        return CreateFailed(message, provider=self.type, op=op)
