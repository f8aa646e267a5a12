"""`Sandbox.exec`, wherever it runs."""

from __future__ import annotations

import os
import tracemalloc

import anyio
import pytest

from mabridge.sandbox import Sandbox
from tests.providers.conftest import living, run, sh, wait_for_file

pytestmark = pytest.mark.anyio

# A child in the session, one in a session of its own, one without its environment; their ids go to a file.
FAMILY = """
    note='echo $$ >> pids; while :; do sleep 1; done'
    sh -c "$note" & setsid sh -c "$note" & env -i PATH="$PATH" sh -c "$note" &
    echo started; echo trouble >&2
    echo $$ >> pids; while :; do sleep 1; done
"""


async def test_streams_and_exit_code_are_told_apart(sandbox: Sandbox) -> None:
    result = await sh(sandbox, "echo out; echo err >&2; exit 3")
    assert (result.exit_code, result.stdout, result.stderr) == (3, b"out\n", b"err\n")
    assert not result.timed_out
    assert not result.truncated


async def test_bytes_pass_unchanged_both_ways(sandbox: Sandbox) -> None:
    data = bytes(range(256)) * 1000 + b"\r\n\xff\xfe\0"
    assert (await run(sandbox, "cat", stdin=data, max_output=len(data))).stdout == data


async def test_arguments_pass_exactly(sandbox: Sandbox) -> None:
    args = [
        "",
        " a  b ",
        "$(touch pwned)",
        "`id`",
        "'\"\\",
        "new\nline\n",
        "-n",
        "--",
        "*",
        "é ☃ 𝄞",
        "a=b",
        "x" * 100_000,
    ]
    result = await sh(sandbox, 'for a; do printf "%s\\0" "$a"; done', *args, max_output=1_000_000)
    assert result.stdout.decode().split("\0")[:-1] == args
    assert (await run(sandbox, "ls")).stdout == b""


async def test_missing_program_is_127(sandbox: Sandbox) -> None:
    result = await run(sandbox, "no-such-program", "x")
    assert result.exit_code == 127
    assert b"no-such-program" in result.stderr
    assert result.stdout == b""


async def test_what_cannot_be_executed_is_126(sandbox: Sandbox) -> None:
    await sandbox.write_file("plain", b"hello")
    assert (await run(sandbox, f"{sandbox.workdir}/plain")).exit_code == 126


async def test_missing_directory_is_126_and_nothing_runs(sandbox: Sandbox) -> None:
    result = await sh(sandbox, 'echo ran > "$1/ran"', sandbox.workdir, cwd="/no/such")
    assert result.exit_code == 126
    assert b"/no/such" in result.stderr
    assert (await run(sandbox, "ls")).stdout == b""


async def test_runs_in_workdir_by_default_and_in_cwd_if_given(sandbox: Sandbox) -> None:
    await run(sandbox, "mkdir", "-p", "a b")
    assert (await run(sandbox, "pwd")).stdout.decode() == f"{sandbox.workdir}\n"
    assert (await run(sandbox, "pwd", cwd=f"{sandbox.workdir}/a b")).stdout.decode() == f"{sandbox.workdir}/a b\n"


async def test_no_stdin_is_an_empty_one(sandbox: Sandbox) -> None:
    assert (await run(sandbox, "cat", timeout=20)).exit_code == 0
    assert (await run(sandbox, "cat", stdin=b"", timeout=20)).exit_code == 0


async def test_large_stdin_arrives_whole(sandbox: Sandbox) -> None:
    size = 50 * 1024 * 1024
    assert (await run(sandbox, "wc", "-c", stdin=bytes(size))).stdout.split() == [str(size).encode()]


@pytest.mark.parametrize("size", [1, 300_000, 5_000_000])
async def test_stdin_that_nobody_reads_does_not_hold_the_call(sandbox: Sandbox, size: int) -> None:
    result = await sh(sandbox, "echo done; exit 4", stdin=bytes(size), timeout=20)
    assert (result.exit_code, result.stdout) == (4, b"done\n")
    result = await sh(sandbox, "head -c 10 > read; exit 5", stdin=bytes(size), timeout=20)
    assert (result.exit_code, result.stdout) == (5, b"")


async def test_environment_is_the_specs_and_the_calls(sandbox: Sandbox) -> None:
    result = await sh(sandbox, 'echo "$FROM_SPEC,$MINE"', env={"MINE": "x\ny 'z'"})
    assert result.stdout == b"a b,x\ny 'z'\n"
    assert (await sh(sandbox, 'echo "$FROM_SPEC"', env={"FROM_SPEC": "other"})).stdout == b"other\n"


async def test_nothing_of_the_workers_environment_leaks(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "secret-one")
    monkeypatch.setenv("SOMETHING_ELSE", "secret-two")
    assert b"secret" not in (await run(sandbox, "env")).stdout


async def test_home_and_temporary_files_can_be_written(sandbox: Sandbox) -> None:
    result = await sh(sandbox, 'touch "$HOME/x" "${TMPDIR:-/tmp}/x" && mktemp')
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("argv", [[], ["a\0b"], ["-c"]])
async def test_impossible_command_is_refused(sandbox: Sandbox, argv: list[str]) -> None:
    with pytest.raises(ValueError, match="not a command"):
        await run(sandbox, *argv)


@pytest.mark.parametrize("env", [{"A B": "c"}, {"": "c"}, {"A": "b\0"}, {"A=B": "c"}])
async def test_impossible_variable_is_refused(sandbox: Sandbox, env: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="environment variable"):
        await run(sandbox, "true", env=env)


async def test_death_by_signal_is_128_and_its_number(sandbox: Sandbox) -> None:
    assert (await sh(sandbox, "kill -TERM $$")).exit_code == 143
    assert (await sh(sandbox, "kill -KILL $$")).exit_code == 137


async def test_timeout_keeps_the_output_and_kills_all_that_was_started(sandbox: Sandbox) -> None:
    result = await sh(sandbox, FAMILY, timeout=2)
    assert result.timed_out
    assert result.exit_code is None
    assert (result.stdout, result.stderr) == (b"started\n", b"trouble\n")
    pids = await wait_for_file(sandbox, "pids", lines=4)
    assert await living(sandbox, pids) == []


async def test_timeout_kills_a_command_that_cleared_its_environment(sandbox: Sandbox) -> None:
    script = 'echo $$ > pids; exec env -i PATH="$PATH" sh -c "sleep 60; sleep 60"'
    assert (await sh(sandbox, script, timeout=1)).timed_out
    assert await living(sandbox, await wait_for_file(sandbox, "pids")) == []


async def test_cancelled_call_kills_all_that_was_started(sandbox: Sandbox) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(sh, sandbox, FAMILY)
        pids = await wait_for_file(sandbox, "pids", lines=4)
        assert len(await living(sandbox, pids)) == 4
        group.cancel_scope.cancel()
    assert await living(sandbox, pids) == []


async def test_call_cancelled_at_any_moment_leaves_nothing_running(sandbox: Sandbox) -> None:
    for delay in (0, 0.002, 0.01, 0.02, 0.03, 0.05):
        with anyio.move_on_after(delay):
            await sh(sandbox, "echo $$ >> pids; sleep 60; echo $$ >> survived")
    assert await living(sandbox, (await sh(sandbox, "cat pids")).stdout.decode().split()) == []


async def test_process_left_in_the_background_lives_on_and_holds_nothing(sandbox: Sandbox) -> None:
    with anyio.fail_after(20):
        result = await sh(sandbox, "sleep 50 & echo $! > pid; echo begun")
    assert (result.exit_code, result.stdout) == (0, b"begun\n")
    pids = await wait_for_file(sandbox, "pid")
    assert await living(sandbox, pids) == pids
    await run(sandbox, "kill", *pids)


async def test_timeout_of_one_call_spares_the_others(sandbox: Sandbox) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(sh, sandbox, "echo $$ > other; sleep 60")
        other = await wait_for_file(sandbox, "other")
        assert (await run(sandbox, "sleep", "60", timeout=0.5)).timed_out
        assert await living(sandbox, other) == other
        group.cancel_scope.cancel()


async def test_output_is_cut_at_the_bound_for_each_stream(sandbox: Sandbox) -> None:
    result = await sh(sandbox, "printf 12345; printf 1234567 >&2", max_output=5)
    assert (result.stdout, result.stderr, result.truncated) == (b"12345", b"12345", True)
    result = await sh(sandbox, "printf 12345; printf 12345 >&2", max_output=5)
    assert (result.stdout, result.stderr, result.truncated) == (b"12345", b"12345", False)


async def test_output_is_bounded_while_it_is_read(sandbox: Sandbox) -> None:
    tracemalloc.start()
    try:
        result = await run(sandbox, "head", "-c", "60000000", "/dev/zero", max_output=1000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (result.exit_code, len(result.stdout), result.truncated) == (0, 1000, True)
    assert peak < 15_000_000


async def test_endless_output_is_stopped_by_the_timeout(sandbox: Sandbox) -> None:
    began = anyio.current_time()
    result = await run(sandbox, "yes", timeout=1, max_output=10)
    assert anyio.current_time() - began < 10
    assert (result.timed_out, result.stdout, result.truncated) == (True, b"y\ny\ny\ny\ny\n", True)


async def test_program_that_closes_its_output_is_waited_for(sandbox: Sandbox) -> None:
    result = await sh(sandbox, "exec >&- 2>&-; sleep 1; exit 7")
    assert result.exit_code == 7


async def test_many_run_at_once(sandbox: Sandbox) -> None:
    """None of the sixty can end before all have begun."""
    done: list[int | None] = []

    async def one(number: int) -> None:
        script = f'touch begun.{number}; until [ "$(ls begun.* | wc -l)" -ge 60 ]; do sleep 0.5; done; exit {number}'
        done.append((await sh(sandbox, script)).exit_code)

    async with anyio.create_task_group() as group:
        for number in range(60):
            group.start_soon(one, number)
    assert sorted(filter(None, done)) == list(range(1, 60))


async def test_file_descriptors_are_given_back(sandbox: Sandbox) -> None:
    await run(sandbox, "true")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        await run(sandbox, "sleep", "9", timeout=0.05, stdin=bytes(1_000_000))
        await run(sandbox, "true")
    assert len(os.listdir("/proc/self/fd")) <= before + 2
