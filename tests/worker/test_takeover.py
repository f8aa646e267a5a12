"""Two workers that meet at one sandbox: the one that lost its lease takes nothing away from the one that has it now."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from mabridge import Provider, Sandbox, SandboxSpec
from mabridge.identity import sandbox_key
from mabridge.observe import Observers
from mabridge.providers.local import LocalOptions, LocalProvider
from mabridge.sandboxes import NamedProvider, Sandboxes
from mabridge.testing import Agent, Environment
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


async def attached(provider: Provider) -> Sandbox | None:
    return await provider.attach(sandbox_key("env_1", "sesn_1"))
