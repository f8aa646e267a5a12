"""The options of the ``e2b`` provider."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mabridge.providers._env import SandboxEnv
from mabridge.sandbox import EnvVar, ProviderOptions

__all__ = ["ALL", "E2BNetwork", "E2BOptions"]

ALL = "0.0.0.0/0"
"""What E2B calls all traffic."""


class E2BNetwork(BaseModel):
    """What the sandbox may reach."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    allow_out: tuple[str, ...] = ()
    """Addresses, CIDR blocks and domains that may be reached whatever is denied."""
    deny_out: tuple[str, ...] = ()
    """Addresses and CIDR blocks that may not; ``0.0.0.0/0`` is everything."""


class E2BOptions(ProviderOptions):
    """Options of the ``e2b`` provider, named as E2B names them."""

    template: str = "base"
    """The template's name or id. Its CPUs, memory and disk are the sandbox's. It needs ``bash`` and coreutils."""
    api_key: EnvVar = EnvVar(env="E2B_API_KEY")
    """The variable that holds the key."""
    domain: str | None = None
    """Where the service is; by default ``E2B_DOMAIN``, or else ``e2b.app``. For self-hosted and compatible services."""
    api_url: str | None = None
    """The control plane's URL, if it is not ``https://api.{domain}``."""
    sandbox_url: str | None = None
    """The URL of all sandboxes, if it is not made from the domain."""
    user: str | None = None
    """Who commands run as, such as ``root``; the template's default user otherwise, which is ``user``."""
    allow_internet_access: bool = True
    """Whether the sandbox reaches the internet at all. What ``network.allow_out`` names it reaches in any case."""
    network: E2BNetwork = E2BNetwork()
    """Rules for what leaves the sandbox."""
    volume_mounts: dict[str, str] = Field(default_factory=dict)
    """E2B volumes: absolute path in the sandbox to the volume's name."""
    env: SandboxEnv = Field(default_factory=dict)
    """For every command. The agent can read it, so no secret that it should not have. The template's login profile is
    read after it, which on Debian sets ``PATH`` anew."""
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    """How often the SDK repeats a request to the control plane that met a rate limit or a server at fault."""

    @model_validator(mode="before")
    @classmethod
    def _of_the_template(cls, data: Any) -> Any:  # noqa: ANN401 - whatever was given
        for name in ("cpu", "cpus", "memory", "disk", "gpu", "image") if isinstance(data, dict) else ():
            if name in data:
                raise ValueError(f"{name}: E2B takes it from the template; build one with it, and set template")
        return data

    @model_validator(mode="after")
    def _restricts(self) -> Self:
        if self.network.allow_out and self.allow_internet_access and ALL not in self.network.deny_out:
            raise ValueError(
                "network.allow_out restricts nothing by itself, for E2B allows what it does not deny; "
                "set allow_internet_access = false too"
            )
        return self
