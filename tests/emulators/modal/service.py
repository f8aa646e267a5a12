"""What both of Modal's services share: names of calls to handlers, and the faults."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from grpclib import GRPCError, Status
from grpclib.const import Handler
from grpclib.protocol import H2Protocol
from grpclib.server import Server, Stream
from modal._utils.grpc_utils import custom_detail_codec
from modal_proto import api_pb2


@dataclass
class Faults:
    """What goes wrong, for as long as it is set; counts run down with each call."""

    latency: float = 0.0
    """Seconds added to each call."""
    throttled: int = 0
    """Calls to refuse with RESOURCE_EXHAUSTED."""
    retry_after: float | None = 1.0
    """What a refusal says about when to come back; None says nothing."""
    unavailable: int = 0
    """Calls to refuse with UNAVAILABLE."""
    slow_start: float = 0.0
    """Seconds until a new sandbox is on a machine."""
    lose_create: bool = False
    """A create is done, and its answer is an error that the SDK does not retry."""
    lose_terminate: bool = False
    """A sandbox is ended, and the answer is an error that the SDK does not retry."""
    fail_snapshot: bool = False
    """No snapshot can be taken."""
    slow_snapshot: float = 0.0
    """Seconds that a snapshot takes."""
    refused: set[str] = field(default_factory=set)
    """Calls, by their names, that fail in a way that the SDK does not retry."""
    missing: str = "-"
    """What the names of the calls begin with that the service does not have."""
    calls: dict[str, int] = field(default_factory=dict)
    """How often each call was made."""


class Service:
    """Base of an emulated service: handlers are async methods named as the calls are, ``name(stream, request)``.

    `stubs` is grpclib's base class, whose other calls answer UNIMPLEMENTED.
    """

    stubs: type

    def __init__(self, faults: Faults) -> None:
        self.faults = faults

    def check(self, stream: Stream[Any, Any]) -> None:
        """Refuse a call without the right credentials."""

    def __mapping__(self) -> dict[str, Handler]:
        abstract = {name: (lambda self, stream: None) for name in self.stubs.__abstractmethods__}
        table = type("Stubs", (self.stubs,), abstract)().__mapping__()
        return {path: handler._replace(func=self._guarded(path.rpartition("/")[2])) for path, handler in table.items()}

    def _guarded(self, name: str) -> Callable[[Stream[Any, Any]], Any]:
        method = getattr(self, name, None)
        faults = self.faults

        async def handle(stream: Stream[Any, Any]) -> None:
            faults.calls[name] = faults.calls.get(name, 0) + 1
            await asyncio.sleep(faults.latency)
            self.check(stream)
            if method is None or name.startswith(faults.missing):
                raise GRPCError(Status.UNIMPLEMENTED, f"{name} is not emulated")
            if faults.unavailable:
                faults.unavailable -= 1
                raise GRPCError(Status.UNAVAILABLE, "the emulator was told to be unavailable")
            if name in faults.refused:
                raise GRPCError(Status.DATA_LOSS, f"the emulator was told to refuse {name}")
            if faults.throttled:
                faults.throttled -= 1
                policy = faults.retry_after and [api_pb2.RPCRetryPolicy(retry_after_secs=faults.retry_after)]
                raise GRPCError(Status.RESOURCE_EXHAUSTED, "too many requests", policy or None)
            request = await stream.recv_message()
            answer = await method(stream, request)
            if answer is not None:
                await stream.send_message(answer)

        return handle


class Listener(Server):
    """A grpclib server on a port of its own, whose connections can be cut."""

    def __init__(self, service: Service) -> None:
        super().__init__([service], status_details_codec=custom_detail_codec)
        self._protocols: set[H2Protocol] = set()
        self.url = ""

    def _protocol_factory(self) -> H2Protocol:
        protocol = super()._protocol_factory()
        self._protocols.add(protocol)
        return protocol

    async def open(self) -> None:
        await self.start("127.0.0.1", 0)
        assert self._server is not None
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Drop every connection, without a word."""
        protocols, self._protocols = self._protocols, set()
        for protocol in protocols:
            transport = getattr(getattr(protocol, "connection", None), "_transport", None)
            if transport is not None:  # it is not closed yet
                transport.abort()

    async def shut(self) -> None:
        self.close()
        self.cut()
        await self.wait_closed()
