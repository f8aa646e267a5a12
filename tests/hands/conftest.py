"""The hands of every place, each over a channel and over plain exec."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import count

import pytest

from mabridge.hands import CallResult, Hands
from mabridge.sandbox import Sandbox

_numbers = count()


class ExecOnly:
    """A sandbox that can hold no process open."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.id = sandbox.id
        self.workdir = sandbox.workdir
        self.exec = sandbox.exec
        self.read_file = sandbox.read_file


class Shell:
    """Runs commands, each under an id of its own."""

    def __init__(self, hands: Hands) -> None:
        self.hands = hands

    async def __call__(self, command: str, *, timeout: float = 20.0, shell: str = "main") -> CallResult:
        return await self.hands.run(f"call_{next(_numbers)}", command, shell=shell, timeout=timeout)

    async def text(self, command: str, **options) -> str:
        return (await self(command, **options)).head.decode().strip()


@pytest.fixture(params=["channel", "exec"])
def reached(request: pytest.FixtureRequest, sandbox: Sandbox) -> Sandbox:
    return sandbox if request.param == "channel" else ExecOnly(sandbox)  # type: ignore[return-value]


@pytest.fixture
async def run(reached: Sandbox) -> AsyncIterator[Shell]:
    async with Hands(reached) as hands:
        yield Shell(hands)
