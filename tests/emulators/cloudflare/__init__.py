"""Cloudflare on loopback: the vendor's own bridge and Durable Objects from npm, under Miniflare on Node.

Only what no machine but Cloudflare's has is replaced: the container that a Durable Object is given (`container.ts`,
`control.py`). In front of it a proxy is slow, refuses, or cuts connections on demand (`rig.mjs`).

Where Node or its packages cannot be had, `new_bridge` gives the same in Python (`bridge.py`). With CI set that is a
failure.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import anyio
import httpx2

from mabridge.testing.server import Server
from tests.emulators.cloudflare.bridge import BridgeInPython
from tests.emulators.cloudflare.control import Control
from tests.emulators.cloudflare.node import node, unavailable, workshop
from tests.emulators.machine import require

__all__ = ["BridgeInPython", "CloudflareEmulator", "new_bridge"]

_READY = 120.0  # seconds, on a machine that does much else
_STOP = 15.0


def new_bridge(
    worker: Literal["ours", "vendor"] = "ours", *, bindings: Mapping[str, str | None] | None = None
) -> CloudflareEmulator | BridgeInPython:
    """The real bridge, or where that cannot run, or with MABRIDGE_CLOUDFLARE_BRIDGE=python, the one in Python.

    With CI set it is the real one.
    """
    wanted = os.environ.get("MABRIDGE_CLOUDFLARE_BRIDGE") == "python" and not os.environ.get("CI")
    in_python = wanted or unavailable()
    return (BridgeInPython if in_python else CloudflareEmulator)(worker, bindings=bindings)


class CloudflareEmulator:
    """A deployed Worker, reached at `url` with `api_key`. An async context manager.

    Args:
        worker: ``ours`` for the Worker of ``examples/cloudflare``, ``vendor`` for the bridge alone.
        bindings: variables of the Worker besides its key; None takes one away.
        internet: whether there is one, in which every host says what it was asked for.
    """

    def __init__(
        self,
        worker: Literal["ours", "vendor"] = "ours",
        *,
        bindings: Mapping[str, str | None] | None = None,
        internet: bool = False,
    ) -> None:
        self.api_key = "an-api-key-of-the-rig"
        self.url = ""
        self.control: Control
        self._worker = worker
        self._internet = internet
        self._bindings = {"SANDBOX_API_KEY": self.api_key, **(bindings or {})}
        self._directory = Path()
        self._process: asyncio.subprocess.Process
        self._server: Server
        self._serving: asyncio.Task[None]
        self._latency = 0.0
        self._unanswered = 0

    async def __aenter__(self) -> Self:
        require()
        path, shop = node(), await asyncio.to_thread(workshop)
        self._directory = Path(tempfile.mkdtemp(prefix="mabridge-cloudflare-"))
        self.control = Control(self._directory)
        self._server = Server(self.control.app)
        self._serving = asyncio.create_task(self._server.serve(task_status=anyio.TASK_STATUS_IGNORED))
        bindings = {**self._bindings, "CONTROL": self._server.url}
        told = {
            "entry": str(shop / "rig" / f"{self._worker}.ts"),
            "bindings": {name: value for name, value in bindings.items() if value is not None},
            "internet": self._internet,
            "verbose": bool(os.environ.get("MABRIDGE_RIG_VERBOSE")),
        }
        self._process = await asyncio.create_subprocess_exec(
            *(path, str(shop / "rig" / "rig.mjs"), json.dumps(told)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "HOME": str(self._directory), "TMPDIR": str(self._directory)},
        )
        try:
            with anyio.fail_after(_READY):
                self.url = (await self._answer())["url"]
        except BaseException:
            await self.__aexit__()
            raise
        self.latency = self._latency
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        with anyio.CancelScope(shield=True):
            assert self._process.stdin is not None
            self._process.stdin.close()
            with anyio.move_on_after(_STOP):
                await self._process.wait()
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
            await self.control.close()
            await self._server.stop()
            await self._serving
            shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def latency(self) -> float:
        """Seconds that each request is delayed by."""
        return self._latency

    @latency.setter
    def latency(self, seconds: float) -> None:
        self._latency = seconds
        if self.url:
            self._write(latency=seconds)

    async def fail_next(
        self, path: str, status: int, *, times: int = 1, body: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer the next requests whose path holds `path` with a status, and pass them on to nobody."""
        fault = {"path": path, "status": status, "body": body, "headers": dict(headers or {})}
        await self._tell(faults=[fault] * times)

    async def connections(self) -> int:
        """How many connections were opened, ever."""
        return int((await self._tell())["connections"])

    async def cut(self) -> None:
        """Break every connection."""
        await self._tell(cut=True)

    async def lose_containers(self) -> None:
        """End every container, as their sleeping does."""
        for key in tuple(self.control.containers):
            await self.control.end(key)

    async def outbound(self, container: str, url: str) -> dict[str, Any]:
        """What becomes of a request that a program in a container makes, as far as the Worker decides that.

        Returns:
            ``by`` says who has it: ``worker``, and what ``status`` and ``text`` that answers; ``internet``; ``nobody``.
        """
        async with httpx2.AsyncClient(base_url=self.url, timeout=60) as client:
            answer = await client.get("/rig/outbound", params={"container": container, "url": url})
        answered: dict[str, Any] = answer.raise_for_status().json()
        return answered

    async def _tell(self, **changes: Any) -> dict[str, Any]:
        self._write(**changes)
        answer: dict[str, Any] = {}
        with anyio.fail_after(_READY):
            while self._unanswered:
                answer = await self._answer()
                self._unanswered -= 1
        return answer

    def _write(self, **changes: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(changes).encode() + b"\n")
        self._unanswered += 1

    async def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        assert line, "the rig ended; set MABRIDGE_RIG_VERBOSE to see why"
        answer: dict[str, Any] = json.loads(line)
        return answer
