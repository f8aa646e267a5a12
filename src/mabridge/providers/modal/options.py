"""The options of the ``modal`` provider. Pure."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from mabridge.providers._env import SandboxEnv
from mabridge.sandbox import EnvVar, ProviderOptions

__all__ = ["ModalOptions"]


class ModalOptions(ProviderOptions):
    """Options of the ``modal`` provider, named as Modal names them."""

    app: Annotated[str, Field(max_length=53)] = "mabridge"
    """The app that the sandboxes belong to; made if missing. Suspended ones are noted in a volume named for it."""
    environment_name: str | None = None
    """Modal's environment; the token's default otherwise."""
    token_id: EnvVar | None = None
    """The variable with the token's id. Without it, what the SDK finds: ``MODAL_TOKEN_ID``, ``~/.modal.toml``."""
    token_secret: EnvVar | None = None
    """The variable with the token's secret; set together with ``token_id``."""
    image: str = "python:3.13-slim"
    """An image's name in a registry, for ``linux/amd64``, or the id (``im-...``) of one that Modal has built."""
    add_python: str | None = None
    """The version of Python that Modal adds to a registry's image that has none, which Modal requires."""
    registry_secret: str | None = None
    """The name of the Modal secret with the registry's credentials."""
    cpu: float | tuple[float, float] | None = None
    """Cores to reserve, or a reservation and a limit."""
    memory: int | tuple[int, int] | None = None
    """MiB to reserve, or a reservation and a limit. What passes the limit is killed."""
    gpu: str | None = None
    """Such as ``A10G`` or ``H100:2``."""
    cloud: str | None = None
    """The cloud to run in."""
    region: str | tuple[str, ...] | None = None
    """The region, or regions, to run in."""
    timeout: Annotated[int, Field(ge=1, le=86_400)] = 86_400
    """Seconds after which Modal ends the sandbox, whatever keeps it alive. A day is Modal's most."""
    idle_timeout: Annotated[int, Field(ge=1)] | None = None
    """Seconds without a command after which Modal ends it."""
    snapshot_ttl: Annotated[int, Field(ge=1)] = 7 * 86_400
    """Seconds that a suspended sandbox is kept. Modal deletes its snapshot a little later."""
    block_network: bool = False
    """No network at all."""
    outbound_cidr_allowlist: tuple[str, ...] | None = None
    """All that may be reached, as address ranges; any port."""
    outbound_domain_allowlist: tuple[str, ...] | None = None
    """All that may be reached, as domains (``*.example.com`` too); Modal looks at the name in TLS, on port 443."""
    volumes: dict[str, str] = Field(default_factory=dict)
    """Modal volumes: absolute path in the sandbox to the volume's name."""
    secrets: tuple[str, ...] = ()
    """Names of Modal secrets that become variables in the sandbox. The agent can read them."""
    env: SandboxEnv = Field(default_factory=dict)
    """For every command. The agent can read it, so no secret that it should not have."""
    connect_timeout: Annotated[float, Field(gt=0)] = 15.0
    """Seconds until a Modal that cannot be reached is said to be so; the SDK by itself would try for 63."""
    max_throttle_wait: Annotated[int, Field(ge=0)] = 10
    """Seconds that the SDK may wait when Modal says to slow down; without a bound it would do so for ever. Holds for
    the whole process, unless ``MODAL_MAX_THROTTLE_WAIT`` is set."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.token_id is None) != (self.token_secret is None):
            raise ValueError("token_id and token_secret are set together or not at all")
        lists = (self.outbound_cidr_allowlist, self.outbound_domain_allowlist)
        if self.block_network and lists != (None, None):
            raise ValueError("block_network allows nothing, so outbound_..._allowlist does not go with it")
        return self
