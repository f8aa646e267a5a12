"""The demo itself: a platform in this process, scripted agents on it, and a worker that serves them."""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from mabridge.cli._output import seconds
from mabridge.config import ProviderConfig
from mabridge.demo.agents import DemoFailed, make_brain
from mabridge.demo.choose import Choice, Chosen, choose
from mabridge.demo.projects import PYTHON, TASKS
from mabridge.demo.screen import Screen
from mabridge.errors import ConfigError
from mabridge.identity import sandbox_key
from mabridge.plugins import make_provider

if TYPE_CHECKING:
    from mabridge.testing.session import Session

__all__ = ["run_demo"]

_DEADLINE = 120.0
_CLEANUP_DEADLINE = 30.0


async def run_demo(choice: Choice) -> None:
    """Run the demo, and show it on stdout.

    Raises:
        ConfigError: what was asked for cannot be had, or an agent could not do its work.
    """
    try:
        from mabridge.testing import ControlPlane
    except ImportError as exc:
        raise ConfigError(f"the demo needs {exc.name}: pip install 'mabridge[demo]'") from exc
    from anthropic import AsyncAnthropic

    from mabridge.worker import Worker

    console = Console()
    _log_to(console)
    chosen = await choose(choice, lambda text: _say(console, text))
    _say(console, f"Sandboxes: {chosen.why}.")
    with tempfile.TemporaryDirectory(prefix="mabridge-demo-") as directory:
        config = _rooted(chosen, directory)
        async with ControlPlane() as plane:
            environment = plane.create_environment()
            client = AsyncAnthropic(auth_token=environment.key, base_url=plane.url)
            sessions = {}
            for number in range(choice.sessions):
                session = environment.create_session(
                    make_brain(number, choice.pace),
                    message=TASKS[number % len(TASKS)],
                    agent_name=f"{PYTHON[number % len(PYTHON)].name}-{number + 1}",
                )
                sessions[session.id] = session
            _say(console, f"{choice.sessions} sessions are queued; one worker claims and serves them all at once.")
            started = time.perf_counter()
            with Screen(console, {s.id: s.agent["name"] for s in sessions.values()}) as screen:
                worker = Worker(
                    client,
                    environment_id=environment.id,
                    environment_key=environment.key,
                    providers={config.type: config},
                    max_sessions=choice.sessions,
                    max_idle=0.5,
                    observers=[screen],
                )
                try:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(worker.run)
                        failures = await _wait(list(sessions.values()))
                        worker.drain()
                finally:
                    await _remove_leftovers(config, environment.id, list(sessions))
            _summarize(console, screen, list(sessions.values()), time.perf_counter() - started)
    if failures:
        raise ConfigError("the demo failed: " + "; ".join(failures))


async def _wait(sessions: list[Session]) -> list[str]:
    """Wait until every agent has ended its turn; return what went wrong, agent by agent."""
    from mabridge.testing import BrainFailed

    failures: list[str] = []

    async def wait(session: Session) -> None:
        try:
            await session.wait_idle(timeout=_DEADLINE)
        except BrainFailed as exc:
            if not isinstance(exc.__cause__, DemoFailed):
                raise
            failures.append(f"{session.agent['name']}: {exc.__cause__}")
        except TimeoutError as exc:
            failures.append(f"{session.agent['name']}: {exc}")

    async with anyio.create_task_group() as tasks:
        for session in sessions:
            tasks.start_soon(wait, session)
    return failures


async def _remove_leftovers(config: ProviderConfig, environment_id: str, sessions: list[str]) -> None:
    """Remove what a demo that was interrupted has left."""
    with anyio.CancelScope(shield=True), anyio.move_on_after(_CLEANUP_DEADLINE):
        async with make_provider(config, config.type) as provider, anyio.create_task_group() as tasks:

            async def remove(session_id: str) -> None:
                sandbox = await provider.attach(sandbox_key(environment_id, session_id))
                if sandbox is not None:
                    await sandbox.teardown()

            for session_id in sessions:
                tasks.start_soon(remove, session_id)


def _summarize(console: Console, screen: Screen, sessions: list[Session], took: float) -> None:
    rows = list(screen.rows.values())
    calls = sorted(second for row in rows for second in row.took)
    made = sorted(row.created_in for row in rows if row.created_in is not None)
    results = [session.results(call.id) for session in sessions for call in session.calls]
    once = sum(len(result.accepted) == 1 for result in results)
    _say(console, "")
    _say(console, f"{len(rows)} agents worked side by side for {seconds(took)}, each in a sandbox of its own.")
    if made:
        _say(
            console, f"A sandbox was made in {seconds(statistics.median(made))} (median; {seconds(made[-1])} at most)."
        )
    if calls:
        _say(
            console,
            f"{len(calls)} tool calls took {seconds(statistics.median(calls))} (median; {seconds(calls[-1])} at most); "
            f"{sum(row.errors for row in rows)} failed, as a test does that finds a fault.",
        )
    _say(console, f"The platform has exactly one result for {once} of {len(results)} calls.")


def _rooted(chosen: Chosen, directory: str) -> ProviderConfig:
    """Put the sandboxes of the local provider into the demo's own directory."""
    if chosen.config.type != "local":
        return chosen.config
    return chosen.config.model_copy(update={"options": {"root": str(Path(directory) / "sandboxes")}})


def _log_to(console: Console) -> None:
    """Show warnings where they do not disturb the table."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s", force=True)
    # The demo says itself what these say.
    logging.getLogger("mabridge.events").setLevel(logging.CRITICAL)
    logging.getLogger("mabridge.providers.local").setLevel(logging.ERROR)


def _say(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)
