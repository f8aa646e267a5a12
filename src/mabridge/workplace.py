"""Where one session's calls are run: its sandbox with hands, tools and skills in it, made anew when it is lost."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import anyio

from mabridge.bounded import bounded
from mabridge.errors import MabridgeError, SandboxGone, first_error
from mabridge.hands import Hands
from mabridge.sandbox import Sandbox
from mabridge.sandboxes import Held, Sandboxes
from mabridge.tools import SandboxTools, ToolLimits

__all__ = ["Workplace"]

_log = logging.getLogger(__name__)

# After a failure, calls are told of it for this long before another attempt is made.
_FAILURE_STANDS = 15.0
_VANISHED_AT_MOST = 2


class Workplace:
    """The sandbox of one session, obtained when it is first wanted.

    `run` owns all that goes on in it; `tools` may be asked for by many tasks at once.

    Args:
        sandboxes: where the sandbox comes from.
        session_id: the session.
        providers: names of the providers to try, in order.
        furnish: puts what belongs to the session into a sandbox before anything is run there.
        lived_before: tells whether calls of the session were run before; see `Sandboxes.obtain`.
        limits: of the tools.
    """

    def __init__(
        self,
        sandboxes: Sandboxes,
        *,
        session_id: str,
        providers: Sequence[str],
        furnish: Callable[[Sandbox], Awaitable[None]],
        lived_before: Callable[[], Awaitable[bool]],
        limits: ToolLimits,
    ) -> None:
        self._sandboxes = sandboxes
        self._session_id = session_id
        self._providers = providers
        self._furnish = furnish
        self._lived_before = lived_before
        self._limits = limits
        self._wanted = anyio.Event()
        self._lost = anyio.Event()
        self._changed = anyio.Condition()
        self._tools: SandboxTools | None = None
        self._failure: MabridgeError | None = None
        self._made = 0
        self.held: Held | None = None
        """The sandbox, if the session has one now."""
        self.fresh_untold = False
        """The sandbox was made just now, and the agent was not told that its file system is a fresh one."""
        self.replaced = False
        """The sandbox is not the first that this run of the session had."""

    def want(self) -> None:
        """Have a sandbox made, without waiting for it."""
        self._wanted.set()

    async def tools(self) -> SandboxTools:
        """Return the tools, once the sandbox is ready.

        Raises:
            MabridgeError: no sandbox can be had.
        """
        async with self._changed:
            while self._tools is None:
                if self._failure is not None:
                    raise self._failure
                self.want()
                await self._changed.wait()
            return self._tools

    def lost(self, tools: SandboxTools) -> None:
        """Say that the sandbox of these tools is gone: another is made when one is wanted."""
        if tools is self._tools:
            self._tools = None
            self._lost.set()

    async def run(self) -> None:
        """Keep the sandbox, whenever one is wanted, until cancelled."""
        vanished = 0
        while True:
            await self._wanted.wait()
            failure: MabridgeError | None = None
            try:
                await self._keep_one()
            except* MabridgeError as group:
                failure = first_error(group)
            except* Exception as group:  # noqa: BLE001 - no fault of ours may end the session
                _log.exception("the sandbox of session %s could not be used", self._session_id)
                failure = MabridgeError(f"the worker failed in its own code ({type(first_error(group)).__name__})")
            if isinstance(failure, SandboxGone) and not self._lost.is_set() and vanished < _VANISHED_AT_MOST:
                # It went before anything was run in it: such as one that its last worker was just removing.
                vanished += 1
                continue
            vanished = 0
            if failure is not None and not self._lost.is_set():
                await self._change(failure=failure)
                await anyio.sleep(_FAILURE_STANDS)
            self._wanted, self._lost = anyio.Event(), anyio.Event()
            await self._change()

    async def _keep_one(self) -> None:
        held = await self._sandboxes.obtain(self._session_id, self._providers, lived_before=self._has_lived)
        self.held = held
        self.fresh_untold = held.created
        self.replaced = self._made > 0
        _log.debug("session %s works in sandbox %s", self._session_id, held.sandbox.id)
        sandbox = bounded(held.sandbox, provider=held.by.provider.type, slack=self._limits.provider_slack)
        async with Hands(sandbox) as hands, anyio.create_task_group() as tasks:
            tasks.start_soon(self._sandboxes.tend, held)
            await self._furnish(sandbox)
            self._made += 1
            await self._change(tools=SandboxTools(sandbox, hands, limits=self._limits))
            await self._lost.wait()
            tasks.cancel_scope.cancel()

    async def _has_lived(self) -> bool:
        return self._made > 0 or await self._lived_before()

    async def _change(self, *, tools: SandboxTools | None = None, failure: MabridgeError | None = None) -> None:
        async with self._changed:
            self._tools, self._failure = tools, failure
            self._changed.notify_all()
