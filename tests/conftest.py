"""Fixtures and rules for the whole suite."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Generator
from pathlib import Path

import pytest

from mabridge.providers.local import LocalOptions, LocalProvider
from mabridge.sandbox import Sandbox, SandboxSpec


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CI set, a test that needs Docker must run: a skip there would be a hole nobody sees."""
    report = yield
    if (
        report.skipped
        and not hasattr(report, "wasxfail")
        and os.environ.get("CI")
        and item.get_closest_marker("docker")
    ):
        report.outcome = "failed"
        report.longrepr = f"skipped with CI set, where Docker must be there: {report.longrepr}"
    return report


@pytest.fixture
async def local_provider(tmp_path: Path) -> AsyncIterator[LocalProvider]:
    async with LocalProvider(LocalOptions(root=tmp_path / "sandboxes")) as provider:
        yield provider


@pytest.fixture
async def local_sandbox(local_provider: LocalProvider) -> AsyncIterator[Sandbox]:
    sandbox = await local_provider.create(SandboxSpec(key="mab" + "a" * 24))
    yield sandbox
    await sandbox.teardown()
