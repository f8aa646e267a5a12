"""The sandboxes of a worker: made or found, kept alive, and put away."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import anyio

from mabridge.errors import CreateFailed, MabridgeError, SandboxError, SandboxUnavailable
from mabridge.gate import Gate, ours
from mabridge.identity import sandbox_key, sandbox_labels
from mabridge.named_provider import NamedProvider
from mabridge.observe import Event, EventName, Observers
from mabridge.sandbox import Sandbox, SandboxSpec, SupportsSuspend
from mabridge.telemetry import sandbox_span

__all__ = ["Held", "Sandboxes"]

_log = logging.getLogger(__name__)

_ATTACH_DEADLINE = 60.0  # one that was suspended is woken by it
_PUT_AWAY_DEADLINE = 120.0  # to suspend one may be to take a snapshot of its disk
_CREATE_GRACE = 10.0
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 15.0
_STRAY_PAUSE = 2.0


@dataclass(frozen=True, kw_only=True)
class Held:
    """The sandbox that a session has.

    Attributes:
        key: its key.
        sandbox: ready for use.
        by: its provider.
        created: it was made just now, so its file system is fresh.
        strays: providers that failed to make it and may have made one all the same.
    """

    key: str
    sandbox: Sandbox
    by: NamedProvider
    created: bool
    strays: tuple[NamedProvider, ...] = ()


async def _whole(create: Awaitable[Sandbox], *, timeout: float) -> Sandbox:
    """Cut a create off after `timeout` seconds; if the caller is cancelled before, after `_CREATE_GRACE`.

    The caller is cancelled when its lease is lost. The next worker may have found the sandbox by then, and an adapter
    whose create is cut off removes what it was making.
    """
    caught: Exception | None = None
    async with anyio.create_task_group() as tasks:
        shielded = anyio.CancelScope(shield=True)

        async def limit() -> None:
            try:
                await anyio.sleep_forever()
            finally:
                shielded.deadline = anyio.current_time() + _CREATE_GRACE

        tasks.start_soon(limit)
        with shielded:
            try:
                with anyio.fail_after(timeout):
                    return await create
            except Exception as error:  # noqa: BLE001 - raised again outside, where no group is made of it
                caught = error
            finally:
                tasks.cancel_scope.cancel()
    if caught is not None:
        raise caught
    # It was cut off, for the caller is cancelled: that is delivered here.
    await anyio.sleep_forever()
    raise AssertionError("nothing comes after being cancelled")


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
        self._gates = {name: Gate(named, observers) for name, named in providers.items()}
        self._freed = anyio.Event()

    @property
    def room(self) -> int | None:
        """How many sessions can have a sandbox at once, over all providers; ``None`` is no limit."""
        limits = [named.max_sandboxes for named in self._providers.values()]
        known = [limit for limit in limits if limit is not None]
        return sum(known) if len(known) == len(limits) else None

    async def obtain(
        self, session_id: str, names: Sequence[str], *, lived_before: Callable[[], Awaitable[bool]]
    ) -> Held:
        """Return the session's sandbox: the one it has, else one made by the first of `names` that can.

        Args:
            session_id: the session.
            names: the providers it may be at, in the order in which they are tried.
            lived_before: tells whether calls of the session were run before. If so, and a provider cannot say whether
                it has the sandbox, no other is made elsewhere: the session would lose its files.

        Raises:
            CreateFailed: none of them could, until the deadline; says for each of them why not.
        """
        with sandbox_span(session_id) as span:
            held = await self._obtain(session_id, names, lived_before)
            span.set_attributes({"mabridge.provider": held.by.name, "mabridge.sandbox.id": held.sandbox.id})
            return held

    async def _obtain(self, session_id: str, names: Sequence[str], lived_before: Callable[[], Awaitable[bool]]) -> Held:
        pause = _FIRST_PAUSE
        deadline = anyio.current_time() + self._create_timeout
        while True:
            failures: dict[str, MabridgeError] = {}
            held = await self._find(session_id, names, deadline, failures)
            if held is None and not (failures and await lived_before()):
                held = await self._make(session_id, names, deadline, failures)
            if held is not None:
                return held
            errors = [error for error in failures.values() if isinstance(error, SandboxError)]
            pause_now = max(pause, min((e.retry_after for e in errors if e.retry_after), default=0.0))
            left = deadline - anyio.current_time()
            if not any(error.retryable for error in errors) or left <= _FIRST_PAUSE:
                reasons = "; ".join(f"{name}: {error}" for name, error in failures.items())
                raise CreateFailed(f"no sandbox could be had: {reasons}", provider=",".join(names), op="create")
            with anyio.move_on_after(min(pause_now, left - _FIRST_PAUSE / 2)):
                await self._freed.wait()
            pause = min(pause * 2, _LONGEST_PAUSE)

    def release(self, session_id: str) -> None:
        """Say that a session is not served here any more, so that its place at its provider is free."""
        left = [gate for gate in self._gates.values() if gate.leave(session_id)]
        if left:
            self._freed.set()
            self._freed = anyio.Event()

    async def tend(self, held: Held) -> None:
        """Keep the sandbox from ending by itself, and remove what a failed create may have left, until cancelled."""
        async with anyio.create_task_group() as tasks:
            for named in held.strays:
                tasks.start_soon(self._remove_stray, named, held)
            # One that was made just now has all its time before it.
            await anyio.sleep(held.by.ttl / 3 if held.created else 0.0)
            while True:
                pause = held.by.ttl / 3
                try:
                    with ours(held.by, "keep_alive"), anyio.fail_after(_ATTACH_DEADLINE):
                        await held.sandbox.keep_alive(held.by.ttl)
                except (MabridgeError, TimeoutError) as error:
                    _log.warning("sandbox %s could not be kept alive: %s", held.sandbox.id, error or "no answer")
                    pause = held.by.ttl / 12
                await anyio.sleep(pause)

    async def put_away(self, session_id: str, held: Held, *, for_good: bool) -> None:
        """Do with a session's sandbox what its provider's ``when_done`` says. Never raises.

        Args:
            session_id: the session.
            held: its sandbox.
            for_good: the session has ended, so that nothing will ever ask for its sandbox again.
        """
        done: EventName = "sandbox.kept"
        reason = None
        with anyio.CancelScope(shield=True), anyio.move_on_after(_PUT_AWAY_DEADLINE) as scope:
            try:
                with ours(held.by, "put away"):
                    if for_good or held.by.when_done == "teardown":
                        await held.sandbox.teardown()
                        done = "sandbox.removed"
                    elif held.by.when_done == "suspend":
                        assert isinstance(held.sandbox, SupportsSuspend)  # its provider said so
                        await held.sandbox.suspend()
                        done = "sandbox.suspended"
                    elif held.by.idle_ttl is not None:
                        await held.sandbox.keep_alive(held.by.idle_ttl)
            except MabridgeError as error:
                done, reason = "sandbox.left", str(error)
        if scope.cancelled_caught:
            done, reason = "sandbox.left", "no answer in time"
        self._emit(done, session_id, held.by, sandbox_id=held.sandbox.id, reason=reason)

    async def _find(
        self, session_id: str, names: Sequence[str], deadline: float, failures: dict[str, MabridgeError]
    ) -> Held | None:
        key = sandbox_key(self._environment_id, session_id)
        for index, name in enumerate(names):
            by, started = self._providers[name], anyio.current_time()
            # Each gets its share of the time, and making one as well: what hangs must leave some to the others.
            share = max((deadline - started) / (len(names) - index + 1), 1.0)
            try:
                with self._gates[name].answering("attach", min(_ATTACH_DEADLINE, share)):
                    sandbox = await by.provider.attach(key)
            except MabridgeError as error:
                self._failed(session_id, by, error, failures)
                continue
            if sandbox is not None:
                self._gates[name].enter(session_id)
                self._emit("sandbox.attached", session_id, by, sandbox_id=sandbox.id, started=started)
                return Held(key=key, sandbox=sandbox, by=by, created=False)
        return None

    async def _make(
        self, session_id: str, names: Sequence[str], deadline: float, failures: dict[str, MabridgeError]
    ) -> Held | None:
        strays: list[NamedProvider] = []
        candidates = [name for name in names if name not in failures]
        for index, name in enumerate(candidates):
            by, started = self._providers[name], anyio.current_time()
            try:
                with self._gates[name].place(session_id):
                    share = max((deadline - started) / (len(candidates) - index), 1.0)
                    spec = self._spec(session_id, by)
                    with self._gates[name].answering("create", float("inf")):
                        sandbox = await _whole(by.provider.create(spec), timeout=share)
            except MabridgeError as error:
                if isinstance(error, SandboxUnavailable):
                    strays.append(by)
                self._failed(session_id, by, error, failures)
                continue
            if failures:
                reason = "; ".join(f"{other}: {error}" for other, error in failures.items())
                self._emit("sandbox.fell_back", session_id, by, sandbox_id=sandbox.id, reason=reason)
            self._emit("sandbox.created", session_id, by, sandbox_id=sandbox.id, started=started)
            return Held(key=spec.key, sandbox=sandbox, by=by, created=True, strays=tuple(strays))
        return None

    def _spec(self, session_id: str, by: NamedProvider) -> SandboxSpec:
        return SandboxSpec(
            key=sandbox_key(self._environment_id, session_id),
            labels=sandbox_labels(self._environment_id, session_id),
            workdir=self._workdir,
            ttl=by.ttl,
        )

    async def _remove_stray(self, by: NamedProvider, held: Held) -> None:
        """Look until it is known whether a create that failed left a sandbox behind, and remove it."""
        pause = _STRAY_PAUSE
        # Two instances may well be at one place, where the same key is the same sandbox.
        same_place = by.provider.type == held.by.provider.type
        while True:
            await anyio.sleep(pause)
            try:
                with ours(by, "attach"), anyio.fail_after(_ATTACH_DEADLINE):
                    stray = await by.provider.attach(held.key)
                    if stray is not None and not (same_place and stray.id == held.sandbox.id):
                        await stray.teardown()
                return
            except (MabridgeError, TimeoutError) as error:
                _log.info("%s may have a second sandbox of a session, and cannot be asked: %s", by.name, error)
                pause = min(pause * 2, _LONGEST_PAUSE * 4)

    def _failed(
        self, session_id: str, by: NamedProvider, error: MabridgeError, failures: dict[str, MabridgeError]
    ) -> None:
        failures[by.name] = error
        self._emit("sandbox.failed", session_id, by, reason=str(error))

    def _emit(
        self,
        name: EventName,
        session_id: str,
        by: NamedProvider,
        *,
        sandbox_id: str | None = None,
        reason: str | None = None,
        started: float | None = None,
    ) -> None:
        seconds = None if started is None else anyio.current_time() - started
        self._observers.emit(
            Event(
                name=name,
                session_id=session_id,
                provider=by.name,
                sandbox_id=sandbox_id,
                reason=reason,
                seconds=seconds,
            )
        )
