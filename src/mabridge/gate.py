"""The way to one provider: how many sandboxes may be there, and whether it answers at all."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from mabridge.breaker import Breaker
from mabridge.errors import AtCapacity, MabridgeError, SandboxError, SandboxUnavailable
from mabridge.named_provider import NamedProvider
from mabridge.observe import Event, Observers

__all__ = ["Gate", "ours"]

_log = logging.getLogger(__name__)


class Gate:
    """What a worker knows of a provider and asks of it.

    Args:
        by: the provider.
        observers: told when it stops answering, and when it answers again.
    """

    def __init__(self, by: NamedProvider, observers: Observers) -> None:
        self.by = by
        self._observers = observers
        self._breaker = Breaker()
        self._full_until = 0.0
        self._sessions: set[str] = set()

    def enter(self, session_id: str) -> None:
        """Note that a session has a sandbox here."""
        self._sessions.add(session_id)

    def leave(self, session_id: str) -> bool:
        """Note that a session is not served here any more; return whether others may have waited for its place."""
        had = session_id in self._sessions
        self._sessions.discard(session_id)
        return had and self.by.max_sandboxes is not None

    @contextmanager
    def place(self, session_id: str) -> Iterator[None]:
        """Hold a place while a sandbox is made, and keep it if that succeeds.

        Raises:
            AtCapacity: there is none, or the provider has said that it has no room.
        """
        by, taken = self.by, self._sessions
        if by.max_sandboxes is not None and session_id not in taken and len(taken) >= by.max_sandboxes:
            message = f"all {by.max_sandboxes} that max_sandboxes allows are in use"
            raise AtCapacity(message, provider=by.provider.type, op="create")
        left = self._full_until - anyio.current_time()
        if left > 0:
            message = f"it has no room, and said to ask again in {left:.0f} s"
            raise AtCapacity(message, provider=by.provider.type, op="create", retry_after=left)
        taken.add(session_id)
        try:
            yield
        except BaseException as error:
            taken.discard(session_id)
            if isinstance(error, AtCapacity) and error.retry_after:
                self._full_until = anyio.current_time() + error.retry_after
            raise

    @contextmanager
    def answering(self, op: str, timeout: float) -> Iterator[None]:
        """Give the provider `timeout` seconds to answer, unless it has not answered for some time.

        Raises:
            SandboxUnavailable: it has not, or did not.
            MabridgeError: what it answered, a fault in its adapter's own code included.
        """
        left = self._breaker.wait(anyio.current_time())
        if left > 0:
            message = f"it is left alone for {left:.0f} s more, since it did not answer: {self._breaker.last}"
            raise SandboxUnavailable(message, provider=self.by.provider.type, op=op, retry_after=left)
        try:
            with ours(self.by, op), anyio.fail_after(timeout):
                yield
        except (SandboxUnavailable, TimeoutError) as caught:
            error = caught if isinstance(caught, SandboxUnavailable) else None
            error = error or SandboxUnavailable("no answer in time", provider=self.by.provider.type, op=op)
            if self._breaker.failed(str(error), anyio.current_time()):
                self._observers.emit(Event(name="provider.down", provider=self.by.name, reason=str(error)))
            raise error from caught.__cause__
        except MabridgeError:
            self._breaker.succeeded()
            raise
        if self._breaker.tripped:
            self._observers.emit(Event(name="provider.up", provider=self.by.name))
        self._breaker.succeeded()


@contextmanager
def ours(by: NamedProvider, op: str) -> Iterator[None]:
    """Make an error of ours out of whatever an adapter lets through: a fault of its own must not end a session."""
    try:
        yield
    except (MabridgeError, TimeoutError):
        raise
    except Exception as error:
        _log.exception("%s (%s) failed in its own code", by.name, by.provider.type)
        message = f"the provider failed in its own code ({type(error).__name__})"
        raise SandboxError(message, provider=by.provider.type, op=op) from error
