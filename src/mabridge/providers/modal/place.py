"""Where sandboxes are made: an app of Modal's, its image, and its shelf of suspended ones."""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import anyio
import modal
import modal.experimental
from modal.exception import AlreadyExistsError, NotFoundError

from mabridge.errors import ConfigError, NotSupported
from mabridge.providers._env import read_env
from mabridge.providers._shell import check_env
from mabridge.providers.modal.options import ModalOptions
from mabridge.providers.modal.service import CALL, PROVIDER, call, connect
from mabridge.providers.modal.shelf import IMAGE_ID, Shelf
from mabridge.providers.modal.tags import WORKDIR_MAX, new_tags
from mabridge.sandbox import SandboxSpec

if TYPE_CHECKING:
    from mabridge.providers.modal.process import ModalProcess

__all__ = ["Place"]

logger = logging.getLogger("mabridge.providers.modal")

_BUILD = 1200.0  # seconds for an image that Modal has not built yet
_CLOSE = 10.0


class Place:
    """Opened when it is first used.

    Args:
        options: of the provider.
    """

    def __init__(self, options: ModalOptions) -> None:
        self.options = options
        self._opening, self._preparing = anyio.Lock(), anyio.Lock()
        self._opened: modal.Client | None = None
        self._owned: modal.Client | None = None
        self._shelf: Shelf | None = None
        self._app: modal.App | None = None
        self._image: modal.Image | None = None
        self.held: set[ModalProcess] = set()
        """The processes that are held open."""

    async def close(self) -> None:
        """Let go of the processes that are held open, and close the client, if it is ours."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(_CLOSE):
            for process in tuple(self.held):
                await process.release()
            if self._owned is not None:
                await self._owned.close.aio()

    async def client(self) -> modal.Client:
        """Return the client."""
        async with self._opening:
            if self._opened is None:
                self._opened, ours = await connect(self.options)
                self._owned = self._opened if ours else None
            return self._opened

    async def shelf(self) -> Shelf:
        """Return the suspended sandboxes."""
        client = await self.client()
        if self._shelf is None:
            self._shelf = Shelf(self.options.app, self.options.environment_name, client)
        return self._shelf

    async def app(self, *, create_if_missing: bool) -> modal.App | None:
        """Return the app, or None if it is not there."""
        client = await self.client()
        try:
            lookup = modal.App.lookup.aio(
                self.options.app,
                client=client,
                environment_name=self.options.environment_name,
                create_if_missing=create_if_missing,
            )
            return await call(lookup, within=CALL)
        except NotFoundError:
            if create_if_missing:
                raise
            return None

    async def image(self) -> modal.Image:
        """Return the image, which Modal builds now if it never has."""
        options = self.options
        async with self._preparing:
            if self._image is None:
                if re.fullmatch(IMAGE_ID, options.image):
                    self._image = modal.Image.from_id(options.image, client=await self.client())
                else:
                    image = modal.Image.from_registry(
                        options.image,
                        secret=self._secret(options.registry_secret) if options.registry_secret else None,
                        add_python=options.add_python,
                        setup_dockerfile_commands=["ENTRYPOINT []"],  # the first process is ours
                    )
                    self._image = await call(image.build.aio(await self._home()), within=_BUILD)
            return self._image

    async def snapshot(self, image_id: str) -> modal.Image | None:
        """Return a snapshot, or None if it is not there any more."""
        image = modal.Image.from_id(image_id, client=await self.client())
        app = await self._home()
        try:
            return await call(image.build.aio(app), within=CALL)
        except NotFoundError:
            return None

    async def make(self, first: Sequence[str], image: modal.Image, arguments: Mapping[str, Any]) -> modal.Sandbox:
        """Make a sandbox; `first` is its first process."""
        app, client = await self._home(), await self.client()
        try:
            create = modal.Sandbox.create.aio(*first, **arguments, app=app, image=image, client=client)
            return await call(create, within=CALL)
        except AlreadyExistsError:
            raise
        except Exception:
            self._app = self._image = None  # they may be gone
            raise

    async def delete_snapshots(self, image_ids: Iterable[str]) -> None:
        """Delete snapshots that nobody has any use for. Never fails: Modal deletes them when their time is up."""
        client = await self.client()
        for image_id in set(image_ids):
            try:
                await call(modal.experimental.image_delete.aio(image_id, client=client), within=CALL)
            except NotFoundError:
                logger.debug("%s: it was deleted already", image_id)
            except Exception as exc:  # noqa: BLE001 - the sandbox is gone, whatever this says
                logger.info("%s was not deleted: %s; Modal deletes it when its time is up", image_id, exc)

    async def named(self, key: str) -> tuple[modal.Sandbox, dict[str, str]] | None:
        """Return the sandbox that runs, or is about to, under that name, with its tags."""
        client = await self.client()
        environment = self.options.environment_name
        try:
            named = modal.Sandbox.from_name.aio(self.options.app, key, environment_name=environment, client=client)
            found = await call(named, within=CALL)
            return found, await call(found.get_tags.aio(), within=CALL)
        except NotFoundError:
            return None

    def arguments(self, spec: SandboxSpec, *, woken_from: str | None = None) -> dict[str, Any]:
        """Return what a sandbox is made with, but for the app and the image.

        Raises:
            ConfigError: the working directory cannot be.
            NotSupported: it would have to live longer than Modal lets it.
        """
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
            raise NotSupported(message, provider=PROVIDER, op="create")
        env = read_env(options.env)
        volume = modal.Volume.from_name
        return {
            "name": spec.key,
            "tags": new_tags(spec, options.timeout, woken_from),
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

    async def _home(self) -> modal.App:
        if self._app is None:
            self._app = await self.app(create_if_missing=True)
            assert self._app is not None
        return self._app

    def _secret(self, name: str) -> modal.Secret:
        return modal.Secret.from_name(name, environment_name=self.options.environment_name)
