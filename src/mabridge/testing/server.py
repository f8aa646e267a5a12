"""The HTTP server of the local platform: uvicorn on loopback, in the caller's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import anyio
import anyio.abc
import uvicorn
from starlette.types import ASGIApp, Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["Server"]

_STOP_TIMEOUT = 5.0


class _Server(uvicorn.Server):
    """uvicorn without signal handlers and without its ten ticks a second; it tells when it listens and has ended."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = anyio.Event()
        self.stop = anyio.Event()
        self.ended = anyio.Event()

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.ready.set()

    async def main_loop(self) -> None:
        await self.stop.wait()


class Server:
    """One listening socket and all its connections.

    Args:
        app: what answers.
        port: TCP port on 127.0.0.1; 0 for any that is free.
    """

    def __init__(self, app: ASGIApp, *, port: int = 0) -> None:
        transports: dict[tuple[str, int], asyncio.Transport] = {}

        class Protocol(H11Protocol):
            """Remembers its transport, so that a connection can be broken without an answer."""

            def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
                super().connection_made(transport)
                # asyncio does it for sockets that say they are TCP, which those of `create_server` do not. Without it
                # an answer of two parts waits 40 ms for the client to acknowledge the first.
                transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.client is not None:
                    transports[self.client] = transport

            def connection_lost(self, exc: Exception | None) -> None:
                if self.client is not None:
                    transports.pop(self.client, None)
                super().connection_lost(exc)

        self._transports = transports
        self._socket = socket.create_server(("127.0.0.1", port), backlog=2048)
        self._server = _Server(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                date_header=False,
                server_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=1,
            )
        )

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    async def serve(self, *, task_status: anyio.abc.TaskStatus[str]) -> None:
        """Serve until `stop` or until cancelled. Tells its URL once it listens."""
        url = self.url
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._serve)
            try:
                await self._server.ready.wait()
                task_status.started(url)
                await self._server.stop.wait()
            finally:
                self._server.stop.set()

    async def stop(self) -> None:
        """Stop serving: open connections are closed, and this returns when all is over, or after a few seconds."""
        self._server.stop.set()
        with anyio.move_on_after(_STOP_TIMEOUT):
            await self._server.ended.wait()

    def cut(self, scope: Scope) -> None:
        """Break the connection that a request came on."""
        client: Any = scope.get("client")
        transport = self._transports.get(tuple(client)) if client else None
        if transport is not None:
            transport.abort()

    async def _serve(self) -> None:
        try:
            # uvicorn closes its sockets only if it comes to its end, which `serve` sees to.
            with anyio.CancelScope(shield=True):
                await self._server.serve(sockets=[self._socket])
        finally:
            self._socket.close()
            self._server.ended.set()
