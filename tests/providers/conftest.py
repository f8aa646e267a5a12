"""One sandbox a place for all tests that leave it as it was; the others make their own."""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
import pytest

from mabridge.providers.docker import DockerOptions, DockerProvider
from mabridge.providers.local import LocalOptions, LocalProvider
from mabridge.sandbox import ExecResult, Provider, Sandbox, SandboxSpec
from tests import images

Run = Callable[..., Awaitable[ExecResult]]


def new_key() -> str:
    return "mab" + base64.b32encode(os.urandom(15)).decode().lower()


async def run(sandbox: Sandbox, *argv: str, **options) -> ExecResult:
    return await sandbox.exec(argv, **{"timeout": 60, "max_output": 100_000, **options})


async def sh(sandbox: Sandbox, script: str, *args: str, **options) -> ExecResult:
    return await run(sandbox, "sh", "-c", script, "sh", *args, **options)


async def wait_for_file(sandbox: Sandbox, path: str, *, lines: int = 1) -> list[str]:
    """The lines of a file, once it has as many."""
    with anyio.fail_after(30):
        while True:
            try:
                found = (await sandbox.read_file(path, max_bytes=10_000)).decode().splitlines()
            except FileNotFoundError:
                found = []
            if len(found) >= lines:
                return found
            await anyio.sleep(0.05)


async def living(sandbox: Sandbox, pids: list[str]) -> list[str]:
    """Which of these processes, ids as the sandbox sees them, still run."""
    script = """
        for p; do
            read -r s < "/proc/$p/stat" || continue
            case ${s##*) } in Z*) ;; *) echo "$p" ;; esac
        done 2>/dev/null
    """
    return (await sh(sandbox, script, *pids)).stdout.decode().split()


async def is_root(sandbox: Sandbox) -> bool:
    """Whether nothing is forbidden there: then no test of what is forbidden can be made."""
    return (await run(sandbox, "id", "-u")).stdout == b"0\n"


@pytest.fixture(
    scope="session",
    params=[
        "local",
        pytest.param("busybox", marks=pytest.mark.docker),
        pytest.param("debian", marks=pytest.mark.docker),
    ],
)
def place(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
async def provider(
    place: str, tmp_path_factory: pytest.TempPathFactory, image: Callable[[str], str]
) -> AsyncIterator[Provider]:
    if place == "local":
        made: Provider = LocalProvider(LocalOptions(root=tmp_path_factory.mktemp("local") / "sandboxes"))
    else:
        name = image(images.BUSYBOX if place == "busybox" else images.DEBIAN)
        made = DockerProvider(DockerOptions(image=name, pull="never", cpus=2))
    async with made as entered:
        yield entered


@pytest.fixture(scope="session")
async def shared(provider: Provider) -> AsyncIterator[Sandbox]:
    made = await provider.create(SandboxSpec(key=new_key(), ttl=900, env={"FROM_SPEC": "a b"}))
    yield made
    await made.teardown()


@pytest.fixture
async def sandbox(shared: Sandbox) -> Sandbox:
    """The shared sandbox, with an empty working directory."""
    await sh(shared, 'cd / && chmod -R u+rwx "$1" 2>/dev/null; rm -rf "$1"/* "$1"/.[!.]*', shared.workdir)
    return shared


@pytest.fixture
async def own(provider: Provider) -> AsyncIterator[Sandbox]:
    """A sandbox that the test may break."""
    made = await provider.create(SandboxSpec(key=new_key(), ttl=600))
    yield made
    await made.teardown()
