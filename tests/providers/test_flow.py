"""The whole way with each vendor at its emulator: platform, worker, hands, sandbox; and ``mabridge check``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

from mabridge import Provider, ProviderConfig, Sandbox, sandbox_key
from mabridge.plugins import make_provider
from mabridge.testing import Agent, ControlPlane, Environment
from mabridge.testing.conformance.helpers import wait_for_file
from tests.emulators import machine
from tests.emulators.daytona import KEY, DaytonaEmulator
from tests.emulators.e2b import E2BEmulator
from tests.emulators.modal import Emulator as ModalEmulator
from tests.emulators.vercel import VercelEmulator
from tests.worker.conftest import Serve, environment, local, plane, serve  # noqa: F401 - fixtures

pytestmark = pytest.mark.anyio

NOBODY = "http://127.0.0.1:9"

WITHOUT = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "SDK":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Without())
from mabridge.cli import main
main()
"""


@dataclass(frozen=True, kw_only=True)
class Vendor:
    """How a vendor's emulator is reached.

    Attributes:
        emulator: makes one.
        variables: what the vendor's SDK and the options read, once it runs.
        options: the provider's, likewise.
        key: the variable that holds the key, or the secret part of it.
        refused: what is said of a wrong one.
        unset: what is said if it is not set.
        elsewhere: options or variables by which nobody is reached.
        written: how often stdin of a process was written to, where the hands hold one open.
    """

    emulator: Callable[[], AbstractAsyncContextManager[Any]]
    variables: Callable[[Any], Mapping[str, str]] = lambda _: {}
    options: Callable[[Any], Mapping[str, Any]]
    key: str
    refused: str
    unset: str
    elsewhere: Mapping[str, str]
    written: Callable[[Any], int] = lambda _: 99


VENDORS = {
    "modal": Vendor(
        emulator=ModalEmulator,
        variables=lambda it: {
            "MODAL_SERVER_URL": it.url,
            "MODAL_TOKEN_ID": it.token_id,
            "MODAL_TOKEN_SECRET": it.token_secret,
        },
        options=lambda it: {
            "image": it.image_id,
            "connect_timeout": 5,
            "token_id": {"env": "MODAL_TOKEN_ID"},
            "token_secret": {"env": "MODAL_TOKEN_SECRET"},
        },
        key="MODAL_TOKEN_SECRET",
        refused="Modal refuses the token",
        unset="the environment variable MODAL_TOKEN_SECRET is not set",
        elsewhere={"MODAL_SERVER_URL": NOBODY},
        written=lambda it: it.faults.calls["TaskExecStdinWrite"],
    ),
    "e2b": Vendor(
        emulator=E2BEmulator,
        variables=lambda it: {"E2B_API_KEY": it.api_key},
        options=lambda it: {"api_url": it.url, "sandbox_url": it.url, "retries": 0},
        key="E2B_API_KEY",
        refused="E2B refuses the key in E2B_API_KEY",
        unset="the environment variable E2B_API_KEY is not set",
        elsewhere={"api_url": NOBODY},
        written=lambda it: it.calls.count("POST /process.Process/SendInput"),
    ),
    "daytona": Vendor(
        emulator=DaytonaEmulator,
        variables=lambda it: {"DAYTONA_API_KEY": KEY},
        options=lambda it: {"api_url": it.url},
        key="DAYTONA_API_KEY",
        refused="Daytona refused the API key",
        unset="the environment variable DAYTONA_API_KEY is not set",
        elsewhere={"api_url": NOBODY},
    ),
    "vercel": Vendor(
        emulator=VercelEmulator,
        options=lambda it: it.options,
        key="VERCEL_EMULATOR_TOKEN",
        refused="refused the credentials",
        unset="the environment variable VERCEL_EMULATOR_TOKEN is not set",
        elsewhere={"base_url": f"{NOBODY}/api"},
    ),
}


@dataclass(frozen=True)
class Place:
    """A vendor whose emulator runs."""

    name: str
    vendor: Vendor
    emulator: Any

    def config(self, when_done: str = "teardown") -> ProviderConfig:
        return ProviderConfig(type=self.name, options=self.vendor.options(self.emulator), when_done=when_done)

    def open(self) -> Provider:
        """One more worker's provider, to be entered."""
        return make_provider(self.config(), "watcher")


@pytest.fixture(params=sorted(VENDORS))
async def place(
    anyio_backend: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Place]:
    machine.require()
    vendor = VENDORS[request.param]
    async with vendor.emulator() as emulator:
        for name, value in vendor.variables(emulator).items():
            monkeypatch.setenv(name, value)
        yield Place(request.param, vendor, emulator)


async def all_of(provider: Provider) -> list[str]:
    return [info.state async for info in provider.list()]


async def appearing(provider: Provider, key: str) -> Sandbox:
    """Return the sandbox of a key once there is one."""
    with anyio.fail_after(60):
        while (sandbox := await provider.attach(key)) is None:  # noqa: ASYNC110 - nobody says so
            await anyio.sleep(0.05)
    return sandbox


async def test_session_runs_from_poll_to_stop(place: Place, environment: Environment, serve: Serve) -> None:  # noqa: F811
    seen: dict[str, str] = {}

    async def brain(agent: Agent) -> None:
        await agent.call("write", {"file_path": "notes.txt", "content": "one\ntwo\n"})
        seen["bash"] = (await agent.call("bash", {"command": "wc -l < notes.txt; X=kept; cd /"})).text
        seen["again"] = (await agent.call("bash", {"command": "echo $X; pwd"})).text
        read, found = await agent.calls([("read", {"file_path": "notes.txt"}), ("grep", {"pattern": "tw."})])
        seen["read"], seen["grep"] = read.text, found.text
        failed = await agent.call("bash", {"command": "echo no >&2; exit 3"})
        seen["failed"] = f"{failed.is_error} {failed.text}"
        seen["long"] = (await agent.call("bash", {"command": "seq 1 100000"})).text

    async with serve({"p": place.config()}) as watched:
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
    assert all(len(session.results(call.id).accepted) == 1 for call in session.calls)
    assert place.vendor.written(place.emulator) >= 3, "the hands hold no process open"
    async with place.open() as provider:
        assert await all_of(provider) == []


async def test_another_worker_goes_on_where_one_that_died_was(place: Place, serve: Serve) -> None:  # noqa: F811
    replies: list[str] = []

    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "X=kept; cd /"})
        script = "cd /workspace; echo ran >> log; until [ -e go ]; do sleep 0.1; done; cat log; echo $X"
        replies.append((await agent.call("bash", {"command": script})).text)
        replies.append((await agent.call("bash", {"command": "wc -l < log"})).text)

    async with ControlPlane(lease_ttl=2.0) as plane, place.open() as provider:  # noqa: F811
        environment = plane.create_environment()
        async with serve({"p": place.config()}, environment=environment, clean_up=False):
            session = environment.create_session(brain, message="go")
            sandbox = await appearing(provider, sandbox_key(environment.id, session.id))
            await wait_for_file(sandbox, "/workspace/log")
            # The worker dies in the middle of the command.
        async with serve({"p": place.config()}, environment=environment) as second:
            await second.until("sandbox.attached")
            await sandbox.write_file("/workspace/go", b"")
            await session.wait_idle(timeout=60)
            await second.until("session.released")
        assert await all_of(provider) == []
    assert [text.split() for text in replies] == [["ran", "kept"], ["1"]]


async def test_session_goes_on_in_its_suspended_sandbox_at_another_worker(
    place: Place,
    environment: Environment,  # noqa: F811
    serve: Serve,  # noqa: F811
) -> None:
    async def brain(agent: Agent) -> None:
        script = "X=kept; echo here > file; mkdir d; cd d" if agent.text == "go" else "pwd; echo $X; cat ../file"
        agent.session.reply = await agent.call("bash", {"command": script})

    session = environment.create_session(brain)
    async with place.open() as provider:
        for text, found in (("go", "sandbox.created"), ("again", "sandbox.attached")):
            async with serve({"p": place.config("suspend")}, clean_up=text == "again") as watched:
                session.send_message(text)
                await watched.until(found)
                await session.wait_idle(timeout=60)
                await watched.until("sandbox.suspended")
                await watched.until("session.released")
            if text == "go":
                assert len(await all_of(provider)) == 1
        assert session.reply.text.split() == ["/workspace/d", "kept", "here"]
        assert await all_of(provider) == []


async def check(
    place: Place, path: Path, *arguments: str, program: str | None = None, **changes: str
) -> tuple[int, str, str]:
    """Run ``mabridge check`` in a process of its own; return its exit code and what it said.

    `changes` are to options, if they are named as such, and to variables otherwise.
    """
    options = {**place.vendor.options(place.emulator), **{n: v for n, v in changes.items() if n.islower()}}
    lines = [f"{name} = {_toml(value)}" for name, value in options.items()]
    (path / "mabridge.toml").write_text("\n".join(["[providers.main]", f'type = "{place.name}"', *lines, ""]))
    env = {**os.environ, "HOME": str(path), "COLUMNS": "200", **{n: v for n, v in changes.items() if not n.islower()}}
    python = [sys.executable, *(("-c", program) if program else ("-m", "mabridge.cli"))]
    command = [*python, "check", "main", *arguments]
    with anyio.fail_after(90):
        done = await anyio.run_process(command, cwd=path, env=env, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def _toml(value: Any) -> str:
    return f"{{ env = {json.dumps(value['env'])} }}" if isinstance(value, dict) else json.dumps(value)


async def test_check_makes_uses_and_removes_a_sandbox(place: Place, tmp_path: Path) -> None:
    code, out, err = await check(place, tmp_path)
    assert (code, err) == (0, "")
    assert "ok" in out
    async with place.open() as provider:
        assert await all_of(provider) == []


@pytest.mark.parametrize("wrong", ["key", "no key", "network"])
async def test_check_says_what_is_wrong_once_and_in_a_line(place: Place, tmp_path: Path, wrong: str) -> None:
    vendor = place.vendor
    changes = {"key": {vendor.key: "made-up"}, "no key": {vendor.key: ""}, "network": vendor.elsewhere}[wrong]
    said = {"key": vendor.refused, "no key": vendor.unset, "network": "onnect|reached"}[wrong]
    code, _, err = await check(place, tmp_path, **changes)
    assert code == 2
    assert len(err.splitlines()) == 1, err
    assert [part for part in said.split("|") if part in err], err
    assert "made-up" not in err, "the key was told"


async def test_check_makes_the_configuration_wrong_to_see_what_is_said(place: Place, tmp_path: Path) -> None:
    _, out, err = await check(place, tmp_path, "--conformance", "--only", "errors", "--json")
    said = {report["test"]: (report["outcome"], report["why"]) for report in json.loads(out)}
    tried = [test for test in said if "bad_credentials" in test or "missing_image" in test]
    assert len(tried) == 4
    assert {said[test] for test in tried} == {("passed", "")}, err


async def test_check_without_the_sdk_says_what_to_install(place: Place, tmp_path: Path) -> None:
    code, _, err = await check(place, tmp_path, program=WITHOUT.replace("SDK", place.name))
    assert code == 2
    assert len(err.splitlines()) == 1, err
    assert f"pip install 'mabridge[{place.name}]'" in err
