"""`SupportsProcess`: a process held open."""

from __future__ import annotations

import contextlib
import hashlib

import anyio
import pytest

from mabridge.errors import SandboxGone, SandboxUnavailable
from mabridge.sandbox import Process, Sandbox, SupportsProcess
from tests.providers.conftest import living, run, wait_for_file

pytestmark = pytest.mark.anyio


async def open_process(sandbox: Sandbox, *argv: str, **options) -> Process:
    assert isinstance(sandbox, SupportsProcess)
    return await sandbox.open_process(argv, **options)


async def receive_all(process: Process) -> bytes:
    received = []
    while data := await process.receive():
        received.append(data)
    return b"".join(received)


async def test_bytes_go_both_ways_at_once(sandbox: Sandbox) -> None:
    process = await open_process(sandbox, "cat")
    for data in (b"one\n", bytes(range(256)), b"\n"):
        await process.send(data)
        assert await process.receive() == data
    await process.send_eof()
    assert await process.receive() == b""
    assert await process.receive() == b""
    await process.aclose()


async def test_large_streams_pass_whole_both_ways(sandbox: Sandbox) -> None:
    data = hashlib.sha256(b"x").digest() * 250_000
    process = await open_process(sandbox, "cat")

    async def send() -> None:
        await process.send(data)
        await process.send_eof()

    async with anyio.create_task_group() as group:
        group.start_soon(send)
        assert await receive_all(process) == data
    await process.aclose()


async def test_directory_and_variables_are_as_in_exec(sandbox: Sandbox) -> None:
    process = await open_process(sandbox, "sh", "-c", 'echo "$PWD,$FROM_SPEC,$MINE"', env={"MINE": "1"})
    assert await receive_all(process) == f"{sandbox.workdir},a b,1\n".encode()
    await process.aclose()
    process = await open_process(sandbox, "pwd", cwd="/")
    assert await receive_all(process) == b"/\n"
    await process.aclose()


async def test_stderr_is_dropped_and_blocks_nothing(sandbox: Sandbox) -> None:
    process = await open_process(sandbox, "sh", "-c", "head -c 3000000 /dev/zero >&2; echo done")
    assert await receive_all(process) == b"done\n"
    await process.aclose()


async def test_end_is_seen_though_a_child_holds_the_output(sandbox: Sandbox) -> None:
    process = await open_process(sandbox, "sh", "-c", "sleep 50 & echo $! > pid; echo last")
    with anyio.fail_after(20):
        assert await receive_all(process) == b"last\n"
    await process.aclose()
    await run(sandbox, "kill", *await wait_for_file(sandbox, "pid"))


async def test_closing_kills_it_and_what_shares_its_session(sandbox: Sandbox) -> None:
    script = "echo $$ >> pids; sh -c 'echo $$ >> pids; sleep 60' & wait"
    process = await open_process(sandbox, "sh", "-c", script)
    pids = await wait_for_file(sandbox, "pids", lines=2)
    await process.aclose()
    await process.aclose()
    assert await living(sandbox, pids) == []


async def test_closing_at_once_leaves_nothing_running(sandbox: Sandbox) -> None:
    process = await open_process(sandbox, "sh", "-c", "echo $$ > pid; sleep 60")
    await process.aclose()
    pids = (await run(sandbox, "sh", "-c", "cat pid || true")).stdout.decode().split()
    assert await living(sandbox, pids) == []


async def test_closing_spares_what_went_to_a_session_of_its_own(sandbox: Sandbox) -> None:
    script = "setsid sh -c 'echo $$ > daemon; exec sleep 60' >/dev/null </dev/null & wait"
    process = await open_process(sandbox, "sh", "-c", script)
    pids = await wait_for_file(sandbox, "daemon")
    await process.aclose()
    assert await living(sandbox, pids) == pids
    await run(sandbox, "kill", *pids)


async def test_sending_to_a_closed_one_is_an_error(sandbox: Sandbox) -> None:
    process = await open_process(sandbox, "true")
    assert await receive_all(process) == b""
    await process.aclose()
    with pytest.raises(SandboxUnavailable):
        await process.send(b"x")
    with pytest.raises(SandboxUnavailable):
        await process.receive()


async def test_receiving_ends_when_the_sandbox_is_removed(own: Sandbox) -> None:
    process = await open_process(own, "cat")
    await process.send(b"x")
    assert await process.receive() == b"x"
    await own.teardown()
    with anyio.fail_after(20):
        with contextlib.suppress(SandboxGone):
            assert await process.receive() == b""
    await process.aclose()


async def test_one_in_a_removed_sandbox_cannot_be_opened(own: Sandbox) -> None:
    await own.teardown()
    with pytest.raises(SandboxGone):
        await receive_all(await open_process(own, "true"))


async def test_cancelled_receive_loses_nothing(sandbox: Sandbox) -> None:
    process = await open_process(sandbox, "cat")
    for number in range(20):
        with anyio.move_on_after(0.001 * (number % 3)):
            await process.receive()
            raise AssertionError("nothing had been sent")
        await process.send(b"%d" % number)
        assert await process.receive() == b"%d" % number
    await process.aclose()
