"""Commands that break shells: for these hands they are commands like any other."""

from __future__ import annotations

import re

import anyio
import pytest

from tests.hands.conftest import Shell

pytestmark = pytest.mark.anyio


async def test_output_of_any_bytes_comes_back_as_it_is(run: Shell):
    result = await run("printf 'a\\000b\\377\\303'; printf '\\033[31mred\\033[0m\\r\\n'")
    assert result.head == b"a\0b\xff\xc3\x1b[31mred\x1b[0m\r\n"


async def test_line_of_a_million_characters_is_a_long_output(run: Shell):
    result = await run("head -c 1000000 /dev/zero | tr '\\000' x")
    assert (result.exit_code, result.size) == (0, 1_000_000)
    assert set(result.head) == set(result.tail) == {ord("x")}


async def test_terminal_commands_fail_and_do_not_hang(run: Shell):
    with anyio.fail_after(20):
        assert (await run("stty -a")).exit_code != 0
        assert await run.text("tty; echo on") in ("not a tty\non", "on")
        assert (await run('read -r line; echo "got<$line>"')).head == b"got<>\n"


async def test_traps_of_the_agent_are_its_own(run: Shell):
    await run("trap 'echo leaving' EXIT; trap '' TERM; trap 'echo usr' USR1")
    assert await run.text("kill -USR1 $$; kill -TERM $$; echo on") in ("usr\non", "on\nusr")
    died = await run("exit 4")
    assert died.exit_code == 4
    assert died.head in (b"leaving\n", b"")  # busybox has put the output back by then
    assert await run.text("echo on") == "on"


async def test_shell_with_odd_options_goes_on(run: Shell):
    for option in ("-u", "-f", "-C", "-a", "-e"):
        await run(f"set {option}; KEPT=yes")
        assert await run.text('echo "$KEPT"') == "yes"
    await run("set +e +u +f +C +a; IFS=x; readonly RO=1; alias ls='echo alias'")
    assert await run.text("echo on") == "on"
    assert re.sub(r"\++ ", "+ ", await run.text("set -x; : traced; set +x")) == "+ : traced\n+ set +x"


async def test_closed_streams_are_the_commands_own_affair(run: Shell):
    await run("exec 1>&- 2>&-; echo unheard")
    assert await run.text("echo heard") == "heard"
    await run("exec 3>&- 4>&- 5>&-")
    assert await run.text("echo heard") == "heard"


async def test_disowned_and_detached_jobs_live_on_and_hold_nothing(run: Shell):
    with anyio.fail_after(30):
        await run("setsid sh -c 'sleep 1; echo done > detached' > /dev/null 2>&1 & disown 2>/dev/null || true")
        await run("(sleep 1; echo late) &")
        while (await run("[ -e detached ]")).exit_code != 0:
            await run("sleep 0.1")


async def test_functions_of_the_names_that_the_hands_use_change_nothing(run: Shell):
    await run(
        "printf() { echo mine; }; read() { echo mine; }; cd() { echo mine; }; pwd() { echo mine; }; look() { :; }"
    )
    assert await run.text("echo one") == "one"
    assert await run.text("echo two") == "two"
    assert (await run("exit 5")).exit_code == 5
    assert await run.text("echo three") == "three"


async def test_variables_that_the_hands_use_are_safe_from_the_agent(run: Shell):
    await run("C=/nowhere D=/nowhere S=x id=y IFS=/ line=z PATH=/nowhere HEAD=1; export C D S id IFS line PATH HEAD")
    assert await run.text("echo on") == "on"
    await run("exit 3")
    assert await run.text('PATH=/bin:/usr/bin; echo "$C $D $id"') == "/nowhere /nowhere y"


async def test_removed_working_directory_is_no_end(run: Shell):
    await run("mkdir gone; cd gone; rmdir ../gone")
    assert await run.text("echo on") == "on"
    await run("exit 1")
    assert await run.text("echo on") == "on"


async def test_journal_that_was_deleted_is_told_and_the_command_not_run_twice(run: Shell):
    await run("true")
    with anyio.fail_after(60):
        # What is being written there makes a removal fail now and then.
        lost = await run(f"echo ran >> log; until rm -rf {run.hands.directory}; do :; done", timeout=5)
    assert lost.exit_code is None
    assert lost.note
    assert await run.text("cat log") == "ran"


async def test_many_calls_one_after_another_and_side_by_side(run: Shell):
    async def several(shell: str) -> None:
        for number in range(8):
            assert await run.text(f"N=$((${{N:-0}} + 1)); echo $N {shell}", shell=shell) == f"{number + 1} {shell}"

    async with anyio.create_task_group() as tasks:
        for number in range(4):
            tasks.start_soon(several, f"shell{number}")
