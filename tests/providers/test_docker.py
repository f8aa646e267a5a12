"""What is special to containers: how they are fenced in, and what an engine can do to them."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import aiodocker
import anyio
import pytest
from pydantic import ValidationError

from mabridge.errors import ConfigError, CreateFailed, NotSupported, SandboxGone, SandboxUnavailable
from mabridge.providers.docker import DockerMount, DockerOptions, DockerProvider
from mabridge.sandbox import Sandbox, SandboxSpec
from mabridge.testing.conformance import new_key, run, sh, wait_for_file
from tests import images

pytestmark = [pytest.mark.anyio, pytest.mark.docker]


@pytest.fixture(autouse=True)
def busybox(image: Callable[[str], str]) -> str:
    """The image, without which, or without an engine, everything here is skipped."""
    return image(images.BUSYBOX)


@pytest.fixture
async def engine() -> AsyncIterator[aiodocker.Docker]:
    async with aiodocker.Docker() as client:
        yield client


@pytest.fixture
async def make(image: Callable[[str], str]) -> AsyncIterator[Callable[..., Any]]:
    """Make a sandbox with these options; all are removed in the end."""
    async with anyio.create_task_group() as group:
        finish = anyio.Event()

        async def create(*, base: str = images.BUSYBOX, ttl: float = 600, key: str = "", **options: Any) -> Sandbox:
            result: list[Sandbox | BaseException] = []
            done = anyio.Event()
            name = image(base)

            async def own() -> None:
                try:
                    async with DockerProvider(DockerOptions(image=name, pull="never", **options)) as provider:
                        result.append(await provider.create(SandboxSpec(key=key or new_key(), ttl=ttl)))
                        done.set()
                        await finish.wait()
                        await result[0].teardown()
                except Exception as exc:  # noqa: BLE001 - it is raised below
                    result.append(exc)
                    done.set()

            group.start_soon(own)
            await done.wait()
            if isinstance(result[0], BaseException):
                raise result[0]
            return result[0]

        yield create
        finish.set()


async def container_of(engine: aiodocker.Docker, sandbox: Sandbox) -> dict[str, Any]:
    return await (await engine.containers.get(sandbox.id)).show()


async def test_container_is_fenced_in(make, engine: aiodocker.Docker) -> None:
    sandbox = await make(memory="64m", cpus=0.5, pids_limit=50)
    host = (await container_of(engine, sandbox))["HostConfig"]
    assert host["NetworkMode"] == "none"
    assert host["CapDrop"] == ["ALL"]
    assert host["CapAdd"] is None
    assert host["Privileged"] is False
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["Memory"] == host["MemorySwap"] == 64 * 1024 * 1024
    assert host["NanoCpus"] == 500_000_000
    assert host["PidsLimit"] == 50
    assert host["AutoRemove"] is True
    assert host["Init"] is True
    assert not host["Binds"]
    assert not host.get("Mounts")


async def test_commands_see_no_rights_and_no_network(make) -> None:
    sandbox = await make()
    status = (await run(sandbox, "cat", "/proc/self/status")).stdout.decode()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["NoNewPrivs"] == "1"
    assert {fields[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {"0" * 16}
    assert fields["Uid"].split() == ["1000"] * 4
    assert fields["Seccomp"] == "2"
    assert (await run(sandbox, "ls", "/sys/class/net")).stdout == b"lo\n"


@pytest.mark.parametrize("user", ["1000:1000", "0:0"])
async def test_agent_cannot_end_stop_or_outlive_the_guard(make, user: str) -> None:
    sandbox = await make(user=user)
    for attack in ("kill -9 -1", "kill -STOP -1", "kill -9 1", "for p in /proc/[0-9]*; do kill -9 ${p#/proc/}; done"):
        await sh(sandbox, f"({attack}) 2>/dev/null", timeout=2)
    await sh(sandbox, "touch /run/mabridge/99999999; rm -rf /run/mabridge; umount /run/mabridge")
    guards = await sh(sandbox, "cat /proc/[0-9]*/status | grep -c '^Uid:.65534'; cat /proc/1/stat")
    assert guards.stdout.split()[0] == b"3"  # init, the guard and its sleep
    assert b") T " not in guards.stdout
    assert (await sh(sandbox, "ls /run/mabridge")).exit_code != 0


async def test_container_ends_though_its_worker_was_killed(busybox: str, engine: aiodocker.Docker) -> None:
    key = new_key()
    script = f"""
import anyio, os, signal
from mabridge.providers.docker import DockerOptions, DockerProvider
from mabridge.sandbox import SandboxSpec
async def main():
    async with DockerProvider(DockerOptions(image={busybox!r}, pull="never")) as provider:
        await provider.create(SandboxSpec(key={key!r}, ttl=2))
        os.kill(os.getpid(), signal.SIGKILL)
anyio.run(main)
"""
    worker = await anyio.run_process([sys.executable, "-c", script], check=False)
    assert worker.returncode == -signal.SIGKILL
    await engine.containers.get(key)
    with anyio.fail_after(20):
        while True:
            try:
                await engine.containers.get(key)
            except aiodocker.DockerError as exc:
                if exc.status != 404:
                    raise
                return
            await anyio.sleep(0.2)


async def test_command_that_takes_too_much_memory_dies_and_the_sandbox_lives(make) -> None:
    sandbox = await make(memory="32m")
    result = await sh(sandbox, 'x=$(head -c 100000000 /dev/zero | tr "\\0" a); echo survived')
    assert (result.exit_code, result.stdout) == (137, b"")
    assert (await run(sandbox, "true")).exit_code == 0


FILL = """
import os, sys, time
try:
    while os.fork():
        pass
except BlockingIOError:
    print("full", flush=True)
time.sleep(99)
"""
# Each in a session of its own, and one that takes every process id that becomes free.
REFILL = """
import os, time
while True:
    try:
        if not os.fork():
            os.setsid()
            if os.fork():
                time.sleep(99)
    except BlockingIOError:
        time.sleep(0.001)
"""


async def test_processes_are_limited_and_killed_though_there_is_room_for_no_other(make, engine) -> None:
    sandbox = await make(base=images.DEBIAN, pids_limit=20)
    before = (await container_of(engine, sandbox))["State"]["StartedAt"]
    result = await run(sandbox, "python3", "-c", FILL, timeout=8)  # it takes a while to fill up where much else runs
    assert (result.timed_out, result.stdout) == (True, b"full\n")
    assert len((await sh(sandbox, "echo /proc/[0-9]*")).stdout.split()) <= 5
    assert (await container_of(engine, sandbox))["State"]["StartedAt"] == before


async def test_what_cannot_be_killed_is_ended_by_a_restart_that_keeps_the_files(make, engine) -> None:
    sandbox = await make(base=images.DEBIAN, pids_limit=20)
    before = (await container_of(engine, sandbox))["State"]["StartedAt"]
    await sandbox.write_file("mark", b"")
    assert (await run(sandbox, "python3", "-c", REFILL, timeout=2)).timed_out
    assert (await run(sandbox, "ls")).stdout == b"mark\n"
    assert len((await sh(sandbox, "echo /proc/[0-9]*")).stdout.split()) <= 5
    assert (await container_of(engine, sandbox))["State"]["StartedAt"] != before


async def test_call_that_cannot_start_says_so_and_harms_nothing(make, engine: aiodocker.Docker) -> None:
    sandbox = await make(user="0:0")
    before = (await container_of(engine, sandbox))["State"]["StartedAt"]
    await run(sandbox, "rm", "/bin/sh")
    with pytest.raises(SandboxUnavailable, match="nothing could be started in the container: OCI runtime exec failed"):
        await run(sandbox, "true")
    process = await sandbox.open_process(["true"])
    with pytest.raises(SandboxUnavailable, match="nothing could be started"):
        await process.receive()
    await process.aclose()
    assert (await container_of(engine, sandbox))["State"]["StartedAt"] == before


async def test_container_killed_under_a_call_is_gone(make, engine: aiodocker.Docker) -> None:
    sandbox = await make()
    async with anyio.create_task_group() as group:

        async def call() -> None:
            with pytest.raises(SandboxGone):
                await sh(sandbox, "echo > begun; sleep 60")

        group.start_soon(call)
        await wait_for_file(sandbox, "begun")
        await engine.containers.container(sandbox.id).kill()


async def test_program_that_talks_like_the_engine_is_only_a_program(make) -> None:
    sandbox = await make()
    said = "OCI runtime exec failed: exec failed: unable to start container process"
    result = await sh(sandbox, 'echo "$1"; exit 126', said)
    assert (result.exit_code, result.stdout) == (126, f"{said}\n".encode())


async def test_read_only_root_leaves_the_working_directory_the_home_and_tmp(make) -> None:
    sandbox = await make(read_only=True, user="0:0")
    await sandbox.write_file("a/script", b"#!/bin/sh\necho ran\n", mode=0o755)
    assert (await run(sandbox, f"{sandbox.workdir}/a/script")).stdout == b"ran\n"
    assert await sandbox.read_file("a/script", max_bytes=100) == b"#!/bin/sh\necho ran\n"
    assert (await sh(sandbox, 'touch "$HOME/x" /tmp/x')).exit_code == 0
    assert (await sh(sandbox, "touch /x || touch /bin/x || touch /etc/x")).exit_code != 0


async def test_mounts_are_read_only_unless_asked(make, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "in").write_text("given")
    (tmp_path / "out").mkdir(mode=0o777)
    (tmp_path / "out").chmod(0o777)
    mounts = [
        {"source": str(tmp_path), "target": "/given"},
        {"source": str(tmp_path / "out"), "target": "/out", "read_only": False},
        {"type": "tmpfs", "target": "/scratch"},
    ]
    sandbox = await make(mounts=mounts)
    assert await sandbox.read_file("/given/in", max_bytes=100) == b"given"
    with pytest.raises((PermissionError, OSError)):
        await sandbox.write_file("/given/out/new", b"x")
    await sandbox.write_file("/out/new", b"x")
    assert (tmp_path / "out/new").read_bytes() == b"x"
    await sandbox.write_file("/scratch/new", b"y")
    assert await sandbox.read_file("/scratch/new", max_bytes=100) == b"y"


async def test_working_directory_on_a_mount_that_cannot_be_written_is_refused(
    make, tmp_path: Path, engine: aiodocker.Docker
) -> None:
    key = new_key()
    tmp_path.chmod(0o755)
    with pytest.raises(CreateFailed, match="/workspace is not a directory that the user 1000:1000 may write"):
        await make(key=key, mounts=[{"source": str(tmp_path), "target": "/workspace", "read_only": False}])
    assert tmp_path.stat().st_uid == os.getuid()
    assert await engine.containers.list(all=True, filters=f'{{"name": ["{key}"]}}') == []


async def test_stopped_container_is_replaced(busybox: str, engine: aiodocker.Docker) -> None:
    spec = SandboxSpec(key=new_key())
    config = {"Image": busybox, "Cmd": ["true"], "Labels": {"mabridge.key": spec.key}}
    config["HostConfig"] = {"NetworkMode": "none"}
    stopped = await engine.containers.create(config, name=spec.key)
    await stopped.start()
    await stopped.wait()
    async with DockerProvider(DockerOptions(image=busybox, pull="never")) as provider:
        assert await provider.attach(spec.key) is None
        sandbox = await provider.create(spec)
        assert not stopped.id.startswith(sandbox.id)
        assert (await run(sandbox, "true")).exit_code == 0
        await sandbox.teardown()


async def test_container_that_its_maker_never_started_is_finished(busybox: str, engine: aiodocker.Docker) -> None:
    spec = SandboxSpec(key=new_key())
    async with DockerProvider(DockerOptions(image=busybox, pull="never")) as provider:
        sandbox = await provider.create(spec)
        config = (await container_of(engine, sandbox))["Config"]
        await sandbox.teardown()
        await engine.containers.create(config | {"HostConfig": {"NetworkMode": "none"}}, name=spec.key)
        assert await provider.attach(spec.key) is None
        sandbox = await provider.create(spec)
        assert (await run(sandbox, "touch", "file")).exit_code == 0
        await sandbox.teardown()


async def test_somebody_elses_container_is_not_touched(busybox: str, engine: aiodocker.Docker) -> None:
    key = new_key()
    other = await engine.containers.create({"Image": busybox, "Cmd": ["true"]}, name=key)
    try:
        async with DockerProvider(DockerOptions(image=busybox, pull="never")) as provider:
            with pytest.raises(CreateFailed, match="did not make"):
                await provider.create(SandboxSpec(key=key))
            with pytest.raises(CreateFailed, match="did not make"):
                await provider.attach(key)
        await other.show()
    finally:
        await other.delete(force=True)


async def test_paused_container_is_woken(make, engine: aiodocker.Docker) -> None:
    key = new_key()
    sandbox = await make(key=key)
    await engine.containers.container(sandbox.id).pause()
    async with DockerProvider(DockerOptions(image=images.BUSYBOX)) as provider:
        woken = await provider.attach(key)
        assert woken is not None
        assert (await run(woken, "true")).exit_code == 0


@pytest.mark.parametrize("pull", ["missing", "never", "always"])
async def test_image_that_cannot_be_had_is_one_clear_line(pull: Any) -> None:
    options = DockerOptions(image="localhost:9/no-such-image:1", pull=pull)
    async with DockerProvider(options) as provider:
        with pytest.raises(CreateFailed, match="the image localhost:9/no-such-image:1 is not on this engine") as caught:
            await provider.create(SandboxSpec(key=new_key()))
    assert "\n" not in str(caught.value)


class Registry(BaseHTTPRequestHandler):
    """A registry that has nothing, and only for those who say who they are."""

    said: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        who = self.headers.get("Authorization")
        self.said.append(who)
        self.send_response(404 if who else 401)
        self.send_header("WWW-Authenticate", 'Basic realm="test"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 - the name is http.server's

    def log_message(self, *args: object) -> None:
        pass


async def test_image_is_pulled_with_what_docker_login_keeps_and_no_message_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"localhost:{server.server_port}"
        login = base64.b64encode(b"me:s3cret").decode()
        (tmp_path / "config.json").write_text(json.dumps({"auths": {host: {"auth": login}}}))
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
        async with DockerProvider(DockerOptions(image=f"{host}/team/image")) as provider:
            with pytest.raises(CreateFailed) as caught:
                await provider.create(SandboxSpec(key=new_key()))
        server.shutdown()
    assert f"Basic {login}" in Registry.said
    for secret in ("s3cret", login):
        assert secret not in str(caught.value) + caplog.text


async def test_check_names_a_missing_image_that_is_never_pulled() -> None:
    async with DockerProvider(DockerOptions(image="no-such-image:1", pull="never")) as provider:
        with pytest.raises(CreateFailed, match="no-such-image:1"):
            await provider.check()


async def test_image_without_a_shell_is_refused_and_nothing_is_left(engine: aiodocker.Docker, tmp_path: Path) -> None:
    name, key = f"mabridge-test-empty:{os.getpid()}", new_key()
    (tmp_path / "file").touch()
    tar = await anyio.run_process(["tar", "-C", str(tmp_path), "-c", "."])
    await anyio.run_process(["docker", "import", "-", name], input=tar.stdout)
    try:
        async with DockerProvider(DockerOptions(image=name, pull="never")) as provider:
            with pytest.raises(CreateFailed, match="/bin/sh"):
                await provider.create(SandboxSpec(key=key))
        assert await engine.containers.list(all=True, filters=f'{{"name": ["{key}"]}}') == []
    finally:
        await engine.images.delete(name, force=True)  # the container may still be on its way out


async def test_engine_that_is_not_there_asks_whether_docker_runs(tmp_path: Path) -> None:
    async with DockerProvider(DockerOptions(host=f"unix://{tmp_path}/none.sock")) as provider:
        with pytest.raises(SandboxUnavailable, match="is Docker running"):
            await provider.check()
        with pytest.raises(SandboxUnavailable, match="is Docker running"):
            await provider.create(SandboxSpec(key=new_key()))
        with pytest.raises(SandboxUnavailable, match="is Docker running"):
            await provider.attach(new_key())
        with pytest.raises(SandboxUnavailable, match="is Docker running"):
            _ = [info async for info in provider.list()]


def test_importing_the_provider_imports_no_sdk() -> None:
    script = "import sys, mabridge.providers.docker; sys.exit('aiodocker' in sys.modules or 'aiohttp' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("host", ["nonsense", "ftp://x"])
async def test_host_that_is_none_is_a_config_error(host: str) -> None:
    with pytest.raises(ConfigError, match=host):
        async with DockerProvider(DockerOptions(host=host)):
            pass


async def test_missing_runtime_and_network_are_refused(busybox: str) -> None:
    async with DockerProvider(DockerOptions(image=busybox, runtime="no-such-runtime")) as provider:
        with pytest.raises(NotSupported, match="no-such-runtime"):
            await provider.check()
    async with DockerProvider(DockerOptions(image=busybox, network="no-such-network")) as provider:
        key = new_key()
        with pytest.raises(CreateFailed, match="no-such-network"):
            await provider.create(SandboxSpec(key=key))
        assert [info async for info in provider.list() if info.key == key] == []


@pytest.fixture
def socket_link(tmp_path: Path) -> str:
    link = tmp_path / "link"
    link.symlink_to("/var/run")
    return str(link)


@pytest.mark.parametrize(
    "source", ["/var/run/docker.sock", "/run", "/var/run/", "/", "/var/../run/docker.sock", "/var"]
)
def test_engines_socket_cannot_be_mounted(source: str) -> None:
    with pytest.raises(ValidationError, match="own the engine"):
        DockerMount(source=source, target="/x")


def test_engines_socket_cannot_be_mounted_through_a_link(socket_link: str) -> None:
    with pytest.raises(ValidationError, match="own the engine"):
        DockerMount(source=socket_link, target="/x")


@pytest.mark.parametrize(
    "options",
    [
        {"network": "host"},
        {"network": "container:other"},
        {"user": "root"},
        {"user": "65534"},
        {"memory": "much"},
        {"memory": -1},
        {"env": {"ANTHROPIC_API_KEY": "x"}},
        {"dns": ["1.1.1.1"]},
        {"mounts": [{"source": "/x", "target": "relative"}]},
        {"mounts": [{"source": "/x", "target": "/run"}]},
        {"mounts": [{"target": "/x"}]},
        {"privileged": True},
    ],
)
def test_option_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DockerOptions.model_validate(options)


@pytest.mark.parametrize(("text", "size"), [("512m", 512 << 20), ("2g", 2 << 30), ("1G", 1 << 30), ("64", 64), (7, 7)])
def test_sizes_are_read_as_docker_reads_them(text: Any, size: int) -> None:
    assert DockerOptions(memory=text).memory == size


async def test_secret_of_an_option_reaches_the_command_and_no_message(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    sandbox = await make(env={"TOKEN": {"env": "MY_TOKEN"}, "PLAIN": "1"})
    assert (await sh(sandbox, 'echo "$TOKEN,$PLAIN"')).stdout == b"s3cret,1\n"
    assert "s3cret" not in repr(DockerOptions(env={"TOKEN": {"env": "MY_TOKEN"}}))
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(ConfigError, match="MY_TOKEN is not set"):
        await make(env={"TOKEN": {"env": "MY_TOKEN"}})


async def test_containers_of_others_are_not_listed(make, busybox: str, engine: aiodocker.Docker) -> None:
    other = await engine.containers.create({"Image": busybox, "Cmd": ["true"]}, name=f"other-{new_key()}")
    sandbox = await make()
    try:
        async with DockerProvider(DockerOptions(image=busybox)) as provider:
            ids = [info.id async for info in provider.list()]
        assert sandbox.id in ids
        assert other.id[:12] not in ids
    finally:
        await other.delete(force=True)


async def test_more_than_a_hundred_calls_can_be_open(make) -> None:
    """aiohttp's own limit is a hundred connections, and what is to end a call would wait for one."""
    sandbox = await make(pids_limit=0)
    processes = [await sandbox.open_process(["cat"]) for _ in range(110)]
    await processes[-1].send(b"x")
    with anyio.fail_after(60):
        assert await processes[-1].receive() == b"x"
        async with anyio.create_task_group() as group:
            for process in processes:
                group.start_soon(process.aclose)
