"""The options of the ``daytona`` provider, and the call that makes a sandbox of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mabridge.errors import NotSupported
from mabridge.identity import KEY_LABEL
from mabridge.providers._shell import check_env
from mabridge.sandbox import EnvVar, ProviderOptions, SandboxSpec

if TYPE_CHECKING:
    from daytona import AsyncSandbox, CreateSandboxFromImageParams, CreateSandboxFromSnapshotParams

__all__ = [
    "CREATOR_LABEL",
    "OURS_LABEL",
    "OWN_LABELS",
    "WORKDIR_LABEL",
    "DaytonaOptions",
    "DaytonaVolume",
    "minutes",
    "params_of",
    "require_network",
]

WORKDIR_LABEL = "mabridge.workdir"
CREATOR_LABEL = "mabridge.creator"
"""Tells which call made it."""
OURS_LABEL = "mabridge"
"""On every one: Daytona cannot filter by a label's name alone."""
OWN_LABELS = (WORKDIR_LABEL, CREATOR_LABEL, OURS_LABEL)


# To the service an empty list is none, and opens the network.
AllowList = Annotated[tuple[Annotated[str, Field(pattern=r"^[^\s,]+$")], ...], Field(min_length=1, max_length=10)]


class DaytonaVolume(BaseModel):
    """A Daytona volume to be seen in the sandbox."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    volume_id: str
    """Its id or name."""
    mount_path: str
    """Absolute path in the sandbox."""
    subpath: str | None = None
    """What of the volume is mounted; all of it otherwise."""


class DaytonaOptions(ProviderOptions):
    """Options of the ``daytona`` provider, named as Daytona names them."""

    api_key: EnvVar | None = None
    """The variable with the API key; ``DAYTONA_API_KEY`` if neither this nor ``jwt_token`` is set."""
    jwt_token: EnvVar | None = None
    """The variable with a JWT, instead of a key. Needs ``organization_id``."""
    organization_id: str | None = None
    """The organisation that the JWT is used for."""
    api_url: str | None = None
    """The API's address; ``DAYTONA_API_URL``, or else ``https://app.daytona.io/api``."""
    target: str | None = None
    """The region; ``DAYTONA_TARGET``, or else the organisation's own."""
    snapshot: str | None = None
    """The snapshot to start from; Daytona's default one if neither this nor ``image`` is set."""
    image: str | None = None
    """An image's name in a registry, from which Daytona builds a snapshot when it is first used."""
    cpu: Annotated[int, Field(ge=1)] | None = None
    """Cores. With ``image`` only: a snapshot has its own."""
    memory: Annotated[int, Field(ge=1)] | None = None
    """GiB. With ``image`` only."""
    disk: Annotated[int, Field(ge=1)] | None = None
    """GiB. With ``image`` only."""
    gpu: Annotated[int, Field(ge=1)] | None = None
    """How many. With ``image`` and ``ephemeral`` only."""
    gpu_type: tuple[str, ...] = ()
    """Such as ``H100``; several are tried in order. With ``gpu`` only."""
    os_user: str | None = None
    """Who commands run as; the image's own user otherwise."""
    network_block_all: bool = False
    """No network at all."""
    network_allow_list: AllowList | None = None
    """All that may be reached, as address ranges of IPv4, such as ``10.0.0.0/8``; at most ten."""
    domain_allow_list: AllowList | None = None
    """All that may be reached, as domains (``*.example.com`` too); at most ten."""
    auto_stop_interval: Annotated[int, Field(ge=0)] = 0
    """Minutes without a request after which Daytona stops it; a command that runs does not count. 0 is never."""
    auto_archive_interval: Annotated[int, Field(ge=0)] | None = None
    """Minutes after which a stopped one is archived, from which it starts slower; a week otherwise."""
    ephemeral: bool = False
    """Whether it is removed when it stops. Then it cannot be suspended. Some regions, and GPUs, require it."""
    volumes: tuple[DaytonaVolume, ...] = ()
    """Daytona volumes: tables of ``volume_id``, ``mount_path`` and, if only a part is wanted, ``subpath``."""
    secrets: dict[str, str] = Field(default_factory=dict)
    """Variable to the name of a Daytona secret. The sandbox holds a placeholder; Daytona puts the secret into requests
    to the hosts that it is for."""
    timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds for a sandbox to be made and started. The first use of an image may need more."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.snapshot is not None and self.image is not None:
            raise ValueError("snapshot and image do not go together")
        if self.image is None and (self.cpu or self.memory or self.disk or self.gpu):
            raise ValueError("cpu, memory, disk and gpu need image: a snapshot has its own")
        if self.gpu_type and not self.gpu:
            raise ValueError("gpu_type needs gpu")
        if self.gpu and not self.ephemeral:
            raise ValueError("gpu needs ephemeral = true: Daytona makes no other sandbox with a GPU")
        if self.network_block_all and (self.network_allow_list or self.domain_allow_list):
            raise ValueError("network_block_all allows nothing, so an allow list does not go with it")
        if self.network_allow_list and self.domain_allow_list:
            raise ValueError(
                "network_allow_list and domain_allow_list do not go together: Daytona does not say which holds"
            )
        if self.api_key is not None and self.jwt_token is not None:
            raise ValueError("api_key and jwt_token do not go together")
        if self.jwt_token is not None and self.organization_id is None:
            raise ValueError("jwt_token needs organization_id")
        return self


def params_of(
    options: DaytonaOptions, spec: SandboxSpec
) -> CreateSandboxFromImageParams | CreateSandboxFromSnapshotParams:
    """Return the call that makes the sandbox."""
    import daytona

    common: dict[str, Any] = {
        "name": spec.key,
        "labels": {**spec.labels, KEY_LABEL: spec.key, WORKDIR_LABEL: spec.workdir, OURS_LABEL: "true"},
        "env_vars": check_env(spec.env),
        "ttl_minutes": minutes(spec.ttl),
        "os_user": options.os_user,
        "auto_stop_interval": options.auto_stop_interval,
        "auto_archive_interval": options.auto_archive_interval,
        "auto_delete_interval": 0 if options.ephemeral else -1,
        "network_block_all": options.network_block_all or None,
        "network_allow_list": ",".join(options.network_allow_list or ()) or None,
        "domain_allow_list": ",".join(options.domain_allow_list or ()) or None,
        "volumes": [daytona.VolumeMount(**volume.model_dump()) for volume in options.volumes] or None,
        "secrets": options.secrets or None,
        "target": options.target,
    }
    if options.image is None:
        return daytona.CreateSandboxFromSnapshotParams(snapshot=options.snapshot, **common)
    types = [daytona.GpuType(name) for name in options.gpu_type]
    if unknown := [name for name, kind in zip(options.gpu_type, types, strict=True) if kind.value != name]:
        raise NotSupported(f"gpu_type: Daytona has no {', '.join(unknown)}", provider="daytona", op="create")
    resources = daytona.Resources(
        cpu=options.cpu, memory=options.memory, disk=options.disk, gpu=options.gpu, gpu_type=types or None
    )
    return daytona.CreateSandboxFromImageParams(image=options.image, resources=resources, **common)


def require_network(options: DaytonaOptions, box: AsyncSandbox) -> None:
    """Refuse a service that made a sandbox without the restrictions that were asked for, as an old one may."""
    asked = {
        "network_block_all": (options.network_block_all, bool(box.network_block_all)),
        "network_allow_list": (set(options.network_allow_list or ()), _listed(box.network_allow_list)),
        "domain_allow_list": (set(options.domain_allow_list or ()), _listed(box.domain_allow_list)),
    }
    for name, (wanted, got) in asked.items():
        if wanted and wanted != got:
            message = f"this Daytona does not keep to the option {name}: it says {got or 'nothing'!r}"
            raise NotSupported(message, provider="daytona", op="create", sandbox_id=box.id)


def _listed(text: str | None) -> set[str]:
    return {part.strip() for part in (text or "").split(",") if part.strip()}


def minutes(seconds: float) -> int:
    """Daytona counts in minutes, and 0 would be for ever."""
    return max(1, math.ceil(seconds / 60))
