"""The contract between mabridge and a sandbox provider.

A provider adapter implements `Provider` and `Sandbox`, and needs nothing else of mabridge but this module
and `mabridge.errors`. `mabridge.testing` checks that it keeps the contract.
"""

from __future__ import annotations

import builtins
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import ClassVar, Protocol, Self, runtime_checkable

from pydantic import BaseModel, ConfigDict

from mabridge.errors import ConfigError

__all__ = [
    "EnvVar",
    "ExecResult",
    "Process",
    "Provider",
    "ProviderOptions",
    "Sandbox",
    "SandboxInfo",
    "SandboxSpec",
    "SupportsProcess",
    "SupportsSuspend",
]


@dataclass(frozen=True, kw_only=True)
class SandboxSpec:
    """What a sandbox must be, whoever provides it. What is the provider's own is in its options.

    Attributes:
        key: names the session's sandbox for good (`mabridge.identity.sandbox_key`): the same key is the same
            sandbox, whichever worker asks. ``mab`` and 24 characters of ``a-z2-7``.
        labels: set on the sandbox in the very call that creates it, and reported back by `Provider.list`.
        workdir: absolute path of the directory the agent works in; made if missing, writable by the agent.
        env: environment variables of every command in the sandbox. Never a credential of Anthropic's.
        ttl: seconds after which the sandbox removes itself, unless `Sandbox.keep_alive` put that off, even if
            every worker is dead.
    """

    key: str
    labels: Mapping[str, str] = field(default_factory=dict)
    workdir: str = "/workspace"
    env: Mapping[str, str] = field(default_factory=dict)
    ttl: float = 3600.0


@dataclass(frozen=True, kw_only=True)
class ExecResult:
    """What a command did. A non-zero exit and a time-out are data, not errors.

    Attributes:
        exit_code: as a shell reports it: 128 + n for death by signal n; ``None`` if it timed out.
        stdout: the first ``max_output`` bytes at most.
        stderr: likewise, counted by itself.
        timed_out: it was killed, with all it had started, because ``timeout`` had passed. The output up to
            then is kept.
        truncated: there was more output than ``max_output``, on either stream, and the rest was dropped.
    """

    exit_code: int | None
    stdout: bytes = b""
    stderr: bytes = b""
    timed_out: bool = False
    truncated: bool = False


@dataclass(frozen=True, kw_only=True)
class SandboxInfo:
    """One of our sandboxes, as its provider lists it.

    Attributes:
        key: as in `SandboxSpec.key`.
        id: the provider's own id.
        labels: what was set at create.
        state: the provider's own word for it, such as ``running``.
        created_at: when it was made, with a time zone, if the provider tells.
    """

    key: str
    id: str
    labels: Mapping[str, str]
    state: str
    created_at: datetime | None = None


class Process(ABC):
    """A process held open in a sandbox, with bytes going both ways. Its stderr is dropped."""

    @abstractmethod
    async def send(self, data: bytes) -> None:
        """Write all of `data` to its stdin.

        Raises:
            SandboxUnavailable: the connection is broken; how much arrived is not known.
            SandboxGone: the sandbox is definitely absent.
        """

    @abstractmethod
    async def send_eof(self) -> None:
        """Close its stdin. What it writes can still be received."""

    @abstractmethod
    async def receive(self) -> bytes:
        """Return the next bytes of its stdout, at least one, or ``b""`` once it has ended and all was read.

        Raises:
            SandboxUnavailable: the connection is broken.
            SandboxGone: the sandbox is definitely absent.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Kill it, if it still runs, and free the connection. Safe to call again.

        A `receive` that is under way ends: with ``b""``, or `SandboxUnavailable`.
        """


class Sandbox(ABC):
    """One sandbox, ready for commands. Safe to use from many tasks at once."""

    id: str
    """The provider's own id, for logs and for the provider's console."""

    workdir: str
    """Absolute path, in the sandbox, of the directory the agent works in."""

    @abstractmethod
    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float,
        max_output: int,
    ) -> ExecResult:
        """Run one command to its end, and never twice.

        A cancelled call kills the command, as a time-out does. A process that the command leaves in the
        background does not hold the call.

        Args:
            argv: the program and its arguments, passed on exactly: no shell reads them. A program that is not there
                is exit code 127, and one that cannot be executed 126, as a shell has it.
            stdin: its whole standard input; ``None`` is an empty one.
            cwd: absolute path; `workdir` if not given. If there is no such directory, nothing runs: exit code 126.
            env: variables added to the sandbox's own.
            timeout: seconds after which it is killed, with everything it started.
            max_output: bytes kept of each output stream.

        Raises:
            ValueError: this can be no command: `argv` is empty, its program begins with ``-``, or there is a NUL in it;
                or `env` has a name that is not a variable's.
            SandboxGone: the sandbox is definitely absent.
            SandboxUnavailable: it could not be reached, or the connection broke: it may have run.
            OutOfMemory: the sandbox ran out of memory.
        """

    @abstractmethod
    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        """Return a regular file's bytes.

        Args:
            path: absolute, or relative to `workdir`. Symbolic links are followed.
            max_bytes: the most that is read.

        Raises:
            FileNotFoundError: there is no such file.
            IsADirectoryError: it is a directory.
            PermissionError: it may not be read.
            FileTooLarge: it holds more than `max_bytes`.
        """

    @abstractmethod
    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Write a file, whole, replacing what was there. Directories on the way to it are made.

        Args:
            path: absolute, or relative to `workdir`.
            data: its bytes.
            mode: its permission bits.

        Raises:
            IsADirectoryError: there is a directory of that name.
            PermissionError: it may not be written.
            NotADirectoryError: something on the way to it is not a directory.
        """

    @abstractmethod
    async def teardown(self) -> None:
        """Remove the sandbox and all that is in it. Gone already is success; safe to call again."""

    async def keep_alive(self, ttl: float) -> None:  # noqa: B027 - a provider without a clock has nothing to do
        """Put the sandbox's own end off until `ttl` seconds from now. Never brings it nearer by error."""


class ProviderOptions(BaseModel):
    """Base of a provider's options. Unknown ones are refused. The string below an option says what it is for."""

    # What was given may be a secret in the wrong place, and an error is soon in a log.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True)


class EnvVar(BaseModel):
    """A secret in a configuration: never the secret itself, only the environment variable that holds it.

    In TOML: ``api_key = { env = "E2B_API_KEY" }``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    env: str

    def read(self) -> str:
        """Return the variable's value.

        Raises:
            ConfigError: it is not set, or empty.
        """
        value = os.environ.get(self.env, "")
        if not value:
            raise ConfigError(f"the environment variable {self.env} is not set")
        return value


class Provider(ABC):
    """Makes and finds sandboxes at one place. An async context manager: entered once, before anything else.

    A subclass is given to mabridge by the hook `mabridge_register_providers`. It is made with one argument, an
    instance of its `Options`; making it does no I/O, and importing its module imports no vendor SDK.
    """

    type: ClassVar[str]
    """The name it is chosen by in a configuration, such as ``docker``."""

    Options: ClassVar[builtins.type[ProviderOptions]] = ProviderOptions
    """Its options, named as the vendor names them."""

    def __init__(self, options: ProviderOptions) -> None:
        self.options = options

    @property
    def can_suspend(self) -> bool:
        """Whether its sandboxes, with the options that it has, can be suspended (`SupportsSuspend`)."""
        return False

    async def __aenter__(self) -> Self:
        """Open what the adapter needs to hold open. Reaching the provider is for `check` and `create`."""
        return self

    async def __aexit__(  # noqa: B027 - many hold nothing open
        self, exc_type: builtins.type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Close it. Sandboxes live on."""

    @abstractmethod
    async def create(self, spec: SandboxSpec) -> Sandbox:
        """Return the sandbox of `spec.key`, ready for `Sandbox.exec`: made now, or found if it is there already.

        On failure, and when cancelled, nothing is left behind. Called twice at once with one key, both get the
        same sandbox.

        Raises:
            CreateFailed: it will not work this way (no such image, bad credentials).
            AtCapacity: not now.
            SandboxUnavailable: the provider could not be reached, or failed.
            NotSupported: an option asks for what the provider cannot do.
        """

    @abstractmethod
    async def attach(self, key: str) -> Sandbox | None:
        """Return the sandbox of that key, woken if it was suspended; ``None`` only if it is definitely absent.

        Raises:
            SandboxUnavailable: it is not known whether it exists.
        """

    @abstractmethod
    def list(self) -> AsyncIterator[SandboxInfo]:
        """Yield every sandbox that mabridge made here and that still exists, running or not.

        Raises:
            SandboxUnavailable: the list could not be read whole. A part is never passed off as the whole.
        """

    async def remove(self, info: SandboxInfo) -> None:
        """Remove the very sandbox that `list` told of, in whatever state it is. Gone already is success.

        By default it is attached to and torn down, which an adapter can do without waking it.

        Raises:
            SandboxError: it may still be there.
        """
        sandbox = await self.attach(info.key)
        if sandbox is not None and sandbox.id == info.id:
            await sandbox.teardown()

    @abstractmethod
    async def check(self) -> None:
        """Prove that the credentials are good and the provider can be reached, without making anything.

        Raises:
            SandboxError: why not, and what to do.
            ConfigError: likewise, for what is missing on this side.
        """


@runtime_checkable
class SupportsProcess(Protocol):
    """A `Sandbox` that can hold a process open."""

    async def open_process(
        self, argv: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        """Start a program and hold it open; `argv`, `cwd` and `env` as in `Sandbox.exec`."""


@runtime_checkable
class SupportsSuspend(Protocol):
    """A `Sandbox` that can be stopped with its disk kept (`Provider.can_suspend`); `Provider.attach` wakes it."""

    async def suspend(self) -> None:
        """Stop it and keep its disk. Stopped already is success."""
