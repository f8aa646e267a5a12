"""The work queue of one environment: what is claimed from it, and with which credential each call is made.

Facts: https://platform.claude.com/docs/en/managed-agents/self-hosted-sandboxes and the docstrings of
``anthropic.resources.beta.environments.work``.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar, cast

import anyio
import stamina
from anthropic import APIError, APIStatusError, AsyncAnthropic, omit

from mabridge.errors import ConfigError
from mabridge.identity import is_safe_id

if TYPE_CHECKING:
    from anthropic.types.beta.environments import BetaSelfHostedWorkHeartbeatResponse

__all__ = ["ClaimedWork", "SessionStatus", "WorkQueue", "WorkStatus", "is_transient", "worth_repeating"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

_BLOCK_MS = 999  # the platform's maximum
_POLL_DEADLINE = 15.0
# An item that is not acknowledged within 5 s is offered to others.
_ACK_DEADLINE = 4.0
_STOP_DEADLINE = 15.0
_READ_DEADLINE = 30.0
_ITEMS_A_PAGE = 100


def is_transient(error: APIError) -> bool:
    """Whether the same request may succeed later: no answer, a fault of the platform's, or a rate limit."""
    if not isinstance(error, APIStatusError):
        return True
    return error.status_code >= 500 or error.status_code in (408, 409, 429)


def worth_repeating(error: Exception) -> bool:
    """As `is_transient`, for any exception and for calls that find a conflict (409) to be an answer."""
    if isinstance(error, APIStatusError) and error.status_code == 409:
        return False
    return isinstance(error, APIError) and is_transient(error)


@dataclass(frozen=True, kw_only=True)
class WorkStatus:
    """Where the work item of a session stands.

    Attributes:
        item: the item.
        state: ``queued``, ``starting``, ``active``, ``stopping`` or ``stopped``.
        last_active: when a worker last had to do with it, as far as the platform tells.
        unclaimed_since: it was acknowledged then, and there was no heartbeat for it ever since.
    """

    item: object = field(repr=False)
    state: str
    last_active: datetime | None = None
    unclaimed_since: datetime | None = None

    @property
    def live(self) -> bool:
        """Whether a worker has it, or one will."""
        return self.state != "stopped"


@dataclass(frozen=True, kw_only=True)
class SessionStatus:
    """Where a session stands.

    Attributes:
        status: ``idle``, ``running``, ``rescheduling``, ``terminated``, or ``deleted``.
        updated_at: when it last changed, unless it is deleted.
    """

    status: str
    updated_at: datetime | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing will ever be run for it again."""
        return self.status in ("terminated", "deleted")


class WorkQueue:
    """The queue of one environment.

    Args:
        client: any client of the API. Its own credentials are never used: the environment key goes in their place.
        environment_id: ``env_...``.
        environment_key: the environment's key. It stays in this process.
        worker_id: tells this worker from others in the Console.
    """

    def __init__(self, client: AsyncAnthropic, *, environment_id: str, environment_key: str, worker_id: str) -> None:
        if not is_safe_id(environment_id):
            raise ConfigError(f"{environment_id!r} is not the id of an environment, such as env_011CZkZ...")
        self.environment_id = environment_id
        self.client = _bearer(client, environment_key)
        self._worker_id = worker_id
        self._answered_once = False

    async def poll(self) -> ClaimedWork | None:
        """Wait up to a second for a work item; ``None`` if there was none, or none that is ours to serve.

        Raises:
            ConfigError: the key or the environment is wrong. Asking again will not help.
            APIError: the platform could not be asked; try again later.
            TimeoutError: it did not answer.
        """
        try:
            with anyio.fail_after(_POLL_DEADLINE):
                item = await self.client.beta.environments.work.poll(
                    self.environment_id, block_ms=_BLOCK_MS, anthropic_worker_id=self._worker_id
                )
        except APIStatusError as error:
            if error.status_code == 404 and "session" in error.message.lower():
                # The queue held an entry whose session is gone. Polling has consumed it.
                _log.info("the queue offered a session that no longer exists; skipped")
                return None
            if (explained := self._explained(error)) is not None:
                raise explained from error
            raise
        self._answered_once = True
        if not item:
            return None
        work = ClaimedWork(self, item)
        if (refusal := work.why_not_served()) is None:
            return work
        _log.warning("work item %s is not served: %s", work.work_id if is_safe_id(work.work_id) else "?", refusal)
        if is_safe_id(work.work_id) and work.environment_id == self.environment_id:
            # Nobody will serve it, and left alone it would be offered again for ever.
            await work.stop()
        return None

    async def statuses(self) -> dict[str, WorkStatus]:
        """Return where every work item of the environment stands, by the id of its session.

        Raises:
            APIError: the list could not be read whole. Claude Platform on AWS has none.
            TimeoutError: likewise.
        """
        found: dict[str, WorkStatus] = {}
        with anyio.fail_after(_READ_DEADLINE * 4):
            async for item in self.client.beta.environments.work.list(
                self.environment_id, limit=_ITEMS_A_PAGE, timeout=_READ_DEADLINE
            ):
                session_id = _text(getattr(item, "data", None), "id")
                if is_safe_id(session_id) and (session_id not in found or not found[session_id].live):
                    found[session_id] = _status(item)
        return found

    async def unclaimed(self, *, longer_than: float) -> list[ClaimedWork]:
        """Return the items that somebody acknowledged and never claimed the lease of, and never will.

        That is what a worker leaves that dies between the two. Such an item is offered to nobody, and has no lease that
        could lapse; but its first heartbeat may come from anyone.

        Args:
            longer_than: seconds that it must have been so.

        Raises:
            APIError: the list could not be read whole.
            TimeoutError: likewise.
        """
        now = datetime.now(UTC)
        return [
            ClaimedWork(self, status.item)
            for status in (await self.statuses()).values()
            if status.unclaimed_since is not None and (now - status.unclaimed_since).total_seconds() > longer_than
        ]

    async def session_status(self, session_id: str) -> SessionStatus:
        """Return where a session stands.

        Raises:
            APIError: the platform could not be asked.
        """
        try:
            session = await self.client.beta.sessions.retrieve(session_id, timeout=_READ_DEADLINE)
        except APIStatusError as error:
            if error.status_code == 404:
                return SessionStatus(status="deleted")
            raise
        return SessionStatus(status=session.status, updated_at=session.updated_at)

    def _explained(self, error: APIStatusError) -> ConfigError | None:
        if error.status_code in (401, 403):
            return ConfigError(
                f"the platform rejected the environment key ({error.status_code}): it is wrong, was revoked, or "
                f"belongs to another environment than {self.environment_id}. Make a key for it in the Console."
            )
        if error.status_code == 404 and not self._answered_once:
            return ConfigError(f"there is no environment {self.environment_id} (404): look up its id in the Console.")
        if error.status_code == 400:
            return ConfigError(f"the platform cannot poll {self.environment_id} (400): {error.message}")
        return None


class ClaimedWork:
    """One work item as the queue gave it: a session to serve.

    It holds the item's own token, if it came with one, and so is never logged whole.
    """

    def __init__(self, queue: WorkQueue, item: object) -> None:
        self._queue = queue
        data = getattr(item, "data", None)
        self.work_id = _text(item, "id")
        self.environment_id = _text(item, "environment_id")
        self.kind = str(getattr(data, "type", None))
        self.session_id = _text(data, "id")
        token = _sessions_token(getattr(item, "secret", None))
        self._item_client = _bearer(queue.client, token) if token else None

    def __repr__(self) -> str:
        return f"ClaimedWork({self.work_id})"

    @property
    def client(self) -> AsyncAnthropic:
        """A client for the item and its session: with the item's token if there is one, else the environment key."""
        return self._item_client or self._queue.client

    @property
    def environment_client(self) -> AsyncAnthropic:
        """A client with the environment key: the skills API refuses the item's token."""
        return self._queue.client

    async def request(self, call: Callable[[AsyncAnthropic], Awaitable[T]]) -> T:
        """Make a request for the item or its session with `client`.

        Where the platform refuses the item's token, which may have run out, the environment key is used from then on.

        Raises:
            APIError: as the request itself.
        """
        try:
            return await call(self.client)
        except APIStatusError as error:
            if error.status_code == 401 and self.forget_token():
                return await call(self.client)
            raise

    def forget_token(self) -> bool:
        """Go on with the environment key, after the platform refused the item's token; ``False`` if that is in use."""
        had_one = self._item_client is not None
        self._item_client = None
        return had_one

    def why_not_served(self) -> str | None:
        """Return why the item cannot be served, or ``None`` if it can."""
        if self.kind != "session":
            return f"it is of type {self.kind!r}, not a session"
        if not is_safe_id(self.work_id) or not is_safe_id(self.session_id):
            return "its ids are malformed"
        if self.environment_id != self._queue.environment_id:
            return f"it belongs to another environment than {self._queue.environment_id}"
        return None

    async def acknowledge(self) -> None:
        """Take the item off the queue.

        Raises:
            APIError: it could not be, or not in time; it will be offered again if it is still there.
        """
        work = self.environment_client.beta.environments.work
        async for attempt in stamina.retry_context(
            on=worth_repeating, attempts=4, timeout=_ACK_DEADLINE, wait_initial=0.1, wait_max=1.0
        ):
            with attempt:
                await work.ack(self.work_id, environment_id=self.environment_id, timeout=_ACK_DEADLINE)

    async def heartbeat(self, expected: str, *, desired_ttl: int | None = None) -> BetaSelfHostedWorkHeartbeatResponse:
        """Send one heartbeat.

        Args:
            expected: the time of the one before, or ``NO_HEARTBEAT``.
            desired_ttl: seconds that the lease should last; ``None`` leaves it to the platform.
        """
        return await self.request(
            lambda client: client.beta.environments.work.heartbeat(
                self.work_id,
                environment_id=self.environment_id,
                expected_last_heartbeat=expected,
                desired_ttl_seconds=omit if desired_ttl is None else desired_ttl,
            )
        )

    async def stop(self, *, still_ours: Callable[[], bool] = lambda: True) -> None:
        """Say that we are done with the item. Never raises: what cannot be stopped lapses with its lease.

        Args:
            still_ours: asked before each try; an item that is someone else's by now is not stopped.
        """
        try:
            async for attempt in stamina.retry_context(on=worth_repeating, attempts=5, timeout=_STOP_DEADLINE):
                with attempt:
                    if not still_ours():
                        return
                    await self.request(
                        lambda client: client.beta.environments.work.stop(
                            self.work_id, environment_id=self.environment_id, force=True, timeout=_STOP_DEADLINE / 3
                        )
                    )
        except APIError as error:
            if not (isinstance(error, APIStatusError) and error.status_code == 409):  # it was stopped already
                _log.warning("work item %s could not be stopped: %s", self.work_id, error.message)


def _text(item: object, name: str) -> str:
    """Return a field that should be a text; empty if it is missing, or anything else."""
    value = getattr(item, name, None)
    return value if isinstance(value, str) else ""


def _status(item: object) -> WorkStatus:
    state = str(getattr(item, "state", ""))
    times = {
        name: _time(getattr(item, name, None)) for name in ("acknowledged_at", "latest_heartbeat_at", "stopped_at")
    }
    unclaimed = state == "starting" and times["latest_heartbeat_at"] is None
    return WorkStatus(
        item=item,
        state=state,
        last_active=max((time for time in times.values() if time is not None), default=None),
        unclaimed_since=times["acknowledged_at"] if unclaimed else None,
    )


def _time(text: object) -> datetime | None:
    try:
        time = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return time if time is None or time.tzinfo is not None else None


def _bearer(client: AsyncAnthropic, token: str) -> AsyncAnthropic:
    """Return a copy of `client` that sends `token`, and no other credential, and leaves retries to us."""
    headers = {"Authorization": f"Bearer {token}", "X-Api-Key": omit}
    return client.copy(
        auth_token=token,
        base_url=client.base_url,
        max_retries=0,
        # They win over credentials in the parent's own default headers, which a copy takes over.
        default_headers=cast("dict[str, str]", headers),
    )


def _sessions_token(secret: Any) -> str | None:  # noqa: ANN401 - it is whatever the platform sent
    """Return the token inside a work item's secret: URL-safe base64, perhaps unpadded, of JSON."""
    if not isinstance(secret, str) or not secret:
        return None
    try:
        parsed = json.loads(base64.urlsafe_b64decode(secret + "=" * (-len(secret) % 4)))
    except (binascii.Error, ValueError):
        _log.warning("a work item's secret cannot be read; its session is served with the environment key")
        return None
    token = parsed.get("sessions_token") if isinstance(parsed, dict) else None
    return token if isinstance(token, str) and token else None
