"""The sandboxes of a worker: made or found, kept alive, and put away."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import anyio

from mabridge.errors import CreateFailed, MabridgeError, SandboxError
from mabridge.identity import sandbox_key, sandbox_labels
from mabridge.observe import Event, Observers
from mabridge.sandbox import Provider, Sandbox, SandboxSpec

__all__ = ["Held", "NamedProvider", "Sandboxes"]

_log = logging.getLogger(__name__)

_ATTACH_DEADLINE = 60.0
_TEARDOWN_DEADLINE = 60.0
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 15.0


@dataclass(frozen=True, kw_only=True)
class NamedProvider:
    """A provider as it was configured.

    Attributes:
        name: what the configuration calls this instance.
        provider: the adapter, entered.
        when_done: what becomes of a sandbox when its session is done with.
        ttl: seconds that a sandbox outlives its worker.
    """

    name: str
    provider: Provider
    when_done: Literal["keep", "teardown"] = "keep"
    ttl: float = 3600.0


@dataclass(frozen=True, kw_only=True)
class Held:
    """The sandbox that a session has.

    Attributes:
        sandbox: ready for use.
        by: its provider.
        created: it was made just now, so its file system is fresh.
    """

    sandbox: Sandbox
    by: NamedProvider
    created: bool


class Sandboxes:
    """Makes, finds and puts away the sandboxes of an environment's sessions.

    Args:
        providers: by their configured names.
        environment_id: of the sessions.
        workdir: absolute path of the directory the agent works in.
        observers: told of what happens.
        create_timeout: seconds after which a session is told that no sandbox can be had.
    """

    def __init__(
        self,
        providers: Mapping[str, NamedProvider],
        *,
        environment_id: str,
        workdir: str,
        observers: Observers,
        create_timeout: float = 120.0,
    ) -> None:
        self._providers = providers
        self._environment_id = environment_id
        self._workdir = workdir
        self._observers = observers
        self._create_timeout = create_timeout

    async def obtain(self, session_id: str, names: Sequence[str]) -> Held:
        """Return the session's sandbox: the one it has, else one made by the first of `names` that can.

        Raises:
            CreateFailed: none of them could, until the deadline; says for each of them why not.
        """
        pause = _FIRST_PAUSE
        deadline = anyio.current_time() + self._create_timeout
        while True:
            failures: dict[str, MabridgeError] = {}
            for attempt in (self._attach, self._create):
                for name in names:
                    held = await attempt(session_id, self._providers[name], deadline, failures)
                    if held is not None:
                        return held
            retryable = any(isinstance(error, SandboxError) and error.retryable for error in failures.values())
            waits = [e.retry_after for e in failures.values() if isinstance(e, SandboxError) and e.retry_after]
            pause_now = max(pause, min(waits, default=0.0))
            if not retryable or anyio.current_time() + pause_now >= deadline:
                reasons = "; ".join(f"{name}: {error}" for name, error in failures.items())
                raise CreateFailed(f"no sandbox could be had: {reasons}", provider=",".join(names), op="create")
            await anyio.sleep(pause_now)
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def keep_alive(self, held: Held) -> None:
        """Put off the sandbox's own end again and again, until cancelled."""
        while True:
            try:
                with anyio.fail_after(_ATTACH_DEADLINE):
                    await held.sandbox.keep_alive(held.by.ttl)
                await anyio.sleep(held.by.ttl / 3)
            except (SandboxError, TimeoutError) as error:
                _log.warning("sandbox %s could not be kept alive: %s", held.sandbox.id, error or "no answer")
                await anyio.sleep(held.by.ttl / 12)

    async def put_away(self, session_id: str, held: Held, *, for_good: bool) -> None:
        """Do with a session's sandbox what its provider's ``when_done`` says. Never raises.

        Args:
            session_id: the session.
            held: its sandbox.
            for_good: the session has ended, so that nothing will ever ask for its sandbox again.
        """
        event = partial(Event, session_id=session_id, provider=held.by.name, sandbox_id=held.sandbox.id)
        if held.by.when_done == "keep" and not for_good:
            self._observers.emit(event(name="sandbox.kept"))
            return
        with anyio.CancelScope(shield=True), anyio.move_on_after(_TEARDOWN_DEADLINE) as scope:
            try:
                await held.sandbox.teardown()
                self._observers.emit(event(name="sandbox.removed"))
            except SandboxError as error:
                _log.warning("sandbox %s was not removed, and is left to its time-out: %s", held.sandbox.id, error)
        if scope.cancelled_caught:
            _log.warning("sandbox %s was not removed in time, and is left to its time-out", held.sandbox.id)

    async def _attach(
        self, session_id: str, by: NamedProvider, deadline: float, failures: dict[str, MabridgeError]
    ) -> Held | None:
        key = sandbox_key(self._environment_id, session_id)
        started = anyio.current_time()
        try:
            with anyio.fail_after(min(_ATTACH_DEADLINE, max(deadline - started, 1.0))):
                sandbox = await by.provider.attach(key)
        except (MabridgeError, TimeoutError) as error:
            self._failed(session_id, by, error, failures)
            return None
        if sandbox is None:
            return None
        return self._got("sandbox.attached", session_id, Held(sandbox=sandbox, by=by, created=False), started)

    async def _create(
        self, session_id: str, by: NamedProvider, deadline: float, failures: dict[str, MabridgeError]
    ) -> Held | None:
        if by.name in failures:
            return None
        spec = SandboxSpec(
            key=sandbox_key(self._environment_id, session_id),
            labels=sandbox_labels(self._environment_id, session_id),
            workdir=self._workdir,
            ttl=by.ttl,
        )
        started = anyio.current_time()
        try:
            with anyio.fail_after(max(deadline - started, 1.0)):
                sandbox = await by.provider.create(spec)
        except (MabridgeError, TimeoutError) as error:
            self._failed(session_id, by, error, failures)
            return None
        return self._got("sandbox.created", session_id, Held(sandbox=sandbox, by=by, created=True), started)

    def _got(
        self, name: Literal["sandbox.attached", "sandbox.created"], session_id: str, held: Held, started: float
    ) -> Held:
        self._observers.emit(
            Event(
                name=name,
                session_id=session_id,
                provider=held.by.name,
                sandbox_id=held.sandbox.id,
                seconds=anyio.current_time() - started,
            )
        )
        return held

    def _failed(
        self,
        session_id: str,
        by: NamedProvider,
        error: MabridgeError | TimeoutError,
        failures: dict[str, MabridgeError],
    ) -> None:
        if isinstance(error, TimeoutError):
            error = SandboxError("no answer in time", provider=by.provider.type, op="create", retryable=True)
        failures[by.name] = error
        self._observers.emit(Event(name="sandbox.failed", session_id=session_id, provider=by.name, reason=str(error)))
