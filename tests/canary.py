"""Watches, all through the suite, that no environment key and no sessions token turns up where it may not."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

SECRET = re.compile(rb"sk-ant-(oat|ses)01-[\w-]{20,}")
"""What the local platform's keys and tokens look like."""

_PERIOD = 0.5  # seconds between two looks at the processes
_LARGEST = 4 * 1024 * 1024  # bytes of a file that are looked at

spans = InMemorySpanExporter()
"""The spans of the test that runs."""
measured = InMemoryMetricReader()
"""The metrics of all tests so far."""


def record() -> None:
    """Have spans and metrics recorded in this process. It can be done once."""
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(tracers)
    metrics.set_meter_provider(MeterProvider([measured]))


class ProcessWatch:
    """Looks at the command line of every process, and at the environment of those that run in a sandbox."""

    def __init__(self, secret: re.Pattern[bytes] = SECRET) -> None:
        self._secret = secret
        self.found: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="canary", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_PERIOD):
            self.look()

    def look(self) -> None:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                arguments = (process / "cmdline").read_bytes()
                if self._secret.search(arguments):
                    self.found.append(f"argv of {arguments[:40]!r}")
                environment = (process / "environ").read_bytes()
                if b"MAB_" in environment and self._secret.search(environment):
                    self.found.append(f"environment of {arguments[:40]!r}, which runs in a sandbox")


def in_records(records: Iterable[logging.LogRecord]) -> Iterator[str]:
    """Yield where in the log there is a secret."""
    for entry in records:
        text = f"{entry.getMessage()} {entry.exc_text or ''} {getattr(entry, 'fields', '')}"
        if SECRET.search(text.encode()):
            yield f"log of {entry.name}: {entry.msg}"


def in_telemetry() -> Iterator[str]:
    """Yield where in the spans since the last time, or in the metrics, there is a secret."""
    for span in spans.get_finished_spans():
        if SECRET.search(span.to_json().encode()):
            yield f"span {span.name}"
    data = measured.get_metrics_data()
    if data is not None and SECRET.search(data.to_json().encode()):
        yield "a metric"
    spans.clear()


def in_files(directory: Path) -> Iterator[str]:
    """Yield the files of a directory that have a secret in them: sandboxes are among them."""
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            looked_at = path.is_file() and not path.is_symlink() and path.stat().st_size <= _LARGEST
            if looked_at and SECRET.search(path.read_bytes()):
                yield f"file {path}"
