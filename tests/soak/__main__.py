"""``python -m tests.soak``: the long form, for minutes."""

from __future__ import annotations

import sys

import anyio
import click

from tests.soak.soak import Plan, Soak


@click.command()
@click.option("--sessions", default=1000, show_default=True)
@click.option("--turns", default=6, show_default=True)
@click.option("--restarts", default=4, show_default=True)
@click.option("--lease-ttl", default=60.0, show_default=True)
@click.option("--think", default=5.0, show_default=True)
@click.option("--timeout", default=1800.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(**plan: float) -> None:
    """Serve many sessions at once, with a fault in every 20th request, and worker after worker replaced."""
    report = anyio.run(Soak(Plan(**plan)).run)  # type: ignore[arg-type]
    click.echo(report)
    sys.exit(bool(report.wrong))


main()
