"""The ``e2b`` provider: the conformance kit at the emulator, or live, and what is special to E2B."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import anyio
import pytest
from pydantic import ValidationError

from mabridge.errors import AtCapacity, ConfigError, CreateFailed, SandboxError, SandboxGone, SandboxUnavailable
from mabridge.providers.e2b import E2BOptions, E2BProvider
from mabridge.sandbox import EnvVar, SupportsSuspend
from mabridge.testing import SandboxConformance
from mabridge.testing.conformance import find, living, new_spec, run, sh, wait_for_file
from tests.emulators import machine
from tests.emulators.e2b import E2BEmulator

pytestmark = pytest.mark.anyio

KEY = "MABRIDGE_TEST_E2B_KEY"
LIVE_KEY = "E2B_API_KEY"


def options(emulator: E2BEmulator | None, **rest) -> E2BOptions:
    """Options for the emulator, or for E2B itself."""
    if emulator is not None:
        rest = {"api_url": emulator.url, "sandbox_url": emulator.url, "api_key": EnvVar(env=KEY), "retries": 1, **rest}
    return E2BOptions.model_validate(rest)


@pytest.fixture(scope="session")
def live(request: pytest.FixtureRequest) -> bool:
    """Whether to test E2B itself: ``--mabridge-live``, with ``E2B_API_KEY``."""
    wanted = bool(request.config.getoption("--mabridge-live", default=False))
    if wanted and LIVE_KEY not in os.environ:
        pytest.skip(f"{LIVE_KEY} is not set")
    return wanted


@pytest.fixture(scope="session")
async def service(anyio_backend: str, live: bool) -> AsyncIterator[E2BEmulator | None]:
    """The emulator for the kit, or None for E2B itself."""
    if live:
        yield None
        return
    machine.require()
    async with E2BEmulator() as running:
        running.page = 3
        yield running


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MABRIDGE_TEST_E2B_WRONG_KEY", "e2b_" + "0" * 40)


class TestE2B(SandboxConformance):
    @pytest.fixture(scope="class")
    async def provider(self, anyio_backend: str, service: E2BEmulator | None) -> AsyncIterator[E2BProvider]:
        with pytest.MonkeyPatch.context() as patch:
            if service is not None:
                patch.setenv(KEY, service.api_key)
                type(self).page_size = service.page
            async with E2BProvider(options(service)) as provider:
                yield provider

    @pytest.fixture
    def bad_credentials(self, service: E2BEmulator | None) -> E2BProvider:
        return E2BProvider(options(service, api_key=EnvVar(env="MABRIDGE_TEST_E2B_WRONG_KEY")))

    @pytest.fixture
    def missing_image(self, service: E2BEmulator | None) -> E2BProvider:
        return E2BProvider(options(service, template="no-such-template-anywhere"))

    @pytest.fixture
    def unreachable(self, service: E2BEmulator | None) -> E2BProvider:
        return E2BProvider(options(service, api_url="http://127.0.0.1:9", sandbox_url="http://127.0.0.1:9"))

    @pytest.fixture
    def no_egress(self, service: E2BEmulator | None) -> E2BProvider:
        return E2BProvider(options(service, allow_internet_access=False))

    @pytest.fixture
    def open_egress(self, service: E2BEmulator | None) -> E2BProvider:
        return E2BProvider(options(service))

    @pytest.fixture
    def egress_target(self, service: E2BEmulator | None) -> Iterator[tuple[str, int]]:
        if service is None:
            yield ("1.1.1.1", 443)
            return
        if os.geteuid() != 0:
            pytest.skip("the emulator needs root to take a sandbox's network away")
        with socket.create_server(("127.0.0.1", 0), backlog=16) as listening:
            yield listening.getsockname()[:2]

    @pytest.fixture
    def break_connections(self, service: E2BEmulator | None) -> Callable[[], Awaitable[None]]:
        if service is None:
            pytest.skip("the connections to E2B itself are not ours to cut")

        async def cut() -> None:
            service.drop_connections()

        return cut


@pytest.fixture
async def emulator(anyio_backend: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[E2BEmulator]:
    """An emulator that the test may spoil."""
    machine.require()
    async with E2BEmulator() as running:
        monkeypatch.setenv(KEY, running.api_key)
        yield running


@pytest.fixture
async def provider(emulator: E2BEmulator) -> AsyncIterator[E2BProvider]:
    async with E2BProvider(options(emulator)) as provider:
        yield provider


async def test_command_costs_one_request_and_a_large_stdin_one_more(emulator, provider: E2BProvider) -> None:
    sandbox = await provider.create(new_spec())
    emulator.calls.clear()
    assert (await run(sandbox, "cat", stdin=bytes(1000))).stdout == bytes(1000)
    assert emulator.calls == ["POST /process.Process/Start"]
    assert (await run(sandbox, "wc", "-c", stdin=bytes(1_000_000))).stdout == b"1000000\n"
    assert emulator.calls[1:] == ["POST /files", "POST /process.Process/Start"]


async def test_arguments_longer_than_linux_takes_in_one_are_passed(provider: E2BProvider) -> None:
    sandbox = await provider.create(new_spec())
    parts = [letter * 120_000 for letter in "abc"]
    assert (await sh(sandbox, 'printf "%s" "$@"', *parts, max_output=400_000)).stdout == "".join(parts).encode()


async def test_output_is_exact_whether_it_travels_as_it_is_or_encoded(provider: E2BProvider) -> None:
    """Short and plain output is not encoded; a mark of 32 letters goes with it, and 4096 is the bound."""
    sandbox = await provider.create(new_spec())
    outputs = [b"", b"=", b"\n\n", b"a\r\n", "é\n".encode(), b"\xff", b"\0", b"a\0", b"\0a", b"\x1b[0m", b"\x7f"]
    outputs += [b"a" * size for size in (4063, 4064, 4065, 4096, 5000)]
    for output in outputs:
        result = await sh(sandbox, "cat; echo end >&2", stdin=output, max_output=5000)
        assert (result.stdout, result.stderr, result.truncated) == (output, b"end\n", False)


async def test_files_of_the_wrapper_are_removed(provider: E2BProvider) -> None:
    sandbox = await provider.create(new_spec())
    look = 'find /dev/shm /tmp /var/tmp -name ".mab-*" ! -name "*$MAB_EXEC*"'
    await run(sandbox, "cat", stdin=bytes(1_000_000))
    await run(sandbox, "sleep", "60", stdin=bytes(1_000_000), timeout=0.5)
    with anyio.move_on_after(0.2):
        await run(sandbox, "sleep", "60")
    with anyio.fail_after(30):
        while (left := (await sh(sandbox, look)).stdout) != b"":
            assert left.count(b"\n") < 20
            await anyio.sleep(0.1)


async def test_what_the_login_profile_says_is_no_output(provider: E2BProvider) -> None:
    sandbox = await provider.create(new_spec())
    await sandbox.write_file("/home/user/.bash_profile", b"echo welcome; echo trouble >&2; cd /usr\n")
    result = await sh(sandbox, "pwd; echo err >&2")
    assert (result.stdout, result.stderr) == (b"/workspace\n", b"err\n")


async def test_output_is_kept_where_every_directory_for_it_is_full_but_one(provider: E2BProvider) -> None:
    sandbox = await provider.create(new_spec())
    await run(sandbox, "chmod", "0", "/tmp")
    async with E2BProvider(options(None, **{**provider.options.model_dump(), "user": "root"})) as as_root:
        found = [info async for info in as_root.list()]
        root = await as_root.attach(found[0].key)
        assert root is not None
        await sh(root, "chmod 755 /dev/shm /tmp; chmod 1777 /var/tmp")
        assert (await run(sandbox, "echo", "hi")).stdout == b"hi\n"
        await sh(root, "chmod 755 /var/tmp")
        with pytest.raises(SandboxUnavailable, match="no directory to write in"):
            await run(sandbox, "echo", "hi")


async def test_command_that_kills_all_it_can_is_dead_and_the_sandbox_lives(provider: E2BProvider) -> None:
    sandbox = await provider.create(new_spec())
    assert (await sh(sandbox, "kill -9 -1")).exit_code == 137
    assert (await run(sandbox, "echo", "hi")).stdout == b"hi\n"


async def test_cancelled_call_is_killed_though_its_process_hides(provider: E2BProvider) -> None:
    """Its environment is cleared and its session another: only what the wrapper noted tells of it."""
    sandbox = await provider.create(new_spec())
    async with anyio.create_task_group() as group:
        group.start_soon(sh, sandbox, 'echo $$ > pid; exec env -i PATH="$PATH" sh -c "sleep 60; sleep 60"')
        pids = await wait_for_file(sandbox, "pid")
        group.cancel_scope.cancel()
    assert await living(sandbox, pids) == []


async def test_signals_reach_a_command_as_they_are(provider: E2BProvider) -> None:
    """A shell lets what it does not wait for ignore SIGINT; and what bounds the output must not bound files."""
    sandbox = await provider.create(new_spec())
    told = await sh(sandbox, "grep SigIgn /proc/self/status; kill -INT $$; echo ignored")
    assert (told.exit_code, told.stdout) == (130, b"SigIgn:\t0000000000000000\n")
    assert (await sh(sandbox, "ulimit -f")).stdout == b"unlimited\n"


async def test_of_two_made_at_once_the_first_is_kept(emulator: E2BEmulator) -> None:
    emulator.start_delay = 0.3
    spec = new_spec()
    made = []

    async def worker() -> None:
        async with E2BProvider(options(emulator)) as provider:
            made.append((await provider.create(spec)).id)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(worker)
    assert emulator.calls.count("POST /v2/sandboxes") == 3
    assert set(made) == set(emulator.vms)
    assert len(emulator.vms) == 1


async def test_new_sandbox_that_is_listed_late_is_waited_for(emulator, provider: E2BProvider) -> None:
    emulator.list_lag = 1.0
    spec = new_spec()
    sandbox = await provider.create(spec)
    info = await find(provider, spec.key)
    assert info is not None
    assert info.id == sandbox.id


async def test_create_whose_answer_is_lost_leaves_nothing(emulator, provider: E2BProvider) -> None:
    emulator.fail("POST /v2/sandboxes", status=0, after=True)
    with pytest.raises(SandboxUnavailable):
        await provider.create(new_spec())
    assert emulator.vms == {}


@pytest.mark.parametrize("where", ["GET /v2/sandboxes", "POST /v2/sandboxes", "POST /process.Process/Start"])
async def test_server_at_fault_is_unavailable_and_leaves_nothing(emulator, provider: E2BProvider, where: str) -> None:
    emulator.fail(where, body=b"<html>oops</html>", times=1)
    with pytest.raises(SandboxUnavailable) as caught:
        await provider.create(new_spec())
    assert "\n" not in str(caught.value)
    assert emulator.vms == {}


async def test_create_cancelled_while_its_directory_is_made_leaves_no_error_behind(
    emulator: E2BEmulator, provider: E2BProvider
) -> None:
    """What the SDK starts for a call, and forgets when that is cut off, ends in an error that the loop complains of."""
    emulator.latency = 0.2
    async with anyio.create_task_group() as group:
        group.start_soon(provider.create, new_spec())
        with anyio.fail_after(20):
            while sum(call.endswith("Process/Start") for call in emulator.calls) < 2:  # noqa: ASYNC110
                await anyio.sleep(0.02)
        group.cancel_scope.cancel()
    gc.collect()
    assert emulator.vms == {}


async def test_rate_limit_is_waited_out_if_it_is_short_and_told_if_not(emulator, provider: E2BProvider) -> None:
    emulator.fail("POST /v2/sandboxes", status=429, headers={"Retry-After": "1"})
    await (await provider.create(new_spec())).teardown()
    emulator.fail("POST /v2/sandboxes", status=429, headers={"Retry-After": "600"}, message="slow down")
    with pytest.raises(AtCapacity, match="slow down") as caught:
        await provider.create(new_spec())
    assert caught.value.retry_after is not None
    assert caught.value.retryable


async def test_no_room_is_told(emulator, provider: E2BProvider) -> None:
    emulator.max_sandboxes = 0
    with pytest.raises(AtCapacity, match="maximum number of concurrent"):
        await provider.create(new_spec())
    emulator.max_sandboxes = 9
    emulator.fail("POST /v2/sandboxes", status=503, times=2, message="no capacity")
    with pytest.raises(AtCapacity):
        await provider.create(new_spec())


async def test_life_longer_than_the_plan_allows_is_refused(emulator, provider: E2BProvider) -> None:
    emulator.max_hours = 1
    with pytest.raises(CreateFailed, match="greater than 1 hours"):
        await provider.create(new_spec(ttl=3601))


async def test_paused_sandbox_says_so_and_is_not_gone(provider: E2BProvider) -> None:
    spec = new_spec()
    sandbox = await provider.create(spec)
    assert isinstance(sandbox, SupportsSuspend)
    await sandbox.suspend()
    with pytest.raises(SandboxUnavailable, match="paused; attach wakes it"):
        await run(sandbox, "true")
    info = await find(provider, spec.key)
    assert info is not None
    assert info.state == "paused"
    await sandbox.teardown()
    with pytest.raises(SandboxGone):
        await sandbox.suspend()


async def test_sandbox_is_unreachable_and_not_gone_while_the_control_plane_is_down(emulator, provider) -> None:
    sandbox = await provider.create(new_spec())
    await run(sandbox, "true")
    next(iter(emulator.vms.values())).state = "starting anew"  # nobody there, and nobody knows
    emulator.fail("GET /sandboxes/", times=99)
    with pytest.raises(SandboxUnavailable):
        await run(sandbox, "true")


async def test_working_directory_that_root_must_make_belongs_to_the_user(provider: E2BProvider) -> None:
    spec = new_spec()
    sandbox = await provider.create(spec)
    told = await sh(sandbox, 'stat -c "%u %a" "$PWD"; id -u; stat -c %u /')
    assert told.stdout == b"1000 755\n1000\n0\n" or os.geteuid() != 0


async def test_egress_rules_are_in_the_very_request_that_creates(emulator) -> None:
    rules = {"allow_out": ("pypi.org", "10.1.0.0/16")}
    async with E2BProvider(options(emulator, network=rules, allow_internet_access=False)) as provider:
        await provider.create(new_spec())
    (vm,) = emulator.vms.values()
    assert vm.network["allow_internet_access"] is False
    assert vm.network["network"] == {"allowOut": ["pypi.org", "10.1.0.0/16"], "denyOut": ["0.0.0.0/0"]}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"network": {"allow_out": ["pypi.org"]}}, "restricts nothing by itself"),
        ({"memory": 1024}, "memory: E2B takes it from the template"),
        ({"env": {"ANTHROPIC_API_KEY": "x"}}, "no credential of Anthropic's"),
        ({"env": {"A B": "x"}}, "A B"),
    ],
)
def test_option_that_would_not_do_is_refused(given, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        E2BOptions.model_validate(given)


async def test_debug_mode_of_the_sdk_does_not_turn_the_provider_off(emulator, monkeypatch) -> None:
    monkeypatch.setenv("E2B_DEBUG", "true")
    async with E2BProvider(options(emulator)) as provider:
        sandbox = await provider.create(new_spec())
        assert list(emulator.vms) == [sandbox.id]
        await sandbox.teardown()
    assert emulator.vms == {}


async def test_key_is_in_no_error_and_no_sandbox(emulator, provider: E2BProvider) -> None:
    sandbox = await provider.create(new_spec())
    assert emulator.api_key.encode() not in (await run(sandbox, "env")).stdout
    emulator.api_key = "e2b_another"
    key = os.environ[KEY]
    for call in (provider.check, lambda: provider.create(new_spec()), sandbox.teardown):
        with pytest.raises((SandboxError, ConfigError)) as caught:
            await call()
        error: BaseException | None = caught.value
        while error is not None:
            assert key not in str(error)
            error = error.__cause__


async def test_missing_key_is_told_before_anything_is_sent(emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY)
    with pytest.raises(ConfigError, match=KEY):
        async with E2BProvider(options(emulator)):
            pass
    assert emulator.calls == []


async def test_root_may_be_the_user(emulator) -> None:
    async with E2BProvider(options(emulator, user="root")) as provider:
        sandbox = await provider.create(new_spec())
        assert (await run(sandbox, "id", "-u")).stdout == b"0\n" or os.geteuid() != 0
