"""The hands of every place, each over a channel and over plain exec.

Making a sandbox takes longer than most tests: those of one place share one, each with directories and processes of its
own in it.
"""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from itertools import count

import pytest

from mabridge.hands import CallResult, Hands
from mabridge.providers.docker import DockerOptions, DockerProvider
from mabridge.providers.local import LocalOptions, LocalProvider
from mabridge.sandbox import ExecResult, Process, Provider, Sandbox, SandboxSpec
from tests import images

_numbers = count()

_END = r"""
for f in $(grep -ls "^TMPDIR=$1\$\|[[:cntrl:]]TMPDIR=$1[[:cntrl:]]" /proc/[0-9]*/environ); do
    f=${f#/proc/}
    kill -9 "${f%/environ}"
done 2>/dev/null
rm -rf "$1"
"""


class ExecOnly:
    """A part of a sandbox, with directories of its own, that can hold no process open."""

    def __init__(self, sandbox: Sandbox, directory: str | None = None) -> None:
        self._sandbox = sandbox
        self.id = sandbox.id
        self.workdir = sandbox.workdir if directory is None else f"{directory}/workspace"
        self._env = {} if directory is None else {"TMPDIR": directory}

    async def exec(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        **options,
    ) -> ExecResult:
        return await self._sandbox.exec(argv, cwd=cwd or self.workdir, env={**self._env, **(env or {})}, **options)

    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        return await self._sandbox.read_file(path, max_bytes=max_bytes)


class WithProcess(ExecOnly):
    """The same with `SupportsProcess`."""

    async def open_process(
        self, argv: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        return await self._sandbox.open_process(argv, cwd=cwd or self.workdir, env={**self._env, **(env or {})})


class Shell:
    """Runs commands, each under an id of its own."""

    def __init__(self, hands: Hands) -> None:
        self.hands = hands

    async def __call__(self, command: str, *, timeout: float = 20.0, shell: str = "main") -> CallResult:
        return await self.hands.run(f"call_{next(_numbers)}", command, shell=shell, timeout=timeout)

    async def text(self, command: str, **options) -> str:
        return (await self(command, **options)).head.decode().strip()


@pytest.fixture(
    scope="session",
    params=["local", *(pytest.param(name, marks=pytest.mark.docker) for name in ("busybox", "debian", "dash"))],
)
def place(request: pytest.FixtureRequest) -> str:
    """Where a shell's behaviour is tested: bash, here and in a container; busybox's ash; dash."""
    return request.param


@pytest.fixture(scope="session")
async def shared(
    place: str, tmp_path_factory: pytest.TempPathFactory, image: Callable[[str], str]
) -> AsyncIterator[Sandbox]:
    if place == "local":
        provider: Provider = LocalProvider(LocalOptions(root=tmp_path_factory.mktemp("local") / "sandboxes"))
    else:
        name = image({"busybox": images.BUSYBOX, "debian": images.DEBIAN, "dash": images.DASH}[place])
        provider = DockerProvider(DockerOptions(image=name, pull="never"))
    async with provider:
        key = "mab" + base64.b32encode(os.urandom(15)).decode().lower()
        sandbox = await provider.create(SandboxSpec(key=key, ttl=1800))
        yield sandbox
        await sandbox.teardown()


@pytest.fixture(params=["channel", "exec"])
async def reached(request: pytest.FixtureRequest, shared: Sandbox) -> AsyncIterator[Sandbox]:
    parent = "/tmp" if shared.workdir == "/workspace" else shared.workdir.removesuffix("workspace") + "tmp"
    directory = f"{parent}/test{next(_numbers)}"
    options = {"cwd": "/", "timeout": 60, "max_output": 10_000}
    await shared.exec(["mkdir", "-p", f"{directory}/workspace"], **options)
    part = WithProcess(shared, directory) if request.param == "channel" else ExecOnly(shared, directory)
    yield part  # type: ignore[misc]
    await shared.exec(["sh", "-c", _END, "sh", directory], **options)


@pytest.fixture
async def run(reached: Sandbox) -> AsyncIterator[Shell]:
    async with Hands(reached) as hands:
        yield Shell(hands)
