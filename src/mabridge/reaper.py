"""Removes the sandboxes that nobody has any use for: of sessions that have ended, or that nobody went on with.

A sandbox is touched only if all of this holds: it carries all our labels and they agree with one another; it belongs to
this environment; the platform, asked after the sandboxes were listed and once more right before a removal, has no live
work item for its session; and it has been so for a while. A list that could not be read whole ends the sweep: what is
not known to be unused is left alone, for it removes itself when its ``ttl`` has passed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

import anyio
from anthropic import APIError, APIStatusError

from mabridge.control_plane.queue import WorkQueue, WorkStatus
from mabridge.errors import MabridgeError
from mabridge.identity import ENVIRONMENT_LABEL, KEY_LABEL, SESSION_LABEL, sandbox_key
from mabridge.named_provider import NamedProvider
from mabridge.observe import Event, Observers
from mabridge.sandbox import SandboxInfo

__all__ = ["Orphan", "Reaper", "Sweep"]

_log = logging.getLogger(__name__)

_LIST_DEADLINE = 120.0
_REMOVE_DEADLINE = 60.0
# A removal that was accepted may take a moment to show in the list.
_CONFIRM_DEADLINE = 15.0
_CONFIRM_PAUSE = 0.5


@dataclass(frozen=True, kw_only=True)
class Orphan:
    """A sandbox that nobody has any use for.

    Attributes:
        providers: configured names of the instances that list it.
        info: as they list it.
        session_id: its session.
        reason: why nobody has, for a person to read.
        idle: seconds since anything was last heard of it.
    """

    providers: tuple[str, ...]
    info: SandboxInfo
    session_id: str
    reason: str
    idle: float


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What came of a sweep.

    Attributes:
        orphans: what is of no use to anybody.
        removed: those of them that were removed, by their ids, and are in no list any more.
        failures: what went wrong, by the name of the provider or the id of the sandbox; ``anthropic`` is the platform.
    """

    orphans: list[Orphan] = field(default_factory=list)
    removed: list[Orphan] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass
class _Found:
    """One sandbox, and the instances that list it: two of one type may well see the same ones."""

    info: SandboxInfo
    by: list[NamedProvider]

    @property
    def session_id(self) -> str:
        return self.info.labels[SESSION_LABEL]


class Reaper:
    """Finds and removes the sandboxes of an environment that nobody has any use for.

    Args:
        providers: by their configured names, entered.
        queue: of the environment.
        observers: told of what happens.
        grace: seconds that a sandbox is left alone after its session has ended, or has let go of it.
        older_than: seconds after which a sandbox without a live work item is of no use, whatever the configuration says
            of how long it is kept; ``None`` is to go by the configuration.
        looks: how many sessions are looked at in one sweep, those first that were not for the longest time; ``None`` is
            all. Each costs a read of the organization's 1,200 a minute.
        spared: gives the ids of sessions that are not to be touched: those that are being served here.
    """

    def __init__(
        self,
        providers: Mapping[str, NamedProvider],
        queue: WorkQueue,
        *,
        observers: Observers,
        grace: float = 300.0,
        older_than: float | None = None,
        looks: int | None = None,
        spared: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._providers = providers
        self._queue = queue
        self._observers = observers
        self._grace = grace
        self._older_than = older_than
        self._looks = looks
        self._spared = spared
        self._first_seen: dict[str, datetime] = {}
        self._looked: dict[str, float] = {}

    async def sweep(self, *, dry_run: bool = False) -> Sweep:
        """Look at all sandboxes once, and remove those that are of no use to anybody.

        Args:
            dry_run: only look.

        Returns:
            what was found and removed, and what failed; it raises nothing of its own.
        """
        result = Sweep()
        found = [each for each in await self._list_all(result) if self._is_ours(each.info)]
        self._first_seen = {
            each.info.id: self._first_seen.get(each.info.id, datetime.now(UTC)) for each in found
        }  # and so forgets those that are gone
        candidates = [each for each in await self._unleased(found, result) if self._may_be_due(*each[:2])]
        candidates.sort(key=lambda each: self._looked.get(each[0].info.id, 0.0))
        self._looked = {each[0].info.id: self._looked.get(each[0].info.id, 0.0) for each in candidates}
        for each in candidates[: self._looks]:
            self._looked[each[0].info.id] = anyio.current_time()
            orphan = await self._judge(each, result)
            if orphan is not None:
                result.orphans.append(orphan)
        if result.orphans and not dry_run:
            await self._remove_all(result)
        for where, reason in result.failures.items():
            self._observers.emit(Event(name="reap.failed", provider=where, reason=reason))
        return result

    async def _list_all(self, result: Sweep) -> list[_Found]:
        found: dict[tuple[str, str], _Found] = {}
        for named in self._providers.values():
            try:
                infos = await _listed(named)
            except (MabridgeError, TimeoutError) as error:
                result.failures[named.name] = str(error) or "the list did not come in time"
                continue
            for info in infos:
                found.setdefault((named.provider.type, info.id), _Found(info, [])).by.append(named)
        return list(found.values())

    def _is_ours(self, info: SandboxInfo) -> bool:
        environment, session = info.labels.get(ENVIRONMENT_LABEL), info.labels.get(SESSION_LABEL)
        if environment != self._queue.environment_id or not session:
            return False
        return info.key == info.labels.get(KEY_LABEL) == sandbox_key(environment, session)

    async def _unleased(self, found: Iterable[_Found], result: Sweep) -> list[tuple[_Found, WorkStatus | None, bool]]:
        """Return those without a live work item, with the item if there is one and whether the platform told at all."""
        found = list(found)
        if not found:
            return []
        told, statuses = await self._statuses(result)
        if told is None:
            return []
        spared = self._spared()
        return [
            (each, statuses.get(each.session_id), told)
            for each in found
            if each.session_id not in spared and not _live(statuses.get(each.session_id))
        ]

    async def _statuses(self, result: Sweep) -> tuple[bool | None, dict[str, WorkStatus]]:
        """Ask for all work items: ``True`` if the platform told, ``False`` if it never tells, ``None`` if it failed."""
        try:
            return True, await self._queue.statuses()
        except APIStatusError as error:
            if error.status_code in (403, 404, 405):
                # Claude Platform on AWS has no such list. Of a session that has ended it is plain even so.
                _log.info("the platform lists no work items (%s): only ended sessions are looked at", error.status_code)
                return False, {}
            result.failures["anthropic"] = f"work items could not be listed: {error.status_code} {error.message}"
        except (APIError, TimeoutError) as error:
            result.failures["anthropic"] = f"work items could not be listed: {str(error) or 'no answer in time'}"
        return None, {}

    async def _judge(self, candidate: tuple[_Found, WorkStatus | None, bool], result: Sweep) -> Orphan | None:
        """Return the candidate as an orphan if it has been of no use for long enough."""
        found, work, told = candidate
        try:
            session = await self._queue.session_status(found.session_id)
        except APIError as error:
            result.failures[found.info.id] = f"session {found.session_id} could not be looked at: {error.message}"
            return None
        if not session.ended and (not told or session.status != "idle"):
            return None
        idle = self._idle(found, work, session.updated_at)
        kept_for, reason = self._allowed(found, session.status)
        if idle < kept_for:
            return None
        names = tuple(named.name for named in found.by)
        return Orphan(providers=names, info=found.info, session_id=found.session_id, reason=reason, idle=idle)

    def _may_be_due(self, found: _Found, work: WorkStatus | None) -> bool:
        """Whether it is worth asking how its session stands."""
        return self._idle(found, work) >= (self._grace if self._older_than is None else self._older_than)

    def _idle(self, found: _Found, work: WorkStatus | None, session_updated: datetime | None = None) -> float:
        """Return the seconds since anything was last heard of it."""
        times = [found.info.created_at, work.last_active if work else None, session_updated]
        last = max((time for time in times if time is not None), default=self._first_seen[found.info.id])
        return (datetime.now(UTC) - last).total_seconds()

    def _allowed(self, found: _Found, status: str) -> tuple[float, str]:
        """Return the seconds that a sandbox is left alone, and why it is of no use after them."""
        if status != "idle":
            return self._grace if self._older_than is None else self._older_than, f"its session is {status}"
        if self._older_than is not None:
            return self._older_than, "no worker has its session"
        # What several instances list is kept for as long as any of them says.
        return max(self._kept_for(named) for named in found.by), "no worker has its session"

    def _kept_for(self, named: NamedProvider) -> float:
        return self._grace if named.when_done == "teardown" else max(named.kept_for, self._grace)

    async def _remove_all(self, result: Sweep) -> None:
        """Remove the orphans, unless somebody has taken up their sessions meanwhile."""
        told, statuses = await self._statuses(result)
        if told is None:
            return
        tried: list[Orphan] = []
        for orphan in result.orphans:
            if orphan.session_id in self._spared() or _live(statuses.get(orphan.session_id)):
                continue
            try:
                with anyio.fail_after(_REMOVE_DEADLINE):
                    await self._providers[orphan.providers[0]].provider.remove(orphan.info)
            except (MabridgeError, TimeoutError) as error:
                result.failures[orphan.info.id] = f"it was not removed: {str(error) or 'no answer in time'}"
            else:
                tried.append(orphan)
        await self._confirm(tried, result)

    async def _confirm(self, tried: list[Orphan], result: Sweep) -> None:
        """Look whether what was removed is in no list any more."""
        for name in dict.fromkeys(orphan.providers[0] for orphan in tried):
            left = {orphan.info.id: orphan for orphan in tried if orphan.providers[0] == name}
            give_up_at = anyio.current_time() + _CONFIRM_DEADLINE
            while left:
                try:
                    there = {info.id for info in await _listed(self._providers[name])}
                except (MabridgeError, TimeoutError) as error:
                    result.failures[name] = f"removals could not be confirmed: {str(error) or 'no list in time'}"
                    break
                for orphan in [orphan for sandbox_id, orphan in left.items() if sandbox_id not in there]:
                    del left[orphan.info.id]
                    self._reaped(orphan, result)
                if left and anyio.current_time() >= give_up_at:
                    result.failures.update(dict.fromkeys(left, "it was removed, and is there all the same"))
                    break
                if left:
                    await anyio.sleep(_CONFIRM_PAUSE)

    def _reaped(self, orphan: Orphan, result: Sweep) -> None:
        result.removed.append(orphan)
        name: Literal["sandbox.reaped"] = "sandbox.reaped"
        self._observers.emit(
            Event(
                name=name,
                session_id=orphan.session_id,
                provider=orphan.providers[0],
                sandbox_id=orphan.info.id,
                reason=f"{orphan.reason}, idle for {orphan.idle:.0f} s",
            )
        )


def _live(work: WorkStatus | None) -> bool:
    return work is not None and work.live


async def _listed(named: NamedProvider) -> list[SandboxInfo]:
    with anyio.fail_after(_LIST_DEADLINE):
        return [info async for info in named.provider.list()]
