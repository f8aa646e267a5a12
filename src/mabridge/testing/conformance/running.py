"""`Sandbox.exec`: bounds on time and output, cancellation, and commands side by side."""

from __future__ import annotations

import contextlib
import os
import tracemalloc
from collections.abc import Awaitable, Callable

import anyio

from mabridge.errors import SandboxUnavailable
from mabridge.sandbox import Sandbox
from mabridge.testing.conformance.helpers import living, run, sh, wait_for_file

__all__ = ["RunningTests"]

# A child in the session, one in a session of its own, one without its environment; their ids go to a file.
_FAMILY = """
    note='echo $$ >> pids; while :; do sleep 1; done'
    sh -c "$note" & setsid sh -c "$note" & env -i PATH="$PATH" sh -c "$note" &
    echo started; echo trouble >&2
    echo $$ >> pids; while :; do sleep 1; done
"""
_AT_ONCE = 50


class RunningTests:
    """Commands that last, that say too much, and that are many."""

    async def test_timeout_keeps_the_output_so_far(self, sandbox: Sandbox) -> None:
        result = await sh(sandbox, "echo started; echo trouble >&2; sleep 60; echo more", timeout=3)
        assert result.timed_out, "a time-out was not told"
        assert result.exit_code is None
        assert (result.stdout, result.stderr) == (b"started\n", b"trouble\n")

    async def test_timeout_kills_all_that_the_command_started(self, sandbox: Sandbox) -> None:
        result = await sh(sandbox, _FAMILY, timeout=3)
        assert result.timed_out
        pids = await wait_for_file(sandbox, "pids", lines=4)
        assert await living(sandbox, pids) == [], "processes outlived the time-out"

    async def test_timeout_kills_a_command_that_cleared_its_environment(self, sandbox: Sandbox) -> None:
        script = 'echo $$ > pids; exec env -i PATH="$PATH" sh -c "sleep 60; sleep 60"'
        assert (await sh(sandbox, script, timeout=3)).timed_out
        assert await living(sandbox, await wait_for_file(sandbox, "pids")) == []

    async def test_timeout_kills_a_command_that_ignores_signals(self, sandbox: Sandbox) -> None:
        script = "trap '' TERM INT HUP; echo $$ > pids; while :; do sleep 1; done"
        assert (await sh(sandbox, script, timeout=3)).timed_out
        assert await living(sandbox, await wait_for_file(sandbox, "pids")) == []

    async def test_timeout_of_one_call_spares_the_others(self, sandbox: Sandbox) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(sh, sandbox, "echo $$ > other; sleep 60")
            other = await wait_for_file(sandbox, "other")
            assert (await run(sandbox, "sleep", "60", timeout=0.5)).timed_out
            assert await living(sandbox, other) == other
            group.cancel_scope.cancel()

    async def test_timeout_spares_what_an_earlier_call_left_running(self, sandbox: Sandbox) -> None:
        await sh(sandbox, "sleep 60 & echo $! > job")
        job = await wait_for_file(sandbox, "job")
        assert (await run(sandbox, "sleep", "60", timeout=0.5)).timed_out
        assert await living(sandbox, job) == job
        await run(sandbox, "kill", *job)

    async def test_cancelled_call_kills_all_that_the_command_started(self, sandbox: Sandbox) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(sh, sandbox, _FAMILY)
            pids = await wait_for_file(sandbox, "pids", lines=4)
            assert len(await living(sandbox, pids)) == 4
            group.cancel_scope.cancel()
        assert await living(sandbox, pids) == [], "processes outlived the cancellation"

    async def test_call_cancelled_at_any_moment_leaves_nothing_running(self, sandbox: Sandbox) -> None:
        for delay in (0, 0.002, 0.01, 0.02, 0.03, 0.05, 0.2):
            with anyio.move_on_after(delay):
                await sh(sandbox, "echo $$ >> pids; sleep 60; echo $$ >> survived")
        assert await living(sandbox, (await sh(sandbox, "touch pids; cat pids")).stdout.decode().split()) == []

    async def test_process_left_in_the_background_lives_on_and_holds_nothing(self, sandbox: Sandbox) -> None:
        with anyio.fail_after(20):
            result = await sh(sandbox, "sleep 50 & echo $! > pid; echo begun")
        assert (result.exit_code, result.stdout) == (0, b"begun\n")
        pids = await wait_for_file(sandbox, "pid")
        assert await living(sandbox, pids) == pids
        await run(sandbox, "kill", *pids)

    async def test_output_is_cut_at_the_bound_for_each_stream_and_said_to_be(self, sandbox: Sandbox) -> None:
        result = await sh(sandbox, "printf 12345; printf 1234567 >&2", max_output=5)
        assert (result.stdout, result.stderr, result.truncated) == (b"12345", b"12345", True)
        result = await sh(sandbox, "printf 1234567; printf 12345 >&2", max_output=5)
        assert (result.stdout, result.stderr, result.truncated) == (b"12345", b"12345", True)
        result = await sh(sandbox, "printf 12345; printf 12345 >&2", max_output=5)
        assert (result.stdout, result.stderr, result.truncated) == (b"12345", b"12345", False)

    async def test_command_that_says_too_much_runs_to_its_end(self, sandbox: Sandbox) -> None:
        result = await sh(sandbox, "head -c 3000000 /dev/zero; echo > ended; exit 6", max_output=1000)
        assert (result.exit_code, len(result.stdout), result.truncated) == (6, 1000, True)
        assert (await run(sandbox, "ls")).stdout == b"ended\n"

    async def test_output_is_bounded_while_it_is_read(self, sandbox: Sandbox) -> None:
        tracemalloc.start()
        try:
            result = await run(sandbox, "head", "-c", "60000000", "/dev/zero", max_output=1000)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert (result.exit_code, len(result.stdout), result.truncated) == (0, 1000, True)
        assert peak < 15_000_000, f"{peak:,} bytes of memory for 1,000 bytes of output"

    async def test_endless_output_is_stopped_by_the_timeout(self, sandbox: Sandbox) -> None:
        with anyio.fail_after(30):
            result = await run(sandbox, "yes", timeout=3, max_output=10)
        assert (result.timed_out, result.stdout, result.truncated) == (True, b"y\ny\ny\ny\ny\n", True)

    async def test_fifty_commands_run_at_once(self, sandbox: Sandbox) -> None:
        """None of them can end before all have begun."""
        codes: list[int | None] = []
        wait = 'touch begun.$1; until [ "$(ls begun.* | wc -l)" -ge "$2" ]; do sleep 0.5; done; exit "$1"'

        async def one(number: int) -> None:
            codes.append((await sh(sandbox, wait, str(number), str(_AT_ONCE), timeout=120)).exit_code)

        async with anyio.create_task_group() as group:
            for number in range(1, _AT_ONCE + 1):
                group.start_soon(one, number)
        assert sorted(code or 0 for code in codes) == list(range(1, _AT_ONCE + 1))

    async def test_command_is_never_run_twice(self, sandbox: Sandbox) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(sh, sandbox, "echo x >> runs; exit 1")
        await sh(sandbox, "echo x >> runs; kill -9 $$")
        await sh(sandbox, "echo x >> runs; sleep 60", timeout=3)
        assert await sandbox.read_file("runs", max_bytes=1000) == b"x\n" * 12

    async def test_command_whose_connection_broke_is_not_run_again(
        self, sandbox: Sandbox, break_connections: Callable[[], Awaitable[None]]
    ) -> None:
        async def call() -> None:
            with contextlib.suppress(SandboxUnavailable):  # that it is not known whether it ran is the truth
                assert (await sh(sandbox, "echo x >> runs; sleep 3; exit 9")).exit_code == 9

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await wait_for_file(sandbox, "runs")
            await break_connections()
        assert await sandbox.read_file("runs", max_bytes=1000) == b"x\n"

    async def test_file_descriptors_are_given_back(self, sandbox: Sandbox) -> None:
        directory = "/dev/fd"

        async def use(times: int) -> None:
            for _ in range(times):
                await run(sandbox, "sleep", "9", timeout=0.05, stdin=bytes(1_000_000))
                await run(sandbox, "true")

        await use(3)
        before = len(os.listdir(directory))
        await use(8)
        with anyio.move_on_after(20):
            while len(os.listdir(directory)) > before + 4:  # noqa: ASYNC110
                await anyio.sleep(0.1)
        assert len(os.listdir(directory)) <= before + 4

    async def test_calls_do_not_block_the_event_loop(self, sandbox: Sandbox) -> None:
        gaps: list[float] = []
        async with anyio.create_task_group() as group:

            async def tick() -> None:
                while True:
                    before = anyio.current_time()
                    await anyio.sleep(0.01)
                    gaps.append(anyio.current_time() - before)

            group.start_soon(tick)
            await run(sandbox, "sleep", "60", timeout=3)
            group.cancel_scope.cancel()
        assert max(gaps) < 2, "nothing else could run while a command did"
