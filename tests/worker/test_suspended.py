"""A worker that is stopped in its tracks (SIGSTOP, a suspended machine) and goes on after its leases have lapsed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from mabridge import ProviderConfig
from mabridge.testing import Agent, ControlPlane, Fault
from tests.worker.conftest import Serve

pytestmark = pytest.mark.anyio

CONFIG = """\
[worker]
environment_id = "{environment}"
environment_key = {{ env = "TEST_KEY" }}
base_url = "{url}"
[providers.local]
type = "local"
root = "{root}"
"""


async def test_worker_that_slept_past_its_lease_does_nothing_more_for_the_session(
    serve: Serve, local: ProviderConfig, tmp_path: Path
):
    async def brain(agent: Agent) -> None:
        first = await agent.call("bash", {"command": "echo ran >> log; sleep 3; cat log"})
        assert first.text == "ran"
        await agent.call("bash", {"command": "cat log"})

    async with ControlPlane(lease_ttl=4.0) as plane:
        environment = plane.create_environment()
        text = CONFIG.format(environment=environment.id, url=plane.url, root=local.options["root"])
        (tmp_path / "mabridge.toml").write_text(text)
        session = environment.create_session(brain, message="go")
        process = await anyio.open_process(
            [sys.executable, "-m", "mabridge.cli", "run", "--log-format", "json"],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TEST_KEY": environment.key},
            stdout=subprocess.DEVNULL,
        )
        async with process:
            try:
                await plane.wait_until(lambda: any(Path(local.options["root"]).glob("mab*/workspace/log")), timeout=60)
                process.send_signal(signal.SIGSTOP)
                async with serve(environment=environment, max_idle=3600):
                    await session.wait_idle(timeout=60)
                    before = len(plane.requests)
                    process.send_signal(signal.SIGCONT)
                    assert await line_of("session.lost", process)
                    # Nothing that was the first one's to say has been said: the second one serves it, and is idle.
                    sent = [(r.method, r.path) for r in list(plane.requests)[before:] if r.method == "POST"]
                    assert not [path for _, path in sent if path.endswith(("/events", "/stop"))]
            finally:
                process.kill()
        assert all(len(session.results(call.id).accepted) == 1 for call in session.calls)
        assert not any(session.results(call.id).refused for call in session.calls)


async def line_of(event: str, process: anyio.abc.Process) -> dict[str, object]:
    """Read the log until it tells of `event`."""
    assert process.stderr is not None
    rest = b""
    with anyio.fail_after(60):
        async for chunk in process.stderr:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in map(json.loads, lines):
                if line.get("event") == event:
                    return line
    raise AssertionError(f"no {event}")


async def test_session_whose_heartbeats_all_fail_is_left_when_its_lease_has_lapsed(serve: Serve):
    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "echo begun > file; sleep 4242"})

    async with ControlPlane(lease_ttl=2.0) as plane:
        environment = plane.create_environment()
        async with serve(environment=environment) as watched:
            environment.create_session(brain, message="go")
            await watched.until("sandbox.created")
            await watched.until("call.started")
            plane.faults.add(Fault(path="/poll$", status=503, times=None))
            plane.faults.add(Fault(path="/heartbeat$", hang=True, times=None))
            lost = await watched.until("session.lost")
        assert lost.reason == "no heartbeat got through for as long as the lease lasts"
        sent = [record for record in plane.requests if record.method == "POST"]
        assert not [record for record in sent if record.path.endswith(("/events", "/stop"))]
        assert not watched.named("sandbox.removed")
