"""The `modal` provider on an emulated Modal."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from mabridge.providers.modal import ModalOptions, ModalProvider
from mabridge.sandbox import EnvVar, Provider
from mabridge.testing import SandboxConformance
from tests.emulators.modal import Emulator, emulated

TOKEN = {"token_id": EnvVar(env="MODAL_TOKEN_ID"), "token_secret": EnvVar(env="MODAL_TOKEN_SECRET")}


@pytest.fixture(scope="class")
async def emulator(anyio_backend: str) -> AsyncIterator[Emulator]:
    async with emulated() as emulator:
        yield emulator


def options(emulator: Emulator, **more) -> ModalOptions:
    return ModalOptions(**{"image": emulator.image_id, **TOKEN, **more})


class TestModal(SandboxConformance):
    page_size = Emulator.page_size

    @pytest.fixture(scope="class")
    async def provider(self, emulator: Emulator) -> AsyncIterator[Provider]:
        async with ModalProvider(options(emulator)) as provider:
            yield provider

    @pytest.fixture
    def bad_credentials(self, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Provider:
        monkeypatch.setenv("WRONG", "as-wrong")
        return ModalProvider(options(emulator, token_secret=EnvVar(env="WRONG")))

    @pytest.fixture
    def missing_image(self, emulator: Emulator) -> Provider:
        return ModalProvider(options(emulator, image="example.com/missing:1"))

    @pytest.fixture
    def unreachable(self, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Provider:
        monkeypatch.setenv("MODAL_SERVER_URL", "http://127.0.0.1:9")
        return ModalProvider(options(emulator, connect_timeout=1))


@pytest.mark.mabridge_live
class TestModalLive(SandboxConformance):
    """With the credentials that the SDK finds, such as ``MODAL_TOKEN_ID`` and ``MODAL_TOKEN_SECRET``."""

    page_size = 10
    shortest_ttl = 60.0
    ttl_grace = 60.0

    @pytest.fixture(scope="class")
    async def provider(self, anyio_backend: str) -> AsyncIterator[Provider]:
        async with ModalProvider(ModalOptions(app="mabridge-conformance")) as provider:
            yield provider

    @pytest.fixture
    def bad_credentials(self, monkeypatch: pytest.MonkeyPatch) -> Provider:
        monkeypatch.setenv("WRONG_ID", "ak-wrong")
        monkeypatch.setenv("WRONG", "as-wrong")
        return ModalProvider(ModalOptions(token_id=EnvVar(env="WRONG_ID"), token_secret=EnvVar(env="WRONG")))

    @pytest.fixture
    def missing_image(self) -> Provider:
        return ModalProvider(ModalOptions(app="mabridge-conformance", image="mabridge/there-is-no-such-image:1"))

    @pytest.fixture
    def no_egress(self) -> Provider:
        return ModalProvider(ModalOptions(app="mabridge-conformance", block_network=True))

    @pytest.fixture
    def open_egress(self) -> Provider:
        return ModalProvider(ModalOptions(app="mabridge-conformance"))
