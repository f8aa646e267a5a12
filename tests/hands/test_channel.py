"""When no process can be held open, at first or any more: the calls go over exec, and nothing is lost."""

from __future__ import annotations

import anyio
import pytest

from mabridge.errors import SandboxUnavailable
from mabridge.hands import Hands
from mabridge.sandbox import ExecResult, Process, Sandbox
from tests.hands.conftest import Shell, WithProcess

pytestmark = pytest.mark.anyio


class Fickle(WithProcess):
    """Holds processes open only as long as it likes to."""

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(sandbox)
        self.refuses = False
        self.tries = self.failing = 0
        self.held: list[Process] = []

    async def exec(self, argv, **options) -> ExecResult:
        if self.failing > 0 and "once" in argv:
            self.failing -= 1
            raise SandboxUnavailable("not now", provider="test", op="exec")
        return await super().exec(argv, **options)

    async def open_process(self, argv, *, cwd=None, env=None) -> Process:
        self.tries += 1
        if self.refuses:
            raise SandboxUnavailable("not now", provider="test", op="open_process")
        self.held.append(await super().open_process(argv, cwd=cwd, env=env))
        return self.held[-1]

    async def cut(self) -> None:
        for process in self.held:
            await process.aclose()


async def test_channel_that_breaks_is_opened_again(local_sandbox: Sandbox):
    fickle = Fickle(local_sandbox)
    async with Hands(fickle) as hands:
        run = Shell(hands)
        await run("x=1")
        await fickle.cut()
        assert await run.text("echo $x") == "1"
        assert len(fickle.held) == 2
        await run("x=2")
        assert fickle.tries == 2


async def test_where_none_can_be_opened_calls_go_over_exec(local_sandbox: Sandbox):
    fickle = Fickle(local_sandbox)
    fickle.refuses = True
    async with Hands(fickle) as hands:
        run = Shell(hands)
        await run("x=1")
        assert await run.text("echo $x") == "1"
    assert fickle.tries == 1


async def test_channel_that_cannot_be_opened_again_costs_no_call(local_sandbox: Sandbox):
    fickle = Fickle(local_sandbox)
    async with Hands(fickle) as hands:
        run = Shell(hands)
        await run("x=1")
        async with anyio.create_task_group() as tasks:

            async def cut_under_way() -> None:
                while (await run.text("cat begun 2>/dev/null", shell="other")) != "begun":  # noqa: ASYNC110
                    await anyio.sleep(0.05)
                fickle.refuses = True
                await fickle.cut()

            tasks.start_soon(cut_under_way)
            ran = await run.text("echo begun >> begun; sleep 1; cat begun; echo $x")
        assert ran == "begun\n1", "it is run once, and its result comes over exec"
        tries = fickle.tries
        assert await run.text("echo $x") == "1"
        assert fickle.tries == tries, "it is not tried any more"


async def test_large_command_that_fails_over_exec_costs_no_channel(local_sandbox: Sandbox):
    fickle = Fickle(local_sandbox)
    async with Hands(fickle) as hands:
        run = Shell(hands)
        fickle.failing = 2
        assert await run.text(f"x={'y' * 20_000}; echo ${{#x}}") == "20000"
        assert fickle.failing == 0
        await fickle.cut()
        assert await run.text("echo ${#x}") == "20000"
        assert fickle.tries == 2, "it is opened again"
