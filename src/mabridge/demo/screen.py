"""What the demo shows: a live table on a terminal, else one line an event."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mabridge.cli._output import seconds
from mabridge.observe import Event

__all__ = ["Row", "Screen"]

_SHOWN = ("sandbox.created", "sandbox.removed", "sandbox.failed", "session.failed", "session.refused", "session.lost")


@dataclass
class Row:
    """What is known of one session."""

    name: str
    where: str = ""
    state: str = "queued"
    doing: str = ""
    created_in: float | None = None
    took: list[float] = field(default_factory=list)
    errors: int = 0


class Screen:
    """Follows a worker's events. A context manager, and an observer of the worker.

    Args:
        console: where it is shown.
        names: the agents' names by the ids of their sessions.
    """

    def __init__(self, console: Console, names: Mapping[str, str]) -> None:
        self.rows = {session: Row(name) for session, name in names.items()}
        self._console = console
        self._inputs: dict[str, str] = {}
        self._live = (
            Live(get_renderable=self._table, console=console, refresh_per_second=8) if console.is_terminal else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        row = self.rows.get(event.session_id or "")
        if row is None:
            return
        line = None
        if event.name == "session.claimed":
            row.state = "claimed"
        elif event.name in ("sandbox.created", "sandbox.attached"):
            row.state, row.created_in = "working", event.seconds
            row.where = _where(event)
        elif event.name == "call.started":
            row.doing = f"{event.tool} {_summary(event.input)}"
            self._inputs[event.call_id or ""] = row.doing
        elif event.name == "call.ended":
            row.took.append(event.seconds or 0.0)
            row.errors += bool(event.is_error)
            outcome = "failed" if event.is_error else "ok"
            row.doing = f"{self._inputs.pop(event.call_id or '', event.tool)}: {outcome}, {seconds(event.seconds)}"
            line = row.doing
        elif event.name == "session.released":
            row.state, row.doing = "done", ""
        if event.name in _SHOWN:
            took = f" in {seconds(event.seconds)}" if event.seconds is not None else ""
            why = f": {event.reason}" if event.reason else ""
            line = f"{event.name} {_where(event)}{took}{why}"
        if self._live is None and line is not None:
            self._console.print(Text(f"{row.name:<10} {line}"), soft_wrap=True)

    def _table(self) -> Table:
        table = Table("agent", "sandbox", "", "calls", "last call", box=box.SIMPLE_HEAD, expand=True)
        table.columns[4].ratio = 1
        for row in self.rows.values():
            doing = Text(row.doing, no_wrap=True, overflow="ellipsis")
            table.add_row(Text(row.name), Text(row.where), Text(row.state), str(len(row.took)), doing)
        return table


def _where(event: Event) -> str:
    """Return the provider's name and so much of the sandbox's id as tells it from others."""
    return f"{event.provider or ''} {(event.sandbox_id or '').rpartition('/')[2][:12]}".rstrip()


def _summary(arguments: Mapping[str, object] | None) -> str:
    """Return the telling part of a call's input, on one line."""
    values = arguments or {}
    text = next((str(values[key]) for key in ("command", "pattern", "file_path") if key in values), "")
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:59]}…"
