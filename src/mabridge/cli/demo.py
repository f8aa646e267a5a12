"""``mabridge demo``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mabridge.cli._common import command

if TYPE_CHECKING:
    import anyio

    from mabridge.demo import Choice


@command()
@click.option(
    "--provider",
    type=click.Choice(["docker", "local"]),
    help="Where the sandboxes are. Default: docker if an engine answers and has an image or can get one, else local.",
)
@click.option("--sessions", type=click.IntRange(1, 50), default=6, show_default=True, help="How many agents work.")
@click.option("--pace", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Seconds an agent thinks.")
@click.option("--image", help="The Docker image. Default: one that is there, else python:3.13-slim, else a tiny one.")
def demo(provider: str | None, sessions: int, pace: float, image: str | None) -> None:
    """Watch several agents work side by side in sandboxes of this machine. Needs no account.

    The agents are scripts on a platform of the demo's own, and their work is real: the worker, the sandboxes and
    every command in them.
    """
    import anyio

    from mabridge.demo import Choice

    if image and provider == "local":
        raise click.UsageError("--image goes with --provider docker")
    where = provider or ("docker" if image else None)
    anyio.run(_run, Choice(provider=where, image=image, sessions=sessions, pace=pace))


async def _run(choice: Choice) -> None:
    """Run the demo; SIGTERM ends it as Ctrl-C does, which is with its sandboxes removed."""
    import anyio

    from mabridge.demo import run_demo

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_cancel_on_sigterm, tasks.cancel_scope)
        await run_demo(choice)
        tasks.cancel_scope.cancel()
        return
    raise click.Abort


async def _cancel_on_sigterm(scope: anyio.CancelScope) -> None:
    import signal

    import anyio

    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        await anext(signals)
        scope.cancel()
