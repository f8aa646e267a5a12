"""``mabridge reap``: remove the sandboxes that nobody has any use for."""

from __future__ import annotations

import re
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import click

from mabridge.cli._common import command, config_option, explain, json_option

if TYPE_CHECKING:
    from mabridge.config import Config
    from mabridge.reaper import Orphan, Sweep

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _seconds(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Read a length of time as people write it: ``90``, ``90s``, ``15m``, ``12h``, ``2d``."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", value)
    if match is None:
        raise click.BadParameter(f"{value!r} is not a length of time, such as 90s, 15m, 12h or 2d", ctx, param)
    return float(match[1]) * _UNITS[match[2]]


@command()
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option(
    "--older-than",
    callback=_seconds,
    metavar="TIME",
    help="Remove whatever no worker has and nothing was heard of for so long (90s, 15m, 12h, 2d), kept ones too. "
    "Default: what the configuration keeps no longer.",
)
@config_option
@json_option
def reap(dry_run: bool, older_than: float | None, config_file: str | None, as_json: bool) -> None:
    """Remove the sandboxes of this environment that nobody has any use for.

    Those are the ones of sessions that have ended, and those that were kept for a session's next message for longer
    than idle_ttl. The platform is asked which sessions a worker has: theirs are never touched. A list that cannot be
    read whole ends the sweep.
    """
    import anyio

    from mabridge.cli._output import echo_json
    from mabridge.config import load_config

    result = anyio.run(_sweep, load_config(config_file), dry_run, older_than)
    done = result.orphans if dry_run else result.removed
    if as_json:
        names = "would_remove" if dry_run else "removed"
        echo_json({names: [_row(orphan) for orphan in done], "failures": result.failures})
    else:
        for orphan in done:
            click.echo(f"{'would remove' if dry_run else 'removed'} {_line(orphan)}")
        for where, failure in result.failures.items():
            click.echo(f"mabridge: {where}: {failure}", err=True)
    if result.failures:
        raise click.exceptions.Exit(2)


def _row(orphan: Orphan) -> dict[str, object]:
    return {
        "key": orphan.info.key,
        "providers": list(orphan.providers),
        "id": orphan.info.id,
        "state": orphan.info.state,
        "session": orphan.session_id,
        "reason": orphan.reason,
        "idle": orphan.idle,
    }


def _line(orphan: Orphan) -> str:
    from mabridge.cli._output import seconds

    where = f"{orphan.info.key} at {','.join(orphan.providers)}"
    return f"{where}: {orphan.session_id}, {orphan.reason}, idle for {seconds(orphan.idle)}"


async def _sweep(config: Config, dry_run: bool, older_than: float | None) -> Sweep:
    import socket

    from mabridge.cli._platform import connect
    from mabridge.control_plane.queue import WorkQueue
    from mabridge.named_provider import NamedProvider
    from mabridge.observe import Observers
    from mabridge.reaper import Reaper

    failures: dict[str, str] = {}
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(connect(config.worker))
        queue = WorkQueue(
            client,
            environment_id=config.worker.read_environment_id(),
            environment_key=config.worker.environment_key.read(),
            worker_id=f"{socket.gethostname()}-reap",
        )
        providers: dict[str, NamedProvider] = {}
        for name, entry in config.providers.items():
            try:
                named = NamedProvider.configured(name, entry)
                await stack.enter_async_context(named.provider)
            except Exception as exc:
                reason = explain(exc)
                if reason is None:
                    raise
                failures[name] = reason
                continue
            providers[name] = named
        reaper = Reaper(providers, queue, observers=Observers(), grace=config.worker.reap_grace, older_than=older_than)
        result = await reaper.sweep(dry_run=dry_run)
    result.failures.update(failures)
    return result
