"""What every request passes first: the record of it, and the faults that are set."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mabridge.testing.faults import Fault, RequestRecord

if TYPE_CHECKING:
    from mabridge.testing.plane import ControlPlane

__all__ = ["FAULT", "Gate"]

FAULT = "mabridge.fault"
"""Key in a request's scope for the fault that happens to it, for what only the endpoint itself can do."""


class Gate:
    """ASGI middleware around the whole API.

    Args:
        app: the API.
        plane: whose it is.
    """

    def __init__(self, app: ASGIApp, plane: ControlPlane) -> None:
        self._app = app
        self._plane = plane

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        arrived = self._plane.clock.monotonic()
        headers = Headers(scope=scope)
        who = self._plane.credentials.identify(headers)
        status: int | None = None

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                record()
            await send(message)

        def record() -> None:
            self._plane.record(
                RequestRecord(
                    method=scope["method"],
                    path=scope["path"],
                    query=scope["query_string"].decode("latin-1"),
                    status=status,
                    credential=None if who is None else who.kind,
                    worker_id=headers.get("anthropic-worker-id"),
                    at=arrived,
                    seconds=self._plane.clock.monotonic() - arrived,
                )
            )

        fault = self._plane.faults.strike(scope["method"], scope["path"])
        if fault is None:
            await self._app(scope, receive, note)
            return
        if fault.delay:
            await anyio.sleep(fault.delay)
        if not fault.answers:
            scope[FAULT] = fault
            await self._app(scope, receive, note)
            return
        if fault.effect == "after":
            await self._app(scope, receive, _drop)
        if fault.status is not None:
            await _answer(fault, note)
            return
        record()
        if fault.hang:
            await self._plane.closing.wait()
        self._plane.server.cut(scope)
        # The server notes a broken connection in its own time: answering before that would be an answer.
        while (await receive())["type"] != "http.disconnect":
            pass


async def _drop(_: Message) -> None:
    await anyio.lowlevel.checkpoint()


async def _answer(fault: Fault, send: Send) -> None:
    body = json.dumps(fault.error_body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **fault.headers}
    assert fault.status is not None
    await send(
        {
            "type": "http.response.start",
            "status": fault.status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
