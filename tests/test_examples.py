"""The examples are what they say: the configuration is valid, and the worker serves a session."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mabridge import load_config
from mabridge.routing import SessionFacts, route
from mabridge.testing import Agent, ControlPlane
from tests.images import BUSYBOX

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_configuration_is_valid():
    config = load_config(EXAMPLES / "mabridge.toml")
    assert list(config.providers) == ["small", "big", "cloud"]
    facts = SessionFacts(agent_name="research-1")
    assert route(facts, config.routes).providers == ("cloud", "big")
    assert route(SessionFacts(), config.routes).providers == ("small",)


@pytest.mark.anyio
@pytest.mark.docker
async def test_custom_worker_serves_a_session_and_drains(tmp_path: Path, image):
    program = tmp_path / "worker.py"
    program.write_text((EXAMPLES / "custom_worker.py").read_text().replace("python:3.13-slim", image(BUSYBOX)))

    async def brain(agent: Agent) -> None:
        assert (await agent.call("bash", {"command": "echo hello"})).text == "hello"
        assert (await agent.call("price_of", {"product": "pear"}, custom=True)).text == "4 cents"
        memory = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null"
        assert (await agent.call("bash", {"command": memory})).text.splitlines()[0] == str(512 << 20)

    async with ControlPlane() as plane:
        environment = plane.create_environment()
        credentials = {"ANTHROPIC_ENVIRONMENT_ID": environment.id, "ANTHROPIC_ENVIRONMENT_KEY": environment.key}
        process = subprocess.Popen(  # noqa: ASYNC220 - it only starts it
            [sys.executable, str(program)],
            env={**os.environ, **credentials, "ANTHROPIC_BASE_URL": plane.url},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            session = environment.create_session(brain, message="go", metadata={"team": "data"})
            await session.wait_idle(timeout=60)
            session.terminate()
            await plane.wait_until(lambda: environment.queue.get(session.id).state == "stopped", timeout=30)
            process.send_signal(signal.SIGTERM)
            # The platform goes on answering meanwhile: the worker ends its poll first.
            await plane.wait_until(lambda: process.poll() is not None, timeout=30)
        finally:
            process.kill()
            out, _ = process.communicate()
    assert process.returncode == 0
    assert "bash: ok" in out
    assert "price_of: answered here" in out
