"""What Vercel's SDK raises, and what that is here."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import anyio

from mabridge.errors import AtCapacity, ConfigError, CreateFailed, SandboxError, SandboxUnavailable

__all__ = ["PROVIDER", "is_lifecycle", "mapped"]

PROVIDER = "vercel"

_LIFECYCLE = ("sandbox_stopped", "sandbox_stopping", "sandbox_snapshotting")


def is_lifecycle(exc: BaseException) -> bool:
    """Whether Vercel says that a session has stopped, is about to, or never was."""
    from vercel import sandbox as sdk

    if isinstance(exc, sdk.SandboxStreamError):
        return exc.code in _LIFECYCLE
    if not isinstance(exc, sdk.SandboxApiError):
        return False
    closed = exc.status_code == 410 and exc.code != "sandbox_stream_closed"
    return closed or exc.status_code == 404 or exc.code in _LIFECYCLE


@asynccontextmanager
async def mapped(
    op: str, sandbox_id: str | None = None, stopped: Callable[[str], Awaitable[SandboxError]] | None = None
) -> AsyncIterator[None]:
    """Turn what Vercel's SDK raises into mabridge's errors.

    Args:
        op: the operation, for the message.
        sandbox_id: the sandbox that it concerns.
        stopped: is asked why that does not answer, when Vercel says no more than that it does not.
    """
    import httpx2
    from vercel import sandbox as sdk
    from vercel.errors import VercelError

    try:
        yield
    except sdk.SandboxCredentialsError as exc:
        raise ConfigError(f"vercel: {_line(exc)} Or set the options token, team_id and project_id.") from exc
    except (VercelError, httpx2.HTTPError, anyio.BrokenResourceError, anyio.ClosedResourceError, TimeoutError) as exc:
        cause: BaseException = exc
        while isinstance(cause, (sdk.SandboxStdinError, sdk.SandboxFilesystemWriteError)):
            cause = cause.cause
        if stopped is not None and (is_lifecycle(cause) or isinstance(exc, anyio.BrokenResourceError)):
            async with mapped(op, sandbox_id):
                raise await stopped(op) from exc
        raise _translated(cause, op, sandbox_id) from exc
    except ValueError as exc:
        if stopped is None:
            raise
        message = "what came from the sandbox made no sense"
        raise SandboxUnavailable(message, provider=PROVIDER, op=op, sandbox_id=sandbox_id) from exc


def _translated(exc: BaseException, op: str, sandbox_id: str | None) -> SandboxError:
    from vercel import sandbox as sdk

    where: dict[str, Any] = {"provider": PROVIDER, "op": op, "sandbox_id": sandbox_id}
    final = CreateFailed if op in ("create", "check") else SandboxUnavailable
    if isinstance(exc, sdk.SandboxApiError):
        said = f"{_line(exc)} ({exc.status_code}{' ' + exc.code if exc.code else ''})"
        if exc.status_code in (401, 403):
            return final(
                f"Vercel refused the credentials: {said}; see token, team_id, project_id", retryable=False, **where
            )
        if exc.status_code == 429:
            return AtCapacity(
                f"Vercel's limit was met: {said}", retry_after=_retry_after(exc.response.headers), **where
            )
        if 400 <= exc.status_code < 500:
            return final(said, retryable=final is SandboxUnavailable and is_lifecycle(exc), **where)
        return SandboxUnavailable(said, **where)
    if isinstance(exc, TimeoutError):
        return SandboxUnavailable("no answer from Vercel in time", **where)
    return SandboxUnavailable(f"Vercel could not be reached: {_line(exc)}", **where)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait; Vercel gives the time of its reset where it gives no Retry-After."""
    if re.fullmatch(r"\d+(\.\d+)?", after := headers.get("retry-after", "")):
        return float(after)
    reset = headers.get("x-ratelimit-reset", "")
    return max(float(reset) - time.time(), 0.0) if reset.isdigit() else None


def _line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:500] or type(exc).__name__
