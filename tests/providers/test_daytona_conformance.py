"""The daytona provider keeps the contract: on the emulator, and with credentials on the service itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import ClassVar

import pytest

from mabridge.providers.daytona import DaytonaOptions, DaytonaProvider
from mabridge.sandbox import EnvVar
from mabridge.testing import SandboxConformance
from tests.emulators import machine
from tests.emulators.daytona import KEY, DaytonaEmulator


class Emulated(SandboxConformance):
    __test__ = False

    page_size = 3
    list_lag = 2.0
    shell: ClassVar[str]

    @pytest.fixture(scope="class")
    async def emulator(self, anyio_backend: str) -> AsyncIterator[DaytonaEmulator]:
        machine.require()
        async with DaytonaEmulator() as emulator:
            emulator.page, emulator.minute, emulator.list_lag, emulator.shell = 3, 2.5, 0.6, self.shell
            yield emulator

    @pytest.fixture(scope="class")
    async def provider(self, emulator: DaytonaEmulator) -> AsyncIterator[DaytonaProvider]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DAYTONA_API_KEY", KEY)
            async with DaytonaProvider(DaytonaOptions(api_url=emulator.url)) as provider:
                yield provider

    @pytest.fixture
    def bad_credentials(self, emulator: DaytonaEmulator, monkeypatch: pytest.MonkeyPatch) -> DaytonaProvider:
        monkeypatch.setenv("WRONG_KEY", "dtn_wrong")
        return DaytonaProvider(DaytonaOptions(api_url=emulator.url, api_key=EnvVar(env="WRONG_KEY")))

    @pytest.fixture
    def missing_image(self, emulator: DaytonaEmulator) -> DaytonaProvider:
        return DaytonaProvider(DaytonaOptions(api_url=emulator.url, snapshot="missing"))

    @pytest.fixture
    def unreachable(self) -> DaytonaProvider:
        return DaytonaProvider(DaytonaOptions(api_url="http://127.0.0.1:9/api"))

    @pytest.fixture
    def break_connections(self, emulator: DaytonaEmulator) -> Callable[[], Awaitable[None]]:
        return emulator.break_connections


class TestEmulated(Emulated):
    shell = "/bin/bash"


@pytest.mark.mabridge_live
class TestLive(SandboxConformance):
    """With ``DAYTONA_API_KEY`` set."""

    page_size = 100
    shortest_ttl = 60.0
    ttl_grace = 180.0
    list_lag = 30.0

    @pytest.fixture(scope="class")
    async def provider(self) -> AsyncIterator[DaytonaProvider]:
        async with DaytonaProvider(DaytonaOptions()) as provider:
            yield provider

    @pytest.fixture
    def bad_credentials(self, monkeypatch: pytest.MonkeyPatch) -> DaytonaProvider:
        monkeypatch.setenv("WRONG_KEY", "dtn_wrong")
        return DaytonaProvider(DaytonaOptions(api_key=EnvVar(env="WRONG_KEY")))

    @pytest.fixture
    def missing_image(self) -> DaytonaProvider:
        return DaytonaProvider(DaytonaOptions(snapshot="no-such-snapshot"))

    @pytest.fixture
    def unreachable(self) -> DaytonaProvider:
        return DaytonaProvider(DaytonaOptions(api_url="http://127.0.0.1:9/api"))

    @pytest.fixture
    def no_egress(self) -> DaytonaProvider:
        return DaytonaProvider(DaytonaOptions(network_block_all=True))

    @pytest.fixture
    def open_egress(self) -> DaytonaProvider:
        return DaytonaProvider(DaytonaOptions())
