"""The service: a client of it, its errors in our terms, and the states that its sandboxes go through."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import anyio

from mabridge.errors import (
    AtCapacity,
    CreateFailed,
    SandboxError,
    SandboxGone,
    SandboxUnavailable,
    translated,
)
from mabridge.sandbox import EnvVar

if TYPE_CHECKING:
    from daytona import AsyncDaytona, AsyncSandbox

    from mabridge.providers.daytona.options import DaytonaOptions

__all__ = ["CALL", "PROVIDER", "SETTLE", "connect", "delete", "is_gone", "mapped", "state_of", "time_of", "woken"]

logger = logging.getLogger("mabridge.providers.daytona")

PROVIDER = "daytona"
CALL = 30.0
"""Seconds for one request to the API."""
SETTLE = 120.0
"""Seconds for a sandbox to start, or for what another worker does with it to come to an end."""
_REMOVE = 90.0
_DOWN = 10.0  # a sandbox whose removal Daytona has taken on is as good as removed


@asynccontextmanager
async def connect(options: DaytonaOptions) -> AsyncIterator[AsyncDaytona]:
    """Open a client, bound to this event loop. Nothing is sent yet."""
    import daytona

    jwt = options.jwt_token.read() if options.jwt_token is not None else None
    key = (options.api_key or EnvVar(env="DAYTONA_API_KEY")).read() if jwt is None else None
    target = options.target or os.environ.get("DAYTONA_TARGET")
    config = daytona.DaytonaConfig(
        api_key=key,
        jwt_token=jwt,
        organization_id=options.organization_id,
        api_url=(options.api_url or os.environ.get("DAYTONA_API_URL") or "https://app.daytona.io/api").rstrip("/"),
        target=target,
        # Every running command holds a connection, and the request that is to kill one must not wait for another.
        connection_pool_maxsize=None,
        use_deprecated_polling=True,  # the other way holds a socket open that nobody owns, for a state asked for seldom
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of that deprecation, and of a .env that it did not heed
        client = daytona.AsyncDaytona(config)
    client._target = target  # what is not given it would take from a file .env in the working directory
    async with client:
        yield client


def mapped(op: str, sandbox_id: str | None = None) -> AbstractContextManager[None]:
    """Raise what Daytona, its SDK, or the way to it did as an error of `mabridge.errors`."""
    return translated(lambda error: _translated(error, op, sandbox_id))


def _translated(error: Exception, op: str, sandbox_id: str | None) -> SandboxError:
    import daytona

    where: dict[str, Any] = {"provider": PROVIDER, "op": op, "sandbox_id": sandbox_id}
    said = " ".join(str(error).split())[:500] or type(error).__name__
    making = op in ("create", "check")
    match error:
        case daytona.DaytonaRateLimitError():
            return AtCapacity(f"Daytona's rate limit was met: {said}", retry_after=_retry_after(error.headers), **where)
        case daytona.DaytonaAuthenticationError():
            message = f"Daytona refused the API key; set the variable that holds it to one that is valid: {said}"
            return CreateFailed(message, **where) if making else SandboxUnavailable(message, retryable=False, **where)
        case daytona.DaytonaQueueTimeoutError():
            return AtCapacity(said, **where)
        case daytona.DaytonaSpotEvictedError():
            return SandboxGone(said, **where)
        case daytona.DaytonaError() if making and any(word in said.lower() for word in _FULL):
            return AtCapacity(said, **where)
        case daytona.DaytonaNotFoundError() if making:
            return CreateFailed(f"{said}; set the option snapshot, image or target to what there is", **where)
        case daytona.DaytonaNotFoundError() | daytona.DaytonaGoneError():
            return SandboxGone(said, **where)
        case daytona.DaytonaConflictError():
            return SandboxUnavailable(said, **where)
        case daytona.DaytonaError(status_code=int(status)) if status < 500 and status != 408:
            return CreateFailed(said, **where) if making else SandboxUnavailable(said, retryable=False, **where)
        case daytona.DaytonaError(status_code=None) if op == "create" and "error state" in said:
            return CreateFailed(said, **where)
        case TimeoutError():
            return SandboxUnavailable(f"no answer from Daytona in time{f': {said}' if error.args else ''}", **where)
    return SandboxUnavailable(f"Daytona could not be reached, or failed: {said}", **where)


_FULL = ("limit exceeded", "quota", "no available runner", "no runners", "capacity")


def _retry_after(headers: Mapping[str, Any]) -> float | None:
    """Seconds, from ``Retry-After`` or its variant for the kind of request, such as ``Retry-After-sandbox-create``."""
    for name, value in headers.items():
        if name.lower().startswith("retry-after"):
            with contextlib.suppress(ValueError):
                return float(value)
    return None


async def woken(box: AsyncSandbox) -> AsyncSandbox | None:
    """Return a sandbox once it has started, started again if need be; None if it is gone or broken for good."""
    import daytona

    with anyio.fail_after(SETTLE):
        while not is_gone(box):
            state = state_of(box)
            if state == "started" and _desired(box) in (None, "started"):
                return box
            try:
                if state in ("stopped", "archived", "paused"):
                    await box.start(timeout=0)
                    continue
                if state == "error" and box.recoverable:
                    await box.recover(timeout=0)
                    continue
                if state in ("error", "build_failed"):
                    return None
            except daytona.DaytonaConflictError:
                logger.debug("%s: its state is being changed already", box.id)
            await anyio.sleep(0.2)
            try:
                await box.refresh_data()
            except daytona.DaytonaNotFoundError:
                return None
    return None


async def delete(box: AsyncSandbox) -> None:
    """Have a sandbox removed, and wait until it is down: until then, it may go on taking commands."""
    import daytona

    with anyio.fail_after(_REMOVE):
        while True:
            try:
                await box.delete(timeout=0)
                with anyio.move_on_after(_DOWN):
                    while state_of(box) != "destroyed":
                        await anyio.sleep(0.05)
                        await box.refresh_data()
                return
            except daytona.DaytonaNotFoundError:
                return
            except daytona.DaytonaConflictError:  # it is being made, stopped or removed already
                try:
                    await box.refresh_data()
                except daytona.DaytonaNotFoundError:
                    return
                if is_gone(box):
                    return
            await anyio.sleep(0.2)


def state_of(box: AsyncSandbox) -> str:
    return box.state.value if box.state is not None else "unknown"


def _desired(box: AsyncSandbox) -> str | None:
    return box.desired_state.value if box.desired_state is not None else None


def is_gone(box: AsyncSandbox) -> bool:
    return state_of(box) in ("destroyed", "destroying") or _desired(box) == "destroyed"


def time_of(text: str | None) -> datetime | None:
    if not text:
        return None
    time = datetime.fromisoformat(text)
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)
