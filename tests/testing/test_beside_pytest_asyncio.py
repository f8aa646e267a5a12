"""The kit in a project whose own tests are run by pytest-asyncio, in either of its modes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MODULE = '''
import asyncio
import pytest
from mabridge.providers.local import LocalOptions, LocalProvider
from mabridge.testing import SandboxConformance


class Bound(LocalProvider):
    """As one that holds connections open: of use on one event loop only."""

    async def __aenter__(self):
        self.loop = asyncio.get_running_loop()
        return self

    async def create(self, spec):
        assert asyncio.get_running_loop() is self.loop
        return await super().create(spec)


class TestLocal(SandboxConformance):
    @pytest.fixture(scope="class")
    async def provider(self, anyio_backend, tmp_path_factory):
        async with Bound(LocalOptions(root=tmp_path_factory.mktemp("root"))) as provider:
            yield provider


@pytest.mark.asyncio
async def test_of_the_projects_own():
    await asyncio.sleep(0)
'''
SOME = "of_the_projects_own or what_was_written_is_read or arguments_pass_exactly or removed_sandbox_is_gone_for"


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_kit_and_the_projects_own_tests_run_together(tmp_path: Path, mode: str) -> None:
    (tmp_path / "test_local.py").write_text(MODULE)
    (tmp_path / "pytest.ini").write_text(
        f"[pytest]\nasyncio_mode = {mode}\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SOME]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout
