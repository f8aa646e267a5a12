"""What is special to the local provider."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import anyio
import pytest

from mabridge.errors import ConfigError, CreateFailed
from mabridge.providers.local import LocalOptions, LocalProvider
from mabridge.sandbox import Sandbox, SandboxSpec
from mabridge.testing.conformance import living, new_key, sh, wait_for_file

pytestmark = pytest.mark.anyio


async def test_it_says_that_it_isolates_nothing_each_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        async with LocalProvider(LocalOptions(root=tmp_path)):
            pass
    said = [record for record in caplog.records if "isolates nothing" in record.message]
    assert [(record.name, record.levelno) for record in said] == [("mabridge.providers.local", logging.WARNING)] * 2


async def test_directory_is_for_its_owner_alone_and_removed_whole(local_provider: LocalProvider) -> None:
    sandbox = await local_provider.create(SandboxSpec(key=new_key()))
    directory = Path(sandbox.id)
    assert directory.stat().st_mode & 0o777 == 0o700
    await sh(sandbox, "mkdir -p shut/in; touch shut/in/file; chmod 000 shut/in shut; cd ..; mkdir -m 000 tmp/x")
    await sandbox.teardown()
    assert list(directory.parent.iterdir()) == []


async def test_removal_follows_no_link(local_sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir(mode=0o755)
    (tmp_path / "outside/file").touch()
    await sh(local_sandbox, 'ln -s "$1" link', str(tmp_path / "outside"))
    await local_sandbox.teardown()
    assert (tmp_path / "outside/file").exists()
    assert (tmp_path / "outside").stat().st_mode & 0o777 == 0o755


async def test_removal_ends_what_runs_in_it_and_nothing_else(local_provider: LocalProvider) -> None:
    one, other = [await local_provider.create(SandboxSpec(key=new_key())) for _ in range(2)]
    for sandbox in (one, other):
        await sh(sandbox, "setsid sleep 60 & echo $! > pid")
    (pid_of_one,), (pid_of_other,) = await wait_for_file(one, "pid"), await wait_for_file(other, "pid")
    await one.teardown()
    assert await living(other, [pid_of_one, pid_of_other]) == [pid_of_other]
    await other.teardown()


async def test_expired_sandbox_is_dropped_with_its_processes_by_whoever_looks(local_provider: LocalProvider) -> None:
    keys = [new_key(), new_key()]
    sandboxes = [await local_provider.create(SandboxSpec(key=key)) for key in keys]
    await sh(sandboxes[0], "setsid sleep 60 & echo $! > pid")
    pids = await wait_for_file(sandboxes[0], "pid")
    os.utime(Path(sandboxes[0].id) / "deadline", (0, 0))
    assert [info.key async for info in local_provider.list()] == keys[1:]
    assert await living(sandboxes[1], pids) == []
    assert not Path(sandboxes[0].id).exists()
    await sandboxes[1].teardown()


async def test_what_a_dead_worker_left_half_removed_is_cleared_away(local_provider: LocalProvider) -> None:
    sandbox = await local_provider.create(SandboxSpec(key=new_key()))
    directory = Path(sandbox.id)
    directory.rename(directory.with_name(".gone-x"))
    (directory.parent / "a file of somebody's").touch()
    assert [info async for info in local_provider.list()] == []
    assert [path.name for path in directory.parent.iterdir()] == ["a file of somebody's"]


async def test_root_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    async with LocalProvider(LocalOptions(root=tmp_path / "file/below")) as provider:
        with pytest.raises(ConfigError, match="file/below"):
            await provider.check()
        with pytest.raises(CreateFailed, match="file/below"):
            await provider.create(SandboxSpec(key=new_key()))


async def test_calls_do_not_block_the_event_loop(local_sandbox: Sandbox) -> None:
    """A call of two seconds and the loop's own clock, side by side."""
    gaps: list[float] = []
    async with anyio.create_task_group() as group:

        async def tick() -> None:
            while True:
                before = anyio.current_time()
                await anyio.sleep(0.01)
                gaps.append(anyio.current_time() - before)

        group.start_soon(tick)
        await sh(local_sandbox, "setsid sleep 60 & sleep 60", timeout=2)
        group.cancel_scope.cancel()
    assert max(gaps) < 0.5
