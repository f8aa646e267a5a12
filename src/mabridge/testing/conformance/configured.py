"""The kit against a provider of the user's own configuration: what ``mabridge check --conformance`` runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from mabridge.sandbox import Provider
from mabridge.testing.conformance.kit import SandboxConformance

__all__ = ["TestConfigured"]


class TestConfigured(SandboxConformance):
    """What the author of a provider knows of it, and its user need not, is set to what suits every provider."""

    page_size = 9  # sandboxes that somebody pays for
    shortest_ttl = 60.0
    ttl_grace = 120.0
    list_lag = 30.0

    @pytest.fixture(scope="class")
    async def provider(self, anyio_backend: str, request: pytest.FixtureRequest) -> AsyncIterator[Provider]:
        """The provider that is to be tested, entered."""
        run: Any = request.config.pluginmanager.get_plugin("mabridge-check")
        async with run.make() as provider:
            yield provider
