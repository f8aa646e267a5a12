"""`SupportsProcess`: a process held open. Skipped for a provider that has none."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Mapping

import anyio
import pytest

from mabridge.errors import SandboxGone, SandboxUnavailable
from mabridge.sandbox import Process, Sandbox, SupportsProcess
from mabridge.testing.conformance.helpers import living, run, wait_for_file

__all__ = ["ProcessTests"]


async def _open(sandbox: Sandbox, *argv: str, cwd: str | None = None, env: Mapping[str, str] | None = None) -> Process:
    if not isinstance(sandbox, SupportsProcess):
        pytest.skip("the sandbox cannot hold a process open, which is optional (SupportsProcess)")
    return await sandbox.open_process(argv, cwd=cwd, env=env)


async def _receive(process: Process, count: int) -> bytes:
    """The next `count` bytes, or fewer at its end."""
    received = b""
    with anyio.fail_after(60):
        while len(received) < count and (data := await process.receive()):
            received += data
    return received


async def _receive_all(process: Process) -> bytes:
    received = []
    while data := await process.receive():
        received.append(data)
    return b"".join(received)


class ProcessTests:
    """A process held open: bytes both ways, and its end."""

    async def test_bytes_go_both_ways_while_it_runs(self, sandbox: Sandbox) -> None:
        process = await _open(sandbox, "cat")
        for data in (b"one\n", bytes(range(256)), b"\n"):
            await process.send(data)
            assert await _receive(process, len(data)) == data
        await process.aclose()

    async def test_closing_its_stdin_lets_the_rest_be_received(self, sandbox: Sandbox) -> None:
        process = await _open(sandbox, "sh", "-c", "cat; sleep 0.5; echo after")
        await process.send(b"before\n")
        await process.send_eof()
        assert await _receive_all(process) == b"before\nafter\n"
        assert await process.receive() == b"", "its end is told once only"
        await process.aclose()

    async def test_large_streams_pass_whole_both_ways(self, sandbox: Sandbox) -> None:
        data = hashlib.sha256(b"x").digest() * 250_000
        process = await _open(sandbox, "cat")

        async def send() -> None:
            await process.send(data)
            await process.send_eof()

        with anyio.fail_after(120):
            async with anyio.create_task_group() as group:
                group.start_soon(send)
                assert await _receive_all(process) == data
        await process.aclose()

    async def test_process_has_the_directory_and_variables_of_exec(self, sandbox: Sandbox) -> None:
        process = await _open(sandbox, "sh", "-c", 'echo "$PWD,$FROM_SPEC,$MINE"', env={"MINE": "1"})
        assert await _receive_all(process) == f"{sandbox.workdir},a b,1\n".encode()
        await process.aclose()
        process = await _open(sandbox, "pwd", cwd="/")
        assert await _receive_all(process) == b"/\n"
        await process.aclose()

    async def test_arguments_of_a_process_pass_exactly(self, sandbox: Sandbox) -> None:
        process = await _open(sandbox, "sh", "-c", 'printf "%s\\0" "$@"', "sh", "", "a  b", "$(id)", "'\"", "x\ny", "é")
        assert await _receive_all(process) == "\0a  b\0$(id)\0'\"\0x\ny\0é\0".encode()
        await process.aclose()

    async def test_stderr_of_a_process_is_dropped_and_blocks_nothing(self, sandbox: Sandbox) -> None:
        process = await _open(sandbox, "sh", "-c", "head -c 3000000 /dev/zero >&2; echo done")
        with anyio.fail_after(60):
            assert await _receive_all(process) == b"done\n"
        await process.aclose()

    async def test_end_is_seen_though_a_child_holds_the_output(self, sandbox: Sandbox) -> None:
        process = await _open(sandbox, "sh", "-c", "sleep 50 & echo $! > pid; echo last")
        with anyio.fail_after(30):
            assert await _receive_all(process) == b"last\n"
        await process.aclose()
        await run(sandbox, "kill", *await wait_for_file(sandbox, "pid"))

    async def test_closing_kills_the_process_and_its_children(self, sandbox: Sandbox) -> None:
        script = "echo $$ >> pids; sh -c 'echo $$ >> pids; sleep 60' & wait"
        process = await _open(sandbox, "sh", "-c", script)
        pids = await wait_for_file(sandbox, "pids", lines=2)
        await process.aclose()
        await process.aclose()
        assert await living(sandbox, pids) == []

    async def test_closing_at_once_leaves_nothing_running(self, sandbox: Sandbox) -> None:
        process = await _open(sandbox, "sh", "-c", "echo $$ > pid; sleep 60")
        await process.aclose()
        pids = (await run(sandbox, "sh", "-c", "cat pid || true")).stdout.decode().split()
        assert await living(sandbox, pids) == []

    async def test_closing_spares_what_went_to_a_session_of_its_own(self, sandbox: Sandbox) -> None:
        script = "setsid sh -c 'echo $$ > daemon; exec sleep 60' >/dev/null </dev/null & wait"
        process = await _open(sandbox, "sh", "-c", script)
        pids = await wait_for_file(sandbox, "daemon")
        await process.aclose()
        assert await living(sandbox, pids) == pids
        await run(sandbox, "kill", *pids)

    async def test_using_a_closed_process_is_an_error(self, sandbox: Sandbox) -> None:
        process = await _open(sandbox, "true")
        assert await _receive_all(process) == b""
        await process.aclose()
        with pytest.raises(SandboxUnavailable):
            await process.send(b"x")
        with pytest.raises(SandboxUnavailable):
            await process.receive()

    async def test_closing_ends_a_receive_that_is_under_way(self, sandbox: Sandbox) -> None:
        process = await _open(sandbox, "cat")
        received: list[bytes] = []

        async def receive() -> None:
            with contextlib.suppress(SandboxUnavailable):
                received.append(await process.receive())

        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                group.start_soon(receive)
                await anyio.wait_all_tasks_blocked()
                await process.aclose()
        assert received in ([], [b""])

    async def test_cancelled_receive_loses_nothing(self, sandbox: Sandbox) -> None:
        process = await _open(sandbox, "cat")
        for number in range(20):
            with anyio.move_on_after(0.001 * (number % 3)):
                await process.receive()
                raise AssertionError("nothing had been sent")
            data = b"%d" % number
            await process.send(data)
            assert await _receive(process, len(data)) == data
        await process.aclose()

    async def test_broken_connection_of_a_process_is_told(
        self, sandbox: Sandbox, break_connections: Callable[[], Awaitable[None]]
    ) -> None:
        process = await _open(sandbox, "cat")
        await process.send(b"x")
        assert await _receive(process, 1) == b"x"
        await break_connections()
        with anyio.fail_after(60), pytest.raises(SandboxUnavailable):
            await process.receive()
        await process.aclose()
        assert (await run(sandbox, "true")).exit_code == 0, "the sandbox is there as before"

    async def test_receiving_ends_when_the_sandbox_is_removed(self, own_sandbox: Sandbox) -> None:
        process = await _open(own_sandbox, "cat")
        await process.send(b"x")
        assert await _receive(process, 1) == b"x"
        await own_sandbox.teardown()
        with anyio.fail_after(30), contextlib.suppress(SandboxGone):
            assert await process.receive() == b""
        await process.aclose()

    async def test_process_in_a_removed_sandbox_cannot_be_opened(self, own_sandbox: Sandbox) -> None:
        await own_sandbox.teardown()
        with pytest.raises(SandboxGone):
            await _receive_all(await _open(own_sandbox, "true"))
