"""Suspending with the `modal` provider: a snapshot, a record of it, and what is left of both when something fails."""

from __future__ import annotations

import re
import string
from collections.abc import AsyncIterator

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mabridge.errors import NotSupported, SandboxError, SandboxUnavailable
from mabridge.identity import KEY_LABEL
from mabridge.providers.modal import ModalProvider
from mabridge.providers.modal.shelf import Kept
from mabridge.sandbox import Sandbox, SandboxSpec
from mabridge.testing.conformance.helpers import find, new_key, new_spec, sh
from tests.emulators.modal import Emulator, emulated
from tests.emulators.modal.service import Faults
from tests.providers.test_modal import options

pytestmark = pytest.mark.anyio


@pytest.fixture
async def emulator(anyio_backend: str) -> AsyncIterator[Emulator]:
    async with emulated() as emulator:
        yield emulator


@pytest.fixture
def faults(emulator: Emulator) -> Faults:
    return emulator.faults


@pytest.fixture
async def provider(emulator: Emulator) -> AsyncIterator[ModalProvider]:
    async with ModalProvider(options(emulator)) as provider:
        yield provider


def records(emulator: Emulator) -> list[str]:
    return sorted(emulator.control.volumes.get("mabridge-suspended", ()))


class TestSuspending:
    async def test_files_are_kept_and_nothing_that_ran(self, emulator: Emulator, provider: ModalProvider) -> None:
        spec = new_spec()
        sandbox = await provider.create(SandboxSpec(key=spec.key, labels=spec.labels, workdir="/srv/work", ttl=500))
        await sh(sandbox, "echo old > mark; chmod 751 mark; ln -s mark link; echo o > /elsewhere; sleep 4242 &")
        before = await find(provider, spec.key)
        await sandbox.suspend()
        info = await find(provider, spec.key)
        assert (info.state, info.labels, info.created_at) == ("suspended", before.labels, before.created_at)
        assert not [task for task in emulator.control.sandboxes.values() if task.result is None]
        with pytest.raises(SandboxUnavailable, match="suspended"):
            await sh(sandbox, "true")
        async with ModalProvider(options(emulator)) as other:
            woken = await other.attach(spec.key)
            told = await sh(woken, "pwd; cat link /elsewhere; stat -c %a mark; pgrep -f '[s]leep 4242'")
            assert told.stdout == b"/srv/work\nold\no\n751\n"
            after = await find(other, spec.key)
            assert (after.state, after.labels, after.id) == ("running", before.labels, woken.id)
            await woken.teardown()
        assert await provider.attach(spec.key) is None
        assert (records(emulator), emulator.control.snapshots.ids) == ([], {})

    async def test_service_without_volumes_is_of_use_but_for_suspending(
        self, faults: Faults, provider: ModalProvider
    ) -> None:
        faults.missing = "Volume"
        spec = new_spec()
        assert await provider.attach(spec.key) is None
        sandbox = await provider.create(spec)
        with pytest.raises(SandboxError, match="do not fit"):
            await sandbox.suspend()
        assert (await sh(sandbox, "echo here")).stdout == b"here\n"
        assert await find(provider, spec.key) is not None
        await sandbox.teardown()
        assert await find(provider, spec.key) is None

    @pytest.mark.parametrize("volume_version", [1, 2])
    async def test_suspended_again_and_again_goes_on_from_the_last_time(
        self, emulator: Emulator, provider: ModalProvider, volume_version: int
    ) -> None:
        emulator.control.volume_version = volume_version
        sandbox = await provider.create(spec := new_spec())
        for turn in range(3):
            await sh(sandbox, f"echo {turn} >> log")
            await sandbox.suspend()
            assert len(records(emulator)) == 1
            sandbox = await provider.attach(spec.key)
            assert records(emulator) == []
        assert (await sandbox.read_file("log", max_bytes=100)) == b"0\n1\n2\n"
        await sandbox.teardown()

    async def test_workers_that_wake_it_at_once_get_the_same_one(
        self, emulator: Emulator, provider: ModalProvider
    ) -> None:
        sandbox = await provider.create(spec := new_spec())
        await sandbox.write_file("mark", b"kept")
        await sandbox.suspend()
        woken = []

        async def wake(by: ModalProvider, *, create: bool) -> None:
            got = await (by.create(spec) if create else by.attach(spec.key))
            assert await got.read_file("mark", max_bytes=100) == b"kept"
            woken.append(got)

        async with ModalProvider(options(emulator)) as other:
            async with anyio.create_task_group() as group:
                for by in (provider, other):
                    for create in (False, True):
                        group.start_soon(lambda by=by, create=create: wake(by, create=create))
            assert len({each.id for each in woken}) == 1
            await woken[0].teardown()

    async def test_earlier_life_does_not_lengthen_the_next_one(self, provider: ModalProvider) -> None:
        sandbox = await provider.create(spec := new_spec(ttl=3))
        await sandbox.keep_alive(3600)
        await sandbox.suspend()
        assert await provider.attach(spec.key) is not None
        with anyio.fail_after(20):
            while await provider.attach(spec.key) is not None:  # noqa: ASYNC110 - nobody says so
                await anyio.sleep(0.2)

    async def test_variables_of_its_own_are_refused_and_it_runs_on(self, provider: ModalProvider) -> None:
        sandbox = await provider.create(new_spec(env={"MINE": "1"}))
        with pytest.raises(NotSupported, match="env"):
            await sandbox.suspend()
        assert (await sh(sandbox, "echo $MINE")).stdout == b"1\n"
        await sandbox.teardown()


class TestFailures:
    @pytest.mark.parametrize("fault", ["snapshot", "slow", "record"])
    async def test_one_that_cannot_be_suspended_runs_on(
        self,
        emulator: Emulator,
        provider: ModalProvider,
        faults: Faults,
        monkeypatch: pytest.MonkeyPatch,
        fault: str,
    ) -> None:
        monkeypatch.setattr("mabridge.providers.modal.sandbox._SNAPSHOT", 1)
        faults.fail_snapshot, faults.slow_snapshot = fault == "snapshot", 60.0 if fault == "slow" else 0.0
        faults.refused = {"VolumePutFiles"} if fault == "record" else set()
        sandbox = await provider.create(spec := new_spec())
        with anyio.fail_after(15), pytest.raises(SandboxError) as caught:
            await sandbox.suspend()
        assert (caught.value.op, caught.value.sandbox_id or sandbox.id) == ("suspend", sandbox.id)
        assert (await sh(sandbox, "echo here")).stdout == b"here\n"
        info = await find(provider, spec.key)
        assert (info.state, info.id) == ("running", sandbox.id)
        await sandbox.teardown()

    async def test_lost_answer_to_its_end_loses_nothing(
        self, emulator: Emulator, provider: ModalProvider, faults: Faults
    ) -> None:
        sandbox = await provider.create(spec := new_spec())
        await sandbox.write_file("mark", b"kept")
        faults.lose_terminate = True
        with pytest.raises(SandboxUnavailable):
            await sandbox.suspend()
        with anyio.fail_after(10):
            while emulator.control.sandboxes[sandbox.id].result is None:  # noqa: ASYNC110 - nobody says so
                await anyio.sleep(0.01)
        woken = await provider.attach(spec.key)
        assert await woken.read_file("mark", max_bytes=100) == b"kept"
        await woken.teardown()

    async def test_snapshot_is_never_gone_back_to_once_it_was_gone_on_from(
        self, emulator: Emulator, provider: ModalProvider, faults: Faults
    ) -> None:
        """Were it still remembered when the woken one ends, the session would lose what it did since, unseen."""
        sandbox = await provider.create(spec := new_spec())
        await sandbox.suspend()
        faults.refused = {"VolumeRemoveFile"}
        for _ in range(2):
            with pytest.raises(SandboxUnavailable):
                await provider.attach(spec.key)
        assert len(records(emulator)) == 1
        faults.refused = set()
        woken = await provider.attach(spec.key)
        assert records(emulator) == []
        emulator.control.sandboxes[woken.id].machine.stop()
        with anyio.fail_after(10):
            while await provider.attach(spec.key) is not None:  # noqa: ASYNC110 - nobody says so
                await anyio.sleep(0.05)

    async def test_failed_wake_keeps_the_snapshot(
        self, emulator: Emulator, provider: ModalProvider, faults: Faults
    ) -> None:
        sandbox = await provider.create(spec := new_spec())
        await sandbox.write_file("mark", b"kept")
        await sandbox.suspend()
        faults.refused = {"SandboxCreateV2"}
        with pytest.raises(SandboxUnavailable):
            await provider.attach(spec.key)
        faults.refused, faults.lose_create = set(), True
        with pytest.raises(SandboxUnavailable):
            await provider.attach(spec.key)
        woken = await provider.attach(spec.key)
        assert await woken.read_file("mark", max_bytes=100) == b"kept"
        await woken.teardown()

    async def test_cancelled_wake_keeps_the_files(
        self, emulator: Emulator, provider: ModalProvider, faults: Faults
    ) -> None:
        sandbox = await provider.create(spec := new_spec())
        await sandbox.write_file("mark", b"kept")
        await sandbox.suspend()
        faults.slow_start = 1.5
        with anyio.move_on_after(0.7) as scope:
            await provider.attach(spec.key)
        assert scope.cancelled_caught
        woken = await provider.attach(spec.key)
        assert await woken.read_file("mark", max_bytes=100) == b"kept"
        await woken.teardown()

    async def test_outage_of_the_records_is_told_and_leaves_nothing_running(
        self, emulator: Emulator, provider: ModalProvider, faults: Faults
    ) -> None:
        sandbox = await provider.create(spec := new_spec())
        faults.refused = {"VolumeGetOrCreate"}
        with pytest.raises(SandboxUnavailable) as caught:
            await sandbox.teardown()
        assert caught.value.op == "teardown"
        assert emulator.control.sandboxes[sandbox.id].result is not None
        faults.refused = set()
        assert await provider.attach(spec.key) is None

    async def test_wake_that_is_cut_off_takes_nothing_from_another_worker(
        self, emulator: Emulator, provider: ModalProvider, faults: Faults
    ) -> None:
        sandbox = await provider.create(spec := new_spec())
        await sandbox.write_file("mark", b"kept")
        await sandbox.suspend()
        faults.slow_start = 2.0
        faults.calls.clear()
        woken: list[Sandbox] = []

        async def called(name: str, count: int) -> None:
            while faults.calls.get(name, 0) < count:  # noqa: ASYNC110 - nobody says so
                await anyio.sleep(0.01)

        async def wake(scope: anyio.CancelScope | None = None) -> None:
            with scope or anyio.CancelScope():
                woken.append(await provider.attach(spec.key))

        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                first = anyio.CancelScope()
                group.start_soon(wake, first)
                await called("SandboxGetTaskIdV2", 1)
                group.start_soon(wake)
                # It has found what the first one made, and waits for it to run.
                await called("SandboxTagsGetV2", 1)
                await called("VolumeListFiles", 2)
                first.cancel()
        assert len(woken) == 1
        assert await woken[0].read_file("mark", max_bytes=100) == b"kept"
        await woken[0].teardown()

    async def test_outage_of_the_records_is_no_proof_of_absence(
        self, emulator: Emulator, provider: ModalProvider, faults: Faults
    ) -> None:
        sandbox = await provider.create(spec := new_spec())
        await sandbox.suspend()
        faults.refused = {"VolumeListFiles"}
        for call in (
            lambda: provider.attach(spec.key),
            lambda: provider.create(spec),
            lambda: find(provider, spec.key),
        ):
            with pytest.raises(SandboxUnavailable):
                await call()
        faults.refused = set()
        await sandbox.teardown()


class TestRemoval:
    async def test_suspended_one_is_removed_without_being_woken(
        self, emulator: Emulator, provider: ModalProvider
    ) -> None:
        sandbox = await provider.create(spec := new_spec())
        await sandbox.suspend()
        made = len(emulator.definitions)
        await provider.remove(await find(provider, spec.key))
        assert await find(provider, spec.key) is None
        assert await provider.attach(spec.key) is None
        assert (len(emulator.definitions), records(emulator), emulator.control.snapshots.ids) == (made, [], {})

    async def test_one_that_was_woken_since_it_was_listed_is_left_alone(self, provider: ModalProvider) -> None:
        sandbox = await provider.create(spec := new_spec())
        await sandbox.suspend()
        suspended = await find(provider, spec.key)
        woken = await provider.attach(spec.key)
        await provider.remove(suspended)
        assert (await sh(woken, "true")).exit_code == 0
        running = await find(provider, spec.key)
        await woken.suspend()
        await provider.remove(running)
        await provider.remove(suspended)
        assert (await find(provider, spec.key)).state == "suspended"
        await woken.teardown()
        assert await find(provider, spec.key) is None

    async def test_one_whose_time_is_up_is_absent_and_can_be_cleared_away(
        self, emulator: Emulator, provider: ModalProvider
    ) -> None:
        sandbox = await provider.create(spec := new_spec())
        await sandbox.suspend()
        files = emulator.control.volumes["mabridge-suspended"]
        (path,) = files
        files.remove(path)
        files.add(re.sub(r",\d+/", ",1000/", path, count=1))
        assert await provider.attach(spec.key) is None
        info = await find(provider, spec.key)
        assert info.state == "expired"
        await provider.remove(info)
        assert await find(provider, spec.key) is None

    async def test_one_whose_snapshot_is_gone_is_absent_and_made_anew(
        self, emulator: Emulator, provider: ModalProvider, caplog: pytest.LogCaptureFixture
    ) -> None:
        sandbox = await provider.create(spec := new_spec())
        await sandbox.suspend()
        emulator.control.snapshots.ids.clear()
        assert await provider.attach(spec.key) is None
        assert "does not have the snapshot" in caplog.text
        assert records(emulator) == []
        fresh = await provider.create(spec)
        assert (await sh(fresh, "ls -A")).stdout == b""
        await fresh.teardown()

    async def test_files_of_others_in_the_volume_are_no_sandboxes(
        self, emulator: Emulator, provider: ModalProvider
    ) -> None:
        key = new_key()
        emulator.control.volumes["mabridge-suspended"] = {"notes.txt", f"{key}/im-1,1.0,9999999999/{KEY_LABEL}=x,,"}
        assert await provider.attach(key) is None
        assert [info async for info in provider.list()] == []
        del emulator.control.volumes["mabridge-suspended"]


_TAG = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=63)


@given(tags=st.dictionaries(_TAG, _TAG | st.just(""), max_size=8))
def test_record_is_read_as_it_was_written(tags: dict[str, str]) -> None:
    key = new_key()
    kept = Kept(key=key, image="im-01", since=1.5, until=2, tags={**tags, KEY_LABEL: key})
    names = kept.path.strip("/").split("/")
    assert all(0 < len(name) < 256 and name not in (".", "..") for name in names)
    assert Kept.read(kept.path) == kept
    assert Kept.read("/".join(names)) == kept
    for depth in range(len(names)):
        assert Kept.read("/".join(names[:depth])) is None, "a directory on the way is taken for a record"
