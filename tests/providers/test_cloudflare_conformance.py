"""The cloudflare provider keeps the contract, over the vendor's own bridge and our Worker."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from mabridge.providers.cloudflare import CloudflareOptions, CloudflareProvider
from mabridge.sandbox import EnvVar
from mabridge.testing import SandboxConformance
from tests.emulators.cloudflare import BridgeInPython, CloudflareEmulator, new_bridge

Emulator = CloudflareEmulator | BridgeInPython
KEY = "MABRIDGE_TEST_CLOUDFLARE_KEY"


@pytest.fixture(scope="module")
async def emulator(anyio_backend: str) -> AsyncIterator[Emulator]:
    async with new_bridge() as emulator:
        yield emulator


@pytest.fixture(scope="module")
def options(emulator: Emulator) -> Iterator[CloudflareOptions]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY, emulator.api_key)
        yield CloudflareOptions(worker_url=emulator.url, api_key=EnvVar(env=KEY))


class CloudflareConformance(SandboxConformance):
    __test__ = False

    page_size = 20  # of the Worker
    ttl_grace = 30.0  # its alarm comes every ten seconds


class TestCloudflare(CloudflareConformance):
    @pytest.fixture(scope="class")
    async def provider(self, anyio_backend: str, options: CloudflareOptions) -> AsyncIterator[CloudflareProvider]:
        async with CloudflareProvider(options) as provider:
            yield provider

    @pytest.fixture
    def bad_credentials(self, options: CloudflareOptions, monkeypatch: pytest.MonkeyPatch) -> CloudflareProvider:
        monkeypatch.setenv(f"{KEY}_WRONG", "not-the-key")
        return CloudflareProvider(options.model_copy(update={"api_key": EnvVar(env=f"{KEY}_WRONG")}))

    @pytest.fixture
    def unreachable(self, options: CloudflareOptions) -> CloudflareProvider:
        return CloudflareProvider(options.model_copy(update={"worker_url": "http://127.0.0.1:9"}))

    @pytest.fixture
    def break_connections(self, emulator: Emulator) -> Callable[[], Awaitable[None]]:
        return emulator.cut


@pytest.mark.mabridge_live
class TestLive(CloudflareConformance):
    """The Worker of ``examples/cloudflare``, at ``CLOUDFLARE_SANDBOX_WORKER_URL``."""

    @pytest.fixture(scope="class")
    async def provider(self, anyio_backend: str) -> AsyncIterator[CloudflareProvider]:
        options = CloudflareOptions(worker_url=os.environ["CLOUDFLARE_SANDBOX_WORKER_URL"])
        async with CloudflareProvider(options) as provider:
            yield provider
