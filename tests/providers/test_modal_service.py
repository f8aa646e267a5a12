"""The `modal` provider when Modal hurts, and what it is asked for, on an emulated Modal."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator

import anyio
import pytest
from modal_proto import api_pb2
from pydantic import ValidationError

from mabridge.errors import AtCapacity, ConfigError, CreateFailed, NotSupported, SandboxGone, SandboxUnavailable
from mabridge.providers.modal import ModalProvider
from mabridge.sandbox import EnvVar, Process, Sandbox, SandboxSpec
from mabridge.testing.conformance.helpers import find, new_spec, run, sh, wait_for_file
from tests.emulators.modal import Emulator, emulated
from tests.emulators.modal.service import Faults
from tests.providers.test_modal import options

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def emulator(anyio_backend: str) -> AsyncIterator[Emulator]:
    async with emulated() as emulator:
        yield emulator


@pytest.fixture
def faults(emulator: Emulator) -> AsyncIterator[Faults]:
    """What goes wrong, until the test is done."""
    yield emulator.faults
    emulator.faults.__init__()


@pytest.fixture(scope="module")
async def provider(emulator: Emulator) -> AsyncIterator[ModalProvider]:
    async with ModalProvider(options(emulator)) as provider:
        yield provider


@pytest.fixture(scope="module")
async def sandbox(provider: ModalProvider) -> AsyncIterator[Sandbox]:
    made = await provider.create(new_spec())
    yield made
    await made.teardown()


async def test_options_reach_modal_as_they_are_named(emulator: Emulator) -> None:
    asked = options(
        emulator,
        image="registry.example.com/team/image:1",
        cpu=(0.5, 2.0),
        memory=512,
        region=("us-east", "eu-west"),
        timeout=3000,
        outbound_cidr_allowlist=("10.0.0.0/8",),
        outbound_domain_allowlist=("example.com",),
        secrets=("known",),
        volumes={"/data": "stuff"},
        env={"MINE": "1", "KEY": EnvVar(env="MODAL_TOKEN_ID")},
    )
    async with ModalProvider(asked) as provider:
        sandbox = await provider.create(new_spec())
        told = await sh(sandbox, 'echo "$MINE,$KEY,$FROM_SECRET"')
        await sandbox.teardown()
    assert told.stdout == b"1,ak-emulated,yes\n"
    sent = emulator.definitions[-1]
    assert (sent.resources.milli_cpu, sent.resources.milli_cpu_max, sent.resources.memory_mb) == (500, 2000, 512)
    assert list(sent.scheduler_placement.regions) == ["us-east", "eu-west"]
    assert sent.timeout_secs == 3000
    assert sent.network_access.network_access_type == api_pb2.NetworkAccess.NetworkAccessType.ALLOWLIST
    assert list(sent.network_access.allowed_cidrs) == ["10.0.0.0/8"]
    assert list(sent.network_access.allowed_domains) == ["example.com"]
    assert [(mount.mount_path, mount.volume_id) for mount in sent.volume_mounts] == [("/data", "vo-stuff")]
    built = emulator.dockerfiles[-1]
    assert built[0] == "FROM registry.example.com/team/image:1"
    assert "ENTRYPOINT []" in built, "an image's own first process would run instead"


async def test_blocked_network_is_asked_for_as_such(emulator: Emulator) -> None:
    async with ModalProvider(options(emulator, block_network=True)) as provider:
        await (await provider.create(new_spec())).teardown()
    blocked = api_pb2.NetworkAccess.NetworkAccessType.BLOCKED
    assert emulator.definitions[-1].network_access.network_access_type == blocked


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_network": True, "outbound_cidr_allowlist": ["10.0.0.0/8"]},
        {"token_secret": None},
        {"timeout": 86_401},
        {"env": {"ANTHROPIC_API_KEY": "x"}},
        {"env": {"A B": "x"}},
    ],
)
def test_options_that_cannot_be_are_refused(emulator: Emulator, wrong: dict[str, object]) -> None:
    with pytest.raises((ValidationError, ValueError), match=r".+"):
        options(emulator, **wrong)


async def test_missing_secret_is_named(emulator: Emulator) -> None:
    async with ModalProvider(options(emulator, secrets=("none-such",))) as provider:
        with pytest.raises(CreateFailed, match="none-such"):
            await provider.create(new_spec())


async def test_ttl_that_modal_cannot_keep_is_refused(emulator: Emulator) -> None:
    async with ModalProvider(options(emulator, timeout=600)) as provider:
        with pytest.raises(NotSupported, match="timeout"):
            await provider.create(new_spec(ttl=700))


async def test_working_directory_that_fits_no_tag_is_refused(provider: ModalProvider) -> None:
    with pytest.raises(ConfigError, match="workdir"):
        await provider.create(SandboxSpec(key=new_spec().key, workdir="/" + "x" * 60))


async def test_image_without_a_shell_is_told_and_leaves_nothing(emulator: Emulator) -> None:
    spec = new_spec()
    async with ModalProvider(options(emulator, image="im-bare")) as provider:
        with pytest.raises(CreateFailed, match="/bin/sh"):
            await provider.create(spec)
        assert await provider.attach(spec.key) is None


async def test_modals_own_end_is_told(emulator: Emulator) -> None:
    async with ModalProvider(options(emulator, timeout=2)) as provider:
        sandbox = await provider.create(new_spec(ttl=2))
        with anyio.fail_after(30), pytest.raises(SandboxGone):
            await sh(sandbox, "sleep 40")


async def test_end_that_cannot_be_put_off_is_told_once(emulator: Emulator, caplog: pytest.LogCaptureFixture) -> None:
    async with ModalProvider(options(emulator, timeout=600)) as provider:
        sandbox = await provider.create(new_spec(ttl=60))
        with caplog.at_level(logging.WARNING, "mabridge"):
            await sandbox.keep_alive(60)
            assert not caplog.records
            await sandbox.keep_alive(1000)
            await sandbox.keep_alive(1000)
        await sandbox.teardown()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "timeout" in caplog.text


async def test_rate_limit_is_at_capacity_with_the_time_to_come_back(provider: ModalProvider, faults: Faults) -> None:
    faults.throttled, faults.retry_after = 1000, 40.0
    with anyio.fail_after(30), pytest.raises(AtCapacity) as caught:
        await provider.create(new_spec())
    assert (caught.value.retry_after, caught.value.retryable) == (40.0, True)


async def test_rate_limit_without_a_time_is_at_capacity(provider: ModalProvider, faults: Faults) -> None:
    faults.throttled, faults.retry_after = 1, None
    with pytest.raises(AtCapacity) as caught:
        await provider.create(new_spec())
    assert caught.value.retry_after is None


async def test_short_rate_limit_is_waited_for(provider: ModalProvider, faults: Faults) -> None:
    faults.throttled, faults.retry_after = 2, 0.2
    await (await provider.create(new_spec())).teardown()


async def test_outage_is_unavailable_and_no_proof_of_absence(provider: ModalProvider, faults: Faults) -> None:
    faults.unavailable = 1000
    with pytest.raises(SandboxUnavailable) as caught:
        await provider.attach(new_spec().key)
    assert caught.value.retryable
    with pytest.raises(SandboxUnavailable):
        _ = [info async for info in provider.list()]


async def test_create_whose_answer_was_lost_leaves_nothing(provider: ModalProvider, faults: Faults) -> None:
    spec = new_spec()
    faults.lose_create = True
    with pytest.raises(SandboxUnavailable):
        await provider.create(spec)
    assert await find(provider, spec.key) is None


async def test_failed_create_spares_the_sandbox_that_was_there(
    emulator: Emulator, provider: ModalProvider, faults: Faults
) -> None:
    spec = new_spec()
    sandbox = await provider.create(spec)
    async with ModalProvider(options(emulator, secrets=("none-such",))) as other:
        with pytest.raises(CreateFailed):
            await other.create(spec)
    assert await provider.attach(spec.key) is not None
    await sandbox.teardown()


async def test_slow_start_is_waited_for_and_can_be_cancelled(provider: ModalProvider, faults: Faults) -> None:
    faults.slow_start = 1.0
    sandbox = await provider.create(new_spec())
    assert (await run(sandbox, "pwd")).stdout == b"/workspace\n"
    await sandbox.teardown()
    faults.slow_start = 60.0
    spec = new_spec()
    with anyio.move_on_after(1) as scope:
        await provider.create(spec)
    assert scope.cancelled_caught
    assert await find(provider, spec.key) is None


async def test_output_is_whole_though_connections_break(emulator: Emulator, sandbox: Sandbox) -> None:
    data = hashlib.sha256(b"x").digest() * 20_000
    await sandbox.write_file("data", data)
    results = []

    async def call() -> None:
        piece = "dd if=data bs=128000 skip=$((n - 1)) count=1 2>/dev/null; echo > at.$n; sleep 1"
        script = f"for n in 1 2 3 4 5; do {piece}; done"
        results.append(await sh(sandbox, script, max_output=len(data)))

    async with anyio.create_task_group() as group:
        group.start_soon(call)
        for number in (1, 3):
            await wait_for_file(sandbox, f"at.{number}")
            await emulator.break_connections()
    assert (results[0].exit_code, results[0].stdout) == (0, data)


async def test_command_is_not_run_again_though_connections_break(emulator: Emulator, sandbox: Sandbox) -> None:
    async def call() -> None:
        assert (await sh(sandbox, "echo x >> runs; sleep 2; exit 9")).exit_code == 9

    async with anyio.create_task_group() as group:
        group.start_soon(call)
        await wait_for_file(sandbox, "runs")
        await emulator.break_connections()
    assert await sandbox.read_file("runs", max_bytes=100) == b"x\n"


async def test_process_goes_on_though_connections_break(emulator: Emulator, sandbox: Sandbox) -> None:
    process = await sandbox.open_process(["cat"])
    for data in (b"one", b"two", b"three"):
        await process.send(data)
        with anyio.fail_after(30):
            assert await process.receive() == data
        await emulator.break_connections()
    await process.aclose()


async def test_receive_is_told_that_the_process_was_closed_meanwhile(sandbox: Sandbox) -> None:
    process = await sandbox.open_process(["cat"])
    async with anyio.create_task_group() as group:

        async def receive() -> None:
            with pytest.raises(SandboxUnavailable, match="closed"):
                await process.receive()

        group.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        await process.aclose()


async def test_provider_is_closed_by_another_task_with_a_process_open(emulator: Emulator) -> None:
    """As fixtures, exit stacks and web frameworks do it."""
    provider = ModalProvider(options(emulator))

    async def enter() -> None:
        await provider.__aenter__()
        sandboxes.append(await provider.create(new_spec()))
        processes.append(await sandboxes[0].open_process(["cat"]))

    async def leave() -> None:
        await provider.__aexit__(None, None, None)

    sandboxes: list[Sandbox] = []
    processes: list[Process] = []
    for step in (enter, leave):
        async with anyio.create_task_group() as group:
            group.start_soon(step)
    with pytest.raises(SandboxUnavailable, match="closed"):
        await processes[0].receive()
    async with ModalProvider(options(emulator)) as other:
        for info in [info async for info in other.list() if info.id == sandboxes[0].id]:
            await other.remove(info)


async def test_process_whose_connection_stays_broken_is_told(
    emulator: Emulator, sandbox: Sandbox, faults: Faults
) -> None:
    process = await sandbox.open_process(["cat"])
    faults.unavailable = 10_000
    await emulator.break_connections()
    with anyio.fail_after(60), pytest.raises(SandboxUnavailable) as caught:
        await process.receive()
    assert caught.value.retryable
    faults.unavailable = 0
    await process.aclose()
    assert (await run(sandbox, "true")).exit_code == 0


async def test_long_arguments_pass_exactly_and_leave_stdin_alone(sandbox: Sandbox) -> None:
    """More than the SDK takes, so they go another way."""
    args = ["x" * 70_000, "new\nline\n", "it's $HOME `id`", "", "\\n", " é ☃ "]
    script = 'for a; do printf "%s\\0" "$a"; done; echo "${MAB_ARGV-unset}"; cat'
    for stdin, expected in ((None, b""), (b"in\nput\n", b"in\nput\n")):
        result = await sh(sandbox, script, *args, stdin=stdin)
        assert result.stdout == "".join(f"{arg}\0" for arg in args).encode() + b"unset\n" + expected


async def test_forged_end_of_output_is_output(sandbox: Sandbox) -> None:
    """The mark is a secret of one call's: others of its shape mean nothing."""
    forged = b"\x1e" + b"0" * 32 + b"0\x1e"
    result = await sh(sandbox, "cat; exit 7", stdin=forged * 3)
    assert (result.exit_code, result.stdout) == (7, forged * 3)


async def test_end_is_known_though_the_shell_beside_the_command_was_killed(sandbox: Sandbox) -> None:
    with anyio.fail_after(30):
        result = await sh(sandbox, "sleep 40 & echo out; kill -9 $PPID; sleep 1; echo more")
    assert (result.exit_code, result.timed_out) == (137, False)
    assert result.stdout.startswith(b"out\n")
