"""The six tools as one object: inputs, interrupts, cancellation."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from mabridge.errors import SandboxGone
from mabridge.hands import Hands
from mabridge.sandbox import Sandbox
from mabridge.tools import SandboxTools, ToolLimits, ToolResult
from mabridge.tools.inputs import GrepInput, parse_input

pytestmark = pytest.mark.anyio


@pytest.fixture
def tools(local_sandbox: Sandbox) -> SandboxTools:
    return SandboxTools(local_sandbox, Hands(local_sandbox))


@pytest.mark.parametrize(
    ("name", "given", "error"),
    [
        ("read", None, "read: file_path is required"),
        ("read", {}, "read: file_path is required"),
        ("read", {"file_path": None}, "read: file_path must be a string"),
        ("read", {"file_path": 1}, "read: file_path must be a string"),
        ("read", {"file_path": "a", "view_range": "1"}, "read: view_range must be a list of two whole numbers"),
        ("read", {"file_path": "a", "view_range": [1, None]}, "read: view_range must be a list of two whole numbers"),
        ("read", {"file_path": "a", "view_range": [1]}, "read: view_range must be [start_line, end_line]"),
        ("write", {"file_path": "a"}, "write: content is required"),
        ("write", {"file_path": "a", "content": {"x": 1}}, "write: content must be a string"),
        ("edit", {"file_path": "a", "old_string": "x"}, "edit: new_string is required"),
        ("edit", {"file_path": "a", "old_string": "x", "new_string": "y", "replace_all": "?"},
         "edit: replace_all must be true or false"),
        ("glob", {}, "glob: pattern is required"),
        ("grep", {"pattern": ["x"]}, "grep: pattern must be a string"),
        ("bash", None, "bash: command is required"),
        ("bash", {"command": ""}, "bash: command is required"),
        ("bash", {"command": 5}, "bash: command must be a string"),
        ("bash", {"command": "a\0b"}, "bash: command must not hold a NUL character"),
        ("bash", {"command": "true", "timeout_ms": "soon"}, "bash: timeout_ms must be a whole number of milliseconds"),
        ("bash", {"command": "true", "timeout_ms": -1}, "bash: timeout_ms must not be negative"),
        ("nope", {}, "there is no tool 'nope' here; there are bash, edit, glob, grep, read, write"),
    ],
)  # fmt: skip
async def test_wrong_input_is_told_in_a_sentence(
    tools: SandboxTools, name: str, given: dict[str, Any] | None, error: str
) -> None:
    result = await tools.call(name, given, call_id="toolu_1")
    assert result.is_error
    assert result.content[0]["text"].startswith(error)


async def test_fields_that_a_tool_does_not_know_are_left_aside(tools: SandboxTools) -> None:
    given = {"file_path": "a", "content": "x", "description": "why not", "line": 3}
    assert not (await tools.call("write", given, call_id="toolu_1")).is_error
    assert parse_input("grep", GrepInput, {"pattern": "x", "path": None, "-n": True}).path is None


async def test_optional_fields_may_be_null(tools: SandboxTools) -> None:
    await tools.call("write", {"file_path": "a", "content": "x"}, call_id="1")
    result = await tools.call("read", {"file_path": "a", "view_range": None}, call_id="2")
    assert result == ToolResult(content=[{"type": "text", "text": "x"}])


class Slow(Sandbox):
    """A sandbox whose programs take long, and that says when one has begun and how it ended."""

    def __init__(self, inner: Sandbox) -> None:
        self._inner, self.id, self.workdir = inner, inner.id, inner.workdir
        self.begun = anyio.Event()
        self.ended = "no"

    async def exec(self, argv: Any, **options: Any) -> Any:
        self.begun.set()
        try:
            result = await self._inner.exec(["/bin/sh", "-c", "sleep 60"], **options)
        except BaseException as exc:
            self.ended = type(exc).__name__
            raise
        return result

    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        raise NotImplementedError

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        raise NotImplementedError

    async def teardown(self) -> None:
        raise NotImplementedError


CALLS = [
    ("read", {"file_path": "a"}),
    ("write", {"file_path": "a", "content": ""}),
    ("edit", {"file_path": "a", "old_string": "a", "new_string": "b"}),
    ("glob", {"pattern": "*"}),
    ("grep", {"pattern": "x"}),
]


@pytest.mark.parametrize(("name", "given"), CALLS)
async def test_interrupted_call_stops_and_says_so(local_sandbox: Sandbox, name: str, given: dict[str, Any]) -> None:
    slow = Slow(local_sandbox)
    tools = SandboxTools(slow, Hands(local_sandbox))
    results = []

    async def call() -> None:
        results.append(await tools.call(name, given, call_id="toolu_1"))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await slow.begun.wait()
            await tools.interrupt("toolu_other")
            assert not results
            await tools.interrupt("toolu_1")
    assert results[0].is_error
    assert results[0].content[0]["text"] == f"{name}: interrupted before it was done"
    assert slow.ended == "CancelledError"


@pytest.mark.parametrize(("name", "given"), CALLS)
async def test_call_is_bounded_in_time(local_sandbox: Sandbox, name: str, given: dict[str, Any]) -> None:
    limits = ToolLimits(file_timeout=0.1, search_timeout=0.1)
    result = await SandboxTools(Slow(local_sandbox), Hands(local_sandbox), limits=limits).call(name, given, call_id="1")
    assert result.is_error
    assert f"{name}: timed out after 0.1s" in result.content[0]["text"]


async def test_lost_sandbox_is_no_fault_of_the_model(local_sandbox: Sandbox, tools: SandboxTools) -> None:
    await local_sandbox.teardown()
    with pytest.raises(SandboxGone):
        await tools.call("read", {"file_path": "a"}, call_id="toolu_1")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"ok",
        b"ok\0",
        b"ok\0a\0b",
        b"ok\0/x\0many\0s\0",
        b"junk\0" * 10,
        b"error\0" + b"x" * 100_000,
        b"\xff\xfe\0",
        b"ok\0/x\0-1\0\0x",
    ],
)
async def test_answer_that_makes_no_sense_is_a_failed_call(local_sandbox: Sandbox, answer: bytes) -> None:
    """The model can put any program where the shell is: what comes back is not to be trusted."""

    class Liar(Slow):
        async def exec(self, argv: Any, **options: Any) -> Any:
            return await self._inner.exec(["/bin/cat"], **{**options, "stdin": answer})

    tools = SandboxTools(Liar(local_sandbox), Hands(local_sandbox))
    for name, given in CALLS:
        result = await tools.call(name, given, call_id="toolu_1")
        assert result.content[0]["type"] == "text"
        assert len(result.content[0]["text"]) < 100_000
    assert (await tools.call("read", {"file_path": "a"}, call_id="toolu_1")).is_error
