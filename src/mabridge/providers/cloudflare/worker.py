"""The HTTP client of the Worker, and what its answers mean."""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import anyio
import httpx2

from mabridge.errors import AtCapacity, CreateFailed, SandboxError, SandboxGone, SandboxUnavailable
from mabridge.providers._shell import Capture
from mabridge.providers.cloudflare.options import CloudflareOptions

__all__ = ["CALL", "CREATE", "PROVIDER", "SLACK", "Worker", "register"]

PROVIDER = "cloudflare"

CALL = 60.0
"""Seconds for a call that makes nothing."""

CREATE = 240.0
"""Seconds for one that may start a container."""

SLACK = 60.0
"""Seconds that the call of a command may take beyond the command's own time."""

_CONNECT = 20.0
_ENDING = 1.0  # seconds for an answer to end that is complete: a connection that was read to the end is used again
_SILENCE = 90.0  # seconds; a command's script says something every fifteen


def register(key: str) -> str:
    """Return the path of what the register has about a sandbox."""
    return f"/mabridge/v1/sandboxes/{key}"


class Worker:
    """The HTTP client, and what its answers mean."""

    def __init__(self, options: CloudflareOptions) -> None:
        self._url = options.worker_url
        self._authorization = {"Authorization": f"Bearer {options.api_key.read()}"}
        self._key_from = options.api_key.env
        most = options.max_connections
        self.client = httpx2.AsyncClient(
            base_url=options.worker_url,
            timeout=httpx2.Timeout(CALL, connect=_CONNECT),
            limits=httpx2.Limits(max_connections=most, max_keepalive_connections=most, keepalive_expiry=15.0),
        )

    async def call(
        self,
        op: str,
        method: str,
        path: str,
        *,
        sandbox_id: str | None = None,
        timeout: float = CALL,
        allow: Sequence[int] = (),
        anonymous: bool = False,
        **what: Any,  # noqa: ANN401 - the body and the query, as httpx2 takes them
    ) -> httpx2.Response:
        """Make a request and return its answer, unless that is an error that is not in `allow`."""
        headers = {} if anonymous else self._authorization
        limits = httpx2.Timeout(timeout, connect=_CONNECT)
        with self._mapped(op, sandbox_id), anyio.fail_after(timeout):
            response = await self.client.request(method, path, headers=headers, timeout=limits, **what)
        if not response.is_success and response.status_code not in allow:
            self._refuse(op, sandbox_id, response)
        return response

    async def remove(self, key: str) -> None:
        """Remove a sandbox, if there is one."""
        with contextlib.suppress(SandboxGone):
            await self.call("teardown", "DELETE", f"/v1/sandbox/{key}", sandbox_id=key)

    async def run(
        self, op: str, key: str, argv: Sequence[str], *, timeout: float, most: int = 100_000, beats: bool = False
    ) -> tuple[int, bytes]:
        """Run a command of ours through the bridge; return its exit code and stdout, which is text.

        Args:
            op: the operation that it is for.
            key: of the sandbox.
            argv: the command.
            timeout: seconds for all of it.
            most: bytes of stdout.
            beats: whether it says something now and then, so that silence is a broken connection.

        Raises:
            SandboxGone: there is no such sandbox, and none was started.
            SandboxUnavailable: it could not be run, or it may have been.
        """
        out = Capture(most)

        async def keep(data: bytes) -> None:
            out.add(data)
            if out.full:
                message = f"the sandbox said more than {most:,} bytes"
                raise SandboxUnavailable(message, provider=PROVIDER, op=op, sandbox_id=key)

        # The bridge's own time limit is there for the case that nothing else of this works.
        body = {"argv": [*argv], "timeout_ms": math.ceil((timeout + SLACK) * 1000)}
        read = min(timeout, _SILENCE) if beats else timeout
        with self._mapped(op, key), anyio.fail_after(timeout):
            code = await self._stream(op, key, body, keep, httpx2.Timeout(timeout, connect=_CONNECT, read=read))
        return code, out.take()

    async def follow(self, op: str, key: str, argv: Sequence[str], take: Callable[[bytes], Awaitable[None]]) -> int:
        """Run a command of ours, however long that takes, give `take` what it says, and return its exit code.

        It has to say something now and then. Raises as `run` does.
        """
        limits = httpx2.Timeout(CALL, connect=_CONNECT, read=_SILENCE)
        with self._mapped(op, key):
            return await self._stream(op, key, {"argv": [*argv]}, take, limits)

    async def _stream(
        self,
        op: str,
        key: str,
        body: Mapping[str, Any],
        take: Callable[[bytes], Awaitable[None]],
        limits: httpx2.Timeout,
    ) -> int:
        path = f"/v1/sandbox/{key}/exec"
        request = self.client.stream("POST", path, json=body, headers=self._authorization, timeout=limits)
        async with request as response:
            if not response.is_success:
                await response.aread()
                self._refuse(op, key, response)
            event = ""
            lines = response.aiter_lines()
            async for line in lines:
                name, _, value = line.partition(": ")
                if name == "event":
                    event = value
                elif name == "data" and event == "stdout":
                    await take(base64.b64decode(value))
                elif name == "data" and event == "exit":
                    code = int(json.loads(value)["exit_code"])
                    with anyio.move_on_after(_ENDING):
                        async for _ in lines:
                            pass
                    return code
                elif name == "data" and event == "error":
                    message = f"the bridge could not run it: {json.loads(value).get('error')}"[:500]
                    raise SandboxUnavailable(message, provider=PROVIDER, op=op, sandbox_id=key)
        message = "the connection ended before the command did"
        raise SandboxUnavailable(message, provider=PROVIDER, op=op, sandbox_id=key)

    @contextmanager
    def _mapped(self, op: str, sandbox_id: str | None) -> Iterator[None]:
        """Turn what the client raises into our errors."""
        where: dict[str, Any] = {"provider": PROVIDER, "op": op, "sandbox_id": sandbox_id}
        try:
            yield
        except SandboxError:
            raise
        except (TimeoutError, httpx2.TimeoutException) as exc:
            raise SandboxUnavailable(f"no answer in time from {self._url}", **where) from exc
        except httpx2.ConnectError as exc:
            raise SandboxUnavailable(f"the Worker at {self._url} cannot be reached: {exc}", **where) from exc
        except httpx2.HTTPError as exc:
            said = str(exc) or exc.__class__.__name__
            raise SandboxUnavailable(f"the connection to {self._url} broke: {said}", **where) from exc
        except (ValueError, KeyError, TypeError) as exc:  # JSON, base64, or what they hold
            raise SandboxUnavailable(f"{self._url} answers in a way that is not the bridge's", **where) from exc

    def _refuse(self, op: str, sandbox_id: str | None, response: httpx2.Response) -> NoReturn:
        """Raise what an answer means that is an error."""
        where: dict[str, Any] = {"provider": PROVIDER, "op": op, "sandbox_id": sandbox_id}
        try:
            body = response.json()
            said, code = str(body["error"])[:300], body.get("code")
        except (ValueError, KeyError, TypeError, AttributeError):
            said, code = " ".join(response.text.split())[:200], None
        status = response.status_code
        refused = CreateFailed if op == "create" else SandboxError
        if status in (401, 403):
            raise refused(f"the Worker at {self._url} refuses the key in {self._key_from}", **where)
        if code == "unconfigured":
            raise refused("the Worker has no key: wrangler secret put SANDBOX_API_KEY", **where)
        if code == "pool_error" and "mabridge: there is no sandbox" in said:
            raise SandboxGone("its container has stopped, and its files are lost", **where)
        if code == "capacity_exceeded" or "instance limit" in said:
            raise AtCapacity(f"no room for another container: {said}", **where)
        if status == 429:
            after = response.headers.get("retry-after", "")
            seconds = float(after) if after.isdecimal() else None
            raise AtCapacity("Cloudflare's rate limit was met", **where, retry_after=seconds)
        if status >= 500:
            raise SandboxUnavailable(f"the Worker failed ({status}): {said}", **where)
        raise refused(f"{self._url} is not the Worker of Cloudflare's bridge ({status}): {said}", **where)
