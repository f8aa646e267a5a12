"""The kit against a provider of the user's own configuration: what ``mabridge check --conformance`` runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from mabridge.sandbox import Provider
from mabridge.testing.conformance.kit import SandboxConformance
from mabridge.testing.conformance.wrong import with_missing_image, with_wrong_credentials

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
        run = _run(request)
        async with run.make(run.config) as provider:
            yield provider

    @pytest.fixture
    def bad_credentials(
        self, provider: Provider, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> Provider:
        """The same with other credentials of the same form."""
        run = _run(request)
        wrong = with_wrong_credentials(provider, run.config)
        if wrong is None:
            pytest.skip("not tried: it has no credentials among its options")
        config, held = wrong
        for variable, value in held.items():
            monkeypatch.setenv(variable, value)
        made: Provider = run.make(config)
        return made

    @pytest.fixture
    def missing_image(self, provider: Provider, request: pytest.FixtureRequest) -> Provider:
        """The same with an image that does not exist."""
        run = _run(request)
        wrong = with_missing_image(provider, run.config)
        if wrong is None:
            pytest.skip("not tried: it has no image, template or snapshot among its options")
        made: Provider = run.make(wrong)
        return made


def _run(request: pytest.FixtureRequest) -> Any:  # noqa: ANN401 - its module needs more than the kit does
    return request.config.pluginmanager.get_plugin("mabridge-check")
