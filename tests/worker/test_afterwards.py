"""What becomes of a sandbox when its session has come to rest, and how the session finds it again."""

from __future__ import annotations

import os
import time
from pathlib import Path

import anyio
import pytest

from mabridge import ConfigError, Sandbox, SandboxSpec, SandboxUnavailable, sandbox_key
from mabridge.named_provider import NamedProvider
from mabridge.providers.local import LocalSandbox
from mabridge.testing import Agent, Environment
from tests.worker.conftest import Serve
from tests.worker.places import Place, Sleeper

pytestmark = pytest.mark.anyio


async def brain(agent: Agent) -> None:
    command = "echo kept > file" if agent.text == "go" else "cat file"
    agent.session.reply = await agent.call("bash", {"command": command})


@pytest.mark.parametrize("when_done", ["keep", "suspend"])
async def test_session_finds_its_sandbox_again_at_another_worker(
    environment: Environment, serve: Serve, tmp_path: Path, when_done: str
):
    async def one_message(text: str, event: str) -> None:
        named = NamedProvider(name="", provider=Sleeper(tmp_path / "root"), when_done=when_done)
        async with serve({"s": named}, clean_up=False) as watched:
            session.send_message(text)
            await watched.until(event)
            await session.wait_idle()
            released = await watched.until("session.released")
            assert released.reason == "idle"
            assert bool(watched.named("sandbox.suspended")) == (when_done == "suspend")

    session = environment.create_session(brain)
    suspended = tmp_path / "root" / sandbox_key(environment.id, session.id) / "suspended"
    await one_message("go", "sandbox.created")
    assert suspended.exists() == (when_done == "suspend")
    await one_message("again", "sandbox.attached")
    assert session.reply.text == "kept"


def test_sandbox_that_cannot_be_suspended_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"s: when_done: .*place cannot suspend"):
        NamedProvider(name="s", provider=Place(tmp_path / "root"), when_done="suspend")


async def test_kept_sandbox_lives_for_as_long_as_idle_ttl_says(environment: Environment, serve: Serve, tmp_path: Path):
    place = Place(tmp_path / "root")
    named = NamedProvider(name="", provider=place, ttl=600, idle_ttl=86400)
    async with serve({"s": named}, clean_up=False) as watched:
        environment.create_session(brain, message="go")
        await watched.until("session.released")
    (key,) = place.keys
    assert (tmp_path / "root" / key / "deadline").stat().st_mtime > time.time() + 80000


async def test_sandbox_of_a_terminated_session_is_removed_though_others_are_kept(
    environment: Environment, serve: Serve, tmp_path: Path
):
    place = Place(tmp_path / "root")
    async with serve({"s": NamedProvider(name="", provider=place)}, max_idle=3600, clean_up=False) as watched:
        session = environment.create_session(brain, message="go")
        await watched.until("call.answered")
        session.terminate()
        await watched.until("session.released")
    assert not place.keys


async def test_sandbox_that_is_found_again_is_kept_alive_at_once(
    environment: Environment, serve: Serve, tmp_path: Path
):
    """Nobody knows how much of its time is left."""
    place = Place(tmp_path / "root")
    named = NamedProvider(name="", provider=place, ttl=600)
    async with serve({"s": named}, clean_up=False) as watched:
        session = environment.create_session(brain, message="go")
        await watched.until("session.released")
    (key,) = place.keys
    deadline = tmp_path / "root" / key / "deadline"
    os.utime(deadline, (time.time() + 30,) * 2)
    async with serve({"s": named}, clean_up=False) as watched:
        session.send_message("again")
        await watched.until("session.released")
    assert deadline.stat().st_mtime > time.time() + 500


async def test_keeping_alive_that_fails_is_tried_again_soon(environment: Environment, serve: Serve, tmp_path: Path):
    place = Tiring(tmp_path / "root")
    async with serve({"s": NamedProvider(name="", provider=place, ttl=6)}, max_idle=3600, clean_up=False):
        environment.create_session(brain, message="go")
        with anyio.fail_after(30):
            await place.kept_alive.wait()
    first, second = place.asked_at
    assert second - first < 6 / 3


class Tiring(Place):
    """One that does not keep a sandbox alive the first time that it is asked."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked_at: list[float] = []
        self.kept_alive = anyio.Event()

    async def create(self, spec: SandboxSpec) -> Sandbox:
        await super().create(spec)
        return TiringSandbox(self._root / spec.key, self)


class TiringSandbox(LocalSandbox):
    def __init__(self, path: Path, place: Tiring) -> None:
        super().__init__(path)
        self._place = place

    async def keep_alive(self, ttl: float) -> None:
        self._place.asked_at.append(anyio.current_time())
        if len(self._place.asked_at) == 1:
            raise SandboxUnavailable("not now", provider="place", op="keep_alive")
        await super().keep_alive(ttl)
        self._place.kept_alive.set()
