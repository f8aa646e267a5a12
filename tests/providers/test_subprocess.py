"""Finding and killing processes of this machine, for adapters whose commands are such."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import pytest

from mabridge.adapters import kill_marked
from mabridge.errors import SandboxUnavailable
from mabridge.providers._subprocess import HeldProcess


def started(name: str, value: str, *, then: str = "") -> subprocess.Popen[bytes]:
    """Return a process that is there, with its variable, and waits."""
    script = f"sleep 4242 & echo ready; wait; {then}"
    process = subprocess.Popen(["sh", "-c", script], env={name: value}, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_each_of_many_kills_its_own_and_no_other() -> None:
    """At once, so that they look at the processes together; by variables of any name."""
    names = [f"{'MAB' if number % 2 else 'OTHER'}_{number}" for number in range(12)]
    processes = {name: started(name, "same value") for name in names}
    spared = started("MAB_1", "same value and more")
    try:
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(kill_marked, [f"{name}=same value" for name in names]))
        assert [process.wait(10) for process in processes.values()] == [-9] * len(names)
        assert spared.poll() is None
    finally:
        for process in (spared, *processes.values()):
            kill_marked("none=at all", process.pid)
            process.wait()
            process.stdout.close()


def test_what_is_started_after_one_look_began_is_found_by_the_next() -> None:
    for number in range(20):
        process = started("ANY", str(number))
        kill_marked(f"ANY={number}")
        assert process.wait(10) == -9
        process.stdout.close()


def test_shell_does_not_go_on_when_its_child_is_killed(tmp_path: Path) -> None:
    for number in range(20):
        process = started("ANY", str(number), then=f"echo on > {tmp_path}/went")
        kill_marked(f"ANY={number}")
        assert process.wait(10) == -9
        process.stdout.close()
    assert not (tmp_path / "went").exists()


@pytest.mark.anyio
async def test_closing_ends_a_receive_though_the_end_of_the_process_is_still_to_be_seen() -> None:
    popen = subprocess.Popen(  # noqa: ASYNC220 - HeldProcess takes no other
        ["sleep", "4242"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    os.set_blocking(popen.stdout.fileno(), False)
    process = HeldProcess("sandbox", popen)

    async def receive() -> None:
        with pytest.raises(SandboxUnavailable, match="closed"):
            await process.receive()

    async with anyio.create_task_group() as group:
        group.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        popen.kill()
        popen.wait()
        await process.aclose()  # it has nothing to wait for, so this is before the receiver can have seen the end
