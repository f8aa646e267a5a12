"""A command at each vendor: by the vendor's own SDK, and by mabridge, in one sandbox of the same emulator."""

from __future__ import annotations

import os
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from mabridge import SandboxSpec, sandbox_key
from mabridge.hands import Hands
from mabridge.sandbox import EnvVar, Provider, Sandbox

__all__ = ["LATENCY", "VENDORS", "one_vendor"]

LATENCY = 0.02
"""Seconds that each request takes longer."""

_KEY = "MABRIDGE_BENCH_KEY"

Bare = Callable[[Any], Awaitable[Any]]
"""Runs ``true`` in a sandbox of ours by nothing but what the vendor offers."""


@asynccontextmanager
async def _e2b() -> AsyncIterator[tuple[Any, Provider, Bare]]:
    from tests.emulators.e2b import E2BEmulator

    from mabridge.providers.e2b import E2BOptions, E2BProvider

    async with E2BEmulator() as emulator:
        os.environ[_KEY] = emulator.api_key
        options = E2BOptions(api_url=emulator.url, sandbox_url=emulator.url, api_key=EnvVar(env=_KEY))
        async with E2BProvider(options) as provider:
            yield emulator, provider, lambda sandbox: sandbox.box.commands.run("true")


@asynccontextmanager
async def _daytona() -> AsyncIterator[tuple[Any, Provider, Bare]]:
    from tests.emulators.daytona import KEY, DaytonaEmulator

    from mabridge.providers.daytona import DaytonaOptions, DaytonaProvider

    async with DaytonaEmulator() as emulator:
        os.environ[_KEY] = KEY
        options = DaytonaOptions(api_url=emulator.url, api_key=EnvVar(env=_KEY))
        async with DaytonaProvider(options) as provider:
            yield emulator, provider, lambda sandbox: sandbox._box.process.exec("true")


@asynccontextmanager
async def _modal() -> AsyncIterator[tuple[Any, Provider, Bare]]:
    from tests.emulators.modal import Emulator

    from mabridge.providers.modal import ModalOptions, ModalProvider

    async def bare(sandbox: Any) -> None:
        process = await sandbox._sandbox.exec.aio("true")
        await process.stdout.read.aio()
        await process.wait.aio()

    async with Emulator() as emulator:
        os.environ |= {
            "MODAL_SERVER_URL": emulator.url,
            "MODAL_TOKEN_ID": emulator.token_id,
            "MODAL_TOKEN_SECRET": emulator.token_secret,
        }
        async with ModalProvider(ModalOptions(image=emulator.image_id)) as provider:
            yield emulator, provider, bare


@asynccontextmanager
async def _vercel() -> AsyncIterator[tuple[Any, Provider, Bare]]:
    from tests.emulators.vercel import PROJECT, TEAM, TOKEN, VercelEmulator

    from mabridge.providers.vercel import VercelOptions, VercelProvider

    async with VercelEmulator() as emulator:
        os.environ[_KEY] = TOKEN
        options = VercelOptions(token=EnvVar(env=_KEY), team_id=TEAM, project_id=PROJECT, base_url=emulator.url)
        async with VercelProvider(options) as provider:
            yield (
                emulator,
                provider,
                lambda sandbox: sandbox._session.run_process("true", [], cwd="/", capture_output=True),
            )


VENDORS = {"e2b": _e2b, "daytona": _daytona, "modal": _modal, "vercel": _vercel}
"""By name; Cloudflare has no SDK to compare with."""


async def one_vendor(name: str, calls: int) -> tuple[float, float, float]:
    """Return the median milliseconds of the bare call, of `Sandbox.exec`, and of a bash call over hands."""
    async with VENDORS[name]() as (emulator, provider, bare):
        sandbox = await provider.create(SandboxSpec(key=sandbox_key("env_bench", uuid.uuid4().hex), ttl=600))
        try:
            async with Hands(sandbox) as hands:
                emulator.latency = LATENCY
                measured = (
                    await _median(lambda _: bare(sandbox), calls),
                    await _median(lambda _: _exec(sandbox), calls),
                    await _median(lambda number: hands.run(f"call_{number}", "true", timeout=60), calls),
                )
                emulator.latency = 0.0
        finally:
            await sandbox.teardown()
    return measured


async def _exec(sandbox: Sandbox) -> None:
    await sandbox.exec(["true"], timeout=60, max_output=1000)


async def _median(run: Callable[[int], Awaitable[Any]], calls: int) -> float:
    await run(0)
    taken = []
    for number in range(1, calls + 1):
        started = time.perf_counter()
        await run(number)
        taken.append((time.perf_counter() - started) * 1000)
    return statistics.median(taken)
