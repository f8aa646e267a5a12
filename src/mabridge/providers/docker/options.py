"""The options of the ``docker`` provider, and the container that they describe. Pure."""

from __future__ import annotations

import io
import math
import os
import posixpath
import re
import tarfile
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from mabridge.errors import ConfigError
from mabridge.identity import KEY_LABEL
from mabridge.providers._env import SandboxEnv, read_env
from mabridge.providers._guard import DEADLINES, GUARD
from mabridge.providers._shell import check_env
from mabridge.sandbox import ProviderOptions, SandboxSpec

__all__ = [
    "GUARD_USER",
    "DockerMount",
    "DockerOptions",
    "container_config",
    "is_mounted",
    "labels_of",
    "layout",
    "workdir_of",
]

GUARD_USER = 65534
"""The user id that PID 1 runs as. The agent's user is another, so it can signal neither it nor its files."""

_WORKDIR_LABEL = "mabridge.workdir"
_HOME = "/home/agent"
_TMP = "/tmp"  # noqa: S108 - the sandbox's
_SOCKETS = ("/var/run/docker.sock", "/run/docker.sock", "/run/containerd/containerd.sock", "/run/podman/podman.sock")


def _bytes(value: object) -> object:
    """Read a size as ``docker run`` does: ``512m``, ``2g``, or a number of bytes."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+)([bkmg]?)b?", value.strip().lower())
        if match is None:
            raise ValueError('must be a number of bytes, or like "512m" or "2g"')
        return int(match[1]) * 1024 ** "bkmg".index(match[2] or "b")
    return value


Size = Annotated[int, BeforeValidator(_bytes), Field(ge=0)]


class DockerMount(BaseModel):
    """Something of the host's, a volume, or memory, to be seen in the sandbox."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["bind", "volume", "tmpfs"] = "bind"
    source: str | None = None
    """Absolute path on the engine's host, or a volume's name. None for ``tmpfs``."""
    target: str
    """Absolute path in the sandbox."""
    read_only: bool = True
    """Not for ``tmpfs``. What is mounted below the source of a read-only bind is left out, for an engine before 25
    would leave that writable."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.target.startswith("/") or posixpath.normpath(self.target) in ("/", "//", DEADLINES, "/run"):
            raise ValueError(f"target {self.target!r} must be an absolute path, and not {DEADLINES} or above it")
        if (self.type == "tmpfs") != (self.source is None):
            raise ValueError("source is for bind and volume, which need it")
        if self.type == "bind":
            assert self.source is not None
            if not self.source.startswith("/"):
                raise ValueError(f"source {self.source!r} must be an absolute path on the engine's host")
            reached = {posixpath.normpath(self.source), os.path.realpath(self.source)}
            for socket in {*_SOCKETS, *map(os.path.realpath, _SOCKETS)}:
                if any(_is_below(socket, path) for path in reached):
                    raise ValueError(
                        f"source {self.source!r} holds {socket}: with it the agent would own the engine and its host, "
                        "even if mounted read-only"
                    )
        return self


class DockerOptions(ProviderOptions):
    """Options of the ``docker`` provider, named as ``docker run`` names them where it has them. 0 is no limit."""

    image: str = "python:3.13-slim"
    """Any image with ``/bin/sh``, ``grep`` and ``head``. It is run as it is: its entrypoint and user are not used."""
    pull: Literal["missing", "never", "always"] = "missing"
    """When the image is pulled."""
    host: str | None = None
    """The engine, such as ``unix:///var/run/docker.sock`` or ``ssh://user@host``. By default found as ``docker`` finds
    it: ``DOCKER_HOST``, the current context, the usual sockets."""
    network: str = "none"
    """``none``, or the name of a network: then the agent reaches what that network reaches, such as a cloud's metadata
    service. ``host`` is refused."""
    dns: tuple[str, ...] = ()
    """Addresses of name servers; the engine's by default."""
    user: str = "1000:1000"
    """Numbers, ``uid`` or ``uid:gid``, of whom the agent's commands run as. Root has no capabilities."""
    memory: Size = 2 * 1024**3
    """Bytes, or like ``512m``; swap is not on top of it."""
    cpus: float = Field(default=1.0, ge=0)
    """Processors, or parts of one, that it may use."""
    pids_limit: int = Field(default=512, ge=0)
    """Processes and threads that it may hold."""
    shm_size: Size = 64 * 1024**2
    """Of ``/dev/shm``: bytes, or like ``64m``."""
    read_only: bool = False
    """The image's files cannot be changed: only the working directory, the home and ``/tmp``, which are in memory."""
    mounts: tuple[DockerMount, ...] = ()
    """Directories of the engine's host and volumes that it sees, each ``{ source, target, type, read_only }``."""
    runtime: str | None = None
    """Such as ``runsc`` for gVisor; the engine's default otherwise."""
    gpus: Literal["all"] | Annotated[int, Field(ge=1)] | None = None
    """``all``, or how many it is given."""
    env: SandboxEnv = Field(default_factory=dict)
    """For every command. The agent can read it, so no secret that it should not have."""

    @field_validator("network")
    @classmethod
    def _isolated(cls, network: str) -> str:
        if network == "host" or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", network):
            raise ValueError(f"{network!r} would give the agent another's network; name a network made for it, or none")
        return network

    @field_validator("user")
    @classmethod
    def _numeric(cls, user: str) -> str:
        match = re.fullmatch(r"(\d{1,9})(:\d{1,9})?", user)
        if match is None:
            raise ValueError(f'{user!r} must be numbers, like "1000:1000", for names differ from image to image')
        if int(match[1]) == GUARD_USER:
            raise ValueError(f"{GUARD_USER} is the user that ends the container when its time is up")
        return user if match[2] else f"{user}:{user}"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.dns and self.network == "none":
            raise ValueError("dns does nothing without a network; set network too")
        return self

    @property
    def ids(self) -> tuple[int, int]:
        """The user and group id of the agent."""
        uid, _, gid = self.user.partition(":")
        return int(uid), int(gid)


def container_config(options: DockerOptions, spec: SandboxSpec) -> dict[str, Any]:
    """Return the body of the engine's create call.

    See https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerCreate

    Raises:
        ConfigError: the working directory or a variable cannot be.
    """
    if not spec.workdir.startswith("/") or posixpath.normpath(spec.workdir) in ("/", "//"):
        raise ConfigError(f"docker: workdir {spec.workdir!r} must be an absolute path, and not /")
    uid, gid = options.ids
    env = {"HOME": _HOME} | read_env(options.env) | dict(spec.env)
    guard = f"rw,noexec,nosuid,nodev,size=64k,mode=0700,uid={GUARD_USER},gid={GUARD_USER}"
    memory = {DEADLINES: guard}
    own = f"rw,exec,nosuid,nodev,mode=0755,uid={uid},gid={gid}"
    if options.read_only:
        memory |= {spec.workdir: own, _HOME: own, _TMP: "rw,exec,nosuid,nodev,mode=1777"}
    memory |= {mount.target: own for mount in options.mounts if mount.type == "tmpfs"}
    host: dict[str, Any] = {
        "AutoRemove": True,
        "CapDrop": ["ALL"],
        "Init": True,
        "IpcMode": "private",
        "LogConfig": {"Type": "none"},
        "Memory": options.memory,
        "MemorySwap": options.memory,
        "Mounts": [_mount(mount) for mount in options.mounts if mount.type != "tmpfs"],
        "NanoCpus": int(options.cpus * 1e9),
        "NetworkMode": options.network,
        "Dns": list(options.dns),
        "PidsLimit": options.pids_limit or None,
        "ReadonlyRootfs": options.read_only,
        "SecurityOpt": ["no-new-privileges:true"],
        "ShmSize": options.shm_size,
        "Tmpfs": memory,
    }
    if options.runtime is not None:
        host["Runtime"] = options.runtime
    if options.gpus is not None:
        count = -1 if options.gpus == "all" else options.gpus
        host["DeviceRequests"] = [{"Count": count, "Capabilities": [["gpu"]]}]
    return {
        "Image": options.image,
        "Hostname": "sandbox",
        "Entrypoint": ["/bin/sh", "-c", GUARD, "mab"],
        "Cmd": [str(math.ceil(spec.ttl))],
        "Healthcheck": {"Test": ["NONE"]},
        "User": f"{GUARD_USER}:{GUARD_USER}",
        "WorkingDir": "/",
        "Env": [f"{name}={value}" for name, value in check_env(env).items()],
        "Labels": {**spec.labels, KEY_LABEL: spec.key, _WORKDIR_LABEL: spec.workdir},
        "HostConfig": host,
    }


def labels_of(labels: Mapping[str, str]) -> dict[str, str]:
    """Return a container's labels without the one that only this adapter uses. An image's own are among them."""
    return {name: value for name, value in labels.items() if name != _WORKDIR_LABEL}


def workdir_of(labels: Mapping[str, str]) -> str:
    """Return the working directory that a container was made with."""
    return labels.get(_WORKDIR_LABEL, "/workspace")


def layout(options: DockerOptions, workdir: str) -> bytes:
    """Return a tar of the directories that the agent needs, to be unpacked at ``/`` before the container starts.

    Without those that lie on a mount: the engine would give the operator's own directories another owner.
    """
    uid, gid = options.ids
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for path, mode, owner in ((workdir, 0o755, (uid, gid)), (_HOME, 0o755, (uid, gid)), (_TMP, 0o1777, (0, 0))):
            if is_mounted(options, path):
                continue
            entry = tarfile.TarInfo(posixpath.normpath(path).lstrip("/"))
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            entry.uid, entry.gid = owner
            tar.addfile(entry)
    return file.getvalue()


def is_mounted(options: DockerOptions, path: str) -> bool:
    """Whether a path of the sandbox lies on a mount of the operator's."""
    return any(_is_below(path, mount.target) for mount in options.mounts)


def _mount(mount: DockerMount) -> dict[str, Any]:
    body: dict[str, Any] = {
        "Type": mount.type,
        "Source": mount.source,
        "Target": mount.target,
        "ReadOnly": mount.read_only,
    }
    if mount.type == "bind":
        body["BindOptions"] = {"Propagation": "rprivate", "NonRecursive": mount.read_only}
    return body


def _is_below(path: str, parent: str) -> bool:
    return posixpath.commonpath([posixpath.normpath(path), posixpath.normpath(parent)]) == posixpath.normpath(parent)
