"""What changes a file is done once for the id of its call, whoever asks and however often."""

from __future__ import annotations

import pytest

from mabridge import Sandbox
from mabridge.hands import Hands
from mabridge.tools import SandboxTools

pytestmark = pytest.mark.anyio


async def called(sandbox: Sandbox, name: str, call_id: str, **given: str) -> tuple[bool, str]:
    """Call a tool as a worker does that knows of no earlier one."""
    async with Hands(sandbox) as hands:
        result = await SandboxTools(sandbox, hands).call(name, given, call_id=call_id)
    return result.is_error, result.content[0]["text"]


async def content(sandbox: Sandbox, path: str = "file") -> bytes:
    return await sandbox.read_file(path, max_bytes=1000)


async def test_edit_that_another_worker_has_done_is_not_done_again(sandbox: Sandbox) -> None:
    await sandbox.write_file("file", b"end\n")
    for _ in range(2):
        said = await called(sandbox, "edit", "call_1", file_path="file", old_string="end", new_string="more\nend")
        assert said == (False, "edited file (1 replacement(s))")
    assert await content(sandbox) == b"more\nend\n"
    await called(sandbox, "edit", "call_2", file_path="file", old_string="end", new_string="more\nend")
    assert await content(sandbox) == b"more\nmore\nend\n"


async def test_write_that_another_worker_has_done_does_not_undo_what_came_after(sandbox: Sandbox) -> None:
    assert await called(sandbox, "write", "call_1", file_path="file", content="first") == (
        False,
        "wrote 5 bytes to file",
    )
    await sandbox.write_file("file", b"later")
    assert await called(sandbox, "write", "call_1", file_path="file", content="first") == (
        False,
        "wrote 5 bytes to file",
    )
    assert await content(sandbox) == b"later"


async def test_edit_that_failed_is_tried_again(sandbox: Sandbox) -> None:
    await sandbox.write_file("file", b"one")
    failed, _ = await called(sandbox, "edit", "call_1", file_path="file", old_string="two", new_string="three")
    assert failed
    await sandbox.write_file("file", b"two")
    assert await called(sandbox, "edit", "call_1", file_path="file", old_string="two", new_string="three") == (
        False,
        "edited file (1 replacement(s))",
    )
    assert await content(sandbox) == b"three"


async def test_files_are_written_though_the_journal_was_removed(sandbox: Sandbox) -> None:
    async with Hands(sandbox) as hands:
        tools = SandboxTools(sandbox, hands)
        await sandbox.exec(["rm", "-rf", hands.directory], timeout=20, max_output=1000)
        result = await tools.call("write", {"file_path": "file", "content": "x"}, call_id="call_1")
    assert not result.is_error
    assert await content(sandbox) == b"x"
