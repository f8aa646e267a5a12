"""The long form of the chaos test: ``python -m tests.chaos --provider docker --sessions 50 --kills 100 --seed 7``."""

from __future__ import annotations

import logging
import secrets
import tempfile
from pathlib import Path

import anyio
import click


@click.command()
@click.option("--provider", type=click.Choice(["docker", "local"]), multiple=True, help="One or both; default both.")
@click.option("--sessions", default=50, show_default=True)
@click.option("--workers", default=3, show_default=True, help="How many live at a time.")
@click.option("--kills", default=100, show_default=True)
@click.option("--kill-pause", default=3.0, show_default=True, help="Seconds between two kills, at most.")
@click.option("--think", default=2.0, show_default=True, help="Seconds an agent thinks before a turn, at most.")
@click.option("--lease-ttl", default=6.0, show_default=True)
@click.option("--seed", type=int, default=None, help="Default: a new one each time.")
@click.option("--logs", type=click.Path(path_type=Path), default=None, help="Keep the workers' logs there.")
def main(provider: tuple[str, ...], seed: int | None, logs: Path | None, **settings: float) -> None:
    """Kill workers while sessions are at work, and see that each call is run once and answered once."""
    # Imported here, for each worker imports this module as it starts.
    from tests.chaos.run import Chaos, run
    from tests.chaos.script import Wrong
    from tests.images import BUSYBOX, ensure

    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it tells of each connection that was cut
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    for kind in provider or ("local", "docker"):
        click.echo(f"{kind}, seed {seed}")
        with tempfile.TemporaryDirectory(prefix="mabridge-chaos-") as directory:
            root = Path(directory, "sandboxes")
            options = {"root": str(root)} if kind == "local" else {"image": ensure(BUSYBOX), "pull": "never"}
            chaos = Chaos(seed=seed, provider=kind, options=options, **settings)
            where = logs or Path(directory)
            where.mkdir(parents=True, exist_ok=True)
            try:
                click.echo(anyio.run(run, chaos, where))
            except Wrong as wrong:
                raise click.ClickException(str(wrong)) from wrong


if __name__ == "__main__":
    main()
