"""The errors that mabridge raises, as a tree.

::

    MabridgeError
    ├── ConfigError              the configuration, or an argument, is wrong: nothing was started
    ├── PluginError              a provider plugin could not be loaded
    ├── LeaseLost                the work item is not ours any more
    └── SandboxError             a sandbox or its provider failed; says which, and in what operation
        ├── CreateFailed         no sandbox could be made, and trying again will not help
        ├── AtCapacity           the provider has no room, or its rate limit was met
        ├── SandboxGone          the sandbox is definitely absent: it will not come back
        ├── SandboxUnavailable   the provider or the sandbox could not be reached; it may well exist
        ├── OutOfMemory          the sandbox ran out of memory
        ├── FileTooLarge         a file is larger than the caller's bound
        └── NotSupported         the provider cannot do what was asked, and says so instead of ignoring it

What a command does inside a sandbox is never an error here: a non-zero exit and a time-out are data
(`mabridge.ExecResult`). A file that is missing, a directory, or not permitted raises the builtin
`FileNotFoundError`, `IsADirectoryError` or `PermissionError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, overload

__all__ = [
    "AtCapacity",
    "ConfigError",
    "CreateFailed",
    "FileTooLarge",
    "LeaseLost",
    "MabridgeError",
    "NotSupported",
    "OutOfMemory",
    "PluginError",
    "SandboxError",
    "SandboxGone",
    "SandboxUnavailable",
    "first_error",
    "translated",
]

E = TypeVar("E", bound=BaseException)


class MabridgeError(Exception):
    """Base of every error that mabridge raises on purpose."""


class ConfigError(MabridgeError):
    """A configuration file, an option or an argument is wrong; the message names it and what would be right."""


class PluginError(MabridgeError):
    """A provider plugin could not be loaded, or registered something that is not a provider."""


class LeaseLost(MabridgeError):
    """The work item's lease is not held any more, so nothing may be done for its session."""


class SandboxError(MabridgeError):
    """A sandbox, or the provider of it, failed.

    Args:
        message: what happened and what to do about it, for the person who reads it. No secrets.
        provider: the provider's type, such as ``docker``.
        op: the operation that failed, such as ``create`` or ``exec``.
        sandbox_id: the provider's own id of the sandbox, where there is one.
        retryable: whether the same call may succeed later; by default what is usual for the class.
        retry_after: seconds after which the provider says to try again, if it says so.
    """

    default_retryable = False

    def __init__(
        self,
        message: str,
        *,
        provider: str,
        op: str,
        sandbox_id: str | None = None,
        retryable: bool | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.provider = provider
        self.op = op
        self.sandbox_id = sandbox_id
        self.retryable = self.default_retryable if retryable is None else retryable
        self.retry_after = retry_after

    def __str__(self) -> str:
        where = f"{self.provider} {self.op}" + (f" ({self.sandbox_id})" if self.sandbox_id else "")
        return f"{where}: {self.message}"


class CreateFailed(SandboxError):
    """A sandbox could not be created, and the same request will fail again (no such image, bad options)."""


class AtCapacity(SandboxError):
    """The provider has no room now, or a quota or rate limit was met. Another provider may serve."""

    default_retryable = True


class SandboxGone(SandboxError):
    """The sandbox is definitely absent. Never raised for a failure to reach it (`SandboxUnavailable`)."""


class SandboxUnavailable(SandboxError):
    """The provider or the sandbox could not be reached, or answered with a fault of its own."""

    default_retryable = True


class OutOfMemory(SandboxError):
    """The sandbox, or what ran in it, was killed for want of memory."""


class FileTooLarge(SandboxError):
    """A file holds more bytes than the caller allowed.

    Args:
        size: the file's size in bytes, if it is known.
        limit: the bound that was given, in bytes.
    """

    def __init__(
        self, message: str, *, provider: str, op: str, sandbox_id: str | None = None, size: int | None, limit: int
    ) -> None:
        super().__init__(message, provider=provider, op=op, sandbox_id=sandbox_id)
        self.size = size
        self.limit = limit


class NotSupported(SandboxError):
    """The provider cannot do what an option or a call asks for; the message names it."""


@overload
def first_error(error: BaseExceptionGroup[E]) -> E: ...
@overload
def first_error(error: Exception) -> Exception: ...
def first_error(error: BaseException) -> BaseException:
    """Return the first error of a group, as a task group wraps those of its tasks; of any other, the error itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@contextmanager
def translated(translate: Callable[[Exception], MabridgeError]) -> Iterator[None]:
    """Raise errors of mabridge as they are, and what `translate` makes of any other, the first one of a group."""
    try:
        yield
    except Exception as exc:
        error = first_error(exc)
        if isinstance(error, MabridgeError):
            raise error from error.__cause__
        raise translate(error) from exc
