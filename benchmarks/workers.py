"""The workers of the benchmarks, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from tests.images import BUSYBOX

from mabridge.testing import ControlPlane, Environment

__all__ = ["IMAGE", "resident_kb", "until", "worker"]

IMAGE = os.environ.get("MABRIDGE_BENCH_IMAGE", BUSYBOX)
WORKER = Path(__file__).with_name("worker_process.py")


@asynccontextmanager
async def worker(kind: str, plane: ControlPlane, environment: Environment) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A worker of its own for `environment`, ready to claim."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(WORKER), kind, plane.url, environment.id],
        env={**os.environ, "ANTHROPIC_ENVIRONMENT_KEY": environment.key, "MABRIDGE_BENCH_IMAGE": IMAGE},
        stdin=subprocess.PIPE,
    )
    try:
        await until(lambda: any(environment.id in r.path and r.path.endswith("/poll") for r in plane.requests), 60)
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await anyio.to_thread.run_sync(process.wait)


async def until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until `condition` holds, `seconds` at most."""
    with anyio.fail_after(seconds):
        while not condition():
            await anyio.sleep(0.005)


def resident_kb(process: subprocess.Popen[bytes]) -> int:
    """Resident memory of the process, in kB, as Linux tells it."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0
