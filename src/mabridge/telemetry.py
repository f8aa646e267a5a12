"""Spans and metrics, by OpenTelemetry. Without its SDK, or before one is set up, they cost next to nothing.

The spans have the names and attributes of those that the Anthropic SDK's own worker makes
(``anthropic.environment.work`` and ``anthropic.tool_use``), and the SDK's spans of API requests are their children. No
input or output of a tool is ever recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import metrics, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from mabridge._version import __version__
from mabridge.observe import Event

__all__ = ["Metrics", "call_span", "fail", "sandbox_span", "work_span"]

# Events at whose end a session that was claimed is not ours any more.
_LET_GO = frozenset({"session.released", "session.handed_over", "session.lost"})
_WITH_SECONDS = {"sandbox.created": "create", "sandbox.attached": "attach"}


@contextmanager
def work_span(*, environment_id: str, work_id: str, session_id: str) -> Iterator[Span]:
    """Run the block in the span of a work item."""
    with _span(
        "anthropic.environment.work",
        {
            "gen_ai.provider.name": "anthropic",
            "anthropic.environment.id": environment_id,
            "anthropic.environment.work.id": work_id,
            "anthropic.session.id": session_id,
        },
    ) as span:
        yield span


@contextmanager
def call_span(*, tool: str, call_id: str, session_id: str, work_id: str, thread: str | None) -> Iterator[Span]:
    """Run the block in the span of a tool call; tell it with `fail` that the result is an error."""
    attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.provider.name": "anthropic",
        "gen_ai.tool.name": tool,
        "gen_ai.tool.type": "function",
        "gen_ai.tool.call.id": call_id,
        "anthropic.session.id": session_id,
        "anthropic.environment.work.id": work_id,
    }
    if thread is not None:
        attributes |= {"anthropic.session.thread.id": thread, "gen_ai.conversation.id": thread}
    with _span(f"anthropic.tool_use {tool}", attributes) as span:
        yield span


@contextmanager
def sandbox_span(session_id: str) -> Iterator[Span]:
    """Run the block in the span of finding or making a session's sandbox."""
    with _span("mabridge.sandbox.obtain", {"anthropic.session.id": session_id}) as span:
        yield span


def fail(span: Span, error_type: str) -> None:
    """Mark a span as failed. `error_type` is a class of errors: messages may hold what tools put out."""
    span.set_attribute("error.type", error_type)
    span.set_status(Status(StatusCode.ERROR))


@contextmanager
def _span(name: str, attributes: dict[str, AttributeValue]) -> Iterator[Span]:
    tracer = trace.get_tracer("mabridge", __version__)
    with tracer.start_as_current_span(
        name, kind=SpanKind.INTERNAL, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as span:
        try:
            yield span
        except Exception as error:
            # Only its type, for the same reason.
            fail(span, type(error).__qualname__)
            raise


class Metrics:
    """An observer that counts events and takes times.

    - ``mabridge.events``: how many there were, by ``event``, ``provider``, ``tool`` and ``error``.
    - ``mabridge.sessions``: sessions that are served now.
    - ``mabridge.call.duration``: seconds from a call to its result, by ``tool``, ``provider`` and ``error``.
    - ``mabridge.sandbox.duration``: seconds until a sandbox was there, by ``provider`` and ``op``.
    """

    def __init__(self) -> None:
        meter = metrics.get_meter("mabridge", __version__)
        self._events = meter.create_counter("mabridge.events", "{event}", "What a worker did.")
        self._sessions = meter.create_up_down_counter("mabridge.sessions", "{session}", "Sessions that are served.")
        self._calls = meter.create_histogram("mabridge.call.duration", "s", "From a call to its result.")
        self._sandboxes = meter.create_histogram("mabridge.sandbox.duration", "s", "Until a sandbox was there.")

    def __call__(self, event: Event) -> None:
        """Count one event."""
        labels: dict[str, AttributeValue] = {}
        if event.provider is not None:
            labels["provider"] = event.provider
        if event.tool is not None:
            # A name that is not ours is whatever an agent's author, or its model, chose: there is no end to those.
            labels["tool"] = "other" if event.name == "call.skipped" else event.tool
        if event.is_error is not None:
            labels["error"] = event.is_error
        self._events.add(1, {"event": event.name, **labels})
        if event.name == "session.claimed":
            self._sessions.add(1)
        elif event.name in _LET_GO and event.seconds is not None:
            self._sessions.add(-1)
        elif event.name == "call.ended" and event.seconds is not None:
            self._calls.record(event.seconds, labels)
        elif event.name in _WITH_SECONDS and event.seconds is not None:
            self._sandboxes.record(event.seconds, {"op": _WITH_SECONDS[event.name], **labels})
