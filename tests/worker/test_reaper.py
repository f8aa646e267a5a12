"""What is removed because nobody has any use for it, and above all what is not."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import pytest
from anthropic import AsyncAnthropic

from mabridge import ProviderConfig, Sandbox, SandboxSpec, sandbox_key, sandbox_labels
from mabridge.cli import main
from mabridge.control_plane.queue import WorkQueue
from mabridge.named_provider import NamedProvider
from mabridge.observe import Observers
from mabridge.reaper import Reaper
from mabridge.testing import Agent, ControlPlane, Environment, Fault, Session
from tests.images import BUSYBOX
from tests.worker.conftest import Serve

pytestmark = pytest.mark.anyio


async def nothing(agent: Agent) -> None:
    await agent.say("nothing to do")


class Place:
    """A provider of the local platform's environment, and a reaper that looks after it."""

    def __init__(self, named: NamedProvider, queue: WorkQueue) -> None:
        self.named = named
        self.queue = queue

    def reaper(self, *others: NamedProvider, grace: float = 0.0, **options) -> Reaper:
        providers = {named.name: named for named in (self.named, *others)}
        return Reaper(providers, self.queue, observers=Observers(), grace=grace, **options)

    async def sandbox_of(self, session: Session) -> Sandbox:
        environment_id, labels = session.environment.id, sandbox_labels(session.environment.id, session.id)
        return await self.named.provider.create(
            SandboxSpec(key=sandbox_key(environment_id, session.id), labels=labels, ttl=600)
        )

    async def there(self) -> set[str]:
        return {info.id async for info in self.named.provider.list()}


@pytest.fixture
async def place(environment: Environment, local: ProviderConfig) -> AsyncIterator[Place]:
    named = NamedProvider.configured("local", local.model_copy(update={"when_done": "keep"}))
    async with AsyncAnthropic(base_url=environment.plane.url, api_key="unused") as client, named.provider:
        queue = WorkQueue(client, environment_id=environment.id, environment_key=environment.key, worker_id="w")
        yield Place(named, queue)


def at_rest(environment: Environment) -> Session:
    """A session whose worker is done with it."""
    session = environment.create_session(nothing)
    environment.queue.stop(session.id, force=True)
    return session


async def test_sandbox_of_a_session_that_ended_is_removed(environment: Environment, place: Place):
    terminated, deleted, waiting = (at_rest(environment) for _ in range(3))
    kept = await place.sandbox_of(waiting)
    gone = {(await place.sandbox_of(session)).id for session in (terminated, deleted)}
    terminated.terminate()
    deleted.delete()
    swept = await place.reaper().sweep()
    assert {orphan.info.id for orphan in swept.removed} == gone
    assert {orphan.reason for orphan in swept.removed} == {"its session is terminated", "its session is deleted"}
    assert await place.there() == {kept.id}
    assert not swept.failures


async def test_sandbox_is_left_alone_until_the_grace_is_over(environment: Environment, place: Place):
    session = at_rest(environment)
    await place.sandbox_of(session)
    session.terminate()
    assert not (await place.reaper(grace=60).sweep()).orphans


@pytest.mark.parametrize("state", ["queued", "starting", "active", "stopping"])
async def test_sandbox_whose_session_a_worker_has_is_never_removed(environment: Environment, place: Place, state: str):
    session = environment.create_session(nothing)
    await place.sandbox_of(session)
    if state != "queued":
        work = await place.queue.poll()
        assert work is not None
        await work.acknowledge()
        if state != "starting":
            await work.heartbeat("NO_HEARTBEAT")
        if state == "stopping":
            environment.queue.stop(session.id, force=False)
    assert environment.queue.get(session.id).state == state
    assert not (await place.reaper(older_than=0).sweep()).orphans


async def test_kept_sandbox_is_removed_when_its_time_is_over(environment: Environment, place: Place):
    sandbox = await place.sandbox_of(at_rest(environment))
    assert not (await place.reaper().sweep()).orphans
    place.named = NamedProvider(name="local", provider=place.named.provider, idle_ttl=0.01)
    await anyio.sleep(0.02)  # that time has to pass
    (removed,) = (await place.reaper().sweep()).removed
    assert (removed.info.id, removed.reason) == (sandbox.id, "no worker has its session")


async def test_what_two_instances_see_is_kept_as_long_as_either_says(environment: Environment, place: Place):
    await place.sandbox_of(at_rest(environment))
    hasty = NamedProvider(name="hasty", provider=place.named.provider, when_done="teardown")
    assert not (await place.reaper(hasty).sweep()).orphans


async def test_session_that_runs_without_a_worker_keeps_its_sandbox(environment: Environment, place: Place):
    session = at_rest(environment)
    await place.sandbox_of(session)
    session.set_running(session.primary)
    assert not (await place.reaper(older_than=0).sweep()).orphans


async def test_strange_sandboxes_are_not_touched(environment: Environment, place: Place):
    session = at_rest(environment)
    session.delete()
    key, labels = sandbox_key(environment.id, session.id), sandbox_labels(environment.id, session.id)
    other = sandbox_labels("env_other", session.id)
    create = place.named.provider.create
    await create(SandboxSpec(key=sandbox_key("env_other", session.id), labels=other))
    await create(SandboxSpec(key=sandbox_key(environment.id, "sesn_x"), labels=labels))  # its name is another's
    await create(SandboxSpec(key=key, labels={name: value for name, value in labels.items() if "session" not in name}))
    assert not (await place.reaper(older_than=0).sweep()).orphans
    assert len(await place.there()) == 3


async def test_list_of_work_that_fails_ends_the_sweep(environment: Environment, place: Place, plane: ControlPlane):
    session = at_rest(environment)
    await place.sandbox_of(session)
    session.delete()
    plane.faults.add(Fault(path="/work$", status=500, times=None))
    swept = await place.reaper().sweep()
    assert not swept.removed
    assert "could not be listed: 500" in swept.failures["anthropic"]
    assert await place.there()


async def test_second_look_that_fails_removes_nothing(environment: Environment, place: Place, plane: ControlPlane):
    session = at_rest(environment)
    await place.sandbox_of(session)
    session.delete()
    plane.faults.add(Fault(path="/work$", status=500, times=None, skip=1))
    swept = await place.reaper().sweep()
    assert swept.orphans
    assert not swept.removed
    assert "anthropic" in swept.failures


async def test_platform_that_lists_no_work_leaves_only_ended_sessions_to_the_sweep(
    environment: Environment, place: Place, plane: ControlPlane
):
    """As Claude Platform on AWS."""
    ended, resting = at_rest(environment), at_rest(environment)
    for session in (ended, resting):
        await place.sandbox_of(session)
    ended.terminate()
    plane.faults.add(Fault(path="/work$", status=403, times=None))
    swept = await place.reaper(older_than=0).sweep()
    assert [orphan.session_id for orphan in swept.removed] == [ended.id]


async def test_provider_that_cannot_be_listed_is_told_and_the_others_are_swept(
    environment: Environment, place: Place, tmp_path: Path
):
    session = at_rest(environment)
    await place.sandbox_of(session)
    session.delete()
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / ("mab" + "a" * 24)).mkdir()
    (tmp_path / "closed" / ("mab" + "a" * 24) / "deadline").symlink_to("deadline")  # cannot be read: it is a loop
    broken = NamedProvider.configured(
        "broken", ProviderConfig(type="local", options={"root": str(tmp_path / "closed")})
    )
    async with broken.provider:
        swept = await place.reaper(broken).sweep()
    assert set(swept.failures) == {"broken"}
    assert [orphan.session_id for orphan in swept.removed] == [session.id]


async def test_session_that_is_taken_up_meanwhile_keeps_its_sandbox(
    environment: Environment, place: Place, plane: ControlPlane
):
    session = at_rest(environment)
    sandbox = await place.sandbox_of(session)
    fault = plane.faults.add(Fault(path=f"/sessions/{session.id}$", delay=0.5))
    async with anyio.create_task_group() as tasks:

        async def sweep() -> None:
            swept = await place.reaper(older_than=0).sweep()
            assert swept.orphans
            assert not swept.removed

        tasks.start_soon(sweep)
        await plane.wait_until(lambda: fault.hits == 1)  # the work was listed, and the session is being looked at
        session.send_message("one thing more")
    assert await place.there() == {sandbox.id}


async def test_session_that_is_served_here_is_spared(environment: Environment, place: Place):
    session = at_rest(environment)
    await place.sandbox_of(session)
    session.delete()
    assert not (await place.reaper(spared=lambda: [session.id]).sweep()).orphans


async def test_sessions_are_looked_at_some_at_a_time_and_each_in_its_turn(environment: Environment, place: Place):
    sessions = [at_rest(environment) for _ in range(5)]
    for session in sessions:
        await place.sandbox_of(session)
    reaper = place.reaper(looks=2)
    looked: list[set[str]] = []
    for _ in range(3):
        before = len(environment.plane.requests)
        await reaper.sweep()
        paths = [record.path for record in list(environment.plane.requests)[before:]]
        looked.append({path.rsplit("/", 1)[-1] for path in paths if "/sessions/" in path})
    assert [len(ids) for ids in looked] == [2, 2, 2]
    assert set().union(*looked) == {session.id for session in sessions}


async def test_dry_run_removes_nothing(environment: Environment, place: Place):
    session = at_rest(environment)
    sandbox = await place.sandbox_of(session)
    session.delete()
    swept = await place.reaper().sweep(dry_run=True)
    assert [orphan.info.id for orphan in swept.orphans] == [sandbox.id]
    assert await place.there() == {sandbox.id}


async def test_worker_reaps_while_it_runs(environment: Environment, place: Place, serve: Serve):
    session = at_rest(environment)
    sandbox = await place.sandbox_of(session)
    session.terminate()
    async with serve(reap_interval=0.2, reap_grace=0) as watched:
        reaped = await watched.until("sandbox.reaped")
    assert (reaped.sandbox_id, reaped.session_id) == (sandbox.id, session.id)


@pytest.mark.docker
async def test_container_that_was_never_started_is_removed(environment: Environment, image: Callable[[str], str]):
    """It is what a worker leaves that was killed between making a container and starting it."""
    import aiodocker

    session = at_rest(environment)
    session.terminate()
    key = sandbox_key(environment.id, session.id)
    named = NamedProvider.configured("d", ProviderConfig(type="docker", options={"image": image(BUSYBOX)}))
    async with (
        AsyncAnthropic(base_url=environment.plane.url, api_key="unused") as client,
        named.provider,
        aiodocker.Docker() as docker,
    ):
        labels = sandbox_labels(environment.id, session.id)
        await docker.containers.create({"Image": image(BUSYBOX), "Cmd": ["sh"], "Labels": labels}, name=key)
        queue = WorkQueue(client, environment_id=environment.id, environment_key=environment.key, worker_id="w")
        swept = await Place(named, queue).reaper().sweep()
        assert [orphan.info.key for orphan in swept.removed] == [key]
        assert await docker.containers.list(all=True, filters=json.dumps({"name": [key]})) == []


async def test_command_says_what_it_would_remove_and_removes_it(
    environment: Environment, place: Place, local: ProviderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    resting, ended = at_rest(environment), at_rest(environment)
    for session in (resting, ended):
        await place.sandbox_of(session)
    ended.terminate()
    (tmp_path / "mabridge.toml").write_text(
        f'[worker]\nenvironment_id = "{environment.id}"\nenvironment_key = {{ env = "TEST_KEY" }}\n'
        f'base_url = "{environment.plane.url}"\nreap_grace = 0\n'
        f'[providers.here]\ntype = "local"\nroot = "{local.options["root"]}"\n'
    )
    monkeypatch.chdir(tmp_path)

    async def command(*arguments: str) -> tuple[int, str]:
        def invoke() -> tuple[int, str]:
            from click.testing import CliRunner

            done = CliRunner().invoke(main, ["reap", *arguments], env={"TEST_KEY": environment.key})
            return done.exit_code, done.output

        return await anyio.to_thread.run_sync(invoke)

    code, told = await command("--dry-run")
    assert code == 0
    assert told.startswith(f"would remove {sandbox_key(environment.id, ended.id)} at here: {ended.id}, its session is")
    assert len(await place.there()) == 2
    assert (await command("--dry-run", "--older-than", "1h")) == (0, "")
    code, told = await command("--older-than", "0s", "--json")
    assert code == 0
    assert {row["session"] for row in json.loads(told)["removed"]} == {resting.id, ended.id}
    assert await place.there() == set()
    code, told = await command("--older-than", "soon")
    assert code == 2
    assert "'soon' is not a length of time" in told
