"""A command that runs to its end: what is known of it, and what it says."""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import anyio

from mabridge.errors import SandboxUnavailable
from mabridge.providers import _packed
from mabridge.providers.vercel.errors import PROVIDER
from mabridge.sandbox import ExecResult

if TYPE_CHECKING:
    from vercel import sandbox as sdk

__all__ = ["Running", "Stream"]


class Stream:
    """The first bytes of a stream, which the nonce ends.

    Args:
        name: ``o`` or ``e``.
        limit: bytes that are kept.
        nonce: what ends it.
        on_change: is called when it is complete, and when it is more than is kept.
    """

    def __init__(self, name: str, limit: int, nonce: bytes, on_change: Callable[[Stream], None]) -> None:
        self.name = name
        self.full = self.complete = False
        self._data = bytearray()
        self._limit = limit
        self._nonce = nonce
        self._on_change = on_change

    def add(self, data: bytes) -> None:
        """Take more of it."""
        if self.complete:
            return
        before, room = len(self._data), self._limit + len(self._nonce)
        self._data += data[: room - before]
        end = self._data.find(self._nonce, max(before - len(self._nonce), 0))
        self.full = end < 0 and before + len(data) > room
        self.complete = self.full or end >= 0
        if end >= 0:
            del self._data[end:]
        if self.complete:
            self._on_change(self)

    def take(self) -> tuple[bytes, bool]:
        """Return the bytes, and whether there were more."""
        return bytes(self._data[: self._limit]), len(self._data) > self._limit


class Running:
    """A command, as far as it is known.

    Args:
        max_output: bytes that are kept of each stream.
    """

    on_full: Callable[[Stream], None]
    """Is called with a stream of which there is more than is kept, while the command goes on."""

    def __init__(self, max_output: int) -> None:
        self.nonce = secrets.token_hex(16)
        self.out, self.err = self.streams = (
            Stream("o", max_output, self.nonce.encode(), self._changed),
            Stream("e", max_output, self.nonce.encode(), self._changed),
        )
        self.begun, self.ended, self.finished = anyio.Event(), anyio.Event(), anyio.Event()
        self.scope = anyio.CancelScope(shield=True)
        self.leader: int | None = None
        self.code: int | None = None
        self.trouble: BaseException | None = None

    async def follow(
        self, session: sdk.SandboxRuntimeSession, command: Sequence[str], env: Mapping[str, str], kill_after: float
    ) -> None:
        """Start it and take what it says, until it and its output have ended. Shielded: who began it also ends it."""
        out, err = _packed.Unpacker(self.out.add, self._told), _packed.Unpacker(self.err.add, self._told)
        with self.scope:
            try:
                await session.run_process(
                    command[0],
                    command[1:],
                    cwd="/",
                    env=env,
                    kill_after=kill_after,
                    stdout=_text(out),
                    stderr=_text(err),
                )
            except Exception as exc:  # noqa: BLE001 - raised by result(), once everything is cleaned up
                self.trouble = exc
            finally:
                self.begun.set()
                self.ended.set()
                self.finished.set()

    def result(self, sandbox_id: str, *, timed_out: bool) -> ExecResult:
        """Return what it did, or raise why that is not known."""
        if self.trouble is not None:
            raise self.trouble
        if self.leader is None:
            message = "the command did not begin"
            raise SandboxUnavailable(message, provider=PROVIDER, op="exec", sandbox_id=sandbox_id)
        if self.code is None and not timed_out:
            message = "the command's shell was killed; it may have been out of memory"
            raise SandboxUnavailable(message, provider=PROVIDER, op="exec", sandbox_id=sandbox_id)
        if not timed_out and not all(stream.complete for stream in self.streams):
            message = "the command ended, but its output broke off"
            raise SandboxUnavailable(message, provider=PROVIDER, op="exec", sandbox_id=sandbox_id)
        (out, out_cut), (err, err_cut) = self.out.take(), self.err.take()
        return ExecResult(
            exit_code=None if timed_out else self.code,
            stdout=out,
            stderr=err,
            timed_out=timed_out,
            truncated=out_cut or err_cut,
        )

    def _changed(self, stream: Stream) -> None:
        if stream.full and not self.ended.is_set():
            self.on_full(stream)
        self._check()

    def _check(self) -> None:
        """Everything is known before Vercel says that the command's shell has ended as well."""
        if self.code is not None and all(stream.complete for stream in self.streams):
            self.finished.set()

    def _told(self, letter: str, number: int) -> None:
        if letter == "p":
            self.leader = number
            self.begun.set()
        elif letter == "c":
            self.code = number
            self.ended.set()
            self._check()


def _text(stream: io.TextIOBase) -> Any:  # noqa: ANN401 - the SDK asks for TextIO, and needs no more than its write
    return stream
