"""A client of the API for the commands that ask it something."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mabridge.config import WorkerConfig

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic

__all__ = ["connect"]


def connect(worker: WorkerConfig) -> AsyncAnthropic:
    """Return a client that authenticates with the environment key, with connections for all of its sessions.

    Raises:
        ConfigError: the key's environment variable is not set.
    """
    key = worker.environment_key.read()
    from mabridge.control_plane.client import make_client

    return make_client(key=key, base_url=worker.base_url, sessions=worker.max_sessions)
