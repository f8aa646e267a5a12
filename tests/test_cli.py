from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
import pytest
from click.testing import CliRunner

import mabridge
from mabridge.cli import main
from mabridge.identity import sandbox_key, sandbox_labels
from mabridge.providers.local import LocalOptions, LocalProvider
from mabridge.sandbox import SandboxSpec
from mabridge.testing import ControlPlane, Environment

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]

CONFIG = """\
[worker]
environment_id = "{environment}"
environment_key = {{ env = "TEST_KEY" }}
base_url = "{url}"
max_idle = 0.2

[providers.here]
type = "local"
root = "{root}"
when_done = "{when_done}"

[[routes]]
metadata = {{ team = "data-*" }}
providers = ["here"]
"""


def write_config(
    directory: Path, *, environment: str = "env_1", url: str = "http://127.0.0.1:9", when_done: str = "keep"
):
    text = CONFIG.format(environment=environment, url=url, root=directory / "root", when_done=when_done)
    (directory / "mabridge.toml").write_text(text)


@pytest.fixture
def command(tmp_path: Path) -> Run:
    """Run the real command, in a process of its own and in `tmp_path`."""

    async def command(*arguments: str, key: str | None = None, **options):
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "COLUMNS": "200"} | ({"TEST_KEY": key} if key else {})
        with anyio.fail_after(60):
            return await anyio.run_process(
                [sys.executable, "-m", "mabridge.cli", *arguments], cwd=tmp_path, env=env, check=False, **options
            )

    return command


@pytest.fixture
async def environment() -> AsyncIterator[Environment]:
    async with ControlPlane() as plane:
        yield plane.create_environment()


def only_line(done: subprocess.CompletedProcess[bytes]) -> str:
    """Return what was told: one line on stderr, no traceback, exit code 2."""
    told = done.stderr.decode()
    assert done.returncode == 2, told
    (line,) = told.splitlines()
    return line


def test_version_and_help_are_told() -> None:
    assert CliRunner().invoke(main, ["--version"]).output == f"mabridge {mabridge.__version__}\n"
    told = CliRunner().invoke(main, ["--help"]).output
    for name in ("run", "demo", "providers", "check", "route", "ls", "rm", "exec"):
        assert f"\n  {name} " in told
        assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0


def test_providers_are_listed_for_pipes_and_for_scripts() -> None:
    told = CliRunner().invoke(main, ["providers"])
    assert "local\tmabridge\tyes\n" in told.stdout
    listed = json.loads(CliRunner().invoke(main, ["providers", "--json"]).stdout)
    assert {"name": "local", "plugin": "mabridge", "installed": True, "install": None} in listed["providers"]
    assert listed["failures"] == []


def test_options_of_a_provider_are_listed_with_their_meaning() -> None:
    listed = json.loads(CliRunner().invoke(main, ["providers", "docker", "--json"]).stdout)
    assert listed["options"]["network"]["default"] == "none"
    assert listed["options"]["image"]["description"].startswith("Any image with")
    assert "image\t" in CliRunner().invoke(main, ["providers", "docker"]).stdout


def test_route_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(main, ["route", "--metadata", "team=data-1"])
    assert told.stdout == "Route 1 (metadata.team = 'data-*') sends it to here.\n"
    told = CliRunner().invoke(main, ["route", "--agent", "coder"])
    assert told.exit_code == 2
    assert "Route 1 does not match: the session has no metadata 'team'" in told.stdout
    told = CliRunner().invoke(main, ["route", "--metadata", "team"])
    assert told.exit_code == 2
    assert "'team' is not KEY=VALUE" in told.stderr


@pytest.mark.anyio
async def test_route_of_a_session_is_asked_of_the_platform(environment: Environment, tmp_path, command: Run) -> None:
    write_config(tmp_path, environment=environment.id, url=environment.plane.url)
    session = environment.create_session(quiet, message="hello", metadata={"team": "data-7"})
    done = await command("route", "--session", session.id, "--json", key=environment.key)
    assert json.loads(done.stdout)["providers"] == ["here"]
    done = await command("route", "--session", "sesn_absent", key=environment.key)
    assert "knows no such environment or session (404)" in only_line(done)


@pytest.mark.anyio
async def test_broken_configuration_is_one_line_and_exit_code_2(tmp_path: Path, command: Run) -> None:
    assert "no configuration file mabridge.toml" in only_line(await command("run"))
    write_config(tmp_path)
    file = tmp_path / "mabridge.toml"
    file.write_text(file.read_text().replace("max_idle", "max_idel"))
    assert only_line(await command("run")) == (
        "mabridge: mabridge.toml:5: worker.max_idel: there is no such key; did you mean 'max_idle'?"
    )
    done = await command("run", "--debug")
    assert done.returncode == 2
    assert b"Traceback" in done.stderr


@pytest.mark.anyio
async def test_missing_key_is_one_line_and_exit_code_2(tmp_path: Path, command: Run) -> None:
    write_config(tmp_path)
    assert only_line(await command("run")) == "mabridge: the environment variable TEST_KEY is not set"


@pytest.mark.anyio
async def test_check_times_each_step_of_each_provider(environment: Environment, tmp_path, command: Run) -> None:
    write_config(tmp_path, environment=environment.id, url=environment.plane.url)
    done = await command("check", "--json", key=environment.key)
    assert done.returncode == 0, done.stderr
    platform, here = json.loads(done.stdout)
    assert (platform["name"], platform["ok"]) == ("anthropic", True)
    assert (here["name"], here["ok"]) == ("here", True)
    assert list(here["seconds"]) == ["reach", "create", "exec", "write", "read", "teardown"]
    assert (
        await command("ls", "--json", key=environment.key)
    ).stdout == b'{\n  "sandboxes": [],\n  "failures": {}\n}\n'


@pytest.mark.anyio
async def test_check_tells_what_is_wrong_and_goes_on(environment: Environment, tmp_path, command: Run) -> None:
    write_config(tmp_path, environment=environment.id, url=environment.plane.url)
    done = await command("check", key="sk-ant-oat01-wrong")
    assert done.returncode == 2
    assert b"rejected the environment key (401)" in done.stderr
    assert b"sk-ant" not in done.stdout + done.stderr
    assert b"here\tlocal\t" in done.stdout
    write_config(tmp_path, url="http://127.0.0.1:9")
    done = await command("check", key=environment.key)
    assert b"cannot reach 127.0.0.1" in done.stderr
    assert "no provider 'her' in the configuration; did you mean 'here'?" in only_line(await command("check", "her"))


@pytest.mark.anyio
@pytest.mark.parametrize("wrong", ["key", "environment"])
async def test_run_with_wrong_credentials_is_one_line_and_exit_code_2(environment, tmp_path, command: Run, wrong: str):
    key = "sk-ant-oat01-absent" if wrong == "key" else environment.key
    environment_id = "env_absent" if wrong == "environment" else environment.id
    write_config(tmp_path, environment=environment_id, url=environment.plane.url)
    line = only_line(await command("run", "--log-level", "error", key=key))
    assert "the platform rejected the environment key (401)" in line
    assert environment_id in line
    assert key not in line


async def quiet(agent) -> None:
    await agent.say("done")


class Worker:
    """``mabridge run`` as a process."""

    def __init__(self, process: anyio.abc.Process) -> None:
        self.process = process
        self.log: list[dict[str, object]] = []

    async def wait_for(self, event: str) -> dict[str, object]:
        """Read the log until it tells of `event`."""
        rest = b""
        async for chunk in self.process.stderr:
            *lines, rest = (rest + chunk).split(b"\n")
            self.log += [json.loads(line) for line in lines]
            for line in self.log:
                if line.get("event") == event:
                    return line
        raise AssertionError(f"no {event} in {self.log}")


@pytest.mark.anyio
async def test_run_serves_and_drains_at_the_first_signal(environment: Environment, tmp_path: Path) -> None:
    write_config(tmp_path, environment=environment.id, url=environment.plane.url)
    go_on = anyio.Event()

    async def brain(agent) -> None:
        await agent.call("bash", {"command": "echo kept > file"})
        await go_on.wait()
        assert (await agent.call("bash", {"command": "cat file"})).text.strip() == "kept"

    session = environment.create_session(brain, message="go", metadata={"team": "data-1"})
    async with start(tmp_path, environment) as process:
        worker = Worker(process)
        with anyio.fail_after(30):
            assert (await worker.wait_for("call.answered"))["session_id"] == session.id
            process.send_signal(signal.SIGTERM)
            await worker.wait_for("worker.draining")
            go_on.set()
            await session.wait_idle()
            assert await process.wait() == 0
    key = sandbox_key(environment.id, session.id)
    assert (tmp_path / "root" / key / "workspace" / "file").read_text() == "kept\n"


@pytest.mark.anyio
async def test_second_signal_stops_at_once(environment: Environment, tmp_path: Path) -> None:
    write_config(tmp_path, environment=environment.id, url=environment.plane.url)

    async def brain(agent) -> None:
        await agent.call("bash", {"command": "sleep 60"})

    environment.create_session(brain, message="go", metadata={"team": "data-1"})
    async with start(tmp_path, environment) as process:
        worker = Worker(process)
        with anyio.fail_after(30):
            await worker.wait_for("call.started")
            process.send_signal(signal.SIGINT)
            await worker.wait_for("worker.draining")
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 0
    assert not any("Traceback" in str(line) for line in worker.log)


@asynccontextmanager
async def start(directory: Path, environment: Environment) -> AsyncIterator[anyio.abc.Process]:
    process = await anyio.open_process(
        [sys.executable, "-m", "mabridge.cli", "run", "--log-format", "json"],
        cwd=directory,
        env={"PATH": os.environ["PATH"], "HOME": str(directory), "TEST_KEY": environment.key},
        stdout=subprocess.DEVNULL,
    )
    async with process:
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()


@pytest.mark.anyio
async def test_list_says_when_a_worker_last_had_to_do_with_a_sandbox(environment, tmp_path, command: Run) -> None:
    write_config(tmp_path, environment=environment.id, url=environment.plane.url)
    session = environment.create_session(quiet)
    environment.queue.stop(session.id, force=True)
    async with LocalProvider(LocalOptions(root=tmp_path / "root")) as provider:
        labels = sandbox_labels(environment.id, session.id)
        await provider.create(SandboxSpec(key=sandbox_key(environment.id, session.id), labels=labels))
    (row,) = json.loads((await command("ls", "--json", key=environment.key)).stdout)["sandboxes"]
    assert 0 <= row["last_active"] < 60
    done = await command("ls", key="sk-ant-oat01-wrong")
    assert done.stdout.startswith(b"mab")
    assert b"anthropic could not be listed" in done.stderr


@pytest.mark.anyio
async def test_sandboxes_are_listed_used_and_removed(tmp_path: Path, command: Run) -> None:
    write_config(tmp_path)
    key = sandbox_key("env_1", "sesn_1")
    async with LocalProvider(LocalOptions(root=tmp_path / "root")) as provider:
        await provider.create(SandboxSpec(key=key, labels=sandbox_labels("env_1", "sesn_1")))

    done = await command("ls")
    assert done.stdout.decode().split("\t")[:4] == [key, "sesn_1", "here", "running"]
    (row,) = json.loads((await command("ls", "--json")).stdout)["sandboxes"]
    assert (row["key"], row["session"], row["providers"]) == (key, "sesn_1", ["here"])

    assert row["last_active"] is None  # without a key nobody was asked
    done = await command("exec", key, "--", "sh", "-c", "printf 'a\\377b'; echo oops >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"a\xffb", b"oops\n")
    done = await command("exec", "-i", "sesn_1", "--", "cat", "-", input=b"given\0")
    assert (done.returncode, done.stdout) == (0, b"given\0")
    done = await command("exec", "--timeout", "0.2", key, "--", "sleep", "30")
    assert (done.returncode, done.stderr) == (124, b"mabridge: the command was killed after 0.2 s\n")

    done = await command("rm", "sesn_1")
    assert done.stdout.decode() == f"removed {key} at here\n"
    assert f"no sandbox {key} at here" in only_line(await command("rm", key))
    assert "neither a key" in only_line(await command("rm", "../../etc"))
