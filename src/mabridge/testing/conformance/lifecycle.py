"""`Provider.create`, `attach` and `list`, and how a sandbox ends."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, ClassVar

import anyio
import pytest

from mabridge.errors import SandboxGone
from mabridge.sandbox import Provider, Sandbox, SandboxInfo, SupportsSuspend
from mabridge.testing.conformance.helpers import created, find, new_key, new_spec, run, sh, wait_for_file

__all__ = ["LifecycleTests"]

_CREATES_AT_ONCE = 6


class LifecycleTests:
    """From create to teardown; what `SandboxConformance` says of the attributes."""

    page_size: ClassVar[int]
    shortest_ttl: ClassVar[float]
    ttl_grace: ClassVar[float]
    list_lag: ClassVar[float]

    async def test_check_passes(self, provider: Provider) -> None:
        await provider.check()

    async def test_new_sandbox_is_ready_and_empty(self, provider: Provider) -> None:
        async with created(provider, new_spec()) as sandbox:
            result = await sh(sandbox, "ls -A; touch writable")
        assert (result.exit_code, result.stdout, result.stderr) == (0, b"", b"")

    async def test_sandbox_is_listed_with_its_labels(self, provider: Provider) -> None:
        spec = new_spec()
        async with created(provider, spec) as sandbox:
            info = await self._listed(provider, spec.key)
        assert info is not None
        assert info.id == sandbox.id
        assert info.labels.items() >= spec.labels.items()
        if info.created_at is not None:
            assert info.created_at.tzinfo is not None
            assert abs(datetime.now(UTC) - info.created_at) < timedelta(hours=1)

    async def test_list_pages_through_to_the_last_sandbox(self, provider: Provider) -> None:
        specs = [new_spec() for _ in range(self.page_size + 1)]
        made: list[Sandbox] = []
        slots = anyio.CapacityLimiter(_CREATES_AT_ONCE)

        async def create(number: int) -> None:
            async with slots:
                made.append(await provider.create(specs[number]))

        async def remove(sandbox: Sandbox) -> None:
            async with slots:
                await sandbox.teardown()

        try:
            async with anyio.create_task_group() as group:
                for number in range(len(specs)):
                    group.start_soon(create, number)
            wanted = {spec.key for spec in specs}

            async def complete() -> bool:
                found = [info.key async for info in provider.list() if info.key in wanted]
                return sorted(found) == sorted(wanted)

            assert await self._comes_true(complete, within=self.list_lag), "some were not listed, or listed twice"
        finally:
            async with anyio.create_task_group() as group:
                for sandbox in made:
                    group.start_soon(remove, sandbox)

    async def test_same_key_is_the_same_sandbox(self, provider: Provider) -> None:
        spec = new_spec()
        async with created(provider, spec) as sandbox:
            await sandbox.write_file("mark", b"here")
            for again in (await provider.create(spec), await provider.attach(spec.key)):
                assert again is not None
                assert (again.id, again.workdir) == (sandbox.id, sandbox.workdir)
                assert await again.read_file("mark", max_bytes=100) == b"here"

    async def test_creators_at_once_get_the_same_sandbox_ready(self, provider: Provider) -> None:
        spec = new_spec()
        made: list[Sandbox] = []

        async def create() -> None:
            sandbox = await provider.create(spec)
            made.append(sandbox)
            assert (await sh(sandbox, "touch ready")).exit_code == 0

        try:
            async with anyio.create_task_group() as group:
                for _ in range(8):
                    group.start_soon(create)
            infos = [info async for info in provider.list() if info.key == spec.key]
        finally:
            for sandbox in made:
                await sandbox.teardown()
        assert len({sandbox.id for sandbox in made}) == 1
        assert len(infos) <= 1

    async def test_creators_in_two_workers_get_the_same_sandbox(self, provider: Provider) -> None:
        spec = new_spec()
        made: list[Sandbox] = []

        async def create(by: Provider) -> None:
            made.append(await by.create(spec))

        async with type(provider)(provider.options) as other:
            try:
                async with anyio.create_task_group() as group:
                    group.start_soon(create, provider)
                    group.start_soon(create, other)
                await made[0].write_file("mark", b"")
                seen = await run(made[1], "ls")
            finally:
                for sandbox in made:
                    await sandbox.teardown()
        assert made[0].id == made[1].id
        assert seen.stdout == b"mark\n"

    async def test_another_worker_attaches_to_the_sandbox_as_it_was_made(self, provider: Provider) -> None:
        spec = new_spec(env={"MINE": "a 'b' $c"})
        async with created(provider, spec) as sandbox, type(provider)(provider.options) as other:
            await sandbox.write_file("mark", b"here")
            attached = await other.attach(spec.key)
            assert attached is not None
            assert (attached.id, attached.workdir) == (sandbox.id, sandbox.workdir)
            assert await attached.read_file("mark", max_bytes=100) == b"here"
            assert (await sh(attached, 'echo "$MINE"; pwd')).stdout.decode() == f"a 'b' $c\n{sandbox.workdir}\n"
            await attached.teardown()
            assert await provider.attach(spec.key) is None

    async def test_sandbox_outlives_the_provider_object_that_made_it(self, provider: Provider) -> None:
        spec = new_spec()
        async with type(provider)(provider.options) as other:
            await sh(await other.create(spec), "echo kept > mark")
        sandbox = await provider.attach(spec.key)
        assert sandbox is not None, "it was removed when its maker was closed"
        assert await sandbox.read_file("mark", max_bytes=100) == b"kept\n"
        await sandbox.teardown()

    async def test_unknown_key_is_absent(self, provider: Provider) -> None:
        assert await provider.attach(new_key()) is None

    async def test_removed_sandbox_is_gone_for_good(self, provider: Provider) -> None:
        spec = new_spec()
        async with created(provider, spec):
            pass
        assert await provider.attach(spec.key) is None
        assert await self._unlisted(provider, spec.key), "it is listed still"

    async def test_every_call_on_a_removed_sandbox_says_that_it_is_gone(self, own_sandbox: Sandbox) -> None:
        await own_sandbox.teardown()
        for call in (
            partial(run, own_sandbox, "true"),
            partial(own_sandbox.read_file, "x", max_bytes=1),
            partial(own_sandbox.write_file, "x", b""),
            partial(own_sandbox.keep_alive, 60),
        ):
            with pytest.raises(SandboxGone):
                await call()

    async def test_teardown_can_be_repeated_and_raced(self, own_sandbox: Sandbox) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(own_sandbox.teardown)
            group.start_soon(own_sandbox.teardown)
        await own_sandbox.teardown()

    async def test_removed_sandbox_can_be_created_anew_and_is_empty(self, provider: Provider) -> None:
        spec = new_spec()
        async with created(provider, spec) as sandbox:
            await sandbox.write_file("old", b"")
        async with created(provider, spec) as sandbox:
            listing = await run(sandbox, "ls", "-A")
        assert (listing.exit_code, listing.stdout) == (0, b"")

    async def test_removal_ends_a_running_call(self, own_sandbox: Sandbox) -> None:
        async def call() -> None:
            with contextlib.suppress(SandboxGone):
                assert (await sh(own_sandbox, "echo > begun; sleep 60")).exit_code == 137

        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                group.start_soon(call)
                await wait_for_file(own_sandbox, "begun")
                await own_sandbox.teardown()

    async def test_cancelled_create_leaves_nothing_behind(self, provider: Provider) -> None:
        keys: list[str] = []

        async def cancelled_after(delay: float) -> None:
            spec = new_spec()
            keys.append(spec.key)
            sandbox = None
            with anyio.move_on_after(delay):
                sandbox = await provider.create(spec)
            if sandbox is not None:
                await sandbox.teardown()

        async with anyio.create_task_group() as group:
            for delay in (0, 0.005, 0.02, 0.05, 0.1, 0.15, 0.2, 0.4):
                group.start_soon(cancelled_after, delay)
        left = [key for key in keys if not await self._unlisted(provider, key)]
        for key in left:
            if (sandbox := await provider.attach(key)) is not None:
                await sandbox.teardown()
        assert left == [], "a cancelled create left a sandbox"

    async def test_sandbox_removes_itself_when_its_time_is_up(self, provider: Provider) -> None:
        spec = new_spec(ttl=self.shortest_ttl)

        async def gone() -> bool:
            return await provider.attach(spec.key) is None

        async with created(provider, spec):
            assert await self._comes_true(gone, within=self.shortest_ttl + self.ttl_grace), "it outlived its ttl"
            assert await self._unlisted(provider, spec.key), "it is listed still"

    async def test_keeping_alive_puts_the_end_off_and_never_nearer(self, provider: Provider) -> None:
        ttl = max(2.0, self.shortest_ttl)
        spec = new_spec(ttl=ttl)
        async with created(provider, spec) as sandbox:
            await sandbox.keep_alive(ttl + 600)
            await sandbox.keep_alive(1)
            await anyio.sleep(ttl + 3)  # what is tested is that nothing happens in that time
            assert await provider.attach(spec.key) is not None, "it ended before its time"
            assert (await run(sandbox, "true")).exit_code == 0

    async def test_provider_says_whether_its_sandboxes_can_be_suspended(
        self, provider: Provider, sandbox: Sandbox
    ) -> None:
        assert provider.can_suspend == isinstance(sandbox, SupportsSuspend)

    async def test_suspended_sandbox_is_woken_with_its_files(self, provider: Provider) -> None:
        spec = new_spec()
        async with created(provider, spec) as sandbox:
            if not isinstance(sandbox, SupportsSuspend):
                pytest.skip("the sandbox cannot be suspended, which is optional (SupportsSuspend)")
            await sandbox.write_file("mark", b"kept")
            await sandbox.suspend()
            await sandbox.suspend()
            assert await self._listed(provider, spec.key) is not None, "a suspended one is not listed"
            woken = await provider.attach(spec.key)
            assert woken is not None
            assert await woken.read_file("mark", max_bytes=100) == b"kept"
        assert await provider.attach(spec.key) is None

    async def _listed(self, provider: Provider, key: str) -> SandboxInfo | None:
        async def listed() -> SandboxInfo | None:
            return await find(provider, key)

        found: SandboxInfo | None = await self._comes_true(listed, within=self.list_lag)
        return found

    async def _unlisted(self, provider: Provider, key: str) -> bool:
        async def unlisted() -> bool:
            return await find(provider, key) is None

        return bool(await self._comes_true(unlisted, within=self.list_lag))

    @staticmethod
    async def _comes_true(condition: Callable[[], Awaitable[Any]], *, within: float) -> Any:  # noqa: ANN401
        """Return what `condition` says as soon as it is true, or what it says after that many seconds."""
        until = anyio.current_time() + within
        while not (said := await condition()) and anyio.current_time() < until:  # noqa: ASYNC110 - it ends by itself
            await anyio.sleep(0.2)
        return said
