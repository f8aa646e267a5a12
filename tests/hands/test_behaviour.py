"""What a shell does, whatever shell the image has, over a channel and over plain exec alike."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from importlib import resources

import anyio
import pytest

from mabridge.hands import CallResult, Hands
from mabridge.sandbox import ExecResult, Sandbox
from tests.hands.conftest import Shell, WithProcess

pytestmark = pytest.mark.anyio


async def test_shell_keeps_directory_and_variables(run: Shell):
    await run("cd /; X='a  b'; export Y=\"c'd\"")
    assert await run.text('pwd; echo "$X"; echo "$Y"; sh -c \'echo "$Y"\'') == "/\na  b\nc'd\nc'd"


async def test_exit_code_and_both_streams_come_back(run: Shell):
    result = await run("echo out; echo err >&2; (exit 70)")
    assert result.exit_code == 70
    assert sorted(result.head.split()) == [b"err", b"out"]
    assert result.note is None


async def test_commands_that_are_awkward_are_just_commands(run: Shell):
    assert await run.text("cat <<EOF\none $((1+1))\nEOF") == "one 2"
    assert await run.text("cat; echo eof") == "eof"
    assert await run.text("printf '%s' 'a\nb'") == "a\nb"
    assert (await run("printf 'a\\000b\\377'")).head == b"a\0b\xff"
    assert await run.text("echo x; exec 1>&-; echo unheard 2>/dev/null") == "x"
    assert await run.text("echo still here") == "still here"
    assert await run.text("# only a comment") == ""
    assert await run.text("echo 'no newline at the end of a long line' | tr -d '\\n' | wc -c") == "36"


async def test_unclosed_quote_is_an_error_at_once(run: Shell):
    with anyio.fail_after(15):
        assert (await run("echo 'unclosed")).exit_code not in (0, None)
        assert (await run("echo $(")).exit_code not in (0, None)
    assert await run.text("echo on") == "on"


@pytest.mark.parametrize(("command", "code"), [("exit 3", 3), ("exec true", 0), ("kill -9 $$", 137)])
async def test_shell_that_died_is_started_again_where_it_was(run: Shell, command: str, code: int):
    await run("mkdir -p deep && cd deep && export KEPT=yes")
    died = await run(f"echo last words; {command}")
    assert died.exit_code == code
    assert died.head == b"last words\n"
    assert died.note
    assert await run.text("echo $KEPT; basename $(pwd)") == "yes\ndeep"


async def test_only_one_shell_takes_the_place_of_another(run: Shell, reached: Sandbox):
    """The next spare waits by then, and sees the end of the FIFO by which the first was told to go on."""
    await run("greet() { echo hello; }")
    shell = f"{run.hands.directory}/shells/main"
    hold = """
    [ -p "$1/go" ] || exit 0
    exec 9<> "$1/go"
    : > "$1/held"
    while [ -e "$1/held" ]; do sleep 0.1 || sleep 1; done
    """

    async def holder() -> None:
        await reached.exec(["sh", "-c", hold, "sh", shell], timeout=30, max_output=1000)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(holder)
        await run(f"[ ! -p {shell}/go ] || until [ -e {shell}/held ]; do sleep 0.1 || sleep 1; done")
        await run("exit 1")
        assert await run.text("greet") == "hello"
        before = await run.text(f"cat {shell}/inner; rm -f {shell}/held")
    assert await run.text(f"sleep 1; cat {shell}/inner") == before


async def test_set_e_ends_the_command_with_its_own_code(run: Shell):
    result = await run("set -e; echo before; (exit 9); echo after")
    assert (result.exit_code, result.head) == (9, b"before\n")
    assert await run.text("set +e; echo on") == "on"


async def test_timeout_kills_what_the_call_started_and_keeps_the_rest(run: Shell):
    number = secrets.randbelow(900_000) + 100_000  # another run's are not to be counted
    await run("X=kept; sleep 4321 & echo $! > job")
    await run("true")  # so that the job is older than the call by more than a tick
    with anyio.fail_after(15):
        command = f"echo so far; (sleep {number} & setsid sleep {number} & wait); sleep {number}"
        result = await run(command, timeout=2.0)
    assert (result.exit_code, result.timed_out, result.head) == (None, True, b"so far\n")
    listed = "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done 2>/dev/null"
    alive = f"{listed} | grep -c '^sleep {number}'"
    assert await run.text(f"echo $X; kill -0 $(cat job) && echo alive; {alive}") == "kept\nalive\n0"


async def test_functions_outlive_their_shell(run: Shell):
    await run("greet() { echo hello $1; }; X=kept; cd /")
    assert await run.text("wait; jobs; greet you") == "hello you"
    for ending, timeout in (("sleep 60", 2.0), ("exit 7", 20.0), ("while :; do :; done", 2.0)):
        with anyio.fail_after(30):
            ended = await run(f"echo x; {ending}", timeout=timeout)
        assert (ended.exit_code, ended.head) == (7 if "exit" in ending else None, b"x\n")
        assert await run.text("greet again; echo $X; pwd") == "hello again\nkept\n/"
    await run("greet() { echo bye; }")
    await run("exit 1")
    assert await run.text("greet") == "bye"
    await run.hands.restart("greetless")
    assert (await run("greet")).exit_code == 127


async def test_loop_in_the_shell_itself_is_killed(run: Shell):
    with anyio.fail_after(15):
        result = await run("(while :; do :; done) & while :; do :; done", timeout=0.5)
    assert result.timed_out
    assert await run.text("echo on") == "on"


async def test_interrupt_returns_what_there_is(run: Shell):
    results: list[CallResult] = []

    async def long() -> None:
        results.append(await run.hands.run("to_interrupt", "echo so far; touch begun; sleep 4323", timeout=60))

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(long)
            while (await run("ls begun", shell="other")).exit_code != 0:
                pass
            await run.hands.interrupt("to_interrupt")
    (result,) = results
    assert (result.exit_code, result.interrupted, result.head) == (None, True, b"so far\n")


async def test_same_id_runs_once_whoever_asks(reached: Sandbox):
    async def ask(results: list[CallResult]) -> None:
        async with Hands(reached) as hands:
            results.append(await hands.run("only_once", "echo ran >> log; sleep 0.3; wc -l < log", timeout=20))

    results: list[CallResult] = []
    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(ask, results)
    assert [result.head.strip() for result in results] == [b"1"] * 4


async def test_command_of_a_worker_that_left_is_waited_for(reached: Sandbox):
    async with Hands(reached) as first:
        with anyio.move_on_after(0.7):
            await first.run("left", "echo begun >> log; sleep 2; echo done", timeout=30)
    async with Hands(reached) as second:
        result = await second.run("left", "echo begun >> log; sleep 2; echo done", timeout=30)
        assert (result.exit_code, result.head) == (0, b"done\n")
        assert (await second.run("look", "wc -l < log", timeout=10)).head.strip() == b"1"


async def test_shells_of_different_names_share_files_and_nothing_else(run: Shell):
    await run("X=main; echo shared > file")
    assert await run.text("echo ${X:-none}; cat file", shell="thread 1/é") == "none\nshared"


async def test_restart_gives_a_fresh_shell(run: Shell):
    await run("cd /; X=old; export X")
    await run.hands.restart("fresh")
    await run.hands.restart("fresh")
    assert await run.text('echo "${X:-none}"; [ "$PWD" = / ] || echo home') == "none\nhome"


async def test_restart_brings_back_what_was_removed(run: Shell, reached: Sandbox):
    await run("X=old")
    gone = 'until rm -rf "$1"; do :; done'
    await reached.exec(["sh", "-c", gone, "sh", run.hands.directory], timeout=20, max_output=1000)
    await run.hands.restart("again")
    assert await run.text('echo "${X:-none}"') == "none"


async def test_restart_that_was_broken_off_is_done(run: Shell, reached: Sandbox):
    await run("X=old")
    begun = ["touch", f"{run.hands.directory}/calls/broken_off.begun"]
    await reached.exec(begun, timeout=20, max_output=1000)
    await run.hands.restart("broken_off")
    assert await run.text('echo "${X:-none}"') == "none"


async def test_what_a_dying_shell_took_is_run_by_the_next(run: Shell, reached: Sandbox):
    """A shell that is killed while it waits for work can take an id out of its queue, and nothing comes of that."""
    await run("X=kept; echo begin >> log")
    steal = """
    cd "$1/shells/main" && read -r pid _ < inner && kill -STOP "$pid" && read -r id < in && kill -9 "$pid"
    """
    stolen: list[ExecResult] = []

    async def thief() -> None:
        stolen.append(await reached.exec(["sh", "-c", steal, "sh", run.hands.directory], timeout=20, max_output=1000))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(thief)
            await _until_stopped(run, reached)
            assert await run.text("echo $X >> log; cat log") == "begin\nkept"
    assert stolen[0].exit_code == 0, stolen[0].stderr


async def test_long_output_comes_with_its_ends_its_size_and_its_place(run: Shell, reached: Sandbox):
    result = await run("seq 1 100000")
    assert result.size == 588_895
    assert result.head.startswith(b"1\n2\n3\n")
    assert result.tail.endswith(b"99999\n100000\n")
    assert len(result.head) + len(result.tail) < 200_000
    assert result.path is not None
    assert len(await reached.read_file(result.path, max_bytes=1_000_000)) == 588_895


async def test_background_job_does_not_hold_the_call(run: Shell):
    with anyio.fail_after(15):
        assert await run.text("sleep 4324 & echo started") == "started"


async def test_large_command_goes_in_whole(run: Shell):
    text = "x" * 200_000
    assert await run.text(f"printf %s '{text}' | wc -c") == "200000"


async def test_what_is_forgotten_leaves_the_journal_and_is_not_run_again(run: Shell):
    listed = f"(cd {run.hands.directory}; ls calls old | grep to_forget)"
    for number in range(16):  # a worker forgets some together
        await run.hands.run(f"to_forget{number}", "echo x >> log", timeout=10)
        await run.hands.forget(f"to_forget{number}")
    await run("true")
    await run("true")
    assert await run.text(f"{listed} | sort") == "\n".join(sorted(f"to_forget{number}.out" for number in range(16)))
    again = await run.hands.run("to_forget3", "echo x >> log", timeout=10)
    assert again.exit_code is None
    assert again.note
    assert await run.text("wc -l < log") == "16"


async def test_what_is_left_to_forget_is_forgotten_at_the_end(run: Shell, reached: Sandbox):
    async with Hands(reached) as other:
        await other.run("to_forget", "echo said", timeout=10)
        await other.forget("to_forget")
        if not isinstance(reached, WithProcess):
            await other.run("next", "true", timeout=10)
    assert await run.text(f"(cd {run.hands.directory}; ls calls old | grep to_forget)") == "to_forget.out"


async def test_hands_pick_the_first_place_that_can_be_written(local_sandbox: Sandbox):
    async with Hands(local_sandbox) as hands:
        assert hands.directory.startswith(local_sandbox.workdir.removesuffix("/workspace") + "/tmp/")


async def _until_stopped(run: Shell, reached: Sandbox) -> None:
    script = """
    read -r pid _ < "$1/shells/main/inner"
    until grep -q '^State:.T' "/proc/$pid/status"; do sleep 0.1 || sleep 1; done
    """
    await reached.exec(["sh", "-c", script, "sh", run.hands.directory], timeout=20, max_output=1000)


def test_program_is_clean_for_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("there is no shellcheck")
    programs = [str(resources.files("mabridge.hands") / name) for name in ("hands.sh", "inner.sh")]
    # The others with hands.sh, of which they are parts.
    options = ["--external-sources", "--check-sourced", "--source-path=SCRIPTDIR", "--shell=sh"]
    done = subprocess.run(["shellcheck", *options, *programs], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


async def test_timeout_kills_a_subshell_that_has_lost_its_parent(run: Shell):
    """It was forked and never executed anything, so it carries no mark, and it is below nothing of ours."""
    command = "( ( while :; do echo beat >> beats; sleep 0.05 || sleep 1; done ) & ); sleep 60"
    assert (await run(command, timeout=2)).timed_out
    before = await run.text("wc -l < beats")
    assert int(before) > 0
    assert await run.text("sleep 1.2 || sleep 2; wc -l < beats") == before
