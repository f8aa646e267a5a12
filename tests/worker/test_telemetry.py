"""What an operator sees, and what nobody may see."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import anyio
import pytest
from anthropic import AsyncAnthropic

from mabridge import ConfigError, ProviderConfig, Worker
from mabridge.cli._logging import JsonFormatter
from mabridge.testing import Agent, ControlPlane, Environment, Fault
from tests import canary
from tests.worker.conftest import Serve

pytestmark = pytest.mark.anyio


class Recorded:
    """The spans and the metrics of one test."""

    @property
    def spans(self):
        return canary.spans.get_finished_spans()

    def named(self, prefix: str):
        return [span for span in self.spans if span.name.startswith(prefix)]

    def metrics(self) -> dict[str, list]:
        data = canary.measured.get_metrics_data()
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics] if data else []
        return {metric.name: list(metric.data.data_points) for scope in scopes for metric in scope.metrics}


@pytest.fixture
def recorded() -> Recorded:
    canary.spans.clear()
    return Recorded()


async def test_spans_are_those_of_the_sdk_and_its_own_are_joined_to_them(
    environment: Environment, serve: Serve, recorded: Recorded
):
    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "echo out-put"})
        await agent.call("bash", {"command": "false"})

    async with serve() as watched:
        session = environment.create_session(brain, message="go")
        await watched.until("session.released")
        work_id = watched.named("session.released")[0].work_id
    (work,) = recorded.named("anthropic.environment.work")
    assert work.attributes["anthropic.session.id"] == session.id
    assert work.attributes["anthropic.environment.work.id"] == work_id
    assert work.attributes["anthropic.environment.id"] == environment.id
    first, second = recorded.named("anthropic.tool_use bash")
    assert first.attributes["gen_ai.tool.call.id"] == session.calls[0].id
    assert "error.type" not in first.attributes
    assert second.attributes["error.type"] == "tool_error"
    assert {span.context.trace_id for span in (first, second)} == {work.context.trace_id}
    (obtained,) = recorded.named("mabridge.sandbox.obtain")
    assert obtained.attributes["mabridge.provider"] == "local"
    # The SDK's span of the request that sent the result is a child of the call's.
    sent = [span for span in recorded.spans if "events.send" in span.name]
    assert {span.parent.span_id for span in sent if span.parent} == {first.context.span_id, second.context.span_id}


async def test_events_are_counted_and_timed(environment: Environment, serve: Serve, recorded: Recorded):
    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "true"})

    def count(event: str) -> int:
        points = recorded.metrics().get("mabridge.events", [])
        return sum(point.value for point in points if point.attributes["event"] == event)

    def served() -> float:
        return sum(point.value for point in recorded.metrics().get("mabridge.sessions", []))

    # Other tests have been counted as well, and those that cut a worker off have let go of nothing.
    before, served_before = count("call.answered"), served()
    async with serve() as watched:
        environment.create_session(brain, message="go")
        await watched.until("call.answered")
        assert served() == served_before + 1
        await watched.until("session.released")
    assert count("call.answered") == before + 1
    assert served() == served_before
    durations = recorded.metrics()["mabridge.call.duration"]
    assert any(point.attributes["tool"] == "bash" and point.count for point in durations)


async def test_each_event_is_one_line_of_text_or_of_json(
    environment: Environment, serve: Serve, caplog: pytest.LogCaptureFixture
):
    async def brain(agent: Agent) -> None:
        await agent.call("bash", {"command": "echo to-nobody"})

    caplog.set_level(logging.INFO)
    async with serve() as watched:
        session = environment.create_session(brain, message="go")
        await watched.until("session.released")
    records = [record for record in caplog.records if record.name == "mabridge.events"]
    names = [record.event for record in records]
    for name in ("session.claimed", "session.routed", "sandbox.created", "call.ended", "session.released"):
        assert names.count(name) == 1
    lines = [JsonFormatter().format(record) for record in records]
    assert all("\n" not in line for line in lines + [record.getMessage() for record in records])
    created = next(json.loads(line) for line in lines if json.loads(line)["event"] == "sandbox.created")
    assert (created["session_id"], created["provider"]) == (session.id, "local")
    assert created["sandbox_id"]
    released = next(json.loads(line) for line in lines if json.loads(line)["event"] == "session.released")
    assert released["work_id"] == session.id
    assert "to-nobody" not in caplog.text  # neither what a tool was given nor what it put out


async def test_no_secret_is_in_a_log_a_span_a_metric_an_error_a_process_list_or_a_sandbox(
    recorded: Recorded, serve: Serve, local: ProviderConfig, caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    """Through a session with all kinds of faults, a revoked key, and a worker that ends for it."""
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []

    async def brain(agent: Agent) -> None:
        seen.append((await agent.call("bash", {"command": "env; cat /proc/$PPID/environ /proc/$$/cmdline"})).text)
        plane.faults.add(Fault(method="POST", path="/events$", status=401))
        seen.append((await agent.call("bash", {"command": "env"})).text)
        plane.faults.add(Fault(method="POST", path="/events$", status=413))
        seen.append((await agent.call("read", {"file_path": "absent"})).text)
        listing = await anyio.run_process(["ps", "-ww", "-eo", "args"])
        seen.append(listing.stdout.decode())

    async with ControlPlane(lease_ttl=10.0) as plane:
        environment = plane.create_environment()
        plane.faults.add(Fault(path="/poll$", status=500))
        plane.faults.add(Fault(path="/heartbeat$", cut=True, effect="after"))
        keep = local.model_copy(update={"when_done": "keep"})
        async with serve({"local": keep}, environment=environment, clean_up=False) as watched:
            session = environment.create_session(brain, message="go")
            await watched.until("session.released")
        async with AsyncAnthropic(base_url=plane.url, api_key="unused") as client:
            environment.revoke_key()
            worker = Worker(
                client, environment_id=environment.id, environment_key=environment.key, providers={"local": local}
            )
            with pytest.raises(ConfigError) as caught:
                await worker.run()
        secrets = [environment.key, *plane.credentials._known]
        assert any(secret.startswith("sk-ant-ses01") for secret in secrets)
        secrets.remove(plane.api_key)
    assert not session.open_calls
    found = await anyio.run_process(["grep", "-rla", "sk-ant-", local.options["root"]], check=False)
    assert found.stdout == b""
    told = {
        "log": [caplog.text, *(str(vars(record)) for record in caplog.records)],
        "event": [str(event) + repr(event) for event in watched.events],
        "span": [span.to_json() for span in recorded.spans],
        "metric": [str(recorded.metrics())],
        "error": [str(caught.value), repr(caught.value), repr(caught.value.__cause__)],
        "sandbox or process list": seen,
    }
    for where, texts in told.items():
        assert texts
        for secret in secrets:
            assert not any(secret in text for text in texts), f"a secret is in a {where}"
