"""What the tests of the kit are written with; for tests of a provider's own, too."""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import anyio

from mabridge.identity import ENVIRONMENT_LABEL, KEY_LABEL, SESSION_LABEL
from mabridge.sandbox import ExecResult, Provider, Sandbox, SandboxInfo, SandboxSpec

__all__ = [
    "created",
    "find",
    "is_root",
    "living",
    "made_keys",
    "new_key",
    "new_spec",
    "run",
    "sh",
    "stat",
    "wait_for_file",
]

made_keys: set[str] = set()
"""Every key that `new_key` gave in this process: what has one of these is ours to remove."""

_REMOVE = 120.0  # seconds

_LIVING = """
for p; do
    read -r s < "/proc/$p/stat" || continue
    case ${s##*) } in Z*) ;; *) echo "$p" ;; esac
done 2>/dev/null
"""


def new_key() -> str:
    """Return a sandbox key that nobody else has."""
    key = "mab" + base64.b32encode(os.urandom(15)).decode().lower()
    made_keys.add(key)
    return key


def new_spec(
    *, key: str | None = None, env: Mapping[str, str] | None = None, ttl: float = 900.0, labels: str = "conformance"
) -> SandboxSpec:
    """Return a spec with a new key, labelled as a worker labels it.

    Args:
        key: instead of a new one.
        env: as in `SandboxSpec`.
        ttl: seconds.
        labels: what stands for the environment and the session in the labels.
    """
    key = key or new_key()
    named = {KEY_LABEL: key, ENVIRONMENT_LABEL: f"env_{labels}", SESSION_LABEL: f"sesn_{labels}"}
    return SandboxSpec(key=key, labels=named, env=env or {}, ttl=ttl)


@asynccontextmanager
async def created(provider: Provider, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
    """Create a sandbox, and remove it in the end, however that comes."""
    sandbox = await provider.create(spec)
    try:
        yield sandbox
    finally:
        with anyio.CancelScope(shield=True), anyio.fail_after(_REMOVE):
            await sandbox.teardown()


async def run(
    sandbox: Sandbox,
    *argv: str,
    stdin: bytes | None = None,
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 60.0,
    max_output: int = 100_000,
) -> ExecResult:
    """`Sandbox.exec` with bounds that suit a test."""
    return await sandbox.exec(argv, stdin=stdin, cwd=cwd, env=env, timeout=timeout, max_output=max_output)


async def sh(
    sandbox: Sandbox,
    script: str,
    *args: str,
    stdin: bytes | None = None,
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 60.0,
    max_output: int = 100_000,
) -> ExecResult:
    """Run a shell script with these arguments."""
    argv = ("sh", "-c", script, "sh", *args)
    return await run(sandbox, *argv, stdin=stdin, cwd=cwd, env=env, timeout=timeout, max_output=max_output)


async def wait_for_file(sandbox: Sandbox, path: str, *, lines: int = 1) -> list[str]:
    """Return the lines of a file once it has as many.

    Raises:
        TimeoutError: it had not within 60 seconds.
    """
    with anyio.fail_after(60):
        while True:
            try:
                found = (await sandbox.read_file(path, max_bytes=10_000)).decode().splitlines()
            except FileNotFoundError:
                found = []
            if len(found) >= lines:
                return found
            await anyio.sleep(0.05)


async def living(sandbox: Sandbox, pids: Sequence[str]) -> list[str]:
    """Return which of these processes still run; `pids` are ids as the sandbox sees them."""
    return (await sh(sandbox, _LIVING, *pids)).stdout.decode().split()


async def stat(sandbox: Sandbox, path: str, form: str) -> str:
    """Return what ``stat -c form`` says of a file."""
    return (await run(sandbox, "stat", "-c", form, "--", path)).stdout.decode().strip()


async def is_root(sandbox: Sandbox) -> bool:
    """Whether nothing is forbidden there: then no test of what is forbidden can be made."""
    return (await run(sandbox, "id", "-u")).stdout == b"0\n"


async def find(provider: Provider, key: str) -> SandboxInfo | None:
    """Return what the provider lists under a key, and see that it is listed once."""
    found = [info async for info in provider.list() if info.key == key]
    assert len(found) <= 1, f"listed more than once: {found}"
    return found[0] if found else None
