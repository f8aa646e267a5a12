"""What a command may take: space on the disk, processes, memory; and what the worker holds of it."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator

import anyio
import pytest

from mabridge.hands import Hands
from mabridge.providers.docker import DockerMount, DockerOptions, DockerProvider
from mabridge.sandbox import Sandbox, SandboxSpec
from tests import images
from tests.hands.conftest import ExecOnly, Shell

pytestmark = pytest.mark.anyio


@pytest.fixture
async def tight(reached: Sandbox) -> AsyncIterator[Shell]:
    """Hands that keep no more than 4 MiB of an output."""
    async with Hands(reached, max_output=4 * 2**20) as hands:
        yield Shell(hands)


async def sizes(run: Shell) -> list[int]:
    script = f"for f in {run.hands.directory}/*/*.out; do wc -c < $f; done"
    return [int(line) for line in (await run.text(script)).split()]


async def test_output_that_is_more_than_may_be_kept_loses_its_middle(tight: Shell):
    is_cut = f"[ -e {tight.hands.directory}/calls/${{MABRIDGE_CALL%%.*}}.dropped ]"
    result = await tight(
        f"echo first; head -c 12000000 /dev/zero; until {is_cut}; do sleep 0.2; done; echo last", timeout=60
    )
    assert result.exit_code == 0
    assert result.dropped > 2 * 2**20  # it may be cut more than once, and what comes in between is not counted
    assert 5 * 2**20 < result.size <= 12_000_011
    assert result.head.startswith(b"first\n\0")
    assert result.tail.endswith(b"\0last\n")
    assert 2**20 <= max(await sizes(tight)) < 9 * 2**20


async def test_background_job_cannot_fill_the_disk_after_its_call_was_forgotten(tight: Shell):
    await tight.hands.run("flood", "(while :; do head -c 300000 /dev/zero; sleep 0.1; done) & echo $!", timeout=20)
    await tight.hands.forget("flood")
    most = 0
    for _ in range(16):
        await tight("sleep 0.5")
        most = max(most, *await sizes(tight))
    await tight("kill $(jobs -p)")
    assert 0 < most < 12 * 2**20


async def test_large_outputs_stay_after_their_results_were_accepted_but_not_for_ever(run: Shell):
    paths = []
    for number in range(18):
        result = await run.hands.run(f"large_{number}", "seq 1 20000", timeout=20)
        assert result.path is not None
        paths.append(result.path)
        await run.hands.forget(f"large_{number}")
    await run("true")
    await run("true")
    there = [await run.text(f"[ -s {path} ] && echo there") == "there" for path in paths]
    assert there == [False] * 2 + [True] * 16
    again = await run.hands.run("large_17", "seq 1 20000", timeout=20)
    assert (again.exit_code, again.head) == (None, b"")


async def test_gigabyte_of_output_costs_the_worker_next_to_nothing(local_sandbox: Sandbox):
    async with Hands(local_sandbox) as hands:
        run = Shell(hands)
        await run("true")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = await run("yes | head -c 1073741824", timeout=120)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert (result.exit_code, result.size) == (0, 2**30)
        assert await run.text(f"wc -c < {result.path}") == str(2**30)
    assert grown < 8 * 1024  # kilobytes


@pytest.fixture
def small_volume(image: Callable[[str], str]) -> Iterator[str]:
    """The name of a volume of one megabyte."""
    image(images.DEBIAN)
    name = f"mabridge-test-small-{id(object()):x}"
    options = ("type=tmpfs", "device=tmpfs", "o=size=1m,mode=1777")
    subprocess.run(
        ["docker", "volume", "create", *(part for option in options for part in ("--opt", option)), name],
        check=True,
        capture_output=True,
    )
    yield name
    subprocess.run(["docker", "volume", "rm", "--force", name], check=True, capture_output=True)


@pytest.mark.docker
@pytest.mark.parametrize("over", ["channel", "exec"])
@pytest.mark.parametrize("name", [images.DEBIAN, images.BUSYBOX])
async def test_full_disk_is_told_and_can_be_emptied(
    name: str, over: str, small_volume: str, image: Callable[[str], str], key: str
):
    mount = DockerMount(type="volume", source=small_volume, target="/tmp", read_only=False)
    async with DockerProvider(DockerOptions(image=image(name), pull="never", mounts=(mount,))) as provider:
        sandbox = await provider.create(SandboxSpec(key=key, ttl=300))
        try:
            async with Hands(sandbox if over == "channel" else ExecOnly(sandbox)) as hands:  # type: ignore[arg-type]
                run = Shell(hands)
                await run("export KEPT=yes; echo x > /tmp/first")
                filled = await run("cat /dev/zero > /tmp/filled; echo $?; echo $KEPT")
                assert filled.exit_code is not None
                # It may need more than one attempt, but none is lost without a word, and none is done by half.
                for _ in range(3):
                    emptied = await run("rm /tmp/filled && echo ran >> /workspace/log")
                    if emptied.exit_code is not None:
                        break
                    assert "no space" in (emptied.note or "")
                assert emptied.exit_code == 0
                assert await run.text("cat /workspace/log; echo $KEPT") == "ran\nyes"
        finally:
            await sandbox.teardown()


@pytest.mark.docker
@pytest.mark.parametrize("name", [images.DEBIAN, images.BUSYBOX])
async def test_fork_bomb_ends_with_its_time(name: str, image: Callable[[str], str], key: str):
    async with DockerProvider(DockerOptions(image=image(name), pull="never", pids_limit=64)) as provider:
        sandbox = await provider.create(SandboxSpec(key=key, ttl=300))
        try:
            async with Hands(sandbox) as hands:
                run = Shell(hands)
                await run("cd /tmp; export KEPT=yes")
                with anyio.fail_after(90):
                    bomb = await run("bomb() { bomb | bomb & }; bomb; sleep 60", timeout=2)
                    assert bomb.exit_code != 0
                    assert await run.text("pwd; echo $KEPT") == "/tmp\nyes"
        finally:
            await sandbox.teardown()


@pytest.mark.docker
@pytest.mark.parametrize("name", [images.DEBIAN, images.BUSYBOX])
async def test_command_that_takes_too_much_memory_ends_and_the_shell_goes_on(
    name: str, image: Callable[[str], str], key: str
):
    async with DockerProvider(DockerOptions(image=image(name), pull="never", memory="48m")) as provider:
        sandbox = await provider.create(SandboxSpec(key=key, ttl=300))
        try:
            async with Hands(sandbox) as hands:
                run = Shell(hands)
                await run("cd /tmp; export KEPT=yes")
                with anyio.fail_after(60):
                    eaten = await run("head -c 200000000 /dev/zero | tail -n 1 | wc -c", timeout=30)
                    assert eaten.size < 200
                    own = await run("X=$(head -c 200000000 /dev/zero | tr '\\000' x); echo ${#X}", timeout=30)
                    assert own.exit_code not in (0, None)
                    assert await run.text("pwd; echo $KEPT") == "/tmp\nyes"
        finally:
            await sandbox.teardown()


@pytest.mark.docker
@pytest.mark.parametrize(
    ("command", "code"),
    [  # the first kills everything but the shell itself
        ("echo x; kill -9 -1", 0),
        ("echo x; kill -9 $(cut -d ' ' -f 1 {}/shells/main/keeper.*); sleep 60", 137),
        ("echo x; setsid sh -c 'kill -9 -1' & sleep 60", 137),
    ],
)
@pytest.mark.parametrize("name", [images.DEBIAN, images.BUSYBOX])
async def test_command_that_kills_the_hands_themselves_is_told_at_once(
    name: str, command: str, code: int, image: Callable[[str], str], key: str
):
    async with DockerProvider(DockerOptions(image=image(name), pull="never")) as provider:
        sandbox = await provider.create(SandboxSpec(key=key, ttl=300))
        try:
            async with Hands(sandbox) as hands:
                run = Shell(hands)
                await run("cd /tmp; KEPT=yes")
                with anyio.fail_after(30):
                    killed = await run(command.replace("{}", hands.directory), timeout=60)
                assert (killed.exit_code, killed.head) == (code, b"x\n")
                assert bool(killed.note) is (code != 0)
                assert await run.text("pwd; echo $KEPT") == "/tmp\nyes"
        finally:
            await sandbox.teardown()
