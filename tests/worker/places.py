"""Providers that fail on demand: directories of this machine, as `local`, behind a switch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar

import anyio

from mabridge.errors import AtCapacity, SandboxUnavailable
from mabridge.providers.local import LocalOptions, LocalProvider, LocalSandbox
from mabridge.sandbox import Sandbox, SandboxInfo, SandboxSpec


class Place(LocalProvider):
    """`mood` says what becomes of a request.

    ``well``; ``down``, it is refused; ``hanging``, it is never answered; ``stuck``, a create is never answered;
    ``full``, nothing more can be made; ``unclear``, what was to be made is made, and told of as a failure; ``buggy``,
    the adapter's own code fails.
    """

    type: ClassVar[str] = "place"

    def __init__(self, root: Path, mood: str = "well") -> None:
        super().__init__(LocalOptions(root=root))
        self.mood = mood
        self.asked: list[str] = []

    async def create(self, spec: SandboxSpec) -> Sandbox:
        await self._answer("create")
        if self.mood == "full":
            raise AtCapacity("no room", provider=self.type, op="create", retry_after=0.2)
        sandbox = await super().create(spec)
        if self.mood == "unclear":
            raise SandboxUnavailable("502", provider=self.type, op="create")
        return sandbox

    async def attach(self, key: str) -> Sandbox | None:
        await self._answer("attach")
        return await super().attach(key)

    async def list(self) -> AsyncIterator[SandboxInfo]:
        await self._answer("list")
        async for info in super().list():
            yield info

    async def _answer(self, op: str) -> None:
        self.asked.append(op)
        if self.mood == "down":
            raise SandboxUnavailable("refused", provider=self.type, op=op)
        if self.mood == "hanging" or (self.mood == "stuck" and op == "create"):
            await anyio.sleep_forever()
        if self.mood == "buggy":
            raise KeyError("sandbox_id")

    @property
    def keys(self) -> set[str]:
        """The keys of the sandboxes that there are."""
        return (
            {path.name for path in self._root.iterdir() if path.name.startswith("mab")}
            if self._root.exists()
            else set()
        )


class Sleeper(Place):
    """One whose sandboxes can be suspended: a file says that they are."""

    can_suspend = True

    async def create(self, spec: SandboxSpec) -> Sandbox:
        await super().create(spec)
        return SleepingSandbox(self._root / spec.key)

    async def attach(self, key: str) -> Sandbox | None:
        found = await super().attach(key)
        if found is None:
            return None
        (self._root / key / "suspended").unlink(missing_ok=True)
        return SleepingSandbox(self._root / key)


class SleepingSandbox(LocalSandbox):
    async def suspend(self) -> None:
        (self._path / "suspended").touch()


class Hanging(Place):
    """One that never answers, once it is told to, and says nothing either."""

    async def create(self, spec: SandboxSpec) -> Sandbox:
        await super().create(spec)
        return HangingSandbox(self._root / spec.key, self)


class HangingSandbox(LocalSandbox):
    def __init__(self, path: Path, place: Hanging) -> None:
        super().__init__(path)
        self._place = place

    async def exec(self, argv, **options):
        await self._place._answer("exec")
        return await super().exec(argv, **options)

    async def open_process(self, argv, **options):
        await self._place._answer("open_process")
        return await super().open_process(argv, **options)


class Broken(Place):
    """One whose adapter fails in its own code at every command, and takes its time to remove a sandbox."""

    def __init__(self, root: Path, *, teardown: float = 0.0, commands: bool = True) -> None:
        super().__init__(root)
        self._slowness = teardown
        self._commands = commands
        self.tearing_down = anyio.Event()

    async def create(self, spec: SandboxSpec) -> Sandbox:
        await super().create(spec)
        return BrokenSandbox(self._root / spec.key, self, self._slowness, self._commands)


class BrokenSandbox(LocalSandbox):
    def __init__(self, path: Path, place: Broken, teardown: float, commands: bool) -> None:
        super().__init__(path)
        self._place, self._slowness, self._works = place, teardown, not commands

    async def exec(self, argv, **options):
        if not self._works:
            raise KeyError("exit_code")
        return await super().exec(argv, **options)

    async def open_process(self, argv, **options):
        if not self._works:
            raise KeyError("exit_code")
        return await super().open_process(argv, **options)

    async def teardown(self) -> None:
        self._place.tearing_down.set()
        await anyio.sleep(self._slowness)
        await super().teardown()
