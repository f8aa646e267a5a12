"""The options of the ``vercel`` provider, and what they are to its SDK."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from mabridge.errors import ConfigError
from mabridge.identity import KEY_LABEL
from mabridge.providers._shell import check_env
from mabridge.sandbox import EnvVar, ProviderOptions, SandboxSpec

if TYPE_CHECKING:
    from vercel import sandbox as sdk
    from vercel.sandbox import SandboxClient

__all__ = ["VercelOptions", "connect", "create_options"]

_MOST_TAGS = 5  # https://vercel.com/docs/sandbox/concepts/tags
_CONNECT = 10.0
_ANSWER = 60.0
_DAY = 86_400


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class VercelTransform(_Model):
    """What is changed in a request on its way out."""

    headers: dict[str, str | EnvVar]
    """Headers that are set. The sandbox never sees their values."""


class VercelRule(_Model):
    """What is done with the requests to a domain."""

    transform: tuple[VercelTransform, ...] = Field(min_length=1)
    """Changes, in turn."""


class VercelSubnets(_Model):
    """Networks in CIDR notation."""

    allow: tuple[str, ...] | None = None
    """Reached without regard to the domain."""
    deny: tuple[str, ...] | None = None
    """Never reached, whatever is allowed."""


class VercelNetworkPolicy(_Model):
    """What the sandbox may reach; all else is denied."""

    allow: tuple[str, ...] | dict[str, tuple[VercelRule, ...]] = ()
    """Domains such as ``*.pypi.org``, or domains with rules for each."""
    subnets: VercelSubnets | None = None
    """Networks."""


class VercelGit(_Model):
    """A repository that is cloned into the sandbox."""

    type: Literal["git"]
    url: str
    depth: int | None = None
    revision: str | None = None
    username: str | None = None
    password: EnvVar | None = None


class VercelTarball(_Model):
    """An archive that is unpacked in the sandbox."""

    type: Literal["tarball"]
    url: str


class VercelSnapshot(_Model):
    """A snapshot that the sandbox starts from."""

    type: Literal["snapshot"]
    snapshot_id: str


class VercelResources(_Model):
    """The size of the sandbox."""

    vcpus: int | None = None
    """Virtual CPUs."""
    memory: int | None = None
    """MiB of memory."""


class VercelOptions(ProviderOptions):
    """Options of the ``vercel`` provider, named as Vercel's SDK names them."""

    token: EnvVar | None = None
    """The access token. By default the SDK finds what it needs: ``VERCEL_OIDC_TOKEN``, or ``VERCEL_TOKEN`` with
    ``VERCEL_TEAM_ID`` and ``VERCEL_PROJECT_ID``."""
    team_id: str | None = None
    """The team, if `token` is given; by default ``VERCEL_TEAM_ID``."""
    project_id: str | None = None
    """The project, if `token` is given; by default ``VERCEL_PROJECT_ID``."""
    base_url: str | None = None
    """The API, if not ``https://vercel.com/api``."""
    image: str | None = None
    """The image; by default ``vercel/sandbox/universal:latest``."""
    source: Annotated[VercelGit | VercelTarball | VercelSnapshot, Field(discriminator="type")] | None = None
    """What the sandbox starts with: ``{ type = "git", url = ... }``, ``{ type = "tarball", url = ... }`` or
    ``{ type = "snapshot", snapshot_id = ... }``."""
    resources: VercelResources | None = None
    """``{ vcpus = 4, memory = 8192 }``; memory in MiB."""
    persistent: bool = True
    """Whether a stop keeps the files, as a snapshot that is billed as storage. Without it nothing can be suspended."""
    snapshot_expiration: float | None = Field(default=None, ge=0)
    """Seconds after its last use that a snapshot is kept; a day at least, 0 for ever; by default Vercel's 30 days."""
    network_policy: Literal["allow-all", "deny-all"] | VercelNetworkPolicy = "deny-all"
    """``"deny-all"``, ``"allow-all"``, or ``{ allow = [domains], subnets = { allow = [], deny = [] } }``. Headers are
    put into requests by ``allow = { "api.example.com" = [{ transform = [{ headers = { ... } }] }] }``."""
    network_id: str | None = None
    """The Secure Compute network that it is connected to."""
    region: str | None = None
    """Where it runs; by default ``VERCEL_REGION``, else as Vercel chooses."""
    failover_regions: tuple[str, ...] | None = None
    """Where else it may run."""
    tags: dict[str, str] = Field(default_factory=dict)
    """More tags. Vercel takes five, of which mabridge sets up to three."""

    @field_validator("snapshot_expiration")
    @classmethod
    def _check_expiration(cls, value: float | None) -> float | None:
        if value and not _DAY <= value <= 3650 * _DAY:
            raise ValueError("must be 0, or between a day (86400) and ten years")
        return value

    @property
    def mode(self) -> Literal["allow-all", "deny-all", "custom"]:
        """The network policy in a word."""
        return self.network_policy if isinstance(self.network_policy, str) else "custom"


def connect(options: VercelOptions) -> SandboxClient:
    """Return a client, which does no I/O yet.

    Raises:
        ConfigError: a credential that the options name is not there.
    """
    import httpx2
    from vercel.sandbox import SandboxClient, SandboxCredentials, SandboxServiceOptions

    def http() -> httpx2.AsyncClient:
        # Each running command, and each process held open, is a connection of its own: they are bounded by the worker.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=100)
        return httpx2.AsyncClient(timeout=httpx2.Timeout(_ANSWER, connect=_CONNECT), limits=limits)

    factory = None
    if options.token is not None:
        team, project = (
            given or os.environ.get(name)
            for given, name in ((options.team_id, "VERCEL_TEAM_ID"), (options.project_id, "VERCEL_PROJECT_ID"))
        )
        if not team or not project:
            raise ConfigError("vercel: the option token needs team_id and project_id as well")
        credentials = SandboxCredentials(token=options.token.read(), team_id=team, project_id=project)

        async def factory() -> SandboxCredentials:
            return credentials

    elif options.team_id or options.project_id:
        raise ConfigError("vercel: team_id and project_id are for the option token, which is not set")
    service = SandboxServiceOptions(base_url=options.base_url, credentials_factory=factory)
    return SandboxClient.create(options=service, httpx_client_factory=http)


def create_options(options: VercelOptions, spec: SandboxSpec, env: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments of ``create_sandbox`` but for the name.

    Args:
        options: of the provider.
        spec: of the sandbox.
        env: more environment variables.

    Raises:
        ConfigError: there would be too many tags, or a secret is not set.
    """
    from vercel import sandbox as sdk

    tags = {**options.tags, **spec.labels, KEY_LABEL: spec.key}
    if len(tags) > _MOST_TAGS:
        raise ConfigError(
            f"vercel: the option tags makes {len(tags)} tags with mabridge's, and {_MOST_TAGS} are the most"
        )
    resources = options.resources
    return {
        "image": options.image,
        "source": _source(options),
        "execution_time_limit": spec.ttl,
        "resources": resources and sdk.SandboxResources(vcpus=resources.vcpus, memory=resources.memory),
        "persistent": options.persistent,
        "snapshot_expiration": options.snapshot_expiration,
        "network_policy": _network_policy(options),
        "network_id": options.network_id,
        "region": options.region,
        "failover_regions": options.failover_regions,
        "env": {**check_env(spec.env), **env},
        "tags": tags,
    }


def _source(options: VercelOptions) -> sdk.SandboxSource | None:
    from vercel import sandbox as sdk

    source = options.source
    if isinstance(source, VercelGit):
        password = source.password and source.password.read()
        return sdk.GitSource(**{**source.model_dump(), "password": password})
    if isinstance(source, VercelTarball):
        return sdk.TarballSource(url=source.url)
    return None if source is None else sdk.SnapshotSource(snapshot_id=source.snapshot_id)


def _network_policy(options: VercelOptions) -> sdk.NetworkPolicy:
    from vercel import sandbox as sdk

    policy = options.network_policy
    if isinstance(policy, str):
        return sdk.NetworkPolicy.deny_all() if policy == "deny-all" else sdk.NetworkPolicy.allow_all()
    rules = policy.allow if isinstance(policy.allow, dict) else dict.fromkeys(policy.allow, ())
    allow = {domain: [_rule(rule) for rule in those] for domain, those in rules.items()}
    given = policy.subnets
    subnets = None if given is None else sdk.NetworkPolicySubnets(allow=given.allow, deny=given.deny)
    return sdk.NetworkPolicy.custom(allow=allow, subnets=subnets)


def _rule(rule: VercelRule) -> sdk.NetworkPolicyRule:
    from vercel import sandbox as sdk

    return sdk.NetworkPolicyRule(
        transform=[
            sdk.NetworkPolicyTransform(
                headers={
                    name: value.read() if isinstance(value, EnvVar) else value
                    for name, value in transform.headers.items()
                }
            )
            for transform in rule.transform
        ]
    )
