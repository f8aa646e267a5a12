"""A command at each vendor: by what the vendor offers, and by mabridge, in one sandbox of the same emulator."""

from __future__ import annotations

import os
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio

from mabridge import SandboxSpec, sandbox_key
from mabridge.hands import Hands
from mabridge.sandbox import EnvVar, Provider, Sandbox

__all__ = ["LATENCY", "VENDORS", "one_vendor"]

LATENCY = 0.02
"""Seconds that each request takes longer."""

_KEY = "MABRIDGE_BENCH_KEY"
_PAUSE = 0.02  # seconds before each call: what the last one left to be tidied up must not be counted with it

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


@asynccontextmanager
async def _cloudflare() -> AsyncIterator[tuple[Any, Provider, Bare]]:
    import httpx2
    from tests.emulators.cloudflare import CloudflareEmulator

    from mabridge.providers.cloudflare import CloudflareOptions, CloudflareProvider

    async with CloudflareEmulator() as emulator:
        os.environ[_KEY] = emulator.api_key
        options = CloudflareOptions(worker_url=emulator.url, api_key=EnvVar(env=_KEY))
        headers = {"Authorization": f"Bearer {emulator.api_key}"}
        async with (
            httpx2.AsyncClient(base_url=emulator.url, headers=headers, timeout=60) as client,
            CloudflareProvider(options) as provider,
        ):
            yield emulator, provider, lambda sandbox: client.post(f"/v1/sandbox/{sandbox.id}/exec", json=_TRUE)


_TRUE = {"argv": ["true"]}

VENDORS = {"e2b": _e2b, "daytona": _daytona, "modal": _modal, "vercel": _vercel, "cloudflare": _cloudflare}
"""By name. Cloudflare has no SDK: what is measured is a request to its bridge."""


async def one_vendor(name: str, calls: int) -> tuple[float, float, float]:
    """Return the median milliseconds of the bare call, of `Sandbox.exec`, and of a bash call over hands."""
    async with VENDORS[name]() as (emulator, provider, bare):
        sandbox = await provider.create(SandboxSpec(key=sandbox_key("env_bench", uuid.uuid4().hex), ttl=600))
        try:
            async with Hands(sandbox) as hands:
                emulator.latency = LATENCY
                measured = await _medians(
                    calls,
                    lambda _: bare(sandbox),
                    lambda _: _exec(sandbox),
                    lambda number: hands.run(f"call_{number}", "true", timeout=60),
                )
                emulator.latency = 0.0
        finally:
            await sandbox.teardown()
    return measured[0], measured[1], measured[2]


async def _exec(sandbox: Sandbox) -> None:
    await sandbox.exec(["true"], timeout=60, max_output=1000)


async def _medians(calls: int, *runs: Callable[[int], Awaitable[Any]]) -> list[float]:
    """Return the median milliseconds of each, run in turn, so that all meet the same load of the machine."""
    taken: list[list[float]] = [[] for _ in runs]
    for number in range(calls + 1):
        for run, times in zip(runs, taken, strict=True):
            await anyio.sleep(_PAUSE)
            started = time.perf_counter()
            await run(number)
            times.append((time.perf_counter() - started) * 1000)
    return [statistics.median(times[1:]) for times in taken]
