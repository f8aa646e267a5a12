"""Puts the skills of a session's agent into its sandbox, where the agent looks for them.

See https://platform.claude.com/docs/en/managed-agents/self-hosted-sandboxes-reference.
"""

from __future__ import annotations

import logging
import posixpath
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import httpx2
from anthropic import APIError

from mabridge.errors import SandboxError, SandboxGone
from mabridge.identity import is_safe_id
from mabridge.resources.archive import MAX_ARCHIVE_BYTES, ArchiveError, Member, pack, unpack
from mabridge.sandbox import Sandbox

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic
    from anthropic.types.beta import BetaManagedAgentsSessionAgent

__all__ = ["SkillOutcome", "install_skills"]

_log = logging.getLogger(__name__)

_AT_ONCE = 4
_DEADLINE = 120.0
_NO_TAR = 3
_OUTPUT = 4_096


@dataclass(frozen=True, kw_only=True)
class SkillOutcome:
    """What became of one skill.

    Attributes:
        skill_id: the platform's id of it.
        name: its directory's name; the id, if it never came so far.
        path: the directory in the sandbox that it is in; ``None`` if it is not there.
        error: why it is not there.
    """

    skill_id: str
    name: str
    path: str | None = None
    error: str | None = None


async def install_skills(
    client: AsyncAnthropic, agent: BetaManagedAgentsSessionAgent, sandbox: Sandbox
) -> list[SkillOutcome]:
    """Put each of the agent's skills into ``skills/NAME`` below the sandbox's working directory.

    What was there of that name is replaced. A skill that cannot be had is logged, and the others are not held up.

    Args:
        client: authenticated with the environment key: the skills API refuses a work item's own token.
        agent: the session's agent, as the session shows it.
        sandbox: where they go.

    Returns:
        One outcome for each skill, in the agent's order.

    Raises:
        SandboxGone: the sandbox is definitely absent.
    """
    skills: Sequence[Any] = agent.skills or ()
    outcomes: list[SkillOutcome | None] = [None] * len(skills)
    limiter = anyio.CapacityLimiter(_AT_ONCE)
    taken: set[str] = set()
    lost: list[SandboxGone] = []

    async def install(position: int) -> None:
        skill_id = str(skills[position].skill_id)
        async with limiter:
            try:
                with anyio.fail_after(_DEADLINE):
                    outcomes[position] = await _install(client, skill_id, str(skills[position].version), sandbox, taken)
                return
            except SandboxGone as exc:
                # Raised by itself, not in a group, once the others have stopped.
                lost.append(exc)
                tasks.cancel_scope.cancel()
                return
            except TimeoutError:
                error = f"not done after {_DEADLINE:g} seconds"
            except (APIError, httpx2.HTTPError, SandboxError, ValueError) as exc:
                error = str(exc)
        _log.warning("skill %s could not be installed: %s", skill_id, error)
        outcomes[position] = SkillOutcome(skill_id=skill_id, name=skill_id, error=error)

    async with anyio.create_task_group() as tasks:
        for position in range(len(skills)):
            tasks.start_soon(install, position)
    if lost:
        raise lost[0]
    return [outcome for outcome in outcomes if outcome is not None]


async def _install(
    client: AsyncAnthropic, skill_id: str, alias: str, sandbox: Sandbox, taken: set[str]
) -> SkillOutcome:
    versions = client.beta.skills.versions
    # The version may be "latest", which only this endpoint resolves.
    version = await versions.retrieve(alias, skill_id=skill_id)
    name = _directory_name(getattr(version, "name", None), skill_id)
    if name in taken:
        raise ArchiveError(f"another skill of this agent is called {name!r} too")
    taken.add(name)
    archive = bytearray()
    async with versions.with_streaming_response.download(version.id, skill_id=skill_id) as response:
        async for chunk in response.iter_bytes():
            archive += chunk
            if len(archive) > MAX_ARCHIVE_BYTES:
                raise ArchiveError(f"the archive holds more than {MAX_ARCHIVE_BYTES} bytes")
    members = await anyio.to_thread.run_sync(unpack, bytes(archive))
    path = posixpath.join(sandbox.workdir, "skills", name)
    await _put(sandbox, path, members)
    _log.info("skill %s, version %s, is in %s", skill_id, version.id, path)
    return SkillOutcome(skill_id=skill_id, name=name, path=path)


def _directory_name(name: object, skill_id: str) -> str:
    """Return the one plain name that a skill's directory gets: its own, or its id where that is none."""
    last = posixpath.basename(name.strip()) if isinstance(name, str) else ""
    if last.isprintable() and last not in ("", ".", "..") and len(last.encode("utf-8", "replace")) <= 200:
        return last
    if is_safe_id(skill_id):
        return skill_id
    raise ArchiveError("neither its name nor its id can be the name of a directory")


async def _put(sandbox: Sandbox, path: str, members: list[Member]) -> None:
    """Put a tree where `path` is, in place of what is there: in one step, if the sandbox has a tar."""
    token = secrets.token_hex(8)
    result = await sandbox.exec(
        ["/bin/sh", "-c", _program(), "mab", posixpath.dirname(path), posixpath.basename(path), token],
        stdin=await anyio.to_thread.run_sync(lambda: pack(members, below="tree", last="end")),
        cwd="/",
        timeout=_DEADLINE,
        max_output=_OUTPUT,
    )
    if result.exit_code == 0:
        return
    if result.exit_code != _NO_TAR:
        complaint = result.stderr.decode("utf-8", "replace").strip()[-300:]
        raise ArchiveError(f"it could not be unpacked in the sandbox: {complaint or f'exit code {result.exit_code}'}")
    for member in members:
        if member.data is not None:
            mode = 0o755 if member.executable else 0o644
            await sandbox.write_file(posixpath.join(path, member.path), member.data, mode=mode)


@cache
def _program() -> str:
    return (resources.files("mabridge.resources") / "skill.sh").read_text(encoding="utf-8")
