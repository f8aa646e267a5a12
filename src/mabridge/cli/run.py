"""``mabridge run``: the worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mabridge.cli._common import command, config_option

if TYPE_CHECKING:
    import anyio

    from mabridge.config import Config
    from mabridge.worker import Worker


@command()
@config_option
@click.option("--max-sessions", type=click.IntRange(min=1), help="Sessions served at once; instead of the file's.")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
def run(config_file: str | None, max_sessions: int | None, log_level: str, log_format: str) -> None:
    """Claim sessions and serve them, until told to stop.

    SIGTERM or Ctrl-C: no more sessions are claimed, calls that run get drain_timeout to end, and sessions that go on
    are handed over to other workers. Again: stop at once; the sessions go on at another worker when their leases lapse.
    """
    import anyio

    from mabridge.cli._logging import set_up_logging
    from mabridge.config import load_config

    config = load_config(config_file)
    if max_sessions is not None:
        config = config.model_copy(update={"worker": config.worker.model_copy(update={"max_sessions": max_sessions})})
    set_up_logging(log_level, log_format)
    anyio.run(_run, config)


async def _run(config: Config) -> None:
    import anyio

    from mabridge.cli._platform import connect
    from mabridge.worker import Worker

    async with connect(config.worker) as client, anyio.create_task_group() as tasks:
        worker = Worker.from_config(config, client=client)
        await tasks.start(_obey_signals, worker, tasks.cancel_scope)
        await worker.run()
        tasks.cancel_scope.cancel()


async def _obey_signals(worker: Worker, scope: anyio.CancelScope, *, task_status: anyio.abc.TaskStatus[None]) -> None:
    import logging
    import signal

    import anyio

    log = logging.getLogger("mabridge")
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        number = await anext(signals)
        log.warning("%s: finishing what runs, or handing it over; claiming no more; again to stop at once", number.name)
        worker.drain()
        number = await anext(signals)
        log.warning("%s again: stopping at once", number.name)
        scope.cancel()
