"""The docker provider keeps the contract: with the least there can be in an image, and with a usual one."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar

import aiodocker
import pytest

from mabridge.providers.docker import DockerOptions, DockerProvider
from mabridge.testing import SandboxConformance
from tests import images


class DockerConformance(SandboxConformance):
    __test__ = False
    pytestmark = pytest.mark.docker

    base: ClassVar[str]
    page_size = 3  # the engine lists all at once, and a hundred and fifty containers take their time

    @pytest.fixture(scope="class")
    async def provider(self, image: Callable[[str], str]) -> AsyncIterator[DockerProvider]:
        options = DockerOptions(image=image(self.base), pull="never", cpus=2)
        async with DockerProvider(options) as provider:
            yield provider

    @pytest.fixture
    def no_egress(self, image: Callable[[str], str]) -> DockerProvider:
        return DockerProvider(DockerOptions(image=image(self.base), pull="never"))

    @pytest.fixture
    def open_egress(self, image: Callable[[str], str], network: str) -> DockerProvider:
        return DockerProvider(DockerOptions(image=image(self.base), pull="never", network=network))

    @pytest.fixture
    async def network(self) -> AsyncIterator[str]:
        name = f"mabridge-test-{os.urandom(6).hex()}"
        async with aiodocker.Docker() as engine:
            network = await engine.networks.create({"Name": name, "Labels": {"mabridge-test": ""}})
            yield name
            await network.delete()

    @pytest.fixture
    async def egress_target(self, image: Callable[[str], str], network: str) -> AsyncIterator[tuple[str, int]]:
        """A container beside the sandbox."""
        config = {
            "Image": image(images.BUSYBOX),
            "Cmd": ["httpd", "-f", "-p", "8080"],
            "Labels": {"mabridge-test": ""},
            "HostConfig": {"NetworkMode": network, "AutoRemove": True},
        }
        async with aiodocker.Docker() as engine:
            server = await engine.containers.run(config)
            networks = (await server.show())["NetworkSettings"]["Networks"]
            address = networks[network]["IPAddress"]
            try:
                await self._reach(engine, config, address)
                yield address, 8080
            finally:
                await server.delete(force=True)

    async def _reach(self, engine: aiodocker.Docker, config: dict[str, Any], address: str) -> None:
        """Skip the test where this engine's networks connect nothing: it may have been started without iptables."""
        looks = f"for i in 1 2 3 4 5; do nc -w 2 {address} 8080 < /dev/null && exit; sleep 1; done; exit 1"
        host = {**config["HostConfig"], "AutoRemove": False}
        client = await engine.containers.run({**config, "Cmd": ["sh", "-c", looks], "HostConfig": host})
        ended = await client.wait()
        await client.delete(force=True)
        if ended["StatusCode"] != 0:
            pytest.skip("not tried: no container reaches another over a network of this engine's")

    @pytest.fixture
    def missing_image(self) -> DockerProvider:
        return DockerProvider(DockerOptions(image="localhost:9/no-such-image:1"))

    @pytest.fixture
    def unreachable(self) -> DockerProvider:
        return DockerProvider(DockerOptions(host="tcp://127.0.0.1:9"))


class TestBusybox(DockerConformance):
    base = images.BUSYBOX


class TestDebian(DockerConformance):
    base = images.DEBIAN
