"""Two workers that meet at one sandbox: the one that lost its lease takes nothing away from the one that has it now."""

from __future__ import annotations

import logging
from pathlib import Path

import anyio
import pytest

from mabridge import Provider, Sandbox, SandboxSpec
from mabridge.identity import sandbox_key
from mabridge.named_provider import NamedProvider
from mabridge.observe import Observers
from mabridge.providers.local import LocalOptions, LocalProvider
from mabridge.sandboxes import Sandboxes
from mabridge.testing import Agent, ControlPlane, Environment
from tests.worker.conftest import Serve

pytestmark = pytest.mark.anyio


class Vanishing(LocalProvider):
    """Its first sandbox is gone by the time that it is used: another worker has just removed it."""

    vanished = False

    async def create(self, spec: SandboxSpec) -> Sandbox:
        sandbox = await super().create(spec)
        if not self.vanished:
            self.vanished = True
            await sandbox.teardown()
        return sandbox


async def test_sandbox_that_vanished_before_it_was_used_is_made_anew(
    environment: Environment, serve: Serve, tmp_path: Path
):
    async def brain(agent: Agent) -> None:
        reply = await agent.call("bash", {"command": "echo here"})
        assert (reply.is_error, reply.text) == (False, "here")

    provider = Vanishing(LocalOptions(root=tmp_path / "sandboxes"))
    async with serve({"p": provider}, clean_up=False) as watched:
        session = environment.create_session(brain, message="go")
        await session.wait_idle()
    assert len(watched.named("sandbox.created")) == 2


class Slow(LocalProvider):
    """Takes its time, and cleans up when it is cut off."""

    def __init__(self, root: Path) -> None:
        super().__init__(LocalOptions(root=root))
        self.making, self.go_on = anyio.Event(), anyio.Event()

    async def create(self, spec: SandboxSpec) -> Sandbox:
        sandbox = await super().create(spec)
        self.making.set()
        try:
            await self.go_on.wait()
        except anyio.get_cancelled_exc_class():
            await sandbox.teardown()
            raise
        return sandbox


@pytest.mark.parametrize("in_time", [True, False])
async def test_sandbox_that_is_being_made_when_the_lease_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_time: bool
):
    monkeypatch.setattr("mabridge.sandboxes._CREATE_GRACE", 20.0 if in_time else 0.05)
    provider = Slow(tmp_path / "sandboxes")

    async def never() -> bool:
        return False

    async with provider:
        named: dict[str, NamedProvider] = {"p": NamedProvider(name="p", provider=provider)}
        made = Sandboxes(named, environment_id="env_1", workdir="/workspace", observers=Observers())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: made.obtain("sesn_1", ["p"], lived_before=never))
            await provider.making.wait()
            tasks.cancel_scope.cancel()
            if in_time:
                provider.go_on.set()
        left = await attached(provider)
        assert (left is not None) is in_time
        if left is not None:
            await left.teardown()


async def test_worker_that_is_offered_its_own_session_again_and_again_serves_it_once(
    plane: ControlPlane,
    environment: Environment,
    serve: Serve,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    provider = Slow(tmp_path / "sandboxes")

    async def brain(agent: Agent) -> None:
        agent.session.reply = await agent.call("bash", {"command": "echo ran >> log; cat log"})

    async with serve({"p": provider}, clean_up=False) as watched:
        session = environment.create_session(brain, message="go")
        await provider.making.wait()
        item = environment.queue.get(session.id)
        # The first run cannot end before its sandbox is made, so both of these wait for it.
        for deliveries in (2, 3):
            environment.queue.lapse(session.id)
            await plane.wait_until(lambda wanted=deliveries: item.deliveries == wanted, timeout=30)
        assert len(watched.named("session.claimed")) == 1
        provider.go_on.set()
        await session.wait_idle()
        await watched.until("session.released")
        assert watched.worker.sessions == ()
    assert session.reply.text == "ran"
    assert len(session.results(session.calls[0].id).accepted) == 1
    assert [event.name for event in watched.events if event.name in ("session.claimed", "session.lost")] == [
        "session.claimed",
        "session.lost",
        "session.lost",  # the one that waited first: it gave way before it had claimed
        "session.claimed",
    ]
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def attached(provider: Provider) -> Sandbox | None:
    return await provider.attach(sandbox_key("env_1", "sesn_1"))
