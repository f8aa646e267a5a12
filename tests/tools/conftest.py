"""Places for the tools to work in: this machine with several sets of programs, and containers."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mabridge.hands import Hands
from mabridge.providers.local import LocalOptions, LocalProvider
from mabridge.sandbox import ExecResult, Sandbox, SandboxSpec
from mabridge.tools import SandboxTools, ToolLimits, ToolResult

_COREUTILS = [
    "cat",
    "chmod",
    "cp",
    "cut",
    "head",
    "ln",
    "ls",
    "mkdir",
    "mkfifo",
    "mv",
    "od",
    "printf",
    "readlink",
    "rm",
    "sleep",
    "sort",
    "stat",
    "tail",
    "touch",
    "tr",
    "wc",
]


class OtherPrograms(Sandbox):
    """A sandbox whose `/bin/sh` is another shell, and whose `PATH` holds other programs."""

    def __init__(self, inner: Sandbox, shell: Sequence[str], path: Path) -> None:
        self._inner = inner
        self._shell = shell
        self._env = {"PATH": str(path)}
        self.id = inner.id
        self.workdir = inner.workdir

    async def exec(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, **rest: Any) -> ExecResult:
        argv = [*self._shell, *argv[1:]] if argv[0] == "/bin/sh" else argv
        return await self._inner.exec(argv, env={**self._env, **(env or {})}, **rest)

    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        return await self._inner.read_file(path, max_bytes=max_bytes)

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        await self._inner.write_file(path, data, mode=mode)

    async def teardown(self) -> None:
        await self._inner.teardown()


@dataclass
class Place:
    """Where a test's tools work. Paths in what they say begin with ``WD``, for the working directory."""

    sandbox: Sandbox
    limits: ToolLimits

    def tools(self, **options: Any) -> SandboxTools:
        return SandboxTools(self.sandbox, Hands(self.sandbox), **{"limits": self.limits, **options})

    async def call(self, name: str, **given: Any) -> ToolResult:
        return await self.tools().call(name, given, call_id="toolu_1")

    async def said(self, name: str, **given: Any) -> str:
        """Return the text of a call that succeeds."""
        result = await self.call(name, **given)
        assert not result.is_error, result.content
        return self.text(result)

    async def refused(self, name: str, **given: Any) -> str:
        """Return the text of a call that fails."""
        result = await self.call(name, **given)
        assert result.is_error, result.content
        return self.text(result)

    def text(self, result: ToolResult) -> str:
        (block,) = result.content
        text: str = block["text"]
        return text.replace(self.sandbox.workdir, "WD")

    async def sh(self, script: str, *arguments: str, stdin: bytes | None = None) -> bytes:
        """Run a script of the test's own in the working directory."""
        result = await self.sandbox.exec(
            ["/bin/sh", "-c", script, "test", *arguments],
            stdin=stdin,
            cwd=self.sandbox.workdir,
            timeout=60,
            max_output=10_000_000,
        )
        assert result.exit_code == 0, result
        return result.stdout

    async def put(self, path: str, content: str | bytes) -> None:
        """Write a file, not by the tools."""
        data = content.encode() if isinstance(content, str) else content
        await self.sh('case $1 in */*) mkdir -p "./${1%/*}";; esac; cat >"./$1"', path, stdin=data)


PLACES = ["dash", "bash", "busybox", "bare"]


@pytest.fixture(scope="session", params=PLACES)
async def _place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    root = tmp_path_factory.mktemp(f"place-{request.param}")
    async with LocalProvider(LocalOptions(root=root / "sandboxes")) as provider:
        sandbox = await provider.create(SandboxSpec(key="mab" + "a" * 24))
        yield Place(_with_programs(request.param, sandbox, root / "bin"), ToolLimits())
        await sandbox.teardown()


def _with_programs(kind: str, sandbox: Sandbox, directory: Path) -> Sandbox:
    """`dash`: all that this machine has. `bash`: no ripgrep. `busybox`: nothing else. `bare`: not even find."""
    if kind == "dash":
        return sandbox
    directory.mkdir()
    if kind == "busybox":
        busybox = shutil.which("busybox")
        if busybox is None:
            pytest.skip("this machine has no busybox")
        # Debian's finds its own applets by name.
        for name in [*_COREUTILS, "awk", "find", "grep", "sh", "tar"]:
            (directory / name).symlink_to(busybox)
        return OtherPrograms(sandbox, [str(directory / "sh")], directory)
    for name in [*_COREUTILS, "grep", *(["awk", "find"] if kind == "bash" else [])]:
        found = shutil.which(name)
        assert found, name
        (directory / name).symlink_to(found)
    return OtherPrograms(sandbox, ["/bin/bash", "--posix"] if kind == "bash" else ["/bin/sh"], directory)


@pytest.fixture
async def place(_place: Place) -> Place:
    await _place.sh('rm -rf "$PWD"/* "$PWD"/.[!.]* "$PWD"/..?*')
    return _place
