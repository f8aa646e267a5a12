"""The six tools as one object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import anyio

from mabridge.hands import Hands
from mabridge.sandbox import Sandbox
from mabridge.tools import inputs
from mabridge.tools.bash import BashTool
from mabridge.tools.files import FileTools
from mabridge.tools.limits import ToolLimits
from mabridge.tools.result import ToolFailure, ToolResult, text_result
from mabridge.tools.script import Roots
from mabridge.tools.search import SearchTools

__all__ = ["SandboxTools"]


class SandboxTools:
    """The sandbox tools of ``agent_toolset_20260401``, for one sandbox.

    What they say to the model is what the Anthropic SDK's own tools say, but where those fall short.

    Args:
        sandbox: where they work.
        hands: what runs `bash`, entered.
        limits: how much they take and give.
        allowed_roots: directories beside the working directory that the file tools may reach.
        read_only_roots: directories that they may read but not change.
    """

    NAMES: ClassVar[frozenset[str]] = frozenset({"bash", "read", "write", "edit", "glob", "grep"})
    """The tools there are."""
    READ_ONLY: ClassVar[frozenset[str]] = frozenset({"read", "glob", "grep"})
    """Those that change nothing, so that some may run at a time."""

    def __init__(
        self,
        sandbox: Sandbox,
        hands: Hands,
        *,
        limits: ToolLimits | None = None,
        allowed_roots: Sequence[str] = (),
        read_only_roots: Sequence[str] = (),
    ) -> None:
        limits = limits or ToolLimits()
        roots = Roots(workdir=sandbox.workdir, allowed=tuple(allowed_roots), read_only=tuple(read_only_roots))
        self._hands = hands
        self._noted: set[str] = set()
        self._bash = BashTool(hands, limits, keeps=roots.internal.add)
        self._files = FileTools(sandbox, roots, limits)
        self._search = SearchTools(sandbox, roots, limits)
        self._running: dict[str, anyio.CancelScope] = {}

    async def call(
        self,
        name: str,
        input: Mapping[str, Any] | None,  # noqa: A002 - the name of the field on the wire
        *,
        call_id: str,
        thread: str | None = None,
    ) -> ToolResult:
        """Run one tool call and return its result. What the model did wrong is a result too.

        Cancelled, it abandons the call: a `bash` command goes on in the sandbox, where the same `call_id` finds it
        again; the other tools stop. A `write` or an `edit` that was done is not done again for the same `call_id`.

        Args:
            name: one of `NAMES`.
            input: the tool's input, as the model gave it.
            call_id: the id of the call. What changes anything is done once for an id, however often it is called.
            thread: the thread that the call belongs to, if that is not the session's main one.

        Raises:
            SandboxError: the sandbox or its provider failed.
        """
        try:
            if name == "bash":
                given = inputs.parse_input(name, inputs.BashInput, input)
                return await self._bash.bash(given, call_id=call_id, thread=thread)
            with anyio.CancelScope() as scope:
                self._running[call_id] = scope
                try:
                    return await self._file_call(name, input, call_id)
                finally:
                    self._running.pop(call_id, None)
            return text_result(f"{name}: interrupted before it was done", is_error=True)
        except ToolFailure as exc:
            return text_result(str(exc), is_error=True)

    async def interrupt(self, call_id: str) -> None:
        """Stop a running call: its `call` returns, with an error result that holds the output so far.

        Raises:
            SandboxError: the sandbox or its provider failed.
        """
        scope = self._running.get(call_id)
        if scope is not None:
            scope.cancel()
        else:
            await self._bash.interrupt(call_id)

    async def accepted(self, call_id: str) -> None:
        """Say that the platform has the call's result, so nothing need be kept of it.

        Raises:
            SandboxError: the sandbox or its provider failed.
        """
        await self._bash.accepted(call_id)
        if call_id in self._noted:
            self._noted.remove(call_id)
            await self._hands.forget(call_id)

    async def _file_call(self, name: str, given: Mapping[str, Any] | None, call_id: str) -> ToolResult:
        note = self._hands.note_path(call_id)
        if note and name in ("write", "edit"):
            self._noted.add(call_id)
        match name:
            case "read":
                return await self._files.read(inputs.parse_input(name, inputs.ReadInput, given))
            case "write":
                return await self._files.write(inputs.parse_input(name, inputs.WriteInput, given), note=note)
            case "edit":
                return await self._files.edit(inputs.parse_input(name, inputs.EditInput, given), note=note)
            case "glob":
                return await self._search.glob(inputs.parse_input(name, inputs.GlobInput, given))
            case "grep":
                return await self._search.grep(inputs.parse_input(name, inputs.GrepInput, given))
        raise ToolFailure(f"there is no tool {name!r} here; there are {', '.join(sorted(self.NAMES))}")
