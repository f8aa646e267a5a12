"""The tool `bash`: a shell that lasts, on `Hands`."""

from __future__ import annotations

import codecs
import posixpath
import re
from collections.abc import Callable

from mabridge.hands import CallResult, Hands
from mabridge.tools.inputs import BashInput
from mabridge.tools.limits import ToolLimits
from mabridge.tools.result import ToolFailure, ToolResult, text_result

__all__ = ["BashTool"]

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_MAIN = "main"


class BashTool:
    """`bash`. Each thread of a session has a shell of its own, and all of them share the sandbox.

    Args:
        hands: what runs the commands.
        limits: the bounds.
        keeps: told of each directory in the sandbox in which a large output is kept.
    """

    def __init__(self, hands: Hands, limits: ToolLimits, *, keeps: Callable[[str], None]) -> None:
        self._hands = hands
        self._limits = limits
        self._keeps = keeps
        self._begun: set[str] = set()

    async def bash(self, given: BashInput, *, call_id: str, thread: str | None) -> ToolResult:
        """Run a command, or restart the shell."""
        shell = thread or _MAIN
        if given.restart:
            self._begun.add(call_id)
            await self._hands.restart(call_id, shell=shell)
            return text_result("bash session restarted")
        if not given.command:
            raise ToolFailure("bash: command is required")
        if "\0" in given.command:
            raise ToolFailure("bash: command must not hold a NUL character")
        timeout = self._timeout(given.timeout_ms)
        command = _HALF_CHARACTER.sub("\ufffd", given.command)
        self._begun.add(call_id)
        result = await self._hands.run(call_id, command, shell=shell, timeout=timeout)
        if result.path is not None:
            self._keeps(posixpath.dirname(result.path))
        return self._answer(result, timeout)

    async def interrupt(self, call_id: str) -> None:
        """Kill what a call runs."""
        if call_id in self._begun:
            await self._hands.interrupt(call_id)

    async def accepted(self, call_id: str) -> None:
        """Let go of what is kept of a call; a large output stays, for the agent was told where it is."""
        if call_id in self._begun:
            self._begun.remove(call_id)
            await self._hands.forget(call_id)

    def _timeout(self, milliseconds: int | None) -> float:
        if not milliseconds:
            return self._limits.default_timeout
        if milliseconds < 0:
            raise ToolFailure("bash: timeout_ms must not be negative")
        return min(milliseconds / 1000.0, self._limits.max_timeout)

    def _answer(self, result: CallResult, timeout: float) -> ToolResult:
        ending = []
        if result.note:
            ending.append(f"[{result.note}]")
        if result.timed_out:
            ending.append(f"bash: bash command timed out after {timeout}s")
        elif result.interrupted:
            ending.append("bash: interrupted before the command had ended")
        elif result.exit_code:
            ending.append(f"[exit code {result.exit_code}]")
        output = self._output(result)
        text = "\n".join([output, *ending] if output else ending)
        return text_result(text, is_error=result.exit_code != 0)

    def _output(self, result: CallResult) -> str:
        """Return the output as text: whole, or its head and tail with a line between them about the rest."""
        head, tail, most = result.head, result.tail, self._limits.max_chars
        if result.size == len(head) + len(tail):
            whole = _clean((head + tail).decode("utf-8", "replace")).rstrip("\n")
            if len(whole) <= most:
                return whole
            first, last = whole, whole
        else:
            # A character that was cut in two is left out on both sides.
            first = _clean(codecs.getincrementaldecoder("utf-8")("replace").decode(head))
            last = _clean(_from_whole_character(tail).decode("utf-8", "replace")).rstrip("\n")
        where = ""
        if result.path:
            kept = f"all but {result.dropped} bytes of it" if result.dropped else "the whole output"
            where = f"; {kept} is in {result.path}"
        middle = f"[... this is the beginning and the end of {result.size} bytes of output{where} ...]"
        return f"{first[: most // 2]}\n{middle}\n{last[-(most // 2) :]}"


def _clean(text: str) -> str:
    return _ANSI.sub("", text)


def _from_whole_character(data: bytes) -> bytes:
    """Return `data` without the rest of a character whose beginning was cut off."""
    for start in range(min(3, len(data))):
        if data[start] & 0xC0 != 0x80:
            return data[start:]
    return data[3:]
