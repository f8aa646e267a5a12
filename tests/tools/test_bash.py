"""`bash` over real hands."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from mabridge.hands import Hands
from mabridge.sandbox import Sandbox
from mabridge.tools import SandboxTools, ToolLimits

pytestmark = pytest.mark.anyio


class Shell:
    """Calls of `bash`, each with an id of its own."""

    def __init__(self, tools: SandboxTools) -> None:
        self.tools = tools
        self.last = ""
        self._count = 0

    async def __call__(
        self, command: str | None = None, *, thread: str | None = None, **given: Any
    ) -> tuple[bool, str]:
        self._count += 1
        self.last = f"toolu_{self._count}"
        given = given if command is None else {"command": command, **given}
        result = await self.tools.call("bash", given, call_id=self.last, thread=thread)
        (block,) = result.content
        assert len(block["text"]) < 100_000
        return result.is_error, block["text"]


@pytest.fixture
async def hands(local_sandbox: Sandbox) -> AsyncIterator[Hands]:
    async with Hands(local_sandbox) as hands:
        yield hands


@pytest.fixture
def bash(local_sandbox: Sandbox, hands: Hands) -> Shell:
    return Shell(SandboxTools(local_sandbox, hands))


async def test_output_is_shown_without_its_last_newlines(bash: Shell) -> None:
    assert await bash("echo one; echo two >&2; echo; echo") == (False, "one\ntwo")
    assert await bash("printf '  x'") == (False, "  x")


async def test_no_output_is_said(bash: Shell) -> None:
    assert await bash("true") == (False, "(no output)")


async def test_failure_shows_output_and_exit_code(bash: Shell) -> None:
    assert await bash("echo out; (exit 3)") == (True, "out\n[exit code 3]")
    assert await bash("false") == (True, "[exit code 1]")


async def test_shell_lasts_from_call_to_call(bash: Shell, local_sandbox: Sandbox) -> None:
    await bash("mkdir d; cd d; x=5; f() { echo f$x; }")
    assert await bash("f; pwd") == (False, f"f5\n{local_sandbox.workdir}/d")


async def test_thread_has_a_shell_of_its_own(bash: Shell) -> None:
    await bash("x=main")
    await bash("x=other", thread="sthr_1")
    assert await bash("echo $x") == (False, "main")
    assert await bash("echo $x", thread="sthr_1") == (False, "other")


async def test_restart_makes_the_shell_fresh(bash: Shell) -> None:
    await bash("x=5")
    assert await bash(restart=True) == (False, "bash session restarted")
    assert await bash("echo [$x]") == (False, "[]")


async def test_escapes_are_stripped_and_bad_bytes_replaced(bash: Shell) -> None:
    assert await bash(r"printf '\033[1;31mred\033[0m \377 \303\251'") == (False, "red \ufffd é")


async def test_half_a_character_in_a_command_is_replaced(bash: Shell) -> None:
    assert await bash("echo 'a\ud800b'") == (False, "a\ufffdb")


async def test_timeout_keeps_the_output_and_the_shell(bash: Shell) -> None:
    await bash("x=5")
    is_error, text = await bash("echo before; sleep 60", timeout_ms=1500)
    assert is_error
    assert text.startswith("before\n")
    assert "bash: bash command timed out after 1.5s" in text
    assert await bash("echo $x") == (False, "5")


async def test_timeout_is_no_longer_than_the_limit(local_sandbox: Sandbox, hands: Hands) -> None:
    bash = Shell(SandboxTools(local_sandbox, hands, limits=ToolLimits(max_timeout=0.5)))
    assert "timed out after 0.5s" in (await bash("sleep 60", timeout_ms=3_600_000))[1]


async def test_large_output_is_cut_in_the_middle_and_can_be_read(bash: Shell, local_sandbox: Sandbox) -> None:
    is_error, text = await bash("seq 1 200000")
    assert not is_error
    lines = text.split("\n")
    assert (lines[0], lines[-1]) == ("1", "200000")
    (note,) = [line for line in lines if line.startswith("[")]
    path = note.partition("the whole output is in ")[2].removesuffix(" ...]")
    result = await bash.tools.call("read", {"file_path": path, "view_range": [100_000, 100_001]}, call_id="read")
    assert result.content[0]["text"] == "100000\n100001"
    await bash.tools.accepted(bash.last)
    result = await bash.tools.call("grep", {"pattern": "^150000$", "path": path}, call_id="grep")
    assert result.content[0]["text"] == f"{path}:150000:150000"
    result = await bash.tools.call("write", {"file_path": path, "content": ""}, call_id="write")
    assert result.is_error


@pytest.mark.parametrize("size", [98_000, 99_001, 110_000, 140_000])
async def test_output_that_is_not_shown_whole_is_kept_whole(bash: Shell, size: int) -> None:
    text = (await bash(f"head -c {size} /dev/zero | tr '\\0' x"))[1]
    if size < 98_304:
        assert text == "x" * size
    else:
        path = text.partition("the whole output is in ")[2].partition(" ...]")[0]
        found = await bash(f"wc -c <{path}")
        assert found == (False, str(size))


async def test_large_output_of_long_characters_is_not_cut_within_one(bash: Shell) -> None:
    text = (await bash("yes 日本語 | head -n 100000 | tr -d '\\n'"))[1]
    assert "\ufffd" not in text


async def test_interrupt_ends_the_command_and_keeps_its_output(bash: Shell, local_sandbox: Sandbox) -> None:
    results = []

    async def call() -> None:
        results.append(await bash("mkfifo begun; echo before; echo >begun; sleep 60"))

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            wait = "until [ -p begun ]; do sleep 0.05; done; cat begun"
            await local_sandbox.exec(["/bin/sh", "-c", wait], timeout=30, max_output=10)
            await bash.tools.interrupt("toolu_1")
    assert results == [(True, "before\nbash: interrupted before the command had ended")]
    assert await bash("echo on") == (False, "on")


async def test_same_call_again_has_the_first_result(bash: Shell) -> None:
    for _ in range(2):
        result = await bash.tools.call("bash", {"command": "echo x >>ran; cat ran"}, call_id="toolu_same")
        assert result.content[0]["text"] == "x"


async def test_accepted_call_is_let_go_and_never_run_again(bash: Shell) -> None:
    await bash("echo x >>ran")
    first = bash.last
    await bash.tools.accepted(first)
    for _ in range(16):  # some are let go together
        await bash("true")
        await bash.tools.accepted(bash.last)
    again = await bash.tools.call("bash", {"command": "echo x >>ran"}, call_id=first)
    assert again.is_error
    assert "not kept any more" in again.content[0]["text"]
    assert await bash("cat ran") == (False, "x")


async def test_output_is_no_longer_than_the_limit(local_sandbox: Sandbox, hands: Hands) -> None:
    bash = Shell(SandboxTools(local_sandbox, hands, limits=ToolLimits(max_chars=100)))
    text = (await bash("seq 1 100"))[1]
    assert text.startswith("1\n2\n3\n")
    assert "this is the beginning and the end of 292 bytes" in text
    assert text.endswith("\n99\n100")
    assert len(text) < 250
