from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from anthropic import AsyncAnthropic

from mabridge.control_plane.queue import WorkQueue
from mabridge.testing import ControlPlane, Environment


@pytest.fixture
async def plane() -> AsyncIterator[ControlPlane]:
    async with ControlPlane(lease_ttl=2.0) as plane:
        yield plane


@pytest.fixture
def environment(plane: ControlPlane) -> Environment:
    return plane.create_environment()


@pytest.fixture
async def client(plane: ControlPlane) -> AsyncIterator[AsyncAnthropic]:
    # Its credential must never be sent: the platform would answer differently, and the records would show it.
    async with AsyncAnthropic(base_url=plane.url, api_key=plane.api_key) as client:
        yield client


@pytest.fixture
def queue(client: AsyncAnthropic, environment: Environment) -> WorkQueue:
    return WorkQueue(client, environment_id=environment.id, environment_key=environment.key, worker_id="w1")


async def no_brain(agent: object) -> None:
    """An agent that does nothing."""
