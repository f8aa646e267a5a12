"""One held-open process of ``hands.sh``, and what it answers."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import anyio

from mabridge.errors import SandboxUnavailable
from mabridge.sandbox import Process, Sandbox, SupportsProcess

__all__ = ["Channel", "Reply", "new_nonce", "parse_reply", "parse_tail"]

# An answer is 128 kB of output and a line. The sandbox is not trusted to keep to it.
_MOST = 200_000
_GREETING = 4096
_CLOSE_DEADLINE = 5.0
_ENDING = re.compile(rb"(?:(\d{1,3}) )?([a-z]+) \.\n")
# A definition, or something that may hold or undo one.
_FUNCTIONS = re.compile(r"\(\s*\)|\b(?:source|eval|unset)\b|(?:^|[;&|\s])\.\s")
_TAIL = re.compile(rb"(\d{1,18}) (\d{1,18}) \.\n")


@dataclass(frozen=True)
class Reply:
    """How a call stands: its output, its exit code, and how it ended (``end``, ``died``, ``timeout``...)."""

    output: bytes
    code: int
    how: str


def new_nonce(command: str) -> str:
    """Return a word that no command can know. It ends in ``.f`` if the command may define functions (see inner.sh)."""
    return secrets.token_hex(8) + (".f" if _FUNCTIONS.search(command) else "")


def parse_reply(data: bytes, nonce: str) -> Reply | None:
    """Return the answer to a request, if it is there whole.

    It is the output, and then a line of its own that begins with the request's nonce, which no command can know.
    """
    output, ending = _parse(data, nonce, _ENDING)
    if ending is None:
        return None
    return Reply(output=output, code=int(ending.group(1) or 0), how=ending.group(2).decode())


def parse_tail(data: bytes, nonce: str) -> tuple[bytes, int, int] | None:
    """Return the end of an output, the bytes that its file holds, and those that were dropped from its middle."""
    output, ending = _parse(data, nonce, _TAIL)
    if ending is None:
        return None
    return output, int(ending.group(1)), int(ending.group(2))


def _parse(data: bytes, nonce: str, pattern: re.Pattern[bytes]) -> tuple[bytes, re.Match[bytes] | None]:
    at = data.rfind(b"\n" + nonce.encode() + b" ")
    if at < 0:
        return b"", None
    return data[:at], pattern.fullmatch(data, at + len(nonce) + 2)


class Channel:
    """A connection to one shell of the hands: requests go in one at a time."""

    def __init__(self, process: Process, sandbox_id: str) -> None:
        self._process = process
        self._sandbox_id = sandbox_id

    @classmethod
    async def open(cls, sandbox: Sandbox, argv: Sequence[str]) -> Self:
        """Start the process.

        Raises:
            SandboxError: it could not be started.
        """
        assert isinstance(sandbox, SupportsProcess)
        return cls(await sandbox.open_process(argv), sandbox.id)

    async def greeting(self) -> tuple[str, str]:
        """Return the journal's directory and its token: two lines, the first that come.

        Raises:
            SandboxUnavailable: something else came, or nothing.
        """
        lines = bytearray()
        while lines.count(b"\n") < 2:
            data = await self._process.receive()
            lines += data
            if not data or len(lines) > _GREETING:
                raise SandboxUnavailable(
                    "the shell there did not start", provider="hands", op="start", sandbox_id=self._sandbox_id
                )
        directory, token, rest = lines.decode("utf-8", "replace").split("\n")
        if rest or not directory.startswith("/"):
            raise SandboxUnavailable(
                "the shell there made no sense", provider="hands", op="start", sandbox_id=self._sandbox_id
            )
        return directory, token

    async def ask(self, call: str, command: str, forget: Sequence[str]) -> Reply:
        """Submit a call and return its answer, however long that takes.

        Raises:
            SandboxUnavailable: the connection broke. The call may have been submitted.
            SandboxGone: the sandbox is definitely absent.
        """
        nonce = new_nonce(command)
        lines = command.split("\n")
        request = " ".join((nonce, call, str(len(lines)), *forget))
        return await self._exchange(nonce, f"{request}\n{command}\n")

    async def forget(self, calls: Sequence[str]) -> None:
        """Have calls forgotten.

        Raises:
            SandboxUnavailable: the connection broke.
            SandboxGone: the sandbox is definitely absent.
        """
        nonce = new_nonce("")
        await self._exchange(nonce, " ".join((nonce, "-", "0", *calls)) + "\n")

    async def _exchange(self, nonce: str, request: str) -> Reply:
        await self._process.send(request.encode())
        answer = bytearray()
        while True:
            data = await self._process.receive()
            answer += data
            reply = parse_reply(bytes(answer), nonce) if data else None
            if reply is not None:
                return reply
            if not data or len(answer) > _MOST:
                raise SandboxUnavailable(
                    "the hands in the sandbox broke off" if not data else "the hands in the sandbox made no sense",
                    provider="hands",
                    op="run",
                    sandbox_id=self._sandbox_id,
                )

    async def aclose(self) -> None:
        """Close it. What it has submitted goes on."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(_CLOSE_DEADLINE):
            await self._process.aclose()
