"""Skills from a platform into a sandbox, over HTTP and the real SDK."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from anthropic import AsyncAnthropic

from mabridge.errors import SandboxGone
from mabridge.resources.skills import SkillOutcome, install_skills
from mabridge.sandbox import ExecResult, Sandbox
from mabridge.testing import Agent, ControlPlane, Environment

pytestmark = pytest.mark.anyio


@pytest.fixture
async def plane() -> AsyncIterator[ControlPlane]:
    async with ControlPlane() as plane:
        yield plane


@pytest.fixture
def environment(plane: ControlPlane) -> Environment:
    return plane.create_environment()


@pytest.fixture
async def client(plane: ControlPlane, environment: Environment) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=plane.url, auth_token=environment.key, api_key=None, max_retries=0) as client:
        yield client


async def nothing(agent: Agent) -> None:
    """An agent that does nothing."""


async def installed(
    client: AsyncAnthropic, environment: Environment, sandbox: Sandbox, *skills: Any
) -> list[SkillOutcome]:
    session = await client.beta.sessions.retrieve(environment.create_session(nothing, skills=skills).id)
    return await install_skills(client, session.agent, sandbox)


def tree(sandbox: Sandbox) -> dict[str, tuple[bytes, int]]:
    root = Path(sandbox.workdir)
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mode & 0o7777)
        for path in root.rglob("*")
        if path.is_file()
    }


class WithoutTar(Sandbox):
    """A sandbox that has no tar."""

    def __init__(self, inner: Sandbox, programs: Path) -> None:
        self._inner, self.id, self.workdir = inner, inner.id, inner.workdir
        programs.mkdir()
        for name in ["cat", "chmod", "mkdir", "mv", "rm", "sh"]:
            (programs / name).symlink_to(shutil.which(name) or name)
        self._path = str(programs)

    async def exec(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, **rest: Any) -> ExecResult:
        return await self._inner.exec(argv, env={"PATH": self._path, **(env or {})}, **rest)

    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        return await self._inner.read_file(path, max_bytes=max_bytes)

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        await self._inner.write_file(path, data, mode=mode)

    async def teardown(self) -> None:
        await self._inner.teardown()


@pytest.mark.parametrize("tar", [True, False])
async def test_skills_are_where_the_agent_looks_for_them(
    plane: ControlPlane,
    environment: Environment,
    client: AsyncAnthropic,
    local_sandbox: Sandbox,
    tmp_path: Path,
    tar: bool,
) -> None:
    sandbox = local_sandbox if tar else WithoutTar(local_sandbox, tmp_path / "bin")
    pdf = plane.create_skill(
        "pdf", {"SKILL.md": "how é", "scripts/run.sh": "#!/bin/sh\n", "deep/" * 30 + "x": b"\0\xff"}
    )
    xls = plane.create_skill("xls", {"SKILL.md": "x" * 300_000})
    outcomes = await installed(client, environment, sandbox, pdf, xls)
    root = f"{sandbox.workdir}/skills"
    assert outcomes == [
        SkillOutcome(skill_id=pdf.id, name="pdf", path=f"{root}/pdf"),
        SkillOutcome(skill_id=xls.id, name="xls", path=f"{root}/xls"),
    ]
    assert tree(sandbox) == {
        "skills/pdf/SKILL.md": ("how é".encode(), 0o644),
        "skills/pdf/scripts/run.sh": (b"#!/bin/sh\n", 0o755),
        "skills/pdf/" + "deep/" * 30 + "x": (b"\0\xff", 0o644),
        "skills/xls/SKILL.md": (b"x" * 300_000, 0o644),
    }


@pytest.mark.parametrize("tar", [True, False])
async def test_skill_replaces_an_older_one_of_its_name_and_no_other(
    plane: ControlPlane,
    environment: Environment,
    client: AsyncAnthropic,
    local_sandbox: Sandbox,
    tmp_path: Path,
    tar: bool,
) -> None:
    sandbox = local_sandbox if tar else WithoutTar(local_sandbox, tmp_path / "bin")
    for name in ("pdf/old", "own/SKILL.md"):
        await sandbox.write_file(f"skills/{name}", b"old")
    await installed(client, environment, sandbox, plane.create_skill("pdf", {"SKILL.md": "new"}))
    assert set(tree(sandbox)) == {"skills/pdf/SKILL.md", "skills/own/SKILL.md"}


async def test_skills_arrive_in_any_sandbox(
    plane: ControlPlane, environment: Environment, client: AsyncAnthropic, sandbox: Sandbox
) -> None:
    skill = plane.create_skill("pdf", {"SKILL.md": "how", "run.sh": "#!/bin/sh\necho ran", "long/" * 30 + "x": "far"})
    (outcome,) = await installed(client, environment, sandbox, skill)
    assert outcome.error is None
    script = 'cd "$1" && ./run.sh && cat SKILL.md long' + "/*" * 30 + "; ls -A . .."
    argv = ["/bin/sh", "-c", script, "sh", outcome.path or ""]
    result = await sandbox.exec(argv, timeout=60, max_output=10_000)
    assert result.stdout == b"ran\nhowfar.:\nSKILL.md\nlong\nrun.sh\n\n..:\npdf\n"


async def test_one_bad_skill_does_not_hold_up_the_others(
    plane: ControlPlane, environment: Environment, client: AsyncAnthropic, local_sandbox: Sandbox,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    bad, gone, good = (plane.create_skill(name, {"SKILL.md": name}) for name in ("bad", "gone", "good"))
    bad.archive = b"no archive"
    plane_skills = [bad, gone, good]
    session = await client.beta.sessions.retrieve(environment.create_session(nothing, skills=plane_skills).id)
    del plane.skills[gone.id]
    outcomes = await install_skills(client, session.agent, local_sandbox)
    assert [outcome.path is None for outcome in outcomes] == [True, True, False]
    assert "the archive cannot be read" in (outcomes[0].error or "")
    assert "404" in (outcomes[1].error or "")
    assert set(tree(local_sandbox)) == {"skills/good/SKILL.md"}
    logged = [record.levelname for record in caplog.records if record.name == "mabridge.resources.skills"]
    assert logged.count("WARNING") == 2


@pytest.mark.parametrize(
    ("name", "directory"),
    [
        ("../../evil", "evil"),
        ("/etc/cron.d/evil", "evil"),
        ("..", None),
        ("", None),
        ("a\tb", None),
        ("x" * 300, None),
        ("-rf", "-rf"),
        (" with space ", "with space"),
    ],
)
async def test_name_of_a_skill_is_one_safe_component(
    plane: ControlPlane, environment: Environment, client: AsyncAnthropic, local_sandbox: Sandbox,
    name: str, directory: str | None,
) -> None:  # fmt: skip
    skill = plane.create_skill("s", {"SKILL.md": "x"})
    skill.name = name
    (outcome,) = await installed(client, environment, local_sandbox, skill)
    assert outcome.name == (directory or skill.id)
    assert set(tree(local_sandbox)) == {f"skills/{directory or skill.id}/SKILL.md"}


async def test_second_skill_of_a_name_is_refused(
    plane: ControlPlane, environment: Environment, client: AsyncAnthropic, local_sandbox: Sandbox
) -> None:
    twins = [plane.create_skill("pdf", {"SKILL.md": "x"}) for _ in range(2)]
    outcomes = await installed(client, environment, local_sandbox, *twins)
    assert sorted(outcome.error or "" for outcome in outcomes) == [
        "",
        "another skill of this agent is called 'pdf' too",
    ]


async def test_archive_that_does_not_arrive_whole_changes_nothing(
    plane: ControlPlane, environment: Environment, client: AsyncAnthropic, local_sandbox: Sandbox
) -> None:
    class Cut(WithoutTar):
        """A sandbox whose connection drops the end of stdin."""

        def __init__(self) -> None:
            self._inner, self.id, self.workdir = local_sandbox, local_sandbox.id, local_sandbox.workdir

        async def exec(self, argv: Sequence[str], *, stdin: bytes | None = None, **rest: Any) -> ExecResult:
            return await self._inner.exec(argv, stdin=stdin and stdin[:1536], **rest)

    await local_sandbox.write_file("skills/pdf/SKILL.md", b"old")
    (outcome,) = await installed(
        client, environment, Cut(), plane.create_skill("pdf", {"SKILL.md": "new", "more": "x"})
    )
    assert "could not be unpacked in the sandbox" in (outcome.error or "")
    assert tree(local_sandbox) == {"skills/pdf/SKILL.md": (b"old", 0o644)}


async def test_lost_sandbox_is_not_a_failed_skill(
    plane: ControlPlane, environment: Environment, client: AsyncAnthropic, local_sandbox: Sandbox
) -> None:
    await local_sandbox.teardown()
    with pytest.raises(SandboxGone):
        await installed(client, environment, local_sandbox, plane.create_skill("pdf", {"SKILL.md": "x"}))
