"""Making and finding containers."""

from __future__ import annotations

import base64
import contextlib
import logging
import posixpath
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import ClassVar, Self

import anyio
import anyio.abc
from pydantic import BaseModel, Field, ValidationError

from mabridge.errors import ConfigError, CreateFailed, NotSupported, SandboxError, SandboxGone, SandboxUnavailable
from mabridge.providers._env import read_env
from mabridge.providers._shell import check_env
from mabridge.providers.cloudflare.options import CloudflareOptions
from mabridge.providers.cloudflare.sandbox import CloudflareSandbox
from mabridge.providers.cloudflare.script import STATE, attach_argv, create_argv
from mabridge.providers.cloudflare.worker import CREATE, PROVIDER, Worker, register
from mabridge.sandbox import Provider, Sandbox, SandboxInfo, SandboxSpec

__all__ = ["CloudflareProvider"]

logger = logging.getLogger("mabridge.providers.cloudflare")

_SETTLE = 5  # how often a new sandbox is looked at until it is the same twice


class State(BaseModel):
    """What a sandbox remembers of itself, for whoever attaches to it. The agent can change it, to its own harm."""

    workdir: str = Field(pattern="^/")
    env: dict[str, str]


class CloudflareProvider(Provider):
    """Containers behind a Worker. Their files last as long as they run, and no longer."""

    type: ClassVar[str] = PROVIDER
    Options = CloudflareOptions
    options: CloudflareOptions

    def __init__(self, options: CloudflareOptions) -> None:
        super().__init__(options)
        self._opened: Worker | None = None
        self._stack = contextlib.AsyncExitStack()
        self._tasks: anyio.abc.TaskGroup
        self._registers: bool | None = None

    async def __aenter__(self) -> Self:
        """Open a client.

        Raises:
            ConfigError: there is no key.
        """
        self._opened = Worker(self.options)
        self._tasks = await self._stack.enter_async_context(anyio.create_task_group())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close it, and the streams of processes. Sandboxes live on."""
        if self._opened is not None:
            self._tasks.cancel_scope.cancel()
            await self._stack.aclose()
            with anyio.CancelScope(shield=True), anyio.move_on_after(10):
                await self._opened.client.aclose()

    async def create(self, spec: SandboxSpec) -> Sandbox:
        _check_workdir(spec.workdir)
        env = read_env(self.options.env)
        state = State(workdir=spec.workdir, env=check_env({**env, **spec.env}))
        made = True
        if await self._hasregister("create"):
            body = {"labels": dict(spec.labels), "ttl": spec.ttl}
            # Shielded: if it were cut off, the container might be made after we had looked for it to remove it.
            with anyio.CancelScope(shield=True):
                response = await self._worker.call("create", "PUT", register(spec.key), json=body, timeout=CREATE)
            made = response.json()["created"]
        elif spec.ttl > self.options.sleep_after:
            message = (
                f"this Worker stops an idle sandbox after {self.options.sleep_after:.0f} s and loses its files, so a "
                f"ttl of {spec.ttl:.0f} s cannot be kept; set ttl to that at most, or deploy the Worker of "
                "examples/cloudflare"
            )
            raise NotSupported(message, provider=self.type, op="create", sandbox_id=spec.key)
        try:
            return await self._begin(spec.key, state)
        except BaseException:
            if made:
                await self._discard(spec.key)
            raise

    async def attach(self, key: str) -> Sandbox | None:
        if await self._hasregister("attach"):
            response = await self._worker.call("attach", "GET", register(key), allow=(404,))
            if response.status_code == 404:
                return None
        try:
            code, out = await self._worker.run("attach", key, attach_argv(), timeout=CREATE)
        except SandboxGone:
            return None
        # One without it is not begun yet, or it is the empty one that the bridge starts for an id it does not know.
        return None if code != 0 else self._sandbox(key, out, "attach")

    async def list(self) -> AsyncIterator[SandboxInfo]:
        if not await self._hasregister("list"):
            message = "Cloudflare's bridge has no list of sandboxes; the Worker of examples/cloudflare has"
            raise NotSupported(message, provider=self.type, op="list")
        cursor: str | None = None
        while True:
            query = {} if cursor is None else {"cursor": cursor}
            page = (await self._worker.call("list", "GET", "/mabridge/v1/sandboxes", params=query)).json()
            for item in page["sandboxes"]:
                created = datetime.fromtimestamp(item["created"] / 1000, UTC)
                yield SandboxInfo(
                    key=item["id"], id=item["id"], labels=item["labels"], state="running", created_at=created
                )
            cursor = page["cursor"]
            if cursor is None:
                return

    async def check(self) -> None:
        open_to_all = await self._worker.call("check", "GET", "/v1/pool/stats", anonymous=True, allow=(401, 503))
        if open_to_all.status_code != 401:
            raise ConfigError(
                f"cloudflare: the Worker at {self.options.worker_url} has no SANDBOX_API_KEY; set one, for without it "
                "anybody can run commands there: wrangler secret put SANDBOX_API_KEY"
            )
        await self._worker.call("check", "GET", "/v1/pool/stats")

    @property
    def _worker(self) -> Worker:
        if self._opened is None:
            raise RuntimeError(
                "a provider is entered before it is used: async with CloudflareProvider(...) as provider"
            )
        return self._opened

    async def _hasregister(self, op: str) -> bool:
        if self._registers is None:
            response = await self._worker.call(op, "GET", "/mabridge/v1", allow=(404,))
            said = response.json() if response.headers.get("content-type", "").startswith("application/json") else None
            self._registers = isinstance(said, dict) and said.get("mabridge") == 1
        return self._registers

    async def _begin(self, key: str, state: State) -> Sandbox:
        """Write what the sandbox remembers, or find it written.

        The bridge alone starts a container for each of two requests that come at once, and forgets the first.
        """
        content = f"{uuid.uuid4().hex} {base64.b64encode(state.model_dump_json().encode()).decode()}"
        argv = create_argv(content, state.workdir)
        before = b""
        for _ in range(_SETTLE):
            code, out = await self._worker.run("create", key, argv, timeout=CREATE)
            if code != 0:
                message = f"{STATE} and {state.workdir} could not be made; does the image run as root?"
                raise CreateFailed(message, provider=self.type, op="create", sandbox_id=key)
            if self._registers or out == before:
                return self._sandbox(key, out, "create")
            before = out
        message = "the Worker went on to give it another container with each request"
        raise SandboxUnavailable(message, provider=self.type, op="create", sandbox_id=key)

    def _sandbox(self, key: str, content: bytes, op: str) -> CloudflareSandbox:
        try:
            instance, encoded = content.split()
            state = State.model_validate_json(base64.b64decode(encoded, validate=True))
            env = check_env(state.env)
        except (ValueError, ValidationError) as exc:
            message = f"{STATE}/state in the sandbox makes no sense"
            raise SandboxUnavailable(message, provider=self.type, op=op, sandbox_id=key) from exc
        registered = bool(self._registers)
        return CloudflareSandbox(
            self._worker, self._tasks, key, instance.decode(), workdir=state.workdir, env=env, registered=registered
        )

    async def _discard(self, key: str) -> None:
        with anyio.CancelScope(shield=True):
            try:
                await self._worker.remove(key)
            except SandboxError as exc:
                logger.error("%s; it stays until its time is up", exc)


def _check_workdir(workdir: str) -> None:
    if not workdir.startswith("/") or posixpath.normpath(workdir) in ("/", "//"):
        raise ConfigError(f"cloudflare: workdir {workdir!r} must be an absolute path, and not /")
