"""Making and finding sandboxes of Modal."""

from __future__ import annotations

import contextlib
import logging
import math
import posixpath
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, ClassVar, Self

import anyio
from anyio.abc import TaskGroup

from mabridge.errors import ConfigError, CreateFailed, NotSupported, SandboxError, SandboxGone, SandboxUnavailable
from mabridge.identity import KEY_LABEL
from mabridge.providers._guard import GUARD
from mabridge.providers._shell import check_env
from mabridge.providers.modal.options import ModalOptions
from mabridge.sandbox import Provider, Sandbox, SandboxInfo, SandboxSpec

if TYPE_CHECKING:
    import modal

    from mabridge.providers.modal.sandbox import ModalSandbox

__all__ = ["ModalProvider"]

logger = logging.getLogger("mabridge.providers.modal")

_CALL = 60.0  # seconds
_BUILD = 1200.0  # seconds for an image that Modal has not built yet
_SETTLE = 60.0  # seconds for what another worker does with the same name to come to an end
_UNDO = 15.0
_TAGS_AT_ONCE = 10


class ModalProvider(Provider):
    """Sandboxes of Modal."""

    type: ClassVar[str] = "modal"
    Options = ModalOptions
    options: ModalOptions

    def __init__(self, options: ModalOptions | None = None) -> None:
        super().__init__(options or ModalOptions())
        self._tasks: TaskGroup | None = None
        self._opening, self._preparing = anyio.Lock(), anyio.Lock()
        self._opened: modal.Client | None = None
        self._owned: modal.Client | None = None
        self._prepared: tuple[modal.App, modal.Image] | None = None

    async def __aenter__(self) -> Self:
        """Make ready to hold processes open. Nothing is sent yet."""
        self._tasks = await anyio.create_task_group().__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close the client. Sandboxes live on."""
        assert self._tasks is not None
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(None, None, None)
        if self._owned is not None:
            with anyio.CancelScope(shield=True), anyio.move_on_after(10):
                await self._owned.close.aio()

    async def create(self, spec: SandboxSpec) -> Sandbox:
        from mabridge.providers.modal.service import mapped

        arguments = self._arguments(spec)
        async with mapped("create"):
            app, image = await self._ready()
            deadline, pause = anyio.current_time() + _SETTLE, 0.05
            while anyio.current_time() < deadline:
                made = await self._new(spec, {**arguments, "app": app, "image": image})
                if made is not None:
                    return await self._launch(made, spec.workdir)
                try:
                    found = await self._find(spec.key, "create")
                    if found is not None:
                        await found.prepare()
                        return found
                except SandboxGone:
                    logger.debug("%s: the sandbox ended while it was being attached to", spec.key)
                await anyio.sleep(pause)  # the name is given free some time after its sandbox has ended
                pause = min(pause * 2, 2.0)
        message = f"the sandbox {spec.key} neither could be made nor was there within {_SETTLE:.0f} s"
        raise SandboxUnavailable(message, provider=self.type, op="create")

    async def attach(self, key: str) -> Sandbox | None:
        from mabridge.providers.modal.service import mapped

        async with mapped("attach"):
            return await self._find(key, "attach")

    async def list(self) -> AsyncIterator[SandboxInfo]:
        import modal
        from modal.exception import NotFoundError

        from mabridge.providers.modal.sandbox import describe
        from mabridge.providers.modal.service import call, mapped

        infos: dict[str, SandboxInfo] = {}
        slots = anyio.CapacityLimiter(_TAGS_AT_ONCE)

        async def look(found: modal.Sandbox) -> None:
            with contextlib.suppress(NotFoundError):  # it ended meanwhile
                async with slots:
                    tags = await call(found.get_tags.aio())
                if KEY_LABEL in tags:
                    infos[found.object_id] = describe(found.object_id, tags)

        async with mapped("list"):
            client = await self._client()
            app = await self._app(client, create_if_missing=False)
            with anyio.fail_after(_CALL):
                # The SDK drops the tags that come with the list, so each is asked for its own.
                if app is not None:
                    async with anyio.create_task_group() as group:
                        async for found in modal.Sandbox.list.aio(app_id=app.app_id, client=client):
                            group.start_soon(look, found)
        for info in infos.values():
            yield info

    async def check(self) -> None:
        from mabridge.providers.modal.service import mapped

        async with mapped("check"):
            client = await self._client()
            await self._app(client, create_if_missing=False)

    async def _client(self) -> modal.Client:
        """Return the client, opened now if it is not."""
        from mabridge.providers.modal.service import connect

        if self._tasks is None:
            raise RuntimeError("a provider is entered before it is used: async with ModalProvider(...) as provider")
        async with self._opening:
            if self._opened is None:
                self._opened, ours = await connect(self.options)
                self._owned = self._opened if ours else None
            return self._opened

    async def _app(self, client: modal.Client, *, create_if_missing: bool) -> modal.App | None:
        import modal
        from modal.exception import NotFoundError

        from mabridge.providers.modal.service import call

        name, environment = self.options.app, self.options.environment_name
        try:
            lookup = modal.App.lookup.aio(
                name, client=client, environment_name=environment, create_if_missing=create_if_missing
            )
            return await call(lookup, within=_CALL)
        except NotFoundError:
            if create_if_missing:
                raise
            return None

    async def _ready(self) -> tuple[modal.App, modal.Image]:
        """Return the app and the image, which Modal builds now if it never has."""
        import modal

        from mabridge.providers.modal.service import call

        async with self._preparing:
            if self._prepared is None:
                client = await self._client()
                app = await self._app(client, create_if_missing=True)
                assert app is not None
                if re.fullmatch(r"im-[A-Za-z0-9-]+", self.options.image):
                    image = modal.Image.from_id(self.options.image, client=client)
                else:
                    secret = self.options.registry_secret and self._secret(self.options.registry_secret)
                    image = modal.Image.from_registry(
                        self.options.image,
                        secret=secret or None,
                        add_python=self.options.add_python,
                        setup_dockerfile_commands=["ENTRYPOINT []"],  # the first process is ours
                    )
                    image = await call(image.build.aio(app), within=_BUILD)
                self._prepared = app, image
            return self._prepared

    def _secret(self, name: str) -> modal.Secret:
        import modal

        return modal.Secret.from_name(name, environment_name=self.options.environment_name)

    def _arguments(self, spec: SandboxSpec) -> dict[str, Any]:
        """Return what a sandbox is made with, but for the app and the image.

        Raises:
            ConfigError: the working directory cannot be.
            NotSupported: it would have to live longer than Modal lets it.
        """
        import modal

        from mabridge.providers.modal.sandbox import WORKDIR_MAX, own_tags

        options = self.options
        if not spec.workdir.startswith("/") or posixpath.normpath(spec.workdir) in ("/", "//"):
            raise ConfigError(f"modal: workdir {spec.workdir!r} must be an absolute path, and not /")
        if len(spec.workdir.encode()) > WORKDIR_MAX:
            raise ConfigError(
                f"modal: workdir {spec.workdir!r} is kept in a tag, which has room for {WORKDIR_MAX} bytes"
            )
        if spec.ttl > options.timeout:
            message = (
                f"a ttl of {spec.ttl:.0f} s is beyond the option timeout, {options.timeout} s (Modal's most: 86400)"
            )
            raise NotSupported(message, provider=self.type, op="create")
        env = {n: v if isinstance(v, str) else v.read() for n, v in options.env.items()}
        volume = modal.Volume.from_name
        return {
            "name": spec.key,
            "tags": {**spec.labels, KEY_LABEL: spec.key, **own_tags(spec.workdir, options.timeout)},
            "env": check_env({**env, **spec.env}),
            "secrets": [self._secret(name) for name in options.secrets],
            "timeout": options.timeout,
            "idle_timeout": options.idle_timeout,
            "gpu": options.gpu,
            "cloud": options.cloud,
            "region": options.region,
            "cpu": options.cpu,
            "memory": options.memory,
            "block_network": options.block_network,
            "outbound_cidr_allowlist": options.outbound_cidr_allowlist,
            "outbound_domain_allowlist": options.outbound_domain_allowlist,
            "volumes": {p: volume(n, environment_name=options.environment_name) for p, n in options.volumes.items()},
        }

    async def _new(self, spec: SandboxSpec, arguments: dict[str, Any]) -> ModalSandbox | None:
        """Make the sandbox, or return None if there is one of that name."""
        import modal
        from modal.exception import AlreadyExistsError

        from mabridge.providers.modal.service import call

        client = await self._client()
        guard = ("/bin/sh", "-c", GUARD, "mab", str(math.ceil(spec.ttl)))
        # Shielded, for a call that is cut off may yet make a sandbox that nobody would know of.
        with anyio.CancelScope(shield=True):
            try:
                made = await call(modal.Sandbox.create.aio(*guard, **arguments, client=client), within=_CALL)
            except AlreadyExistsError:
                return None
            except Exception:
                self._prepared = None  # the app or the image may be gone
                await self._undo(spec.key, arguments["tags"])
                raise
        return self._sandbox(made, arguments["tags"])

    async def _undo(self, key: str, tags: dict[str, str]) -> None:
        """Remove what a create made that was reported to have failed."""
        with anyio.move_on_after(_UNDO), contextlib.suppress(Exception):  # the first failure is what is told
            found = await self._find(key, "create")
            if found is not None and found.made_with(tags):
                await found.teardown()

    async def _launch(self, made: ModalSandbox, workdir: str) -> Sandbox:
        """Wait until a sandbox that we made is ready, or leave nothing of it behind."""
        try:
            try:
                await made.prepare()
            except SandboxGone as exc:
                message = f"the sandbox ended at once; has the image {self.options.image} a /bin/sh that works? ({exc})"
                raise CreateFailed(message, provider=self.type, op="create", sandbox_id=made.id) from exc
        except BaseException:
            try:
                await made.teardown()
            except SandboxError as exc:
                logger.error("%s; Modal ends it when its time is up", exc)
            raise
        return made

    async def _find(self, key: str, op: str) -> ModalSandbox | None:
        import modal
        from modal.exception import NotFoundError

        from mabridge.providers.modal.service import call

        client = await self._client()
        environment = self.options.environment_name
        try:
            named = modal.Sandbox.from_name.aio(self.options.app, key, environment_name=environment, client=client)
            found = await call(named, within=_CALL)
            tags = await call(found.get_tags.aio(), within=_CALL)
        except NotFoundError:
            return None
        if tags.get(KEY_LABEL) != key:
            message = f"there is a sandbox {key} that mabridge did not make; remove it"
            raise CreateFailed(message, provider=self.type, op=op, sandbox_id=found.object_id)
        return self._sandbox(found, tags)

    def _sandbox(self, found: modal.Sandbox, tags: dict[str, str]) -> ModalSandbox:
        from mabridge.providers.modal.sandbox import ModalSandbox

        assert self._tasks is not None
        return ModalSandbox(found, tags, self._tasks)
