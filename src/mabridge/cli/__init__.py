"""The command line. Each command imports what it needs when it runs, so that ``--help`` answers at once."""

from __future__ import annotations

import logging

import click

from mabridge._version import __version__
from mabridge.cli._common import Group, debug_option
from mabridge.cli.check import check
from mabridge.cli.demo import demo
from mabridge.cli.providers import providers
from mabridge.cli.reap import reap
from mabridge.cli.route import route
from mabridge.cli.run import run
from mabridge.cli.sandboxes import exec_, ls, rm

__all__ = ["main"]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mabridge", message="%(prog)s %(version)s")
@debug_option
def main() -> None:
    """Run the tool calls of Claude Managed Agents in sandboxes, from outside the sandbox."""
    # What a command has to say it prints; only `run` keeps a log.
    logging.getLogger("mabridge").addHandler(logging.NullHandler())


for command in (run, demo, providers, check, route, ls, rm, reap, exec_):
    main.add_command(command)
