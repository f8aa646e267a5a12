"""The client of the API that a worker makes for itself."""

from __future__ import annotations

import httpx2
from anthropic import AsyncAnthropic, DefaultAsyncHttpxClient

__all__ = ["make_client"]

# The event stream, and whatever else goes on at the same time.
_A_SESSION = 4
_BESIDES = 32


def make_client(*, key: str, base_url: str | None, sessions: int = 1) -> AsyncAnthropic:
    """Return a client that authenticates with the environment key, and with no other credential.

    Args:
        key: the environment key.
        base_url: of the API; ``None`` is the SDK's own.
        sessions: how many it has to have connections for. The SDK's own client has 1,000 at most, and each session
            holds one for its event stream: with none left, heartbeats would wait until the leases have lapsed.
    """
    limits = httpx2.Limits(
        max_connections=sessions * _A_SESSION + _BESIDES, max_keepalive_connections=sessions + _BESIDES
    )
    return AsyncAnthropic(
        auth_token=key,
        base_url=base_url,
        max_retries=1,
        timeout=20.0,
        http_client=DefaultAsyncHttpxClient(limits=limits, timeout=20.0),
    )
