"""A client of the API for the commands that ask it something."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mabridge.config import WorkerConfig

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic

__all__ = ["connect"]


def connect(worker: WorkerConfig) -> AsyncAnthropic:
    """Return a client that authenticates with the environment key, and with no other credential.

    Raises:
        ConfigError: the key's environment variable is not set.
    """
    key = worker.environment_key.read()
    from anthropic import AsyncAnthropic

    return AsyncAnthropic(auth_token=key, base_url=worker.base_url, max_retries=1, timeout=20.0)
