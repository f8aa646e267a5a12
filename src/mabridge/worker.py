"""The worker: claims sessions from one environment's queue, as many at once as it has room for, and serves each."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import anyio
from anthropic import APIError, APIStatusError, AsyncAnthropic
from anyio.abc import TaskGroup

from mabridge.config import Config, ProviderConfig
from mabridge.control_plane.client import make_client
from mabridge.control_plane.lease import LeaseEnd
from mabridge.control_plane.queue import ClaimedWork, WorkQueue
from mabridge.errors import ConfigError
from mabridge.limits import bound_open_files
from mabridge.named_provider import NamedProvider
from mabridge.observe import Event, Observer, Observers
from mabridge.plugins import registry
from mabridge.reaper import Reaper
from mabridge.routing import Route
from mabridge.sandbox import Provider
from mabridge.sandboxes import Sandboxes
from mabridge.session import SessionRun, SessionSettings
from mabridge.telemetry import Metrics, work_span
from mabridge.tools import ToolLimits

__all__ = ["Worker"]

_log = logging.getLogger(__name__)

# An idle worker asks once a second at most: each poll waits for nearly that long, so work is picked up at once, and
# sixty requests a minute are well inside the organization's 1,200.
_POLL_PERIOD = 1.0
_BACKOFF_START = 1.0
_BACKOFF_CAP = 60.0
# Sessions whose end is asked for each time that the sandboxes are looked through.
_LOOKS = 60


class Worker:
    """Serves the sessions of one self-hosted environment in sandboxes.

    ::

        worker = Worker(
            AsyncAnthropic(),
            environment_id="env_...",
            providers={"docker": ProviderConfig(type="docker", options={"image": "python:3.12-slim"})},
        )
        await worker.run()

    Args:
        client: of the API. Its own credentials are not used; the environment key goes in their place. Each session
            holds one of its connections all the time: give it enough of them (the SDK's own has 1,000).
        environment_id: ``env_...``; by default the variable ``ANTHROPIC_ENVIRONMENT_ID``.
        environment_key: by default the variable ``ANTHROPIC_ENVIRONMENT_KEY``. It never enters a sandbox.
        providers: by a name of your choice: configurations, or `Provider` objects, which the worker enters, by
            themselves or in a `mabridge.named_provider.NamedProvider` that says what becomes of their sandboxes.
        routes: which providers may serve a session; without any, all of them in order.
        max_sessions: sessions served at once. No more are claimed.
        max_idle: seconds that a session is kept after its agent has ended its turn; ``None`` is for ever.
        create_timeout: seconds after which calls are answered with an error if no provider can give a sandbox.
        drain_timeout: seconds that running calls get to end after `drain`; what runs on goes on in its sandbox, and
            another worker sends its result.
        reap_interval: seconds between two looks for what dead workers left: sandboxes that nobody has any use for, and
            work items that were taken and never claimed. 0 is never to look.
        reap_grace: seconds that those are left alone, at least.
        workdir: absolute path, in each sandbox, of the directory the agent works in.
        limits: of the tools.
        worker_id: tells this worker from others in the Console.
        observers: called with every `Event`, from the event loop: they must return at once. So are those of plugins.

    Raises:
        ConfigError: an argument is wrong, or missing.
    """

    def __init__(
        self,
        client: AsyncAnthropic,
        *,
        environment_id: str | None = None,
        environment_key: str | None = None,
        providers: Mapping[str, Provider | ProviderConfig | NamedProvider],
        routes: Sequence[Route] = (),
        max_sessions: int = 20,
        max_idle: float | None = 60.0,
        create_timeout: float = 120.0,
        drain_timeout: float = 25.0,
        reap_interval: float = 300.0,
        reap_grace: float = 300.0,
        workdir: str = "/workspace",
        limits: ToolLimits | None = None,
        worker_id: str | None = None,
        observers: Iterable[Observer] = (),
    ) -> None:
        if not providers:
            raise ConfigError("a worker needs at least one provider")
        if max_sessions < 1:
            raise ConfigError(f"max_sessions is {max_sessions}; it must be at least 1")
        self._providers = {name: _named(name, provider) for name, provider in providers.items()}
        routes = routes or (Route(providers=tuple(self._providers)),)
        unknown = sorted({name for rule in routes for name in rule.providers} - self._providers.keys())
        if unknown:
            raise ConfigError(f"routes name providers that there are not: {', '.join(unknown)}")
        self._observers = Observers((Metrics(), *observers, *registry().observers()))
        self._queue = WorkQueue(
            client,
            environment_id=environment_id or _from_environment("ANTHROPIC_ENVIRONMENT_ID", "environment_id"),
            environment_key=environment_key or _from_environment("ANTHROPIC_ENVIRONMENT_KEY", "environment_key"),
            worker_id=worker_id or f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}",
        )
        self._settings = SessionSettings(routes=routes, max_idle=max_idle, limits=limits or ToolLimits())
        self._serving: dict[str, tuple[SessionRun, anyio.Event]] = {}
        self._sandboxes = Sandboxes(
            self._providers,
            environment_id=self._queue.environment_id,
            workdir=workdir,
            observers=self._observers,
            create_timeout=create_timeout,
        )
        self._reap_interval = reap_interval
        self._reap_grace = reap_grace
        self._reaper = Reaper(
            self._providers,
            self._queue,
            observers=self._observers,
            grace=reap_grace,
            looks=_LOOKS,
            spared=self._serving.keys,
        )
        room = self._sandboxes.room
        self._max_sessions = max_sessions if room is None else min(max_sessions, room)
        self._slots = anyio.Semaphore(self._max_sessions)
        self._drain_timeout = drain_timeout
        self._leave_by: float | None = None
        self._closed = anyio.Event()

    @classmethod
    def from_config(
        cls, config: Config, *, client: AsyncAnthropic | None = None, observers: Iterable[Observer] = ()
    ) -> Worker:
        """Return the worker that a configuration describes.

        Args:
            config: as `load_config` returns it.
            client: of the API; made from the configuration by default.
            observers: called with every `Event`.

        Raises:
            ConfigError: something in it is wrong, or a variable it names is not set.
        """
        key = config.worker.environment_key.read()
        return cls(
            client or make_client(key=key, base_url=config.worker.base_url, sessions=config.worker.max_sessions),
            environment_id=config.worker.read_environment_id(),
            environment_key=key,
            providers=config.providers,
            routes=config.routes,
            max_sessions=config.worker.max_sessions,
            max_idle=config.worker.max_idle,
            create_timeout=config.worker.create_timeout,
            drain_timeout=config.worker.drain_timeout,
            reap_interval=config.worker.reap_interval,
            reap_grace=config.worker.reap_grace,
            workdir=config.worker.workdir,
            worker_id=config.worker.worker_id,
            observers=observers,
        )

    @property
    def sessions(self) -> tuple[str, ...]:
        """The ids of the sessions that are being served."""
        return tuple(self._serving)

    def drain(self) -> None:
        """Claim no more sessions, and let go of those that are being served; `run` returns when that is done.

        A session is let go of when it comes to rest; as soon as none of its calls runs, where the platform lets another
        worker go on with it at once; and at last after ``drain_timeout``.
        """
        if self._leave_by is None:
            self._observers.emit(Event(name="worker.draining", reason=f"{len(self._serving)} sessions left"))
            self._leave_by = anyio.current_time() + self._drain_timeout
            for run, _ in self._serving.values():
                run.drain(self._leave_by)
            self._closed.set()

    async def run(self) -> None:
        """Claim and serve sessions until `drain` is called, or until cancelled.

        Cancelling stops at once: sandboxes and leases are left as they are, and another worker goes on with the
        sessions once their leases have lapsed.

        Raises:
            ConfigError: the platform rejects the environment key or does not know the environment; or a provider
                cannot be opened. Sessions that are being served are first served to their end, as far as their own
                tokens allow.
        """
        bound_open_files(self._max_sessions)
        async with contextlib.AsyncExitStack() as stack:
            for named in self._providers.values():
                await stack.enter_async_context(named.provider)
            self._observers.emit(Event(name="worker.started", reason=f"environment {self._queue.environment_id}"))
            failure: ConfigError | None = None
            async with anyio.create_task_group() as tasks:
                if self._reap_interval > 0:
                    tasks.start_soon(self._until_closed, self._look_after, tasks)
                try:
                    await self._claim_until_closed(tasks)
                except ConfigError as error:
                    failure = error
                    self._closed.set()
                    reason = f"{error} {len(self._serving)} sessions are served on."
                    self._observers.emit(Event(name="worker.key_rejected", reason=reason))
            self._observers.emit(Event(name="worker.stopped", reason=str(failure) if failure else None))
            if failure is not None:
                raise failure

    async def _claim_until_closed(self, tasks: TaskGroup) -> None:
        backoff = _BACKOFF_START
        while not self._closed.is_set():
            # A slot comes before a claim: what is claimed is served at once.
            await self._slots.acquire()
            if self._closed.is_set():
                break
            asked_at = anyio.current_time()
            work: ClaimedWork | None = None
            try:
                work = await self._queue.poll()
                backoff = _BACKOFF_START
                pause = asked_at + _POLL_PERIOD - anyio.current_time()
            except (APIError, TimeoutError) as error:
                pause = max(backoff * random.uniform(0.75, 1.25), _retry_after(error))  # noqa: S311
                backoff = min(backoff * 2, _BACKOFF_CAP)
                reason = f"{str(error) or 'no answer'}; again in {pause:.0f} s"
                self._observers.emit(Event(name="poll.failed", reason=reason))
            if work is not None and not self._closed.is_set():
                tasks.start_soon(self._serve, work)
                continue
            self._slots.release()
            with anyio.move_on_after(max(pause, 0.0)):
                await self._closed.wait()

    async def _until_closed(
        self, background: Callable[[TaskGroup], Coroutine[Any, Any, None]], serve: TaskGroup
    ) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(background, serve)
            await self._closed.wait()
            tasks.cancel_scope.cancel()

    async def _look_after(self, tasks: TaskGroup) -> None:
        """See after what workers that died have left: sandboxes, and items that they took and never claimed."""
        # Spread out, so that workers that were started together do not look together.
        pause = self._reap_interval * random.uniform(0.1, 0.5)  # noqa: S311
        while True:
            await anyio.sleep(pause)
            await self._reaper.sweep()
            try:
                unclaimed = await self._queue.unclaimed(longer_than=self._reap_grace)
            except (APIError, TimeoutError) as error:
                _log.info("work items could not be listed: %s", str(error) or "no answer")
                unclaimed = []
            for work in unclaimed:
                if work.why_not_served() is not None:
                    continue
                await self._slots.acquire()
                if work.session_id in self._serving:  # it was offered to us while we waited for a slot
                    self._slots.release()
                else:
                    tasks.start_soon(self._serve, work)
            pause = self._reap_interval * random.uniform(0.75, 1.25)  # noqa: S311

    async def _serve(self, work: ClaimedWork) -> None:
        done = anyio.Event()
        try:
            while (earlier := self._serving.get(work.session_id)) is not None:
                # The queue offers it again, so the lease that we thought we had has lapsed. Several may wait here: they
                # take turns, and the last one stays.
                run, ended = earlier
                run.lease.finish(LeaseEnd.TAKEN)
                await ended.wait()
            run = SessionRun(work, sandboxes=self._sandboxes, settings=self._settings, observers=self._observers)
            self._serving[work.session_id] = (run, done)
            if self._leave_by is not None:
                run.drain(self._leave_by)
            try:
                with work_span(environment_id=work.environment_id, work_id=work.work_id, session_id=work.session_id):
                    await run.run()
            finally:
                del self._serving[work.session_id]
        except Exception:  # noqa: BLE001 - one session must not end the others
            _log.exception("session %s failed", work.session_id)
        finally:
            done.set()
            self._slots.release()


def _named(name: str, provider: Provider | ProviderConfig | NamedProvider) -> NamedProvider:
    if isinstance(provider, NamedProvider):
        return replace(provider, name=name)
    if isinstance(provider, Provider):
        return NamedProvider(name=name, provider=provider)
    return NamedProvider.configured(name, provider)


def _from_environment(variable: str, argument: str) -> str:
    value = os.environ.get(variable, "")
    if not value:
        raise ConfigError(f"{argument} is missing: give it, or set {variable}")
    return value


def _retry_after(error: Exception) -> float:
    """Return the seconds that the platform asks us to wait, if it does."""
    if not isinstance(error, APIStatusError):
        return 0.0
    try:
        return min(float(error.response.headers.get("retry-after", "0")), _BACKOFF_CAP)
    except ValueError:
        return 0.0
