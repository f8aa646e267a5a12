"""How often an idle worker asks, and how soon it hears."""

from __future__ import annotations

import itertools

import anyio
import pytest

from mabridge.testing import Agent, ControlPlane, Environment
from tests.worker.conftest import Serve

pytestmark = pytest.mark.anyio


async def nothing(agent: Agent) -> None:
    await agent.say("nothing to do")


async def test_idle_worker_polls_once_a_second_at_most(plane: ControlPlane, serve: Serve):
    async with serve():
        await anyio.sleep(5.0)  # what is counted is polls in a stretch of time
        polls = [record.at for record in plane.requests if record.path.endswith("/poll")]
    assert 4 <= len(polls) <= 6
    assert all(later - earlier >= 0.95 for earlier, later in itertools.pairwise(polls))


async def test_busy_worker_asks_again_at_once(plane: ControlPlane, environment: Environment, serve: Serve):
    for _ in range(5):
        environment.create_session(nothing, message="go")
    async with serve() as watched:
        await watched.until("session.claimed", 5)
    polls = [record.at for record in plane.requests if record.path.endswith("/poll")][:5]
    assert polls[-1] - polls[0] < 1.0
