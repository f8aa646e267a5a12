"""What is special to the ``daytona`` provider, at its emulator."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from pydantic import ValidationError

from mabridge.errors import (
    AtCapacity,
    ConfigError,
    CreateFailed,
    NotSupported,
    SandboxError,
    SandboxGone,
    SandboxUnavailable,
)
from mabridge.providers.daytona import DaytonaOptions, DaytonaProvider
from mabridge.sandbox import EnvVar, Sandbox, SandboxSpec, SupportsSuspend
from mabridge.testing.conformance import find, living, new_spec, run, sh, wait_for_file
from tests.emulators import machine
from tests.emulators.daytona import KEY, DaytonaEmulator

pytestmark = pytest.mark.anyio

SHELLS = [shell for shell in ("/bin/bash", "/bin/sh", "/bin/zsh") if Path(shell).exists()]
"""What Daytona gives a text to, and runs in a terminal: zsh in its own images, else bash, else whatever there is."""

EXECUTE = "POST /toolbox/.*/process/execute"


@pytest.fixture
async def emulator(anyio_backend: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[DaytonaEmulator]:
    machine.require()
    monkeypatch.setenv("DAYTONA_API_KEY", KEY)
    async with DaytonaEmulator() as running:
        yield running


@pytest.fixture
async def provider(emulator: DaytonaEmulator) -> AsyncIterator[DaytonaProvider]:
    async with DaytonaProvider(DaytonaOptions(api_url=emulator.url)) as provider:
        yield provider


@pytest.fixture
async def sandbox(provider: DaytonaProvider) -> Sandbox:
    return await provider.create(new_spec())


async def creation(emulator: DaytonaEmulator, **options) -> Sandbox:
    async with DaytonaProvider(DaytonaOptions(api_url=emulator.url, **options)) as provider:
        return await provider.create(new_spec())


async def living_are(emulator: DaytonaEmulator, *ids: str) -> None:
    """Wait until no others are left."""
    with anyio.fail_after(30):
        while [box.id for box in emulator.living] != list(ids):  # noqa: ASYNC110
            await anyio.sleep(0.05)


# Commands.


async def test_command_costs_one_request_and_a_large_stdin_one_more(
    emulator: DaytonaEmulator, sandbox: Sandbox
) -> None:
    emulator.requests.clear()
    assert (await run(sandbox, "cat", stdin=bytes(1000))).stdout == bytes(1000)
    assert [said.rpartition("/")[2] for said in emulator.requests] == ["execute"]
    assert (await run(sandbox, "wc", "-c", stdin=bytes(1_000_000))).stdout == b"1000000\n"
    assert [said.rpartition("/")[2] for said in emulator.requests[1:]] == ["bulk-upload", "execute"]


async def test_it_takes_any_shell_that_daytona_gives_the_text_to(emulator: DaytonaEmulator, sandbox: Sandbox) -> None:
    for shell in SHELLS:
        emulator.shell = shell
        told = await sh(sandbox, 'printf "%s\\0" "$@"; cat; echo err >&2; exit 5', "it's\n!", "$x", stdin=b"\0\xff")
        assert (told.exit_code, told.stdout, told.stderr) == (5, b"it's\n!\0$x\0\0\xff", b"err\n")


async def test_nothing_of_the_script_is_left_behind(sandbox: Sandbox) -> None:
    look = 'ls -A /tmp | grep "^[.]mab-" | grep -v "$MAB_EXEC"'
    await run(sandbox, "cat", stdin=bytes(1_000_000))
    await run(sandbox, "sleep", "60", stdin=bytes(1_000_000), timeout=0.5)
    await sh(sandbox, "sleep 3 & yes | head -c 3000000", max_output=1000)
    with anyio.move_on_after(0.5):
        await run(sandbox, "sleep", "60")
    with anyio.fail_after(30):
        while (await sh(sandbox, look)).stdout != b"":  # noqa: ASYNC110
            await anyio.sleep(0.1)


async def test_background_job_that_says_more_neither_holds_the_call_nor_dies_of_it(sandbox: Sandbox) -> None:
    script = "(while :; do echo late; sleep 0.1; done) & echo $! > job; echo begun; echo err >&2"
    told = await sh(sandbox, script)
    assert told.exit_code == 0
    assert told.stdout.startswith((b"begun\n", b"late\nbegun\n"))
    assert told.stderr == b"err\n"
    job = await wait_for_file(sandbox, "job")
    await anyio.sleep(1)  # it writes meanwhile, to whoever still reads
    assert await living(sandbox, job) == job
    await run(sandbox, "kill", *job)


async def test_output_that_looks_like_the_scripts_own_is_output(sandbox: Sandbox) -> None:
    told = await sh(sandbox, 'echo "$MAB_EXEC 0."; echo .; echo .; env | grep MAB_EXEC')
    marker = told.stdout.split()[0].decode()
    assert told.stdout.decode() == f"{marker} 0.\n.\n.\nMAB_EXEC={marker}\n"


async def test_signals_and_limits_reach_a_command_as_they_are(sandbox: Sandbox) -> None:
    """A shell lets what it does not wait for ignore SIGINT; and what bounds the output must not bound files."""
    told = await sh(sandbox, "grep SigIgn /proc/self/status; ulimit -f; umask; kill -INT $$; echo ignored")
    assert (told.exit_code, told.stdout) == (130, b"SigIgn:\t0000000000000000\nunlimited\n0022\n")


async def test_message_of_a_killed_command_is_not_the_scripts(sandbox: Sandbox) -> None:
    assert (await sh(sandbox, "echo said >&2; kill -9 $$")).stderr == b"said\n"


async def test_command_that_kills_all_it_can_is_dead_and_the_sandbox_lives(sandbox: Sandbox) -> None:
    assert (await sh(sandbox, "kill -9 -1")).exit_code == 137
    assert (await run(sandbox, "echo", "hi")).stdout == b"hi\n"


async def test_program_with_an_equals_sign_is_run_with_variables(sandbox: Sandbox) -> None:
    await sandbox.write_file("a=b", b'#!/bin/sh\necho "$MINE"\n', mode=0o755)
    told = await run(sandbox, f"{sandbox.workdir}/a=b", env={"MINE": "x y"})
    assert (told.exit_code, told.stdout) == (0, b"x y\n")


async def test_variables_are_for_the_command_and_not_for_the_script(sandbox: Sandbox) -> None:
    told = await run(sandbox, "/bin/sh", "-c", 'echo "$PATH"', env={"PATH": "/nowhere", "IFS": "e", "ENV": "/x"})
    assert (told.exit_code, told.stdout) == (0, b"/nowhere\n")


async def test_argument_longer_than_linux_takes_is_refused(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match="131,071 bytes"):
        await run(sandbox, "echo", "x" * 131_072)


async def test_command_called_off_before_it_arrives_never_runs(emulator: DaytonaEmulator, sandbox: Sandbox) -> None:
    emulator.latency = 0.5
    told = await sh(sandbox, "echo ran > ran", stdin=bytes(1_000_000), timeout=0.2)
    assert (told.timed_out, told.stdout) == (True, b"")
    with anyio.move_on_after(0.7):  # the first of its two requests is answered, and the second is on its way
        await sh(sandbox, "echo ran > ran", stdin=bytes(1_000_000))
    emulator.latency = 0.0
    assert (await run(sandbox, "ls")).stdout == b""


async def test_command_whose_connection_breaks_is_killed(emulator: DaytonaEmulator, sandbox: Sandbox) -> None:
    failed: list[SandboxError] = []

    async def call() -> None:
        with pytest.raises(SandboxUnavailable) as caught:
            await sh(sandbox, "echo $$ > pid; sleep 60")
        failed.append(caught.value)

    async with anyio.create_task_group() as group:
        group.start_soon(call)
        pids = await wait_for_file(sandbox, "pid")
        await emulator.break_connections()
    assert failed[0].retryable
    assert await living(sandbox, pids) == []


async def test_command_that_the_daemon_gives_up_is_unavailable(emulator: DaytonaEmulator, sandbox: Sandbox) -> None:
    for status in (408, 500, 502, 503):
        emulator.fail(EXECUTE, status)
        with pytest.raises(SandboxUnavailable):
            await run(sandbox, "true")
    emulator.fail(EXECUTE, 500, body="<html>Bad</html>")
    with pytest.raises(SandboxUnavailable):
        await run(sandbox, "true")
    emulator.fail(EXECUTE, 429, headers={"Retry-After": "3"})
    with pytest.raises(AtCapacity) as caught:
        await run(sandbox, "true")
    assert caught.value.retry_after == 3


async def test_call_on_a_stopped_sandbox_says_that_it_is_stopped(
    emulator: DaytonaEmulator, provider: DaytonaProvider
) -> None:
    spec = new_spec()
    sandbox = await provider.create(spec)
    assert isinstance(sandbox, SupportsSuspend)
    await sandbox.suspend()
    with pytest.raises(SandboxUnavailable, match="it is stopped; to attach to it wakes it"):
        await run(sandbox, "true")
    info = await find(provider, spec.key)
    assert info is not None
    assert info.state == "stopped"
    emulator.requests.clear()
    await provider.remove(info)
    assert not [said for said in emulator.requests if said.endswith("/start")], "it was woken to be removed"
    await living_are(emulator)
    with pytest.raises(SandboxGone):
        await run(sandbox, "true")


# Making sandboxes.


async def test_options_reach_the_service(emulator: DaytonaEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_KEY", KEY)
    await creation(
        emulator,
        api_key=EnvVar(env="OTHER_KEY"),
        target="eu",
        image="debian:13",
        cpu=2,
        memory=4,
        disk=5,
        gpu=1,
        gpu_type=("H100", "H200"),
        os_user="agent",
        domain_allow_list=("pypi.org", "*.example.com"),
        auto_stop_interval=30,
        auto_archive_interval=60,
        ephemeral=True,
        volumes=({"volume_id": "data", "mount_path": "/data", "subpath": "a"},),
        secrets={"TOKEN": "my-secret"},
    )
    (box,) = emulator.boxes.values()
    asked = box.asked
    assert asked.build_info is not None
    assert "FROM debian:13" in (asked.build_info.dockerfile_content or "")
    assert (asked.cpu, asked.memory, asked.disk, asked.gpu, asked.target) == (2, 4, 5, 1, "eu")
    assert [kind.value for kind in asked.gpu_type or []] == ["H100", "H200"]
    assert (asked.user, asked.domain_allow_list) == ("agent", "pypi.org,*.example.com")
    assert (asked.auto_stop_interval, asked.auto_archive_interval, asked.auto_delete_interval) == (30, 60, 0)
    assert asked.volumes is not None
    assert asked.volumes[0].to_dict() == {"volumeId": "data", "mountPath": "/data", "subpath": "a"}
    assert asked.secrets == [{"TOKEN": "my-secret"}]
    assert asked.ttl_minutes == 15


async def test_network_is_only_restricted_if_asked_for(emulator: DaytonaEmulator, provider: DaytonaProvider) -> None:
    await provider.create(new_spec())
    await creation(emulator, network_block_all=True, snapshot="mine")
    await creation(emulator, network_allow_list=("10.0.0.0/8", "192.168.1.0/24"))
    first, second, third = emulator.boxes.values()
    assert not first.asked.network_block_all
    assert (second.asked.network_block_all, second.asked.snapshot) == (True, "mine")
    assert third.asked.network_allow_list == "10.0.0.0/8,192.168.1.0/24"


async def test_restriction_that_the_service_does_not_keep_is_refused(emulator: DaytonaEmulator) -> None:
    emulator.restrictions = False
    for options in (
        {"network_block_all": True},
        {"network_allow_list": ("10.0.0.0/8",)},
        {"domain_allow_list": ("pypi.org",)},
    ):
        with pytest.raises(NotSupported, match=next(iter(options))):
            await creation(emulator, **options)
    await living_are(emulator)


@pytest.mark.parametrize(
    ("options", "about"),
    [
        ({"snapshot": "a", "image": "b"}, "do not go together"),
        ({"cpu": 2}, "need image"),
        ({"image": "a", "gpu": 1}, "ephemeral"),
        ({"image": "a", "gpu_type": ["H100"]}, "needs gpu"),
        ({"network_block_all": True, "domain_allow_list": ["a.com"]}, "allows nothing"),
        ({"network_allow_list": ["10.0.0.0/8"], "domain_allow_list": ["a.com"]}, "do not go together"),
        ({"jwt_token": {"env": "A"}}, "organization_id"),
        ({"jwt_token": {"env": "A"}, "api_key": {"env": "B"}, "organization_id": "o"}, "do not go together"),
        ({"gpus": 1}, "gpus"),
        ({"network_allow_list": []}, "network_allow_list"),
        ({"domain_allow_list": [""]}, "domain_allow_list"),
        ({"domain_allow_list": ["a.com,b.com"]}, "domain_allow_list"),
        ({"network_allow_list": ["10.0.0.0/8"] * 11}, "network_allow_list"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict, about: str) -> None:
    with pytest.raises(ValidationError, match=about):
        DaytonaOptions.model_validate(options)


async def test_gpu_that_daytona_does_not_have_is_refused(emulator: DaytonaEmulator) -> None:
    with pytest.raises(NotSupported, match="H1000"):
        await creation(emulator, image="a", gpu=1, gpu_type=("H1000",), ephemeral=True)
    assert not emulator.boxes


async def test_ephemeral_sandbox_cannot_be_suspended_and_is_still_there(emulator: DaytonaEmulator) -> None:
    async with DaytonaProvider(DaytonaOptions(api_url=emulator.url, ephemeral=True)) as provider:
        sandbox = await provider.create(new_spec())
        assert isinstance(sandbox, SupportsSuspend)
        with pytest.raises(NotSupported, match="ephemeral"):
            await sandbox.suspend()
        assert (await run(sandbox, "true")).exit_code == 0


async def test_rate_limit_is_capacity_with_the_time_to_wait(
    emulator: DaytonaEmulator, provider: DaytonaProvider
) -> None:
    for headers in ({"Retry-After": "7"}, {"Retry-After-sandbox-create": "7"}):
        emulator.fail("POST /api/sandbox$", 429, headers=headers)
        with pytest.raises(AtCapacity) as caught:
            await provider.create(new_spec())
        assert caught.value.retry_after == 7
    assert not emulator.boxes


async def test_sandbox_of_a_request_whose_answer_was_lost_is_removed(
    emulator: DaytonaEmulator, provider: DaytonaProvider
) -> None:
    emulator.fail("POST /api/sandbox$", -1)
    with pytest.raises(SandboxUnavailable):
        await provider.create(new_spec())
    assert len(emulator.boxes) == 1
    await living_are(emulator)


async def test_failing_service_is_unavailable_and_leaves_nothing(
    emulator: DaytonaEmulator, provider: DaytonaProvider
) -> None:
    for status, body in ((500, ""), (502, "<html>Bad Gateway</html>"), (503, "")):
        emulator.fail("POST /api/sandbox$", status, body=body)
        with pytest.raises(SandboxUnavailable) as caught:
            await provider.create(new_spec())
        assert caught.value.retryable
    assert not emulator.boxes


async def test_sandbox_that_does_not_start_in_time_is_removed(emulator: DaytonaEmulator) -> None:
    emulator.start_delay = 3.0
    with pytest.raises(SandboxUnavailable, match="in time"):
        await creation(emulator, timeout=2)
    await living_are(emulator)


async def test_image_that_cannot_be_had_fails_and_leaves_nothing(emulator: DaytonaEmulator) -> None:
    with pytest.raises(CreateFailed, match="could not be pulled"):
        await creation(emulator, image="missing:1")
    await living_are(emulator)


async def test_sandbox_that_is_reached_late_is_waited_for(emulator: DaytonaEmulator, provider: DaytonaProvider) -> None:
    emulator.start_delay, emulator.reach_delay = 0.5, 1.0
    sandbox = await provider.create(new_spec())
    assert (await run(sandbox, "true")).exit_code == 0


async def test_directory_that_cannot_be_made_fails_and_leaves_nothing(
    emulator: DaytonaEmulator, provider: DaytonaProvider
) -> None:
    spec = new_spec()
    elsewhere = SandboxSpec(key=spec.key, labels=spec.labels, workdir="/etc/elsewhere")
    with pytest.raises(CreateFailed, match="cannot make or write /etc/elsewhere"):
        await provider.create(elsewhere)
    await living_are(emulator)


async def test_broken_sandbox_is_replaced(emulator: DaytonaEmulator, provider: DaytonaProvider) -> None:
    spec = new_spec()
    await provider.create(spec)
    (broken,) = emulator.boxes.values()
    broken.state, broken.error = "error", "its runner was lost"
    assert await provider.attach(spec.key) is None
    sandbox = await provider.create(spec)
    assert sandbox.id != broken.id
    assert (await run(sandbox, "true")).exit_code == 0


async def test_sandbox_of_that_name_which_is_not_ours_is_left_alone(
    emulator: DaytonaEmulator, provider: DaytonaProvider
) -> None:
    spec = new_spec()
    await provider.create(spec)
    (box,) = emulator.boxes.values()
    box.asked.labels = {}
    for call in (provider.create(spec), provider.attach(spec.key)):
        with pytest.raises(CreateFailed, match="did not make"):
            await call
    assert emulator.living == [box]


# Finding them.


async def test_list_knows_what_is_new_and_what_is_gone_before_daytonas_does(
    emulator: DaytonaEmulator, provider: DaytonaProvider
) -> None:
    emulator.list_lag = 60.0
    spec, gone = new_spec(), new_spec()
    sandbox, other = await provider.create(spec), await provider.create(gone)
    await other.teardown()
    assert [info.id async for info in provider.list()] == [sandbox.id]
    await living_are(emulator, sandbox.id)
    for box in emulator.boxes.values():
        box.created -= 100.0  # now Daytona lists what is new, and what is gone as started
    async with DaytonaProvider(provider.options) as another:
        assert [info.key async for info in another.list()] == [spec.key]


async def test_list_that_cannot_be_read_whole_is_none(emulator: DaytonaEmulator, provider: DaytonaProvider) -> None:
    emulator.page = 1
    for _ in range(3):
        await provider.create(new_spec())
    emulator.fail("GET /api/sandbox/", 500)
    with pytest.raises(SandboxUnavailable):
        _ = [info async for info in provider.list()]
    assert len([info async for info in provider.list()]) == 3


async def test_what_others_made_is_not_listed(emulator: DaytonaEmulator, provider: DaytonaProvider) -> None:
    await provider.create(new_spec())
    (box,) = emulator.boxes.values()
    box.asked.labels = {"mine": "true"}
    assert [info async for info in provider.list() if info.id != box.id] == []
    async with DaytonaProvider(provider.options) as another:
        assert [info async for info in another.list()] == []


# The client.


async def test_nothing_is_taken_from_a_file_in_the_working_directory(
    emulator: DaytonaEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"DAYTONA_API_KEY={KEY}\nDAYTONA_TARGET=theirs\nDAYTONA_API_URL=http://127.0.0.1:9\n"
    (tmp_path / ".env").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    await creation(emulator)
    (box,) = emulator.boxes.values()
    assert box.asked.target is None
    monkeypatch.delenv("DAYTONA_API_KEY")
    with pytest.raises(ConfigError, match="DAYTONA_API_KEY is not set"):
        await creation(emulator)


async def test_key_is_in_no_error_and_no_log(
    emulator: DaytonaEmulator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WRONG_KEY", "dtn_secret_of_mine")
    caplog.set_level(logging.DEBUG)
    async with DaytonaProvider(DaytonaOptions(api_url=emulator.url, api_key=EnvVar(env="WRONG_KEY"))) as provider:
        with pytest.raises(CreateFailed) as caught:
            await provider.create(new_spec())
    assert "secret_of_mine" not in f"{caught.value!r} {caught.value} {caught.value.__cause__!r} {caplog.text}"


async def test_key_of_the_service_never_enters_the_sandbox(sandbox: Sandbox) -> None:
    assert KEY.encode() not in (await sh(sandbox, "env; cat /proc/*/environ /proc/*/cmdline")).stdout
