"""The local provider, broken in one way a class. What must catch each is in `CAUGHT_BY`; see test_conformance.py."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import anyio
import pytest

from mabridge.errors import FileTooLarge, SandboxGone, SandboxUnavailable
from mabridge.providers.local import LocalOptions, LocalProvider, LocalSandbox
from mabridge.sandbox import ExecResult, Sandbox, SandboxInfo, SandboxSpec
from mabridge.testing import SandboxConformance

CAUGHT_BY: dict[str, str] = {}


class BrokenSandbox(LocalSandbox):
    """Breaks what comes back, or what goes in."""

    async def exec(self, argv: Sequence[str], **options: Any) -> ExecResult:
        return self.after(await super().exec(self.before(list(argv), options), **options))

    def before(self, argv: list[str], options: dict[str, Any]) -> list[str]:
        return argv

    def after(self, result: ExecResult) -> ExecResult:
        return result


class BrokenProvider(LocalProvider):
    sandbox: type[LocalSandbox] = BrokenSandbox

    async def create(self, spec: SandboxSpec) -> Sandbox:
        return self.sandbox(Path((await super().create(spec)).id))

    async def attach(self, key: str) -> Sandbox | None:
        found = await super().attach(key)
        return found and self.sandbox(Path(found.id))


class Broken(SandboxConformance):
    __test__ = False
    ttl_grace = 1.0
    make: ClassVar[type[LocalProvider]] = BrokenProvider

    @pytest.fixture(scope="class")
    async def provider(self, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalProvider]:
        async with self.make(LocalOptions(root=tmp_path_factory.mktemp("local") / "sandboxes")) as provider:
            yield provider


class TestSound(Broken):
    pass


def caught_by(test: str) -> Callable[[type], type]:
    """Make a conformance class of a broken sandbox or provider, and note which test must fail for it."""

    def mark(broken: type) -> type:
        provider = broken
        if issubclass(broken, Sandbox):
            provider = type(broken.__name__ + "Provider", (BrokenProvider,), {"sandbox": broken})
        name = f"Test{broken.__name__}"
        globals()[name] = type(name, (Broken,), {"make": provider})
        CAUGHT_BY[name] = test
        return broken

    return mark


@caught_by("test_stdout_and_stderr_are_kept_apart")
class LosesStderr(BrokenSandbox):
    def after(self, result: ExecResult) -> ExecResult:
        return dataclasses.replace(result, stderr=b"")


@caught_by("test_timeout_keeps_the_output_so_far")
class SwallowsTimeouts(BrokenSandbox):
    def after(self, result: ExecResult) -> ExecResult:
        return dataclasses.replace(result, timed_out=False, exit_code=result.exit_code or 0)


@caught_by("test_arguments_pass_exactly_and_no_shell_reads_them")
class LetsAShellReadArguments(BrokenSandbox):
    def before(self, argv: list[str], options: dict[str, Any]) -> list[str]:
        return ["sh", "-c", " ".join(f"'{arg}'" for arg in argv)]


@caught_by("test_death_by_signal_is_128_and_its_number_and_no_timeout")
class ReportsZeroForASignal(BrokenSandbox):
    def after(self, result: ExecResult) -> ExecResult:
        return dataclasses.replace(result, exit_code=0) if (result.exit_code or 0) > 128 else result


@caught_by("test_timeout_kills_all_that_the_command_started")
class KillsOnlyWhatItStartedItself(BrokenSandbox):
    def before(self, argv: list[str], options: dict[str, Any]) -> list[str]:
        return ["sh", "-c", 'env -u MAB_EXEC setsid -w "$@"', "sh", *argv]


@caught_by("test_process_left_in_the_background_lives_on_and_holds_nothing")
class WaitsForTheBackground(BrokenSandbox):
    def before(self, argv: list[str], options: dict[str, Any]) -> list[str]:
        return ["sh", "-c", '"$@" | cat', "sh", *argv]


@caught_by("test_command_is_never_run_twice")
class TriesAgain(BrokenSandbox):
    async def exec(self, argv: Sequence[str], **options: Any) -> ExecResult:
        result = await super().exec(argv, **options)
        return await super().exec(argv, **options) if result.exit_code == 1 else result


@caught_by("test_output_is_cut_at_the_bound_for_each_stream_and_said_to_be")
class CutsInSilence(BrokenSandbox):
    def after(self, result: ExecResult) -> ExecResult:
        return dataclasses.replace(result, truncated=False)


@caught_by("test_output_is_bounded_while_it_is_read")
class BoundsTheOutputAfterwards(BrokenSandbox):
    async def exec(self, argv: Sequence[str], *, max_output: int, **options: Any) -> ExecResult:
        result = await super().exec(argv, max_output=10**9, **options)
        cut = len(result.stdout) > max_output or len(result.stderr) > max_output
        kept = {"stdout": result.stdout[:max_output], "stderr": result.stderr[:max_output]}
        return dataclasses.replace(result, truncated=cut, **kept)


@caught_by("test_nothing_of_the_workers_environment_leaks")
class PassesItsOwnEnvironmentOn(BrokenSandbox):
    def before(self, argv: list[str], options: dict[str, Any]) -> list[str]:
        options["env"] = {**os.environ, **(options["env"] or {})}
        return argv


@caught_by("test_what_was_written_is_read")
class TakesFilesForText(BrokenSandbox):
    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        return (await super().read_file(path, max_bytes=max_bytes)).decode(errors="replace").encode()


@caught_by("test_file_above_the_bound_is_too_large_and_says_how_large")
class CutsFiles(BrokenSandbox):
    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        try:
            return await super().read_file(path, max_bytes=max_bytes)
        except FileTooLarge:
            return (await super().read_file(path, max_bytes=10**9))[:max_bytes]


@caught_by("test_every_call_on_a_removed_sandbox_says_that_it_is_gone")
class TakesTheGoneForTheUnreachable(BrokenSandbox):
    async def exec(self, argv: Sequence[str], **options: Any) -> ExecResult:
        try:
            return await super().exec(argv, **options)
        except SandboxGone as exc:
            raise SandboxUnavailable(exc.message, provider="local", op="exec") from exc


@caught_by("test_removed_sandbox_is_gone_for_good")
class RemovesNothing(BrokenSandbox):
    async def teardown(self) -> None:
        pass


@caught_by("test_keeping_alive_puts_the_end_off_and_never_nearer")
class BringsTheEndNearer(BrokenSandbox):
    async def keep_alive(self, ttl: float) -> None:
        os.utime(Path(self.id) / "deadline", (0, 0))


@caught_by("test_cancelled_create_leaves_nothing_behind")
class LeaksOnCancel(BrokenProvider):
    async def create(self, spec: SandboxSpec) -> Sandbox:
        with anyio.CancelScope(shield=True):
            made = await super().create(spec)
        await anyio.sleep(0.1)
        return made


@caught_by("test_sandbox_removes_itself_when_its_time_is_up")
class ForgetsTheTtl(BrokenProvider):
    async def create(self, spec: SandboxSpec) -> Sandbox:
        return await super().create(dataclasses.replace(spec, ttl=3600))


@caught_by("test_another_worker_attaches_to_the_sandbox_as_it_was_made")
class KnowsOnlyWhatItMadeItself(BrokenProvider):
    def __init__(self, options: LocalOptions) -> None:
        super().__init__(options)
        self._made: set[str] = set()

    async def create(self, spec: SandboxSpec) -> Sandbox:
        self._made.add(spec.key)
        return await super().create(spec)

    async def attach(self, key: str) -> Sandbox | None:
        return await super().attach(key) if key in self._made else None


@caught_by("test_sandbox_is_listed_with_its_labels")
class LosesLabels(BrokenProvider):
    async def list(self) -> AsyncIterator[SandboxInfo]:
        async for info in super().list():
            yield dataclasses.replace(info, labels={})


@caught_by("test_provider_says_whether_its_sandboxes_can_be_suspended")
class PromisesToSuspend(BrokenProvider):
    can_suspend = True


@caught_by("test_list_pages_through_to_the_last_sandbox")
class ListsTheFirstPage(BrokenProvider):
    async def list(self) -> AsyncIterator[SandboxInfo]:
        count = 0
        async for info in super().list():
            count += 1
            if count <= 100:
                yield info
