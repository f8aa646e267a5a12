"""Where the demo's sandboxes are: Docker where that can work, else directories of this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import anyio
import anyio.to_thread

from mabridge.config import ProviderConfig
from mabridge.demo.image import TINY, tiny_image
from mabridge.errors import ConfigError, MabridgeError, SandboxError
from mabridge.plugins import registry

__all__ = ["Choice", "Chosen", "choose"]

PREFERRED = "python:3.13-slim"
KNOWN = ("python", "debian", "ubuntu", "alpine", "busybox")
"""Repositories of images that have a shell and nothing else of note, the best for a demo first."""

_PULL_DEADLINE = 300.0
_REACH_DEADLINE = 10.0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was asked for.

    Attributes:
        provider: ``docker`` or ``local``; ``None`` leaves it to the demo.
        image: the Docker image; ``None`` leaves it to the demo.
        sessions: how many agents work at once.
        pace: seconds that an agent thinks before each turn.
    """

    provider: str | None = None
    image: str | None = None
    sessions: int = 6
    pace: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What the demo runs on, and why."""

    config: ProviderConfig
    why: str


async def choose(choice: Choice, tell: Callable[[str], None]) -> Chosen:
    """Decide on a provider and an image.

    Args:
        choice: what was asked for.
        tell: told of what takes long.

    Raises:
        ConfigError: what was asked for cannot be had.
    """
    if choice.provider == "local":
        return _local("it was asked for")
    try:
        image, why = await _docker_image(choice.image, tell)
    except MabridgeError as exc:
        if choice.provider == "docker":
            raise
        return _local(f"Docker cannot be used ({exc})")
    options = {"image": image, "memory": "512m", "pull": "never"}
    return Chosen(config=ProviderConfig(type="docker", options=options, when_done="teardown", ttl=900), why=why)


def _local(reason: str) -> Chosen:
    return Chosen(
        config=ProviderConfig(type="local", when_done="teardown", ttl=900),
        why=f"directories and processes of this machine, which isolates nothing: {reason}",
    )


async def _docker_image(wanted: str | None, tell: Callable[[str], None]) -> tuple[str, str]:
    """Return an image that the engine has, and how it came to be chosen."""
    entry = registry().get("docker")
    if not entry.installed:
        raise ConfigError(f"it needs {entry.sdk}: {entry.hint}")
    from mabridge.providers.docker.engine import connect, mapped, pull

    async with connect(None) as docker:
        with mapped("check"), anyio.fail_after(_REACH_DEADLINE):
            tags = sorted(tag for image in await docker.images.list() for tag in image.get("RepoTags") or ())
        if wanted is not None:
            if wanted not in tags and f"{wanted}:latest" not in tags:
                await pull(docker, wanted)
            return wanted, f"Docker, image {wanted}: it was asked for"
        if (local := _best(tags)) is not None:
            return local, f"Docker, image {local}: an engine answers, and has this image"
        tell(f"An engine answers, but has no image for a demo; pulling {PREFERRED} ...")
        try:
            with mapped("create"), anyio.fail_after(_PULL_DEADLINE):
                await pull(docker, PREFERRED)
        except SandboxError as exc:
            tell(f"{exc.message}.")
            tag, archive = await anyio.to_thread.run_sync(tiny_image)
            with mapped("create"):
                await docker.images.import_image(archive)
            return tag, f"Docker, image {tag}: made of this machine's own programs, for no registry could be reached"
        return PREFERRED, f"Docker, image {PREFERRED}: an engine answers, and the image was pulled"


def _best(tags: list[str]) -> str | None:
    for repository in (*KNOWN, TINY):
        for tag in reversed(tags):
            if tag.rpartition(":")[0].removeprefix("docker.io/").removeprefix("library/") == repository:
                return tag
    return None
