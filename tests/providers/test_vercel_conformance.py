"""The conformance kit on ``vercel``: the real SDK, at the emulated API or at Vercel (``--mabridge-live``)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from mabridge.providers.vercel import VercelOptions, VercelProvider
from mabridge.sandbox import Provider
from mabridge.testing.conformance import SandboxConformance
from tests.emulators import machine
from tests.emulators.vercel import VercelEmulator


def options(emulator: VercelEmulator, **more) -> VercelOptions:
    return VercelOptions.model_validate({**emulator.options, **more})


class TestVercel(SandboxConformance):
    page_size = 4
    shortest_ttl = 2.0  # shorter, and it may be over before it is ready where this machine is busy

    @pytest.fixture(scope="class")
    async def emulator(self, anyio_backend: str) -> AsyncIterator[VercelEmulator]:
        machine.require()
        async with VercelEmulator() as emulator:
            emulator.page_size = self.page_size
            yield emulator

    @pytest.fixture(scope="class")
    async def provider(self, emulator: VercelEmulator) -> AsyncIterator[Provider]:
        async with VercelProvider(options(emulator)) as provider:
            yield provider

    @pytest.fixture
    def bad_credentials(self, emulator: VercelEmulator) -> Provider:
        return VercelProvider(options(emulator, token={"env": "VERCEL_EMULATOR_WRONG"}))

    @pytest.fixture
    def missing_image(self, emulator: VercelEmulator) -> Provider:
        return VercelProvider(options(emulator, image="nobody/has-this"))

    @pytest.fixture
    def unreachable(self, emulator: VercelEmulator) -> Provider:
        return VercelProvider(options(emulator, base_url="http://127.0.0.1:9/api"))

    @pytest.fixture
    def no_egress(self, emulator: VercelEmulator) -> Iterator[Provider]:
        emulator.enforce_network = True
        yield VercelProvider(options(emulator, network_policy="deny-all"))
        emulator.enforce_network = False

    @pytest.fixture
    def open_egress(self, emulator: VercelEmulator) -> Iterator[Provider]:
        emulator.enforce_network = True
        yield VercelProvider(options(emulator, network_policy="allow-all"))
        emulator.enforce_network = False

    @pytest.fixture
    async def egress_target(self) -> AsyncIterator[tuple[str, int]]:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        yield server.sockets[0].getsockname()[:2]
        server.close()

    @pytest.fixture
    def break_connections(self, emulator: VercelEmulator) -> Callable[[], Awaitable[None]]:
        async def cut() -> None:
            emulator.refuse_logs = 2  # as often as the SDK tries again
            emulator.cut()

        return cut


@pytest.mark.mabridge_live
class TestVercelLive(SandboxConformance):
    """With the credentials that the SDK finds: ``VERCEL_TOKEN``, ``VERCEL_TEAM_ID`` and ``VERCEL_PROJECT_ID``."""

    page_size = 20
    shortest_ttl = 10.0
    ttl_grace = 60.0
    list_lag = 10.0

    @pytest.fixture(scope="class")
    async def provider(self, anyio_backend: str) -> AsyncIterator[Provider]:
        async with VercelProvider() as provider:
            yield provider

    @pytest.fixture
    def bad_credentials(self, monkeypatch: pytest.MonkeyPatch) -> Provider:
        monkeypatch.setenv("VERCEL_WRONG_TOKEN", "wrong")
        wrong = {"token": {"env": "VERCEL_WRONG_TOKEN"}, "team_id": "team_wrong", "project_id": "prj_wrong"}
        return VercelProvider(VercelOptions.model_validate(wrong))

    @pytest.fixture
    def missing_image(self) -> Provider:
        return VercelProvider(VercelOptions(image="mabridge-has/no-such-image:latest"))

    @pytest.fixture
    def no_egress(self) -> Provider:
        return VercelProvider(VercelOptions(network_policy="deny-all"))

    @pytest.fixture
    def open_egress(self) -> Provider:
        return VercelProvider(VercelOptions(network_policy="allow-all"))
