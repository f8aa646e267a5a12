"""The provider keeps the contract of mabridge."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from mabridge_bubblewrap import BubblewrapOptions, BubblewrapProvider

from mabridge.testing import SandboxConformance
from mabridge.testing.conformance import living, new_spec, wait_for_file

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

WORKER = """
import os, signal, sys
from pathlib import Path
import anyio
from mabridge import SandboxSpec
from mabridge_bubblewrap import BubblewrapOptions, BubblewrapProvider

async def main():
    async with BubblewrapProvider(BubblewrapOptions(root=Path(sys.argv[1]))) as provider:
        sandbox = await provider.create(SandboxSpec(key=sys.argv[2]))
        await sandbox.write_file("mark", b"kept")
        await sandbox.exec(["sh", "-c", "sleep 600 & echo $! > pid"], timeout=60, max_output=1000)
        os.kill(os.getpid(), signal.SIGKILL)

anyio.run(main)
"""


class TestBubblewrap(SandboxConformance):
    page_size = 9  # directories are listed all at once

    @pytest.fixture(scope="class")
    async def provider(self, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[BubblewrapProvider]:
        async with BubblewrapProvider(BubblewrapOptions(root=tmp_path_factory.mktemp("bwrap"))) as provider:
            yield provider

    async def test_sandbox_outlives_a_worker_that_was_killed(self, provider: BubblewrapProvider) -> None:
        spec = new_spec()
        program = [sys.executable, "-c", WORKER, str(provider.options.root), spec.key]
        worker = subprocess.run(program, check=False)  # noqa: ASYNC221 - nothing else is to run meanwhile
        assert worker.returncode == -signal.SIGKILL
        sandbox = await provider.attach(spec.key)
        assert sandbox is not None
        try:
            assert await sandbox.read_file("mark", max_bytes=100) == b"kept"
            assert await living(sandbox, await wait_for_file(sandbox, "pid")) != []
        finally:
            await sandbox.teardown()

    @pytest.fixture
    def no_egress(self, tmp_path: Path) -> BubblewrapProvider:
        return BubblewrapProvider(BubblewrapOptions(root=tmp_path))

    @pytest.fixture
    def open_egress(self, tmp_path: Path) -> BubblewrapProvider:
        return BubblewrapProvider(BubblewrapOptions(root=tmp_path, share_net=True))

    @pytest.fixture
    def egress_target(self) -> Iterator[tuple[str, int]]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield server.getsockname()
