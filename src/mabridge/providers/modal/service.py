"""The service of Modal: reaching it, and its errors in our terms."""

from __future__ import annotations

import asyncio
import math
import os
import urllib.parse
import urllib.request
from collections.abc import Awaitable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import anyio
import modal
from modal.config import config
from modal.exception import (
    AlreadyExistsError,
    AuthError,
    ConflictError,
    Error,
    ImageBuildError,
    InvalidError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnimplementedError,
    VersionError,
)

from mabridge.errors import (
    AtCapacity,
    ConfigError,
    CreateFailed,
    SandboxError,
    SandboxGone,
    SandboxUnavailable,
    translated,
)
from mabridge.providers.modal.options import ModalOptions

__all__ = ["CALL", "PROVIDER", "call", "connect", "mapped"]

T = TypeVar("T")
PROVIDER = "modal"
CALL = 60.0
"""Seconds that a call may take."""
_CANCEL = 10.0  # seconds for a call that was cancelled to come to its end
_TOKEN = "set the options token_id and token_secret, or run: modal token new"  # noqa: S105 - what to do


async def call(awaitable: Awaitable[T], *, within: float = math.inf) -> T:
    """Return what a call of the SDK returns.

    The SDK runs calls on a loop of its own. It has to be told once that one is cancelled, and then to be waited for:
    anyio says so again and again, and what the SDK would have said in the end is told by asyncio as nobody's error.

    Args:
        awaitable: the call.
        within: seconds.

    Raises:
        TimeoutError: it took longer.
    """
    with anyio.fail_after(within):
        task = asyncio.ensure_future(awaitable)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            with anyio.CancelScope(shield=True), anyio.move_on_after(_CANCEL):
                await asyncio.wait([task])
            if task.done() and not task.cancelled():
                task.exception()  # it is not told, for the call was given up
            raise


async def connect(options: ModalOptions) -> tuple[modal.Client, bool]:
    """Return an open client, and whether it is ours to close.

    Where Modal is comes from the SDK's own setting, ``MODAL_SERVER_URL``.

    Raises:
        ConfigError: there is no token.
        SandboxUnavailable: Modal cannot be reached.
    """
    os.environ.setdefault("MODAL_MAX_THROTTLE_WAIT", str(options.max_throttle_wait))
    try:
        with anyio.fail_after(options.connect_timeout):
            await _reach(config["server_url"])
            if options.token_id is None or options.token_secret is None:
                return await call(modal.Client.from_env.aio()), False  # one for the whole process
            token = options.token_id.read(), options.token_secret.read()
            return await call(modal.Client.from_credentials.aio(*token)), True
    except (AuthError, InvalidError) as exc:
        said = _line(exc).partition(". ")[0]  # the rest is the SDK's own advice
        raise ConfigError(f"modal: {said}; {_TOKEN}") from exc
    except (TimeoutError, OSError, Error) as exc:
        said = str(exc) or f"no answer within {options.connect_timeout:.0f} s"
        message = f"the API of Modal, {config['server_url']}, could not be reached: {' '.join(said.split())}"
        raise SandboxUnavailable(message, provider=PROVIDER, op="connect") from exc


async def _reach(server_url: str) -> None:
    """Return if one of the addresses takes connections.

    The SDK tries again for a minute, and when it is stopped, tells its failures on stderr.

    Raises:
        OSError: none does.
    """
    if urllib.request.getproxies():
        return  # it is reached by another way
    failure = OSError("there is no address")
    for url in server_url.split(","):
        parts = urllib.parse.urlsplit(url.strip())
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            return
        try:
            async with await anyio.connect_tcp(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)):
                return
        except OSError as exc:
            failure = exc
    raise failure


def mapped(op: str, sandbox_id: str | None = None) -> AbstractContextManager[None]:
    """Raise what Modal, its SDK, or the way to it, did as an error of `mabridge.errors`.

    Args:
        op: the operation.
        sandbox_id: of the sandbox that it is about.
    """
    return translated(lambda error: _translated(error, op, sandbox_id))


def _translated(error: Exception, op: str, sandbox_id: str | None) -> SandboxError:
    where: dict[str, Any] = {"provider": PROVIDER, "op": op, "sandbox_id": sandbox_id}
    said = _line(error)
    final = CreateFailed if op in ("create", "check") else _Final
    if isinstance(error, (AuthError, PermissionDeniedError)):
        return final(f"Modal refuses the token: {said}; {_TOKEN}", **where)
    if isinstance(error, ResourceExhaustedError):
        return AtCapacity(
            f"Modal has no room, or its rate limit was met: {said}", retry_after=_retry_after(error), **where
        )
    if isinstance(error, ImageBuildError):
        return CreateFailed(
            f"the image could not be built: {said}; see modal image logs, and the option image", **where
        )
    if isinstance(error, NotFoundError) and sandbox_id is not None:
        return SandboxGone(said, **where)
    if isinstance(error, (UnimplementedError, VersionError)):
        return final(f"this version of the SDK and Modal do not fit: {said}; pip install -U modal", **where)
    if isinstance(error, (InvalidError, NotFoundError, AlreadyExistsError)) and not isinstance(error, ConflictError):
        return final(said, **where)
    if isinstance(error, TimeoutError):
        said = "no answer in time"
    return SandboxUnavailable(f"the connection to Modal failed: {said}", **where)


def _Final(message: str, **where: Any) -> SandboxUnavailable:  # noqa: ANN401, N802 - stands for a class
    return SandboxUnavailable(message, retryable=False, **where)


def _retry_after(error: Exception) -> float | None:
    """Return the seconds that the server told, which the SDK keeps with the error."""
    for detail in getattr(error, "_grpc_details", None) or ():
        seconds = getattr(detail, "retry_after_secs", None)
        if seconds is not None:
            return float(seconds)
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
