"""What is Vercel's own: sessions and their end, broken streams, its network policy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import anyio
import anyio.to_thread
import pytest

from mabridge.errors import (
    AtCapacity,
    ConfigError,
    CreateFailed,
    NotSupported,
    SandboxError,
    SandboxGone,
    SandboxUnavailable,
)
from mabridge.identity import KEY_LABEL
from mabridge.providers.vercel import VercelOptions, VercelProvider
from mabridge.providers.vercel.options import create_options
from mabridge.sandbox import Sandbox, SandboxSpec, SupportsProcess, SupportsSuspend
from mabridge.testing.conformance import find, new_key, new_spec, run, sh, wait_for_file
from tests.emulators import machine
from tests.emulators.vercel import PROJECT, TEAM, TOKEN, VercelEmulator

pytestmark = pytest.mark.anyio


@pytest.fixture
async def emulator() -> AsyncIterator[VercelEmulator]:
    machine.require()
    async with VercelEmulator() as emulator:
        yield emulator


@pytest.fixture
async def provider(emulator: VercelEmulator) -> AsyncIterator[VercelProvider]:
    async with made(emulator) as provider:
        yield provider


@pytest.fixture
async def sandbox(provider: VercelProvider) -> Sandbox:
    return await provider.create(new_spec())


def made(emulator: VercelEmulator, **more) -> VercelProvider:
    return VercelProvider(VercelOptions.model_validate({**emulator.options, **more}))


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - the emulator tells nobody
            await anyio.sleep(0.05)


async def until_stopped(emulator: VercelEmulator, key: str) -> None:
    await until(lambda: emulator.sandboxes[key].session.status == "stopped")


async def test_slow_start_is_waited_for_by_all_who_create(emulator: VercelEmulator, provider: VercelProvider):
    emulator.start_delay = 0.7
    spec, got = new_spec(), []

    async def create() -> None:
        sandbox = await provider.create(spec)
        got.append((await run(sandbox, "pwd")).stdout)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(create)
    assert got == [b"/workspace\n"] * 3


async def test_create_cancelled_while_the_sandbox_starts_leaves_nothing(
    emulator: VercelEmulator, provider: VercelProvider
):
    emulator.start_delay = 0.7
    with anyio.move_on_after(0.2):
        await provider.create(new_spec())
    assert emulator.sandboxes == {}


async def test_sandbox_whose_create_was_not_answered_is_found(emulator: VercelEmulator, provider: VercelProvider):
    emulator.lose("/v3/sandboxes")
    sandbox = await provider.create(new_spec())
    assert (await run(sandbox, "true")).exit_code == 0
    assert list(emulator.sandboxes) == [sandbox.id]


async def test_create_survives_a_fault_that_passes(emulator: VercelEmulator, provider: VercelProvider):
    emulator.fail(2, 503, "/v3/sandboxes")
    assert (await run(await provider.create(new_spec()), "true")).exit_code == 0


async def test_create_gives_up_on_a_fault_that_stays(emulator: VercelEmulator, provider: VercelProvider):
    emulator.fail(3, 503, "/v3/sandboxes")
    with pytest.raises(SandboxUnavailable, match="503"):
        await provider.create(new_spec())


async def test_failed_preparation_leaves_nothing(emulator: VercelEmulator, provider: VercelProvider):
    emulator.fail(3, 500, "/cmd")
    with pytest.raises(SandboxUnavailable):
        await provider.create(new_spec())
    assert emulator.sandboxes == {}


async def test_rate_limit_is_at_capacity_with_the_time_to_wait(
    emulator: VercelEmulator, provider: VercelProvider, sandbox: Sandbox
):
    emulator.fail(1, 429, "/v3/sandboxes", **{"Retry-After": "7"})
    with pytest.raises(AtCapacity) as caught:
        await provider.create(new_spec())
    assert caught.value.retry_after == 7
    emulator.fail(1, 429, "/cmd", **{"X-RateLimit-Reset": "99999999999"})
    with pytest.raises(AtCapacity) as caught:
        await run(sandbox, "touch", "ran")
    assert caught.value.retry_after is not None
    assert (await run(sandbox, "ls")).stdout == b""


async def test_time_longer_than_vercel_gives_is_told(provider: VercelProvider):
    with pytest.raises(CreateFailed, match="timeout must be at most"):
        await provider.create(new_spec(ttl=20_000))


async def test_keeping_alive_longer_than_vercel_gives_is_told(sandbox: Sandbox):
    with pytest.raises(SandboxError, match="18000000") as caught:
        await sandbox.keep_alive(20_000)
    assert not caught.value.retryable


async def test_foreign_sandbox_of_the_same_name_is_left_alone(emulator: VercelEmulator, provider: VercelProvider):
    sandbox = await provider.create(new_spec())
    emulator.sandboxes[sandbox.id].body["tags"] = {"whose": "mine"}
    with pytest.raises(CreateFailed, match="did not make"):
        await provider.create(SandboxSpec(key=sandbox.id))
    assert await find(provider, sandbox.id) is None


async def test_working_directory_of_any_name_is_found_again(provider: VercelProvider):
    spec = SandboxSpec(key=new_key(), workdir="/srv/a b/é 'x' $HOME")
    sandbox = await provider.create(spec)
    attached = await provider.attach(spec.key)
    assert attached is not None
    assert sandbox.workdir == attached.workdir == spec.workdir
    assert (await sh(attached, "touch f && pwd")).stdout.decode() == spec.workdir + "\n"


async def test_removal_stops_it_first_where_vercel_insists(emulator: VercelEmulator, sandbox: Sandbox):
    emulator.delete_needs_stop, emulator.stop_delay = True, 0.4
    await sandbox.teardown()
    assert emulator.sandboxes == {}


async def test_time_that_is_up_is_told_from_a_stop(emulator: VercelEmulator, provider: VercelProvider):
    over, stopped = await provider.create(new_spec(ttl=2)), await provider.create(new_spec())
    emulator._stop(emulator.sandboxes[stopped.id].session)  # as somebody may do at Vercel's console
    await until_stopped(emulator, over.id)
    with pytest.raises(SandboxGone, match="time was up"):
        await run(over, "true")
    with pytest.raises(SandboxUnavailable, match="attach wakes") as caught:
        await run(stopped, "true")
    assert caught.value.retryable
    assert await find(provider, stopped.id) is not None
    assert await find(provider, over.id) is None
    assert list(emulator.sandboxes) == [stopped.id], "what is over is removed by whoever meets it"


async def test_key_whose_time_was_up_gets_a_new_sandbox(emulator: VercelEmulator, provider: VercelProvider):
    sandbox = await provider.create(new_spec(ttl=2))
    await sandbox.write_file("old", b"")
    await until_stopped(emulator, sandbox.id)
    again = await provider.create(SandboxSpec(key=sandbox.id))
    assert (await run(again, "ls")).stdout == b""


async def test_suspended_while_it_is_saved_is_waited_for_and_woken(emulator: VercelEmulator, provider: VercelProvider):
    emulator.stop_delay = 0.6
    sandbox = await provider.create(new_spec())
    assert isinstance(sandbox, SupportsSuspend)
    await sandbox.write_file("mark", b"kept")
    await sandbox.suspend()
    woken = await provider.attach(sandbox.id)
    assert woken is not None
    assert await woken.read_file("mark", max_bytes=10) == b"kept"
    with pytest.raises(SandboxUnavailable, match="attach finds it"):
        await run(sandbox, "true")


async def test_attach_that_meets_a_stop_looks_again(emulator: VercelEmulator, provider: VercelProvider):
    sandbox = await provider.create(new_spec())
    emulator.fail(1, 410, "/cmd")
    assert await provider.attach(sandbox.id) is not None


async def test_suspend_that_would_lose_the_files_is_refused(emulator: VercelEmulator):
    async with made(emulator, persistent=False) as provider:
        sandbox = await provider.create(new_spec())
        assert isinstance(sandbox, SupportsSuspend)
        with pytest.raises(NotSupported, match="persistent"):
            await sandbox.suspend()
        emulator._stop(emulator.sandboxes[sandbox.id].session)
        assert await provider.attach(sandbox.id) is None, "its files are lost, so it is not there"
    assert emulator.sandboxes == {}


async def test_streams_that_break_lose_and_repeat_nothing(emulator: VercelEmulator, sandbox: Sandbox):
    emulator.cut_after = 2
    script = 'echo x >> runs; for n in 1 2 3 4 5 6; do head -c 60000 /dev/zero; echo "$n"; sleep 0.1; done; exit 5'
    result = await sh(sandbox, script, max_output=1_000_000)
    emulator.cut_after = None
    assert (result.exit_code, result.stdout) == (5, b"".join(bytes(60_000) + b"%d\n" % n for n in range(1, 7)))
    assert await sandbox.read_file("runs", max_bytes=100) == b"x\n"


async def test_held_process_whose_stream_breaks_goes_on(emulator: VercelEmulator, sandbox: Sandbox):
    assert isinstance(sandbox, SupportsProcess)
    process = await sandbox.open_process(["cat"])
    for data in (b"one", bytes(range(256)), b"three"):
        await process.send(data)
        assert await process.receive() == data
        emulator.cut()
    await process.aclose()


async def test_output_that_nobody_wants_is_not_sent(emulator: VercelEmulator, sandbox: Sandbox):
    (session,) = (each.session for each in emulator.sandboxes.values())

    async def flood() -> None:
        await run(sandbox, "yes", timeout=120, max_output=1000)

    async with anyio.create_task_group() as group:
        group.start_soon(flood)
        with anyio.fail_after(60):
            size, before = 0, -1
            while size == 0 or size != before:  # it grows for ever, if nothing is done
                await anyio.sleep(1)
                before, size = size, sum(len(command.log) for command in session.commands.values())
        assert (await sh(sandbox, "grep -l yes /proc/[0-9]*/comm | wc -l")).stdout == b"1\n", "it runs on"
        group.cancel_scope.cancel()


async def test_what_is_left_in_the_background_does_not_cut_the_output(sandbox: Sandbox):
    result = await sh(sandbox, "sleep 50 & head -c 100000 /dev/zero; printf end >&2; exit 4", max_output=100_000)
    assert (result.exit_code, result.stdout, result.stderr) == (4, bytes(100_000), b"end")
    assert not result.truncated
    result = await sh(sandbox, "yes & sleep 50 >&2 & echo err >&2; sleep 0.1; kill $!; exit 4", max_output=10)
    assert (result.exit_code, result.stderr, result.truncated) == (4, b"err\n", True)


async def test_what_is_left_in_the_background_may_go_on_to_speak(sandbox: Sandbox):
    result = await sh(sandbox, "{ until [ -e go ]; do sleep 0.1; done; echo late; echo late >&2; echo > ended; } &")
    assert (result.exit_code, result.stdout) == (0, b"")
    await sandbox.write_file("go", b"")
    await wait_for_file(sandbox, "ended")


async def test_path_that_leads_nowhere_is_the_commands_alone(sandbox: Sandbox):
    result = await run(sandbox, "/bin/sh", "-c", 'echo "$PATH"', env={"PATH": "/nowhere"}, stdin=b"x")
    assert (result.exit_code, result.stdout) == (0, b"/nowhere\n")


async def test_network_is_closed_unless_options_open_it(emulator: VercelEmulator, provider: VercelProvider):
    await provider.create(new_spec())
    assert emulator.bodies[-1]["networkPolicy"] == {"mode": "deny-all"}
    async with made(emulator, network_policy={"allow": ["pypi.org"], "subnets": {"deny": ["10.0.0.0/8"]}}) as limited:
        await limited.create(new_spec())
    assert emulator.bodies[-1]["networkPolicy"] == {"allow": {"pypi.org": []}, "subnets": {"deny": ["10.0.0.0/8"]}}


async def test_network_policy_that_is_not_confirmed_is_no_sandbox(emulator: VercelEmulator, provider: VercelProvider):
    emulator.echo_policy = False
    with pytest.raises(NotSupported, match="network_policy"):
        await provider.create(new_spec())
    assert emulator.sandboxes == {}


async def test_injected_header_reaches_vercel_and_never_the_sandbox(
    emulator: VercelEmulator, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    rule = {"transform": [{"headers": {"Authorization": {"env": "MY_TOKEN"}, "X-Plain": "a"}}]}
    async with made(emulator, network_policy={"allow": {"api.example.com": [rule]}}) as provider:
        assert "s3cret" not in repr(provider.options)
        sandbox = await provider.create(new_spec())
        assert b"s3cret" not in (await sh(sandbox, "env; cat /proc/[0-9]*/cmdline")).stdout
    sent = emulator.bodies[-1]["networkPolicy"]["allow"]["api.example.com"]
    assert sent == [{"transform": [{"headers": {"Authorization": "s3cret", "X-Plain": "a"}}]}]


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"type": "git", "url": "https://x/y.git", "depth": 1}, {"type": "git", "url": "https://x/y.git", "depth": 1}),
        ({"type": "tarball", "url": "https://x/y.tgz"}, {"type": "tarball", "url": "https://x/y.tgz"}),
        ({"type": "snapshot", "snapshot_id": "snap_1"}, {"type": "snapshot", "snapshotId": "snap_1"}),
    ],
)
async def test_options_are_passed_on(emulator: VercelEmulator, given: dict[str, object], sent: dict[str, object]):
    more = {
        "source": given,
        "resources": {"vcpus": 4},
        "snapshot_expiration": 86400,
        "region": "iad1",
        "tags": {"a": "b"},
    }
    async with made(emulator, **more) as provider:
        spec = new_spec()
        await provider.create(spec)
    body = emulator.bodies[-1]
    assert body["source"] == sent
    assert (body["resources"], body["snapshotExpiration"], body["region"]) == ({"vcpus": 4}, 86_400_000, "iad1")
    assert body["tags"] == {"a": "b", **spec.labels, KEY_LABEL: spec.key}
    assert (body["timeout"], body["persistent"]) == (900_000, True)


def test_more_tags_than_vercel_takes_are_refused():
    options = VercelOptions(tags={"a": "1", "b": "2", "c": "3"})
    with pytest.raises(ConfigError, match="6 tags"):
        create_options(options, new_spec(), {})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"token": {"env": "VERCEL_EMULATOR_TOKEN"}}, "team_id and project_id"),
        ({"team_id": "t"}, "for the option token"),
    ],
)
async def test_half_of_the_credentials_is_refused(given: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("VERCEL_TEAM_ID", "VERCEL_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VERCEL_EMULATOR_TOKEN", TOKEN)
    with pytest.raises(ConfigError, match=said):
        async with VercelProvider(VercelOptions.model_validate(given)):
            pass


async def test_credentials_are_found_in_vercels_own_variables(
    emulator: VercelEmulator, monkeypatch: pytest.MonkeyPatch
):
    for name in ("VERCEL_OIDC_TOKEN", "VERCEL_TOKEN", "VERCEL_TEAM_ID", "VERCEL_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)
    async with VercelProvider(VercelOptions(base_url=emulator.url)) as provider:
        with pytest.raises(ConfigError, match="VERCEL_TOKEN"):
            await provider.check()
        for name, value in (("TOKEN", TOKEN), ("TEAM_ID", TEAM), ("PROJECT_ID", PROJECT)):
            monkeypatch.setenv(f"VERCEL_{name}", value)
        await provider.check()


async def test_project_that_is_not_there_is_told(emulator: VercelEmulator):
    async with made(emulator, project_id="prj_nobody_has") as provider:
        with pytest.raises((ConfigError, SandboxError), match="Project not found"):
            await provider.check()
