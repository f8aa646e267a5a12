"""Making and finding sandboxes of Modal."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, ClassVar, Self

import anyio

from mabridge.errors import CreateFailed, SandboxError, SandboxGone, SandboxUnavailable
from mabridge.identity import KEY_LABEL
from mabridge.providers._guard import DEADLINES, GUARD
from mabridge.providers.modal.options import ModalOptions
from mabridge.providers.modal.tags import WOKEN_FROM, describe, spec_of
from mabridge.sandbox import Provider, Sandbox, SandboxInfo, SandboxSpec

if TYPE_CHECKING:
    import modal

    from mabridge.providers.modal.place import Place
    from mabridge.providers.modal.sandbox import ModalSandbox
    from mabridge.providers.modal.shelf import Kept

__all__ = ["ModalProvider"]

logger = logging.getLogger("mabridge.providers.modal")

_SETTLE = 60.0  # seconds for what another worker does with the same name to come to an end
_LIST = 60.0
_UNDO = 15.0
_TAGS_AT_ONCE = 10

# Uptime begins anew in a sandbox that is woken, so deadlines of the one that was suspended mean nothing there.
_FIRST = f"rm -rf {DEADLINES}\n{GUARD}"


class ModalProvider(Provider):
    """Sandboxes of Modal."""

    type: ClassVar[str] = "modal"
    Options = ModalOptions
    options: ModalOptions

    def __init__(self, options: ModalOptions | None = None) -> None:
        super().__init__(options or ModalOptions())
        self._entered: Place | None = None

    @property
    def can_suspend(self) -> bool:
        return True

    async def __aenter__(self) -> Self:
        """Make ready. Nothing is sent yet."""
        from mabridge.providers.modal.place import Place

        self._entered = Place(self.options)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close the client. Sandboxes live on."""
        await self._place.close()

    async def create(self, spec: SandboxSpec) -> Sandbox:
        from mabridge.providers.modal.service import mapped

        with mapped("create"):
            arguments = self._place.arguments(spec)
            shelf = await self._place.shelf()
            kept = await shelf.find(spec.key)
            if kept is not None and (woken := await self._wake(kept)) is not None:
                return woken
            return await self._obtain(spec, await self._place.image(), arguments)

    async def attach(self, key: str) -> Sandbox | None:
        from mabridge.providers.modal.service import mapped

        with mapped("attach"):
            found = await self._find(key)
            if found is None:
                shelf = await self._place.shelf()
                kept = await shelf.find(key)
                if kept is not None:
                    return await self._wake(kept)
                # Between the two looks, it may have been woken by another worker.
                found = await self._find(key) if shelf.in_use else None
            if found is not None:
                await self._settle(found)
            return found

    async def list(self) -> AsyncIterator[SandboxInfo]:
        import modal
        from modal.exception import NotFoundError

        from mabridge.providers.modal.service import CALL, call, mapped

        infos: dict[str, SandboxInfo] = {}
        slots = anyio.CapacityLimiter(_TAGS_AT_ONCE)

        async def look(found: modal.Sandbox) -> None:
            with contextlib.suppress(NotFoundError):  # it ended meanwhile
                async with slots:
                    tags = await call(found.get_tags.aio(), within=CALL)
                if KEY_LABEL in tags:
                    infos[found.object_id] = describe(found.object_id, tags, "running")

        with mapped("list"):
            client = await self._place.client()
            app = await self._place.app(create_if_missing=False)
            with anyio.fail_after(_LIST):
                # The SDK drops the tags that come with the list, so each is asked for its own.
                if app is not None:
                    async with anyio.create_task_group() as group:
                        async for found in modal.Sandbox.list.aio(app_id=app.app_id, client=client):
                            group.start_soon(look, found)
            # After those that run, so that none is missed that was suspended meanwhile.
            shelf = await self._place.shelf()
            records = await shelf.all()
        running = {info.key for info in infos.values()}
        newest = {kept.key: kept for kept in sorted(records, key=lambda kept: kept.since) if kept.key not in running}
        for info in infos.values():
            yield info
        for kept in newest.values():
            yield describe(kept.image, kept.tags, "expired" if kept.expired else "suspended")

    async def remove(self, info: SandboxInfo) -> None:
        """Remove the very sandbox that `list` told of. A suspended one is not woken for it."""
        from mabridge.providers.modal.service import mapped

        with mapped("remove"):
            found = await self._find(info.key)
            if found is not None:
                if found.id == info.id:
                    await found.teardown()
                return  # it is another by now, which may be in use
            shelf = await self._place.shelf()
            records = await shelf.all(info.key)
            if any(kept.image == info.id for kept in records):
                await shelf.forget_all(info.key)
                await self._place.delete_snapshots(kept.image for kept in records)

    async def check(self) -> None:
        from mabridge.providers.modal.service import mapped

        with mapped("check"):
            await self._place.app(create_if_missing=False)

    @property
    def _place(self) -> Place:
        if self._entered is None:
            raise RuntimeError("a provider is entered before it is used: async with ModalProvider(...) as provider")
        return self._entered

    async def _wake(self, kept: Kept) -> ModalSandbox | None:
        """Go on with a suspended sandbox, or return None if its snapshot is not there any more.

        Whatever happens, the snapshot or a sandbox made from it is there. So one that fails is left to run, where
        another worker may have found it by now; it ends as any other that nobody keeps alive.
        """
        image = await self._place.snapshot(kept.image)
        shelf = await self._place.shelf()
        if image is None:
            logger.warning("%s: Modal does not have the snapshot %s any more", kept.key, kept.image)
            await shelf.forget(kept)
            return None
        spec = spec_of(kept.tags)
        arguments = self._place.arguments(spec, woken_from=kept.image)
        woken = await self._obtain(spec, image, arguments)
        await self._settle(woken)
        return woken

    async def _settle(self, sandbox: ModalSandbox) -> None:
        """Forget the snapshot that a sandbox was made from, once it is sure that it runs.

        Otherwise the session would be thrown back to it when the sandbox has ended.
        """
        if sandbox.woken_from is None:
            return
        shelf = await self._place.shelf()
        used = [kept for kept in await shelf.all(sandbox.key) if kept.image == sandbox.woken_from]
        if used:
            await sandbox.prepare()
            await shelf.forget(*used)

    async def _obtain(self, spec: SandboxSpec, image: modal.Image, arguments: dict[str, Any]) -> ModalSandbox:
        """Make the sandbox, or find the one of that name that another worker made first."""
        deadline, pause = anyio.current_time() + _SETTLE, 0.05
        while anyio.current_time() < deadline:
            made = await self._new(spec, image, arguments)
            if made is not None:
                await self._launch(made)
                return made
            try:
                found = await self._find(spec.key)
                if found is not None:
                    await found.prepare()
                    return found
            except SandboxGone:
                logger.debug("%s: the sandbox ended while it was being attached to", spec.key)
            await anyio.sleep(pause)  # the name is given free some time after its sandbox has ended
            pause = min(pause * 2, 2.0)
        message = f"the sandbox {spec.key} neither could be made nor was there within {_SETTLE:.0f} s"
        raise SandboxUnavailable(message, provider=self.type, op="create")

    async def _new(self, spec: SandboxSpec, image: modal.Image, arguments: dict[str, Any]) -> ModalSandbox | None:
        """Make the sandbox, or return None if there is one of that name."""
        from modal.exception import AlreadyExistsError

        first = ("/bin/sh", "-c", _FIRST, "mab", str(math.ceil(spec.ttl)))
        # Shielded, for a call that is cut off may yet make a sandbox that nobody would know of.
        with anyio.CancelScope(shield=True):
            try:
                made = self._sandbox(await self._place.make(first, image, arguments), arguments["tags"])
            except AlreadyExistsError:
                return None
            except Exception:
                await self._undo(spec.key, arguments["tags"])
                raise
        return made

    async def _undo(self, key: str, tags: dict[str, str]) -> None:
        """Remove what a create made that was reported to have failed."""
        if WOKEN_FROM in tags:
            return
        with anyio.move_on_after(_UNDO), contextlib.suppress(Exception):  # the first failure is what is told
            found = await self._find(key)
            if found is not None and found.made_with(tags):
                await found.terminate()

    async def _launch(self, made: ModalSandbox) -> None:
        """Wait until a sandbox that we made is ready, or leave nothing of it behind."""
        try:
            try:
                await made.prepare()
            except SandboxGone as exc:
                image = made.woken_from or self.options.image
                message = f"the sandbox ended at once; has the image {image} a /bin/sh that works? ({exc})"
                raise CreateFailed(message, provider=self.type, op="create", sandbox_id=made.id) from exc
        except BaseException:
            if made.woken_from is None:
                try:
                    await made.terminate()
                except SandboxError as exc:
                    logger.error("%s; Modal ends it when its time is up", exc)
            raise

    async def _find(self, key: str) -> ModalSandbox | None:
        """Return the sandbox that runs, or is about to, under that name."""
        named = await self._place.named(key)
        if named is None:
            return None
        found, tags = named
        if tags.get(KEY_LABEL) != key:
            message = f"there is a sandbox {key} that mabridge did not make; remove it"
            raise CreateFailed(message, provider=self.type, op="attach", sandbox_id=found.object_id)
        return self._sandbox(found, tags)

    def _sandbox(self, found: modal.Sandbox, tags: dict[str, str]) -> ModalSandbox:
        from mabridge.providers.modal.sandbox import ModalSandbox

        return ModalSandbox(found, tags, self._place)
