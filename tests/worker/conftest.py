"""A worker on the local platform, with the real providers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anthropic import AsyncAnthropic

from mabridge import Event, Provider, ProviderConfig, SandboxError, Worker
from mabridge.identity import ENVIRONMENT_LABEL
from mabridge.plugins import make_provider
from mabridge.testing import ControlPlane, Environment
from tests.images import BUSYBOX

Serve = Callable[..., AbstractAsyncContextManager["Watched"]]


class Watched:
    """A running worker, and what it told of its work."""

    def __init__(self) -> None:
        self.worker: Worker
        self.events: list[Event] = []
        self._changed = anyio.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self._changed.set()

    def named(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]

    async def until(self, name: str, count: int = 1, *, timeout: float = 60.0) -> Event:
        """Wait until `count` events of that name have come; return the last of them."""
        with anyio.fail_after(timeout):
            while len(self.named(name)) < count:
                self._changed = anyio.Event()
                await self._changed.wait()
        return self.named(name)[count - 1]


@pytest.fixture
async def plane() -> AsyncIterator[ControlPlane]:
    async with ControlPlane() as plane:
        yield plane


@pytest.fixture
def environment(plane: ControlPlane) -> Environment:
    return plane.create_environment()


@pytest.fixture
def local(tmp_path: Path) -> ProviderConfig:
    return ProviderConfig(type="local", options={"root": str(tmp_path / "sandboxes")}, when_done="teardown")


@pytest.fixture(params=["local", pytest.param("docker", marks=pytest.mark.docker)])
def provider(request: pytest.FixtureRequest, local: ProviderConfig, image: Callable[[str], str]) -> ProviderConfig:
    """Each of the two providers, for what the whole way has to show."""
    if request.param == "local":
        return local
    return ProviderConfig(type="docker", options={"image": image(BUSYBOX)}, when_done="teardown")


@pytest.fixture
def serve(environment: Environment, local: ProviderConfig) -> Serve:
    """Run a worker: ``async with serve({"docker": ProviderConfig(...)}, max_idle=0.1) as watched``."""
    usual = environment

    @asynccontextmanager
    async def serve(
        providers: dict[str, Provider | ProviderConfig] | None = None,
        *,
        environment: Environment = usual,
        clean_up: bool = True,
        **options: Any,
    ) -> AsyncIterator[Watched]:
        watched = Watched()
        async with AsyncAnthropic(base_url=environment.plane.url, api_key="unused") as client:
            watched.worker = Worker(
                client,
                environment_id=environment.id,
                environment_key=environment.key,
                providers=providers or {"local": local},
                observers=[watched],
                **{"max_idle": 0.2, **options},
            )
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(watched.worker.run)
                    yield watched
                    tasks.cancel_scope.cancel()
            finally:
                # A worker that is cancelled leaves its sandboxes to the next one.
                for config in (providers or {"local": local}).values() if clean_up else ():
                    await remove_sandboxes(config, environment)

    return serve


async def remove_sandboxes(config: Provider | ProviderConfig, environment: Environment) -> None:
    """Remove the sandboxes of an environment's sessions, if the provider can be asked at all."""
    assert isinstance(config, ProviderConfig)
    with anyio.CancelScope(shield=True), anyio.move_on_after(30), contextlib.suppress(SandboxError):
        async with make_provider(config, "cleanup") as provider:
            infos = [info async for info in provider.list()]
            for info in infos:
                if info.labels.get(ENVIRONMENT_LABEL) == environment.id:
                    sandbox = await provider.attach(info.key)
                    if sandbox is not None:
                        await sandbox.teardown()
