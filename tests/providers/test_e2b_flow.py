"""The whole way with the ``e2b`` provider at its emulator: platform, worker, hands; and ``mabridge check``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from mabridge import ProviderConfig
from mabridge.testing import Agent, ControlPlane
from tests.emulators import machine
from tests.emulators.e2b import E2BEmulator
from tests.worker import conftest as worker
from tests.worker.conftest import Serve

pytestmark = pytest.mark.anyio

environment, local, plane, serve = worker.environment, worker.local, worker.plane, worker.serve

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "e2b" or name.startswith("e2b."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from mabridge.cli import main
main()
"""


@pytest.fixture
async def emulator(anyio_backend: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[E2BEmulator]:
    machine.require()
    async with E2BEmulator() as running:
        monkeypatch.setenv("E2B_API_KEY", running.api_key)
        yield running


@pytest.fixture
def e2b(emulator: E2BEmulator) -> ProviderConfig:
    urls = {"api_url": emulator.url, "sandbox_url": emulator.url}
    return ProviderConfig(type="e2b", options=urls, when_done="teardown")


async def test_session_runs_from_poll_to_stop(
    emulator: E2BEmulator,
    environment,
    serve: Serve,
    e2b: ProviderConfig,
) -> None:
    seen: dict[str, str] = {}

    async def brain(agent: Agent) -> None:
        await agent.call("write", {"file_path": "notes.txt", "content": "one\ntwo\n"})
        seen["bash"] = (await agent.call("bash", {"command": "wc -l < notes.txt; X=kept; cd /"})).text
        seen["again"] = (await agent.call("bash", {"command": "echo $X; pwd"})).text
        read, found = await agent.calls([("read", {"file_path": "notes.txt"}), ("grep", {"pattern": "tw."})])
        seen["read"], seen["grep"] = read.text, found.text
        failed = await agent.call("bash", {"command": "echo no >&2; exit 3"})
        seen["failed"] = f"{failed.is_error} {failed.text}"
        long = await agent.call("bash", {"command": "seq 1 100000"})
        seen["long"] = long.text

    async with serve({"e2b": e2b}) as watched:
        session = environment.create_session(brain, message="go")
        await session.wait_idle(timeout=60)
        await watched.until("session.released")
    assert seen["bash"].strip() == "2"
    assert seen["again"] == "kept\n/"
    assert seen["read"] == "one\ntwo\n"
    assert seen["grep"].endswith("notes.txt:2:two")
    assert seen["failed"].startswith("True no")
    assert seen["long"].startswith("1\n2\n")
    assert "100000" in seen["long"]
    assert emulator.calls.count("POST /process.Process/SendInput") >= 3, "the hands use a held-open process"
    assert emulator.vms == {}


async def test_another_worker_goes_on_where_one_that_died_was(serve: Serve, e2b: ProviderConfig) -> None:
    replies: list[str] = []

    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "X=kept"})
        replies.append((await agent.call("bash", {"command": "echo ran >> log; sleep 3; cat log"})).text)
        replies.append((await agent.call("bash", {"command": "echo $X; wc -l < log"})).text)

    async with ControlPlane(lease_ttl=2.0) as plane:
        environment = plane.create_environment()
        async with serve({"e2b": e2b}, environment=environment, clean_up=False) as first:
            session = environment.create_session(brain, message="go")
            await first.until("call.started", 2)
            await anyio.sleep(0.5)  # the worker dies in the middle of the command, which takes 3 s
        async with serve({"e2b": e2b}, environment=environment) as second:
            await session.wait_idle(timeout=60)
            assert second.named("sandbox.attached")
    assert [text.split() for text in replies] == [["ran"], ["kept", "1"]]


async def check(path: Path, url: str, *, program: str | None = None, **environ: str) -> tuple[int, str, str]:
    """Run ``mabridge check`` and return its exit code and output."""
    config = path / "mabridge.toml"
    config.write_text(f'[providers.main]\ntype = "e2b"\napi_url = "{url}"\nsandbox_url = "{url}"\nretries = 0\n')
    argv = [sys.executable, *(["-c", program] if program else ["-m", "mabridge.cli"])]
    argv += ["check", "main", "--json", "--config", str(config)]
    env = {**os.environ, "ANTHROPIC_ENVIRONMENT_ID": "env_1", "ANTHROPIC_ENVIRONMENT_KEY": "k", **environ}
    with anyio.fail_after(90):
        done = await anyio.run_process(argv, check=False, env=env, cwd=path)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


async def test_check_makes_uses_and_removes_a_sandbox(emulator: E2BEmulator, tmp_path: Path) -> None:
    code, out, err = await check(tmp_path, emulator.url)
    assert code == 0, err
    (outcome,) = json.loads(out)
    assert set(outcome["seconds"]) == {"reach", "create", "exec", "write", "read", "teardown"}
    assert emulator.vms == {}


async def test_check_with_a_wrong_key_says_so_in_a_line(emulator: E2BEmulator, tmp_path: Path) -> None:
    code, out, err = await check(tmp_path, emulator.url, E2B_API_KEY="e2b_wrong")
    assert code == 2, err
    assert "E2B refuses the key in E2B_API_KEY" in json.loads(out)[0]["error"]
    code, out, err = await check(tmp_path, emulator.url, E2B_API_KEY="")
    assert code == 2, err
    assert json.loads(out)[0]["error"] == "the environment variable E2B_API_KEY is not set"


async def test_check_without_a_network_says_so_in_a_line(emulator: E2BEmulator, tmp_path: Path) -> None:
    code, out, err = await check(tmp_path, "http://127.0.0.1:9")
    assert code == 2, err
    error = json.loads(out)[0]["error"]
    assert error.startswith("e2b check: ")
    assert "onnect" in error
    assert "\n" not in error


async def test_check_without_the_sdk_says_what_to_install(emulator: E2BEmulator, tmp_path: Path) -> None:
    code, out, err = await check(tmp_path, emulator.url, program=BLOCKED)
    assert code == 2, err
    assert "pip install 'mabridge[e2b]'" in out + err
    assert "Traceback" not in err
