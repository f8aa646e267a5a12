"""Creating, finding, keeping alive and removing sandboxes, wherever they are."""

from __future__ import annotations

import contextlib

import anyio
import pytest

from mabridge.errors import SandboxGone
from mabridge.sandbox import Provider, Sandbox, SandboxInfo, SandboxSpec
from tests.providers.conftest import new_key, run, sh, wait_for_file

pytestmark = pytest.mark.anyio

LABELS = {"mabridge.session": "sesn_1", "mabridge.environment": "env_1"}


async def listed(provider: Provider, key: str) -> SandboxInfo | None:
    found = [info async for info in provider.list() if info.key == key]
    assert len(found) <= 1
    return found[0] if found else None


async def gone(provider: Provider, key: str, *, within: float) -> None:
    with anyio.fail_after(within):
        while await provider.attach(key) is not None:  # noqa: ASYNC110 - it ends by itself
            await anyio.sleep(0.2)


async def test_check_passes(provider: Provider) -> None:
    await provider.check()


async def test_created_sandbox_is_listed_with_its_labels(provider: Provider) -> None:
    key = new_key()
    sandbox = await provider.create(SandboxSpec(key=key, labels=LABELS))
    info = await listed(provider, key)
    await sandbox.teardown()
    assert info is not None
    assert info.id == sandbox.id
    assert info.labels.items() >= LABELS.items()
    assert info.created_at is not None
    assert info.created_at.tzinfo is not None


async def test_same_key_is_the_same_sandbox(provider: Provider, own: Sandbox) -> None:
    key = next(iter([info.key async for info in provider.list() if info.id == own.id]))
    await own.write_file("mark", b"here")
    for again in (await provider.create(SandboxSpec(key=key)), await provider.attach(key)):
        assert again is not None
        assert again.id == own.id
        assert again.workdir == own.workdir
        assert await again.read_file("mark", max_bytes=100) == b"here"


async def test_attached_sandbox_has_the_environment_it_was_created_with(provider: Provider) -> None:
    key = new_key()
    sandbox = await provider.create(SandboxSpec(key=key, env={"MINE": "1"}))
    attached = await provider.attach(key)
    assert attached is not None
    result = await sh(attached, 'echo "$MINE"')
    await sandbox.teardown()
    assert result.stdout == b"1\n"


async def test_creators_at_once_get_the_same_sandbox_ready(provider: Provider) -> None:
    key = new_key()
    made: list[Sandbox] = []

    async def create() -> None:
        sandbox = await provider.create(SandboxSpec(key=key))
        assert (await sh(sandbox, "touch ready")).exit_code == 0
        made.append(sandbox)

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(create)
    await made[0].teardown()
    assert len({sandbox.id for sandbox in made}) == 1


async def test_unknown_key_is_absent(provider: Provider) -> None:
    assert await provider.attach(new_key()) is None


async def test_removed_sandbox_is_gone_for_good(provider: Provider) -> None:
    key = new_key()
    sandbox = await provider.create(SandboxSpec(key=key))
    async with anyio.create_task_group() as group:
        group.start_soon(sandbox.teardown)
        group.start_soon(sandbox.teardown)
    await sandbox.teardown()
    assert await provider.attach(key) is None
    assert await listed(provider, key) is None
    calls = (
        lambda: run(sandbox, "true"),
        lambda: sandbox.read_file("x", max_bytes=1),
        lambda: sandbox.write_file("x", b""),
        lambda: sandbox.keep_alive(60),
    )
    for call in calls:
        with pytest.raises(SandboxGone):
            await call()


async def test_removed_sandbox_can_be_created_anew_and_is_empty(provider: Provider) -> None:
    spec = SandboxSpec(key=new_key())
    sandbox = await provider.create(spec)
    await sandbox.write_file("old", b"")
    await sandbox.teardown()
    sandbox = await provider.create(spec)
    listing = await run(sandbox, "ls", "-A")
    await sandbox.teardown()
    assert (listing.exit_code, listing.stdout) == (0, b"")


async def test_removal_ends_a_running_call(own: Sandbox) -> None:
    async with anyio.create_task_group() as group:

        async def call() -> None:
            with contextlib.suppress(SandboxGone):
                assert (await sh(own, "echo > begun; sleep 60")).exit_code == 137

        group.start_soon(call)
        await wait_for_file(own, "begun")
        with anyio.fail_after(20):
            await own.teardown()


async def test_cancelled_create_leaves_nothing_behind(provider: Provider) -> None:
    async def cancelled_after(delay: float) -> None:
        key = new_key()
        sandbox = None
        with anyio.move_on_after(delay):
            sandbox = await provider.create(SandboxSpec(key=key))
        if sandbox is not None:
            await sandbox.teardown()
        assert await listed(provider, key) is None

    async with anyio.create_task_group() as group:
        for delay in (0, 0.005, 0.02, 0.05, 0.1, 0.15, 0.2):
            group.start_soon(cancelled_after, delay)


async def test_sandbox_removes_itself_when_its_time_is_up(provider: Provider) -> None:
    key = new_key()
    await provider.create(SandboxSpec(key=key, ttl=1))
    await gone(provider, key, within=20)
    assert await listed(provider, key) is None


async def test_keeping_alive_puts_the_end_off_and_never_nearer(provider: Provider) -> None:
    key = new_key()
    sandbox = await provider.create(SandboxSpec(key=key, ttl=2))
    await sandbox.keep_alive(600)
    await sandbox.keep_alive(1)
    await anyio.sleep(5)  # what is tested is that nothing happens in that time
    assert (await run(sandbox, "true")).exit_code == 0
    assert await provider.attach(key) is not None
    await sandbox.teardown()
