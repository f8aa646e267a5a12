"""The Docker engine: reaching it, its errors in our terms, and what aiodocker leaves out."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiodocker import Docker, DockerError
from aiodocker.containers import DockerContainer
from aiodocker.exceptions import DockerContextInvalidError, DockerContextTLSError

from mabridge.errors import (
    AtCapacity,
    ConfigError,
    CreateFailed,
    SandboxError,
    SandboxGone,
    SandboxUnavailable,
    translated,
)

__all__ = ["connect", "mapped", "pull", "state_of"]

logger = logging.getLogger("mabridge.providers.docker")

PROVIDER = "docker"
_TIMEOUT = aiohttp.ClientTimeout(total=60, sock_connect=10)
_HUB = "https://index.docker.io/v1/"


@asynccontextmanager
async def connect(host: str | None) -> AsyncIterator[Docker]:
    """Open a client, bound to this event loop. Nothing is sent yet.

    Raises:
        ConfigError: the host, or the context, is not one that can be used.
    """
    try:
        try:
            client = Docker(url=host, timeout=_TIMEOUT)
        except AssertionError:  # it found no socket: say so when something is asked of it
            client = Docker(url="unix:///var/run/docker.sock", timeout=_TIMEOUT)
    except (ValueError, ImportError, OSError, DockerContextInvalidError, DockerContextTLSError) as exc:
        raise ConfigError(f"docker: no engine can be reached at {host or 'the default host'}: {exc}") from exc
    async with client:
        # Every running exec holds a connection, and at aiohttp's default of 100 the next request would wait for ever,
        # the one that is to kill them included. aiodocker has no option for it.
        client.connector._limit = 0
        if client.connector.limit != 0:
            raise RuntimeError("this aiohttp does not let the limit of connections be lifted")
        yield client


def can_half_close(client: Docker) -> bool:
    """Whether stdin can be closed with stdout left open: not through TLS."""
    return not client.docker_host.startswith("https:")


def mapped(op: str, sandbox_id: str | None = None) -> AbstractContextManager[None]:
    """Raise what the engine, or the way to it, did as an error of `mabridge.errors`."""
    return translated(lambda error: _translated(error, op, sandbox_id))


def _translated(error: Exception, op: str, sandbox_id: str | None) -> SandboxError:
    where: dict[str, Any] = {"provider": PROVIDER, "op": op, "sandbox_id": sandbox_id}
    if not isinstance(error, DockerError):
        said = "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        return SandboxUnavailable(f"the connection to the Docker engine failed: {said}", **where)
    status, said = error.status, error.message.strip()
    if status == 900:
        return SandboxUnavailable(f"{said}; is Docker running, and may this user reach it?", **where)
    if "no space left" in said.lower():
        return AtCapacity(said, **where)
    if op == "create":
        return (CreateFailed if status < 500 or "OCI runtime" in said else SandboxUnavailable)(said, **where)
    if status == 404 or (status == 409 and ("is not running" in said or "removal" in said)):
        return SandboxGone(said, **where)
    return SandboxUnavailable(said, **where)


def state_of(container: DockerContainer) -> str:
    """Return the engine's word for an inspected container: ``created``, ``running``, ``exited`` and others."""
    return str(container["State"]["Status"])


async def pull(client: Docker, image: str) -> None:
    """Pull an image, telling the log how far it is.

    Raises:
        CreateFailed: it cannot be had.
    """
    logger.info("pulling the image %s", image)
    said: dict[str, str] = {}
    try:
        name, auth = _credentials(image)
        async for event in client.images.pull(name, auth=auth, stream=True):
            status, layer = str(event.get("status", "")), str(event.get("id", ""))
            if status and said.get(layer) != status:
                said[layer] = status
                logger.info("%s: %s %s", image, layer, status)
    except Exception as exc:
        reason = exc.message if isinstance(exc, DockerError) else str(exc)
        hint = "" if _config().get("auths") or "denied" not in reason else " (credential helpers are not asked)"
        message = (
            f"the image {image} is not on this engine and could not be pulled: {reason.strip()}{hint}; build or pull "
            "it there, or set the option image"
        )
        raise CreateFailed(message, provider=PROVIDER, op="create") from exc
    logger.info("pulled the image %s", image)


def _credentials(image: str) -> tuple[str, Mapping[str, Any] | None]:
    """Return the name to pull by, and what ``docker login`` keeps for its registry in plain text.

    aiodocker takes credentials only with a name that begins with the registry.
    """
    first, slash, _ = image.partition("/")
    registry = first if slash and ("." in first or ":" in first or first == "localhost") else None
    auths = _config().get("auths", {})
    entry = auths.get(registry) or auths.get(f"https://{registry}") if registry else auths.get(_HUB)
    if not entry or not (entry.get("auth") or entry.get("identitytoken")):
        return image, None
    if registry is None:
        image = f"docker.io/{image}" if slash else f"docker.io/library/{image}"
    token = entry.get("identitytoken")
    return image, {"identitytoken": token} if token else {"auth": entry["auth"]}


def _config() -> dict[str, Any]:
    directory = os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker"
    try:
        config = json.loads(Path(directory, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
