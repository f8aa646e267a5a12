"""The tools in containers of two kinds, the least and a usual one: they say there what they say on this machine.

Nothing is root in them, so this is also where permissions are tried.
"""

from __future__ import annotations

import base64
import io
import os
import tarfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from mabridge.providers.docker import DockerOptions, DockerProvider
from mabridge.providers.local import LocalOptions, LocalProvider
from mabridge.sandbox import SandboxSpec
from mabridge.tools import ToolLimits
from tests import images
from tests.tools.conftest import Place
from tests.tools.test_differential import CALLS, a_tree

pytestmark = [pytest.mark.anyio, pytest.mark.docker]


@pytest.fixture(scope="module", params=["busybox", "debian"])
async def container(request: pytest.FixtureRequest, image: Callable[[str], str]) -> AsyncIterator[Place]:
    name = image(images.BUSYBOX if request.param == "busybox" else images.DEBIAN)
    key = "mab" + base64.b32encode(os.urandom(15)).decode().lower()
    async with DockerProvider(DockerOptions(image=name, pull="never", cpus=2)) as provider:
        sandbox = await provider.create(SandboxSpec(key=key, ttl=900))
        yield Place(sandbox, ToolLimits())
        await sandbox.teardown()


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Place]:
    async with LocalProvider(LocalOptions(root=tmp_path / "sandboxes")) as provider:
        sandbox = await provider.create(SandboxSpec(key="mab" + "a" * 24))
        yield Place(sandbox, ToolLimits())
        await sandbox.teardown()


async def test_calls_say_in_a_container_what_they_say_here(container: Place, here: Place, tmp_path: Path) -> None:
    """The same calls one after the other in both, so that what they write is compared as well."""
    a_tree(tmp_path / "tree")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(tmp_path / "tree", arcname=".")
    for place in (container, here):
        await place.sh("rm -rf ./* ./.[!.]*; tar -xof -", stdin=buffer.getvalue())
    wrong = []
    for name, given in CALLS[::5]:
        if given.get("pattern") == "":
            continue  # it finds all there is, and where that is cut depends on the length of the paths
        expected, found = await here.call(name, **given), await container.call(name, **given)
        if expected.content[0]["type"] == "text":
            said = [sorted(place.text(result).split("\n")) for place, result in ((here, expected), (container, found))]
        else:
            said = [expected.content, found.content]
        if said[0] != said[1] or expected.is_error is not found.is_error:
            wrong.append((name, given, *said))
    assert not wrong, "\n".join(str(case)[:600] for case in wrong)


async def test_what_is_not_permitted_is_said(container: Place) -> None:
    await container.sh(
        "rm -rf ./* ./.[!.]*; echo foo >secret; echo foo >fixed; mkdir closed shut; echo foo >closed/in;"
        "echo foo >shut/in; chmod 000 secret closed; chmod 444 fixed; chmod 555 shut"
    )
    try:
        denied = "permission denied"
        assert await container.refused("read", file_path="secret") == f"read: secret: {denied}"
        assert await container.refused("read", file_path="closed/in") == f"read: path 'closed/in': {denied}"
        assert await container.refused("grep", pattern="foo", path="secret") == f"grep: secret: {denied}"
        for name in ("fixed", "shut/new", "shut/deep/new"):
            assert await container.refused("write", file_path=name, content="x") == f"write: {name}: {denied}"
        # One that may be written, in a directory that may not.
        assert await container.said("write", file_path="shut/in", content="new") == "wrote 3 bytes to shut/in"
        assert await container.sh("cat shut/in fixed") == b"newfoo\n"
        assert await container.said("grep", pattern="foo|new") == "WD/fixed:1:foo\nWD/shut/in:1:new"
        listed = await container.said("glob", pattern="*")
        assert sorted(listed.split("\n")) == ["WD/closed", "WD/fixed", "WD/secret", "WD/shut"]
    finally:
        await container.sh("chmod 700 closed shut")
