"""One worker in a process of its own, for the benchmarks: the SDK's or mabridge's, with its memory on request.

Usage: ``worker_process.py sdk|local|docker URL ENVIRONMENT_ID``, with the key in ``ANTHROPIC_ENVIRONMENT_KEY``.
It works until its standard input ends.
"""

from __future__ import annotations

import os
import sys
import tempfile

import anyio
from anthropic import AsyncAnthropic

MAX_IDLE = 0.2


async def sdk_worker(client: AsyncAnthropic, environment_id: str, key: str, workdir: str) -> None:
    from anthropic.lib.environments import EnvironmentWorker
    from anthropic.lib.tools.agent_toolset import beta_agent_toolset_20260401

    await EnvironmentWorker(
        client,
        environment_id=environment_id,
        environment_key=key,
        workdir=workdir,
        tools=beta_agent_toolset_20260401,
        max_idle=MAX_IDLE,
    ).run()


async def mabridge_worker(kind: str, client: AsyncAnthropic, environment_id: str, key: str, root: str) -> None:
    from mabridge import ProviderConfig, Worker

    options = {"local": {"root": root}, "docker": {"image": os.environ.get("MABRIDGE_BENCH_IMAGE")}}[kind]
    await Worker(
        client,
        environment_id=environment_id,
        environment_key=key,
        providers={kind: ProviderConfig(type=kind, options=options, when_done="teardown")},
        max_sessions=64,
        max_idle=MAX_IDLE,
    ).run()


async def main(kind: str, url: str, environment_id: str) -> None:
    key = os.environ["ANTHROPIC_ENVIRONMENT_KEY"]
    with tempfile.TemporaryDirectory() as directory:
        async with AsyncAnthropic(base_url=url, auth_token=key) as client, anyio.create_task_group() as tasks:
            if kind == "sdk":
                tasks.start_soon(sdk_worker, client, environment_id, key, directory)
            else:
                tasks.start_soon(mabridge_worker, kind, client, environment_id, key, directory)
            await anyio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
            tasks.cancel_scope.cancel()


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:4])
