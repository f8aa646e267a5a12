"""What is Cloudflare's own: the bridge without a register, its faults, its Worker, and the whole way through it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
import httpx2
import pytest
from anthropic import AsyncAnthropic

from mabridge import ProviderConfig, Worker
from mabridge.errors import (
    AtCapacity,
    ConfigError,
    CreateFailed,
    NotSupported,
    SandboxError,
    SandboxGone,
    SandboxUnavailable,
)
from mabridge.identity import sandbox_key
from mabridge.providers.cloudflare import CloudflareOptions, CloudflareProvider, CloudflareSandbox
from mabridge.providers.cloudflare.script import Command, parse
from mabridge.sandbox import EnvVar, ExecResult, Sandbox, SupportsProcess
from mabridge.testing import Agent, ControlPlane
from mabridge.testing.conformance import find, new_key, new_spec, run, sh, wait_for_file
from tests.emulators.cloudflare import BridgeInPython, CloudflareEmulator, new_bridge

pytestmark = pytest.mark.anyio

KEY = "MABRIDGE_TEST_CLOUDFLARE_OTHER_KEY"
T = TypeVar("T")
Emulator = CloudflareEmulator | BridgeInPython


@pytest.fixture(scope="module", autouse=True)
def key() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY, "an-api-key-of-the-rig")
        yield


@pytest.fixture(scope="module")
async def ours(anyio_backend: str) -> AsyncIterator[Emulator]:
    async with new_bridge("ours", bindings={"WARM_POOL_REFRESH_INTERVAL": "1000"}) as emulator:
        yield emulator


@pytest.fixture(scope="module")
async def vendor(anyio_backend: str) -> AsyncIterator[Emulator]:
    async with new_bridge("vendor") as emulator:
        yield emulator


def provider_of(emulator: Emulator, **options: object) -> CloudflareProvider:
    return CloudflareProvider(
        CloudflareOptions.model_validate({"worker_url": emulator.url, "api_key": EnvVar(env=KEY), **options})
    )


async def until(condition: Callable[[], Awaitable[T | None]]) -> T:
    """What `condition` says as soon as it is true."""
    with anyio.fail_after(60):
        while True:
            if said := await condition():
                return said
            await anyio.sleep(0.1)


@pytest.fixture
async def provider(anyio_backend: str, ours: Emulator) -> AsyncIterator[CloudflareProvider]:
    async with provider_of(ours) as provider:
        yield provider


@pytest.fixture
async def sandbox(provider: CloudflareProvider) -> AsyncIterator[Sandbox]:
    made = await provider.create(new_spec())
    yield made
    await made.teardown()


@pytest.fixture
async def plain(anyio_backend: str, vendor: Emulator) -> AsyncIterator[CloudflareProvider]:
    """The provider over Cloudflare's bridge alone."""
    async with provider_of(vendor) as provider:
        yield provider


async def unlisted(provider: CloudflareProvider, key: str) -> bool:
    return await find(provider, key) is None


class TestVendorsBridgeAlone:
    async def test_commands_and_files_pass_and_another_worker_attaches(
        self, plain: CloudflareProvider, vendor: Emulator
    ) -> None:
        await plain.check()
        spec = new_spec(ttl=600, env={"MINE": "1"})
        sandbox = await plain.create(spec)
        await sandbox.write_file("file", b"\xff\0")
        async with provider_of(vendor) as other:
            attached = await other.attach(spec.key)
            assert attached is not None
            assert (await sh(attached, 'cat; echo "$MINE"', stdin=b"in,")).stdout == b"in,1\n"
            assert await attached.read_file("file", max_bytes=10) == b"\xff\0"
            await attached.keep_alive(600)
        await sandbox.teardown()
        assert await plain.attach(spec.key) is None

    async def test_creators_at_once_end_with_one_sandbox(self, plain: CloudflareProvider) -> None:
        """The bridge starts a container for each of them, and only the last is found again."""
        spec, made = new_spec(ttl=600), list[Sandbox]()

        async def create() -> None:
            made.append(await plain.create(spec))

        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(create)
        await made[0].write_file("mark", b"1")
        assert [await sandbox.read_file("mark", max_bytes=9) for sandbox in made] == [b"1"] * 4
        await made[0].teardown()

    async def test_container_that_slept_is_gone_and_not_taken_for_the_new_one(
        self, plain: CloudflareProvider, vendor: Emulator
    ) -> None:
        spec = new_spec(ttl=600)
        sandbox = await plain.create(spec)
        assert isinstance(sandbox, SupportsProcess)
        await vendor.lose_containers()
        for call in (
            partial(run, sandbox, "true"),
            partial(run, sandbox, "true", stdin=bytes(300_000)),
            partial(sandbox.read_file, "x", max_bytes=1),
            partial(sandbox.keep_alive, 60),
            partial(sandbox.open_process, ["true"]),
        ):
            with pytest.raises(SandboxGone):
                await call()
        assert await plain.attach(spec.key) is None
        assert (await run(await plain.create(spec), "ls", "-A")).stdout == b""
        await sandbox.teardown()

    async def test_what_it_cannot_do_is_refused_by_name(self, plain: CloudflareProvider) -> None:
        with pytest.raises(NotSupported, match="ttl to that at most, or deploy"):
            await plain.create(new_spec(ttl=601))
        with pytest.raises(NotSupported, match="no list of sandboxes"):
            _ = [info async for info in plain.list()]


class TestRegister:
    async def test_looking_for_a_sandbox_starts_none(self, provider: CloudflareProvider, ours: Emulator) -> None:
        before = ours.control.started
        assert await provider.attach(new_key()) is None
        async with httpx2.AsyncClient(base_url=ours.url, headers={"Authorization": f"Bearer {ours.api_key}"}) as client:
            answer = await client.post(f"/v1/sandbox/{new_key()}/exec", json={"argv": ["true"]}, timeout=60)
        assert answer.status_code == 502
        assert ours.control.started == before

    async def test_creators_at_once_start_one_container(self, provider: CloudflareProvider, ours: Emulator) -> None:
        spec, before = new_spec(), ours.control.started
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(provider.create, spec)
        assert ours.control.started == before + 1
        sandbox = await provider.attach(spec.key)
        assert sandbox is not None
        await sandbox.teardown()

    async def test_alarm_removes_what_nobody_asks_for(self, provider: CloudflareProvider, ours: Emulator) -> None:
        before = set(ours.control.containers)
        await provider.create(new_spec(ttl=1))
        made = set(ours.control.containers) - before
        assert len(made) == 1

        async def removed() -> bool:
            return not made & set(ours.control.containers)

        await until(removed)

    async def test_container_that_stopped_by_itself_is_gone(self, provider: CloudflareProvider, ours: Emulator) -> None:
        spec, before = new_spec(), set(ours.control.containers)
        sandbox = await provider.create(spec)
        (made,) = set(ours.control.containers) - before
        await ours.control.end(made)

        async def absent() -> bool:
            return await provider.attach(spec.key) is None

        await until(absent)
        with pytest.raises(SandboxGone):
            await run(sandbox, "true")
        assert await find(provider, spec.key) is None

    async def test_sandboxes_are_listed_with_what_they_were_made_with(self, provider: CloudflareProvider) -> None:
        spec = new_spec()
        sandbox = await provider.create(spec)
        info = await find(provider, spec.key)
        await sandbox.teardown()
        assert info is not None
        assert info.labels == spec.labels
        assert info.created_at is not None
        assert abs(datetime.now(UTC) - info.created_at) < timedelta(minutes=5)

    async def test_no_route_is_open_without_the_key(self, ours: Emulator) -> None:
        paths = ("/v1/pool/stats", "/v1/openapi.json", "/mabridge/v1", "/mabridge/v1/sandboxes", "/", "/other")
        async with httpx2.AsyncClient(base_url=ours.url, timeout=60) as client:
            for path in paths:
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}):
                    assert (await client.get(path, headers=headers)).status_code == 401, path

    async def test_worker_without_a_key_serves_nobody_and_the_check_says_why(self, anyio_backend: str) -> None:
        keyless = new_bridge("ours", bindings={"SANDBOX_API_KEY": None})
        async with keyless as emulator, provider_of(emulator) as provider:
            with pytest.raises(ConfigError, match="no SANDBOX_API_KEY"):
                await provider.check()
            with pytest.raises(CreateFailed, match="wrangler secret put"):
                await provider.create(new_spec())
            assert emulator.control.started == 0

    async def test_bridge_that_is_open_to_all_fails_the_check(self, anyio_backend: str) -> None:
        keyless = new_bridge("vendor", bindings={"SANDBOX_API_KEY": None})
        async with keyless as emulator, provider_of(emulator) as provider:
            with pytest.raises(ConfigError, match="anybody can run commands there"):
                await provider.check()


class TestFaults:
    async def test_no_room_for_a_container_is_at_capacity_until_there_is_room(
        self, provider: CloudflareProvider, ours: Emulator
    ) -> None:
        """The vendor's pool would take what it had when the platform refused one for its size, for good."""
        spec = new_spec()
        ours.control.max_instances = len(ours.control.containers)
        with anyio.fail_after(60), pytest.raises(AtCapacity):
            await provider.create(spec)
        assert await find(provider, spec.key) is None
        ours.control.max_instances = 1000

        async def created() -> Sandbox | None:
            with suppress(AtCapacity):
                return await provider.create(spec)
            return None

        await (await until(created)).teardown()

    async def test_rate_limit_is_at_capacity_and_says_when(self, provider: CloudflareProvider, ours: Emulator) -> None:
        await provider.attach(new_key())
        await ours.fail_next("/mabridge/v1/sandboxes/", 429, headers={"Retry-After": "7"})
        with pytest.raises(AtCapacity) as caught:
            await provider.create(new_spec())
        assert caught.value.retry_after == 7

    async def test_fault_of_the_worker_is_unavailable_and_one_line(
        self, provider: CloudflareProvider, ours: Emulator
    ) -> None:
        await provider.attach(new_key())
        await ours.fail_next("/mabridge/v1/sandboxes/", 500, body="<html>\n<h1>Error 1101</h1>\n</html>")
        with pytest.raises(SandboxUnavailable, match="500") as caught:
            await provider.attach(new_key())
        assert "\n" not in str(caught.value)

    async def test_create_that_fails_half_way_leaves_nothing(
        self, provider: CloudflareProvider, ours: Emulator
    ) -> None:
        spec = new_spec()
        await ours.fail_next("/exec", 500)
        with pytest.raises(SandboxUnavailable):
            await provider.create(spec)
        assert await find(provider, spec.key) is None

    async def test_other_server_is_told_from_the_bridge(self, ours: Emulator) -> None:
        async with provider_of(ours, worker_url=f"{ours.url}/elsewhere") as provider:
            with pytest.raises(SandboxError, match="not the Worker of Cloudflare's bridge") as caught:
                await provider.check()
            assert not caught.value.retryable

    async def test_end_that_the_bridge_made_up_is_not_taken_for_one(self, sandbox: Sandbox) -> None:
        """It may say that a command ended well which still runs (sandbox-sdk issue 873): here its script was killed."""
        with pytest.raises(SandboxUnavailable, match="was not told"):
            await sh(sandbox, 'kill -9 "$(grep -o "PPid:.*" /proc/$PPID/status | grep -o "[0-9]*")"', timeout=30)
        assert (await run(sandbox, "true")).exit_code == 0

    async def test_key_appears_in_no_error(self, ours: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(KEY, "a-secret-that-is-wrong")
        async with provider_of(ours) as provider:
            with pytest.raises(SandboxError) as caught:
                await provider.check()
        assert "a-secret" not in f"{caught.value!r} {caught.value} {caught.value.__cause__!r}"


class TestSandbox:
    async def test_command_too_large_for_the_bridge_is_refused(self, sandbox: Sandbox) -> None:
        with pytest.raises(NotSupported, match="120,000"):
            await run(sandbox, "echo", "x" * 120_000)

    async def test_removing_the_working_directory_does_not_break_the_sandbox(self, sandbox: Sandbox) -> None:
        assert (await run(sandbox, "rm", "-rf", "/workspace", cwd="/")).exit_code == 0
        assert (await run(sandbox, "pwd")).stdout == b"/workspace\n"

    async def test_output_beyond_what_the_worker_can_carry_is_cut_and_said_to_be(self, sandbox: Sandbox) -> None:
        result = await run(sandbox, "head", "-c", "12000000", "/dev/zero", max_output=50_000_000)
        assert (len(result.stdout), result.truncated) == (10 * 1024 * 1024, True)

    async def test_nothing_of_a_call_stays_behind(self, sandbox: Sandbox) -> None:
        await run(sandbox, "cat", stdin=bytes(300_000))
        await run(sandbox, "sleep", "9", timeout=0.3)
        with anyio.move_on_after(0.2):
            await run(sandbox, "sleep", "9", stdin=bytes(300_000))

        async def tidy() -> bool:
            first, second = [(await run(sandbox, "ls", "-A", "/var/lib/mabridge")).stdout.split() for _ in range(2)]
            ours = {b"state", *(name for name in first if name.startswith(b"program-"))}
            return set(first) & set(second) == ours  # what is in one only is of that very call

        await until(tidy)
        assert (await run(sandbox, "ls", "-A")).stdout == b""

    async def test_command_runs_under_a_bash_whose_here_strings_are_files(
        self, provider: CloudflareProvider, ours: Emulator
    ) -> None:
        """As they were before bash 5.1."""
        before = set(ours.control.containers)
        sandbox = await provider.create(new_spec())
        assert isinstance(sandbox, CloudflareSandbox)
        (made,) = set(ours.control.containers) - before
        command = Command(
            "call",
            instance=sandbox.instance,
            argv=["sh", "-c", "cat; echo err >&2; exit 3"],
            cwd="/workspace",
            variables=["A=b"],
            timeout=20,
            max_output=1000,
        )
        process = await ours.control.containers[made].machine.spawn(
            ["/bin/bash", "-c", shlex.join(command.argv(b"in"))],
            env={"PATH": os.environ["PATH"], "BASH_COMPAT": "50"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        said, _ = await process.communicate()
        assert parse(said, "call", 1000) == ExecResult(exit_code=3, stdout=b"in", stderr=b"err\n")
        await sandbox.teardown()

    async def test_process_whose_stream_was_tampered_with_does_not_fill_the_worker(self, sandbox: Sandbox) -> None:
        assert isinstance(sandbox, SupportsProcess)
        process = await sandbox.open_process(["cat"])
        flood = """
            for f in /proc/[0-9]*; do
                grep -qs 'program-.* hold ' "$f/cmdline" && exec head -c 3000000 /dev/zero > "$f/fd/1"
            done
        """
        async with anyio.create_task_group() as group:
            group.start_soon(partial(sh, sandbox, flood))
            with anyio.fail_after(60), pytest.raises(SandboxUnavailable, match="makes no sense"):
                await process.receive()
            await process.aclose()

    async def test_connection_serves_one_call_after_another(self, sandbox: Sandbox, ours: Emulator) -> None:
        """An answer that is not read to its end costs a new connection, and TLS, for each call."""
        await run(sandbox, "true")
        before = await ours.connections()
        for _ in range(5):
            await run(sandbox, "true")
        assert await ours.connections() == before

    async def test_standard_error_opened_anew_loses_nothing(self, sandbox: Sandbox) -> None:
        result = await sh(sandbox, "echo one >&2; echo two > /dev/stderr; echo three >&2")
        assert result.stderr == b"one\ntwo\nthree\n"


class TestOptions:
    @pytest.mark.parametrize("url", ["example.dev", "http://example.dev", "ftp://example.dev", "https://a@b.dev"])
    def test_address_that_is_none_or_not_safe_is_refused(self, url: str) -> None:
        with pytest.raises(ValueError, match="https"):
            CloudflareOptions(worker_url=url)

    async def test_missing_key_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CLOUDFLARE_SANDBOX_API_KEY", raising=False)
        with pytest.raises(ConfigError, match="CLOUDFLARE_SANDBOX_API_KEY"):
            async with CloudflareProvider(CloudflareOptions(worker_url="https://example.dev")):
                pass

    def test_credential_of_anthropics_is_refused(self) -> None:
        with pytest.raises(ValueError, match="Anthropic"):
            CloudflareOptions(worker_url="https://example.dev", env={"ANTHROPIC_API_KEY": "x"})


class TestWholeWay:
    async def test_session_runs_and_another_worker_goes_on_in_the_middle_of_a_command(self, ours: Emulator) -> None:
        replies: list[str] = []

        async def brain(agent: Agent) -> None:
            await agent.call("write", {"file_path": "notes.txt", "content": "one\ntwo\n"})
            await agent.call("bash", {"command": "X=kept; cd /tmp"})
            slow = "echo ran >> /workspace/log; sleep 3; cat /workspace/log"
            replies.append((await agent.call("bash", {"command": slow})).text)
            replies.append((await agent.call("bash", {"command": "echo $X; pwd; wc -l < /workspace/log"})).text)
            replies.append((await agent.call("grep", {"pattern": "tw.", "path": "/workspace"})).text)

        options = {"worker_url": ours.url, "api_key": {"env": KEY}}
        config = ProviderConfig(type="cloudflare", options=options, when_done="teardown")
        before = ours.control.started
        async with (
            ControlPlane(lease_ttl=2.0) as plane,
            AsyncAnthropic(base_url=plane.url, api_key="unused") as client,
            provider_of(ours) as provider,
        ):
            environment = plane.create_environment()
            new_worker = partial(
                Worker,
                client,
                environment_id=environment.id,
                environment_key=environment.key,
                providers={"cloudflare": config},
                max_idle=0.2,
            )
            session = environment.create_session(brain, message="go")
            key = sandbox_key(environment.id, session.id)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(new_worker().run)
                sandbox = await until(partial(provider.attach, key))
                await wait_for_file(sandbox, "log")
                tasks.cancel_scope.cancel()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(new_worker().run)
                await session.wait_idle(timeout=90)
                await until(partial(unlisted, provider, key))
                tasks.cancel_scope.cancel()
        assert [reply.split() for reply in replies[:2]] == [["ran"], ["kept", "/tmp", "1"]]
        assert replies[2].endswith("notes.txt:2:two")
        assert ours.control.started == before + 1


class TestCommandLine:
    @staticmethod
    async def check(tmp_path: Path, url: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
        config = tmp_path / "mabridge.toml"
        config.write_text(
            f'[providers.cf]\ntype = "cloudflare"\nworker_url = {json.dumps(url)}\napi_key = {{ env = "{KEY}" }}\n'
        )
        return await anyio.run_process(
            [sys.executable, "-m", "mabridge.cli", "check", "cf", "--config", str(config)],
            env={**os.environ, **variables},
            check=False,
        )

    async def test_check_makes_uses_and_removes_a_sandbox(self, tmp_path: Path, ours: Emulator) -> None:
        done = await self.check(tmp_path, ours.url)
        assert done.returncode == 0, done.stderr
        assert b"ok" in done.stdout

    async def test_check_tells_a_wrong_key_in_a_line(self, tmp_path: Path, ours: Emulator) -> None:
        done = await self.check(tmp_path, ours.url, **{KEY: "wrong"})
        assert done.returncode == 2
        assert done.stderr.decode().strip().endswith(f"the Worker at {ours.url} refuses the key in {KEY}")

    @pytest.mark.parametrize("url", ["http://127.0.0.1:9", "https://mabridge.invalid"])
    async def test_check_tells_in_a_line_that_nobody_is_there(self, tmp_path: Path, url: str) -> None:
        done = await self.check(tmp_path, url)
        assert done.returncode == 2
        assert f"the Worker at {url} cannot be reached" in done.stderr.decode()
        assert len(done.stderr.strip().splitlines()) == 1
