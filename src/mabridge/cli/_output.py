"""Tables for people and for pipes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

__all__ = ["echo_json", "progress", "seconds", "table"]


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows: drawn on a terminal; else one line a row, its values parted by tabs, without a heading."""
    cells = [["" if value is None else str(value) for value in row] for row in rows]
    if not sys.stdout.isatty():
        for row in cells:
            click.echo("\t".join(" ".join(value.split()) for value in row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*columns, box=box.SIMPLE_HEAD)
    for row in cells:
        drawn.add_row(*(Text(value) for value in row))
    Console().print(drawn)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that says what is being done now, where somebody watches; elsewhere it says nothing."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update


def echo_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print `value` as indented JSON; what JSON does not know is printed as text."""
    click.echo(json.dumps(value, indent=2, default=str))


def seconds(value: float | None) -> str:
    """Write a duration given in seconds, as people do."""
    if value is None:
        return ""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    if value < 7200:
        return f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h"
