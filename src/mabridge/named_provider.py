"""A provider as a configuration has it: with its name, and what becomes of its sandboxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mabridge.config import ProviderConfig, cannot_suspend
from mabridge.errors import ConfigError
from mabridge.plugins import make_provider
from mabridge.sandbox import Provider

__all__ = ["NamedProvider", "WhenDone"]

WhenDone = Literal["keep", "suspend", "teardown"]


@dataclass(frozen=True, kw_only=True)
class NamedProvider:
    """A provider as it was configured.

    Attributes:
        name: what the configuration calls this instance.
        provider: the adapter, entered.
        when_done: what becomes of a sandbox when its session is done with.
        ttl: seconds that a sandbox outlives its worker.
        idle_ttl: seconds that it is kept for its session's next message; ``ttl`` by default.
        max_sandboxes: sessions that may have a sandbox here at once, of this worker; ``None`` is no limit.
    """

    name: str
    provider: Provider
    when_done: WhenDone = "keep"
    ttl: float = 3600.0
    idle_ttl: float | None = None
    max_sandboxes: int | None = None

    def __post_init__(self) -> None:
        """Refuse what the provider cannot do.

        Raises:
            ConfigError: sandboxes are to be suspended that cannot be.
        """
        if self.when_done == "suspend" and not self.provider.can_suspend:
            raise ConfigError(f"{self.name or self.provider.type}: when_done: {cannot_suspend(self.provider)}")

    @classmethod
    def configured(cls, name: str, config: ProviderConfig) -> NamedProvider:
        """Return the instance that `config` describes; its provider is still to be entered.

        Raises:
            ConfigError: the configuration is wrong.
            PluginError: the provider's class cannot be loaded.
        """
        return cls(
            name=name,
            provider=make_provider(config, name),
            when_done=config.when_done,
            ttl=config.ttl,
            idle_ttl=config.idle_ttl,
            max_sandboxes=config.max_sandboxes,
        )

    @property
    def kept_for(self) -> float:
        """Seconds that a sandbox is kept for its session's next message."""
        return self.ttl if self.idle_ttl is None else self.idle_ttl
