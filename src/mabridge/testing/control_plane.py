"""Run the local platform by itself, to try a worker by hand: ``python -m mabridge.testing.control_plane``."""

from __future__ import annotations

import anyio
import click

from mabridge.testing.brain import Agent
from mabridge.testing.plane import ControlPlane
from mabridge.testing.session import Session
from mabridge.testing.wire import Json

__all__ = ["brain", "main"]


async def brain(agent: Agent) -> None:
    """Run the user's message as a command, write the output to a file, read it back, and say how it went."""
    shell = await agent.call("bash", {"command": agent.text})
    await agent.call("write", {"file_path": "output.txt", "content": shell.text})
    read = await agent.call("read", {"file_path": "output.txt"})
    await agent.say(f"{'That failed' if shell.is_error else 'Done'}: {len(read.text)} characters of output.")


@click.command()
@click.option("--port", default=0, show_default=True, help="TCP port on 127.0.0.1; 0 for any that is free.")
@click.option("--lease-ttl", default=300.0, show_default=True, help="Seconds that a heartbeat keeps a lease.")
@click.option("--message", "messages", multiple=True, help="A command for the agent; one session for each.")
def main(port: int, lease_ttl: float, messages: tuple[str, ...]) -> None:
    """Serve a local Managed Agents platform until interrupted, with an agent that runs what it is told."""
    try:
        anyio.run(_serve, port, lease_ttl, messages or ("uname -a; pwd; ls -la",))
    except KeyboardInterrupt:
        click.echo("stopped", err=True)


async def _serve(port: int, lease_ttl: float, messages: tuple[str, ...]) -> None:
    async with (
        ControlPlane(port=port, lease_ttl=lease_ttl, default_brain=brain) as plane,
        anyio.create_task_group() as tasks,
    ):
        environment = plane.create_environment()
        click.echo(f"export ANTHROPIC_BASE_URL={plane.url}")
        click.echo(f"export ANTHROPIC_ENVIRONMENT_ID={environment.id}")
        click.echo(f"export ANTHROPIC_ENVIRONMENT_KEY={environment.key}")
        click.echo(f"# to create sessions: POST {plane.url}/v1/sessions with x-api-key: {plane.api_key}")
        for message in messages:
            tasks.start_soon(_follow, environment.create_session(brain, message=message))
        await anyio.sleep_forever()


async def _follow(session: Session) -> None:
    """Print a session's events as they come."""
    subscription = session.log.subscribe()
    for past in session.events:
        _show(session, past)
    while True:
        event = await subscription.receive()
        assert event is not None
        _show(session, event)


def _show(session: Session, event: Json) -> None:
    text = "\n".join(block.get("text", block["type"]) for block in event.get("content") or [])
    detail = text or event.get("input") or event.get("stop_reason") or ""
    click.echo(f"{session.id[-6:]} {event['type']:32} {detail}")


if __name__ == "__main__":
    main()
