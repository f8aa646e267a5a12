"""Processes that the ``daytona`` provider holds open by a terminal, and bash over them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest

from mabridge.errors import AtCapacity, SandboxUnavailable
from mabridge.hands import Hands
from mabridge.providers.daytona.sandbox import DaytonaSandbox
from mabridge.sandbox import Process
from mabridge.testing.conformance import run, sh
from tests.emulators.daytona import DaytonaEmulator
from tests.providers import test_daytona

pytestmark = pytest.mark.anyio

emulator, provider, sandbox = test_daytona.emulator, test_daytona.provider, test_daytona.sandbox


async def everything(process: Process) -> AsyncIterator[bytes]:
    while data := await process.receive():
        yield data


@pytest.mark.parametrize("shell", test_daytona.SHELLS)
async def test_process_has_what_a_command_has_and_nothing_of_the_login_shell(
    emulator: DaytonaEmulator, sandbox: DaytonaSandbox, shell: str
) -> None:
    emulator.shell = shell
    (box,) = emulator.living
    for name in (".profile", ".bash_profile", ".zprofile"):
        said = "umask 077; export PROFILE=read; cd /; echo 'Welcome!'; alias env=false\n"
        (box.machine.tree / "home/daytona" / name).write_text(said, encoding="utf-8")
    script = "env -u MAB_EXEC -u OLDPWD | sort; grep SigIgn /proc/self/status; ulimit -f; umask; tty <&1 || echo none"
    told = await sh(sandbox, script, env={"MINE": "it's\n$x"})
    assert b"SigIgn:\t0000000000000000\nunlimited\n0022\nnot a tty\nnone\n" in told.stdout
    process = await sandbox.open_process(["/bin/sh", "-c", script], env={"MINE": "it's\n$x"})
    with anyio.fail_after(30):
        assert b"".join([data async for data in everything(process)]) == told.stdout
    await process.aclose()


async def test_process_that_nobody_listens_to_waits_and_loses_nothing(sandbox: DaytonaSandbox) -> None:
    script = "head -c 4000000 /dev/urandom > all; cat all; echo > finished"
    process = await sandbox.open_process(["/bin/sh", "-c", script])
    await sandbox.exec(["sh", "-c", "until [ -s all ]; do sleep 0.05; done"], timeout=30, max_output=0)
    await anyio.sleep(1)  # much longer than it takes where nothing stops it
    assert b"finished" not in (await run(sandbox, "ls")).stdout
    with anyio.fail_after(60):
        heard = b"".join([data async for data in everything(process)])
    assert heard == await sandbox.read_file("all", max_bytes=5_000_000)
    await process.aclose()


@pytest.mark.parametrize("said", ["yes", "yes | tr -d '\\n'"], ids=["lines", "a line without end"])
async def test_what_writes_to_the_terminal_itself_breaks_it_and_takes_no_memory(
    sandbox: DaytonaSandbox, said: str
) -> None:
    process = await sandbox.open_process(["cat"])
    await sh(sandbox, f"(cd /proc/$(cat /tmp/.mab-*.w)/fd && {said} | head -c 10000000 > 1) 2>/dev/null &")
    with anyio.fail_after(20), pytest.raises(SandboxUnavailable):
        await process.receive()
    assert len(process._said) <= 1_000_000
    await process.aclose()


async def test_what_a_process_reads_is_what_was_sent(sandbox: DaytonaSandbox) -> None:
    """Text goes in one way, and all else in another."""
    process = await sandbox.open_process(["cat"])
    for data in (
        *(b"a\\b\\n%s%%\tc \n", b" t \n", b"12\n", b"\n\n", b"-n\n", b"\\", b"\\0101\\c"),
        *(b"\0", "é\n".encode(), b"\x03\x04"),
    ):
        await process.send(data)
        heard = b""
        with anyio.fail_after(30):
            while len(heard) < len(data):
                heard += await process.receive()
        assert heard == data
    await process.aclose()


async def test_closing_a_process_leaves_no_terminal_and_no_file(
    emulator: DaytonaEmulator, sandbox: DaytonaSandbox
) -> None:
    for argv in (["cat"], ["true"], ["no-such-program"]):
        process = await sandbox.open_process(argv)
        assert len(emulator.terminals) == 1
        await process.aclose()
        with anyio.fail_after(10):
            while emulator.terminals:  # noqa: ASYNC110
                await anyio.sleep(0.05)
        assert (await sh(sandbox, "ls -A /tmp | grep '^[.]mab-' | grep -v \"$MAB_EXEC\"")).stdout == b""


async def test_terminal_that_cannot_be_opened_is_told_and_leaves_nothing(
    emulator: DaytonaEmulator, sandbox: DaytonaSandbox
) -> None:
    for status, why in ((404, "opens no terminal"), (500, "failed"), (502, "failed")):
        emulator.fail("GET /toolbox/.*/pty/", status)
        with pytest.raises(SandboxUnavailable, match=why):
            await sandbox.open_process(["cat"])
    assert not emulator.terminals
    assert (await sh(sandbox, "ls -A /tmp | grep '^[.]mab-' | grep -v \"$MAB_EXEC\"")).stdout == b""
    emulator.fail("GET /toolbox/.*/pty/", 429)
    with pytest.raises(AtCapacity):
        await sandbox.open_process(["cat"])


async def test_login_shell_that_takes_no_command_is_told_and_ended(
    emulator: DaytonaEmulator, sandbox: DaytonaSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mabridge.providers.daytona.process._READY", 1.0)
    (box,) = emulator.living
    (box.machine.tree / "home/daytona/.bash_profile").write_text("read -r answer", encoding="utf-8")
    with pytest.raises(SandboxUnavailable):
        await sandbox.open_process(["cat"])
    with anyio.fail_after(10):
        while emulator.terminals:  # noqa: ASYNC110
            await anyio.sleep(0.05)


async def test_bash_call_costs_one_message_and_no_request(emulator: DaytonaEmulator, sandbox: DaytonaSandbox) -> None:
    async with Hands(sandbox) as hands:
        await hands.run("call_1", "true", timeout=30)
        emulator.requests.clear()
        for number in range(2, 5):
            told = await hands.run(f"call_{number}", "printf 'x\\0é'", timeout=30)
            assert told.head == b"x\0\xc3\xa9"
        assert emulator.requests == []


async def test_bash_works_where_no_terminal_can_be_opened(emulator: DaytonaEmulator, sandbox: DaytonaSandbox) -> None:
    emulator.fail("GET /toolbox/.*/pty/", 404, times=100)
    async with Hands(sandbox) as hands:
        assert (await hands.run("call_1", "cd /; x=1", timeout=30)).exit_code == 0
        emulator.requests.clear()
        assert (await hands.run("call_2", "echo $PWD $x", timeout=30)).head == b"/ 1\n"
        assert [said.rpartition("/")[2] for said in emulator.requests] == ["execute"]
