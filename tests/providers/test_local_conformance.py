"""The local provider keeps the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from mabridge.providers.local import LocalOptions, LocalProvider
from mabridge.testing import SandboxConformance


class TestLocal(SandboxConformance):
    @pytest.fixture(scope="class")
    async def provider(self, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalProvider]:
        async with LocalProvider(LocalOptions(root=tmp_path_factory.mktemp("local") / "sandboxes")) as provider:
            yield provider
