"""What every part of the local platform shares: identifiers, time stamps, error bodies, page cursors.

The shape of an error is that of the SDK's `anthropic.types.shared.error_object`; identifiers have the prefixes that the
platform's documentation shows (``sesn_``, ``sevt_``, ``sthr_``, ``env_``).
"""

from __future__ import annotations

import base64
import binascii
import secrets
import time
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

__all__ = ["ApiError", "Clock", "Json", "decode_cursor", "encode_cursor", "new_id", "text_block"]

Json: TypeAlias = dict[str, Any]

_TYPE_OF_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    412: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class ApiError(Exception):
    """An error answer, as the platform words it.

    Args:
        status: the HTTP status.
        message: for the person who reads it.
        details: ``error.details``, where the platform has some.
        error_type: ``error.type``; by default what goes with the status.
    """

    def __init__(
        self, status: int, message: str, *, details: Json | None = None, error_type: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.details = details
        self.error_type = error_type or _TYPE_OF_STATUS.get(status, "api_error")

    def body(self) -> Json:
        """Return the JSON body of the answer."""
        error: Json = {"type": self.error_type, "message": self.message}
        if self.details is not None:
            error["details"] = self.details
        return {"type": "error", "error": error}


class Clock:
    """Time for leases, and time stamps that never repeat, so that no two events or heartbeats carry the same one."""

    def __init__(self) -> None:
        self._last = datetime.fromtimestamp(0, UTC)

    def monotonic(self) -> float:
        """Return seconds on a clock that never goes back."""
        return time.monotonic()

    def stamp(self) -> str:
        """Return the time now as RFC 3339 with microseconds, later than every one before."""
        self._last = max(datetime.now(UTC), self._last + timedelta(microseconds=1))
        return self._last.isoformat(timespec="microseconds").replace("+00:00", "Z")


def new_id(prefix: str) -> str:
    """Return a new identifier, such as ``sesn_01k3v...``."""
    return f"{prefix}_01{secrets.token_hex(11)}"


def text_block(text: str) -> Json:
    """Return a text content block."""
    return {"type": "text", "text": text}


def encode_cursor(position: int) -> str:
    """Return the opaque page cursor that stands for a position."""
    return "page_" + base64.urlsafe_b64encode(str(position).encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> int:
    """Return the position a cursor stands for.

    Raises:
        ApiError: 400, if it is none of ours.
    """
    try:
        kind, _, body = cursor.partition("_")
        if kind == "page":
            return int(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    except (ValueError, binascii.Error):
        pass
    raise ApiError(400, "page: invalid cursor")
