"""What is remembered of suspended sandboxes, where any worker on any machine finds it: in a volume of Modal's.

A record is an empty file whose path says it all, so one call lists them, and nothing has to be downloaded. It is not
in a `modal.Dict`: the SDK unpickles what it reads there, so whoever may write to it could run code in the worker; and
an entry is lost a week after its last use (https://modal.com/docs/reference/modal.Dict).
"""

from __future__ import annotations

import io
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import modal
from modal.exception import NotFoundError, UnimplementedError

from mabridge.identity import KEY_LABEL
from mabridge.providers.modal.service import call

__all__ = ["IMAGE_ID", "Kept", "Shelf"]

logger = logging.getLogger("mabridge.providers.modal")

_CALL = 30.0  # seconds
_PIECE = 200  # characters of a name in a path, which may have 255
IMAGE_ID = r"im-[A-Za-z0-9-]+"
"""The pattern of the id of an image, which a snapshot is."""
_PATH = re.compile(rf"/?(mab[a-z2-7]{{24}})/({IMAGE_ID}),(\d+\.\d+),(\d+)/(.+)")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A suspended sandbox.

    Attributes:
        key: its key.
        image: the id of the snapshot of its files.
        since: when it was suspended, in seconds since 1970.
        until: when Modal deletes the snapshot, likewise.
        tags: those of the sandbox.
    """

    key: str
    image: str
    since: float
    until: int
    tags: Mapping[str, str]

    @property
    def expired(self) -> bool:
        """Whether its time is up."""
        return self.until < time.time()

    @property
    def directory(self) -> str:
        """The path of the record's directory."""
        return f"/{self.key}/{self.image},{self.since:.3f},{self.until}"

    @property
    def path(self) -> str:
        """The path of the record."""
        # The second comma at its end tells it from the directories on the way to it.
        text = "".join(f"{name}={value}," for name, value in self.tags.items()) + ","
        return "/".join([self.directory, *(text[at : at + _PIECE] for at in range(0, len(text), _PIECE))])

    @classmethod
    def read(cls, path: str) -> Kept | None:
        """Return the record that a path is, or None if it is none."""
        found = _PATH.fullmatch(path)
        if found is None:
            return None
        key, image, since, until, text = found.groups()
        text = text.replace("/", "")
        pairs = [tag.partition("=") for tag in text.removesuffix(",,").split(",")]
        tags = {name: value for name, _, value in pairs}
        if not text.endswith(",,") or tags.get(KEY_LABEL) != key:
            return None
        return cls(key=key, image=image, since=float(since), until=int(until), tags=tags)


class Shelf:
    """The suspended sandboxes of an app. What it raises is the SDK's.

    Args:
        app: its name.
        environment_name: Modal's environment.
        client: open.
    """

    def __init__(self, app: str, environment_name: str | None, client: modal.Client) -> None:
        self._name = f"{app}-suspended"
        self._environment_name = environment_name
        self._client = client
        self._opened: modal.Volume | None = None

    @property
    def in_use(self) -> bool:
        """Whether anything was ever suspended here, as far as is known."""
        return self._opened is not None

    async def find(self, key: str) -> Kept | None:
        """Return the newest record of a key whose time is not up."""
        found = [kept for kept in await self.all(key) if not kept.expired]
        return max(found, key=lambda kept: kept.since, default=None)

    async def all(self, key: str = "") -> list[Kept]:
        """Return all records, of one key or of all."""
        try:
            volume = await self._volume(create_if_missing=False)
            entries = await call(volume.listdir.aio(f"/{key}", recursive=True), within=_CALL)
        except (NotFoundError, UnimplementedError):  # a service that has no volumes has kept nothing there
            return []
        return [kept for entry in entries if (kept := Kept.read(entry.path)) is not None]

    async def keep(self, kept: Kept) -> None:
        """Remember a suspended sandbox."""

        async def put(volume: modal.Volume) -> None:
            async with volume.batch_upload(force=True) as batch:
                batch.put_file(io.BytesIO(), kept.path)

        await call(put(await self._volume(create_if_missing=True)), within=_CALL)

    async def forget(self, *records: Kept) -> None:
        """Forget these records."""
        for kept in records:
            await self._remove(kept.directory)

    async def forget_all(self, key: str) -> list[Kept]:
        """Forget all records of a key, and return them."""
        records = await self.all(key)
        if records:
            await self._remove(f"/{key}")
        return records

    async def _remove(self, path: str) -> None:
        try:
            volume = await self._volume(create_if_missing=False)
            await call(volume.remove_file.aio(path, recursive=True), within=_CALL)
        except (NotFoundError, FileNotFoundError):
            logger.debug("%s: it was forgotten already", path)

    async def _volume(self, *, create_if_missing: bool) -> modal.Volume:
        if self._opened is None:
            volume = modal.Volume.from_name(
                self._name,
                environment_name=self._environment_name,
                create_if_missing=create_if_missing,
                client=self._client,
            )
            await call(volume.hydrate.aio(), within=_CALL)
            self._opened = volume
        return self._opened
