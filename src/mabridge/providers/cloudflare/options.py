"""The options of the ``cloudflare`` provider."""

from __future__ import annotations

import contextlib
import ipaddress
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from mabridge.providers._env import SandboxEnv
from mabridge.sandbox import EnvVar, ProviderOptions

__all__ = ["CloudflareOptions"]


class CloudflareOptions(ProviderOptions):
    """Options of the ``cloudflare`` provider. Image, size and network of the sandboxes are the Worker's."""

    worker_url: str
    """Where the Worker is, such as ``https://mabridge.example.workers.dev``. ``http`` is for this machine only."""
    api_key: EnvVar = EnvVar(env="CLOUDFLARE_SANDBOX_API_KEY")
    """What the Worker's secret ``SANDBOX_API_KEY`` is."""
    sleep_after: float = Field(default=600.0, gt=0)
    """Seconds: what ``sleepAfter`` is in a Worker that is not that of ``examples/cloudflare``, where no ``ttl`` can be
    longer. The container stops when it was idle for so long, and its files are lost."""
    env: SandboxEnv = Field(default_factory=dict)
    """For every command. The agent can read it, and the Worker's logs show it, so no secret."""
    max_connections: int = Field(default=256, ge=1)
    """To the Worker, at once. A command holds one for as long as it runs."""

    @field_validator("worker_url")
    @classmethod
    def _safe(cls, url: str) -> str:
        parts = urlsplit(url)
        host = parts.hostname or ""
        if parts.query or parts.fragment or parts.username or not host or parts.scheme not in ("http", "https"):
            raise ValueError(f"{url!r} is not an address like https://mabridge.example.workers.dev")
        if parts.scheme == "http" and host != "localhost" and not _is_loopback(host):
            raise ValueError("must be https, for the key is sent there")
        return url.rstrip("/")


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False
