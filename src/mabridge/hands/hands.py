"""Speaks with ``hands.sh``: the worker's side of an agent's shells.

A call goes in under its id, is run once by the shell of its thread, and leaves its output and its end in a journal in
the sandbox. To submit an id again is to wait for the first run of it, or to read what it left. So nothing here needs to
be remembered: a broken connection, or another worker, goes on by asking again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import secrets
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import TracebackType
from typing import Self

import anyio

from mabridge.errors import SandboxError, SandboxUnavailable
from mabridge.hands.channel import Channel, Reply, new_nonce, parse_reply, parse_tail
from mabridge.identity import is_safe_id
from mabridge.sandbox import ExecResult, Sandbox, SupportsProcess

__all__ = ["CallResult", "Hands"]

_log = logging.getLogger(__name__)

# Where a journal is, and its token: one that was removed and made anew has another.
_Journal = tuple[str, str]

_UNKNOWN = Reply(output=b"", code=0, how="unknown")

# What one answer carries of the output at most; it is HEAD in hands.sh.
_ANSWER = 131_072
_PART = 49_152
# A command that is larger goes in as a file: a channel takes it line by line, and a shell reads that byte by byte.
_LINES_LIMIT = 16_384
_EXEC_SLACK = 30.0
_ROUND = 50.0
_KILL_DEADLINE = 20.0
_ATTEMPTS = 4
_CHANNEL_ATTEMPTS = 2  # of these; the others are over exec
# Forgetting starts two processes in the sandbox, whether it is one call or many.
_FORGET_TOGETHER = 16
_FORGET_MOST = 100
_FORGET_DEADLINE = 2.0
_FIRST_PAUSE = 0.2

# What lies beside hands.sh: an agent's shell, and what is not needed for every call.
_PARTS = ("inner", "kill", "watch")

_INSTALL = """
put_parts() {
    base=$1
    shift
    while [ "$#" -gt 0 ]; do
        printf %s "$2" > "$base.$1.sh" || return 1
        shift 2
    done
}
name=$1 tag=$2 shell=$3 most=$4 verb=$5 program=$6
shift 6
for d in "${TMPDIR:-/tmp}" /var/tmp /dev/shm "$PWD"; do
    d=$d/.mabridge-hands
    { mkdir -p "$d/calls" "$d/shells" "$d/old" && [ -O "$d" ] && chmod 700 "$d"; } 2>/dev/null || continue
    { printf '' > "$d/$name.$tag"; } 2>/dev/null || continue
    (set -C && echo "$tag" > "$d/token") 2>/dev/null
    { echo "$most" > "$d/most"; } 2>/dev/null
    if [ -s "$d/$name" ]; then
        rm -f "$d/$name.$tag"
    else
        printf %s "$program" > "$d/$name.$tag" || { rm -f "$d/reserve" && printf %s "$program" > "$d/$name.$tag"; } \
            || { rm -f "$d/$name.$tag"; continue; }
        put_parts "$d/${name%.sh}" "$@" || { rm -f "$d/$name.$tag"; continue; }
        mv -f "$d/$name.$tag" "$d/$name" || exit 1
    fi
    read -r token < "$d/token"
    printf '%s\n%s\n' "$d" "$token"
    exec sh "$d/$name" "$verb" "$shell"
done
exit 73
"""


@dataclass(frozen=True, kw_only=True)
class CallResult:
    """What a command did.

    Attributes:
        exit_code: as a shell reports it, 128 + n for death by signal n; ``None`` if it was killed by us.
        head: the beginning of its output, stdout and stderr merged; all of it if `size` is its length.
        tail: the end of its output, if that is longer than `head`.
        size: bytes of the whole output.
        path: the file in the sandbox that has the whole output, if it is a long one.
        timed_out: it was killed because its time had passed.
        interrupted: it was killed by `Hands.interrupt`.
        dropped: bytes that were cut out of the middle of a very long output, and are in no file.
        note: what the agent has to be told of its shell, if anything.
    """

    exit_code: int | None
    head: bytes = b""
    tail: bytes = b""
    size: int = 0
    path: str | None = None
    dropped: int = 0
    timed_out: bool = False
    interrupted: bool = False
    note: str | None = None


class Hands:
    """The shells of one session in its sandbox. An async context manager.

    Leaving it closes the connections. The shells, and what runs in them, live on.

    Args:
        sandbox: where they are.
        max_output: bytes that the output of one call may take on the sandbox's disk, of background jobs too. Looked
            at once a second; of what is more, the middle is dropped. Less if the disk is nearly full.
    """

    def __init__(self, sandbox: Sandbox, *, max_output: int = 2 * 1024**3) -> None:
        self._sandbox = sandbox
        self._max_output = max_output
        self._over_channels = isinstance(sandbox, SupportsProcess)
        self._channels: dict[str, tuple[_Journal, Channel]] = {}
        self._locks: dict[str, anyio.Lock] = {}
        self._to_forget: list[str] = []
        self._large: set[str] = set()
        self._journal: _Journal = ("", "")
        self.directory = ""
        """Absolute path, in the sandbox, of the journal."""

    async def __aenter__(self) -> Self:
        """Put the hands into the sandbox, unless they are there, and start the main shell.

        Raises:
            SandboxError: they could not be; the sandbox has no place to write, or no shell.
        """
        if self._over_channels:
            try:
                await self._open_channel("main")
            except SandboxUnavailable as error:
                self._do_without_channels(error)
            else:
                return self
        await self._install("main")
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True), anyio.move_on_after(_FORGET_DEADLINE), contextlib.suppress(SandboxError):
            await self._forget_the_rest()
        for shell in tuple(self._channels):
            await self._drop_channel(shell)

    async def run(self, call_id: str, command: str, *, shell: str = "main", timeout: float) -> CallResult:
        """Run a command in a shell, once for its id, whoever asks and however often. Cancelled, it goes on.

        Args:
            call_id: the id of the call.
            command: what the shell is to run.
            shell: the name of the shell; those of different names run side by side.
            timeout: seconds after which it is killed, with all it started. They count from now.

        Raises:
            SandboxGone: the sandbox is definitely absent.
            SandboxUnavailable: it could not be reached. The command may be running; ask again with the same id.
        """
        call, shell = _file_name(call_id), _file_name(shell)
        lock = self._locks.setdefault(shell, anyio.Lock())
        async with lock:
            reply: Reply | None = None
            journal = self._journal
            with anyio.move_on_after(timeout):
                reply = await self._submit(call, command, shell, journal)
            if reply is None:
                await self._kill(call, "timeout")
                reply = await self._end_of(call, command, shell, journal)
            return await self._result(call, reply)

    async def interrupt(self, call_id: str) -> None:
        """Kill what a call has started. Its `run` returns, with the output so far.

        Raises:
            SandboxError: the sandbox could not be reached.
        """
        await self._kill(_file_name(call_id), "interrupt")

    async def restart(self, call_id: str, *, shell: str = "main") -> None:
        """Give a shell up for a fresh one, once for the id of the call.

        Raises:
            SandboxError: the sandbox could not be reached.
        """
        call, name = _file_name(call_id), _file_name(shell)
        result = await self._run_script("restart", call, name)
        if result.exit_code != 0:  # such as where the program was removed
            await self._install(name)
            result = await self._run_script("restart", call, name)
        if result.exit_code != 0:
            why = _complaint(result) or f"exit code {result.exit_code}"
            raise self._unavailable("restart", f"the shell could not be started anew: {why}")

    async def forget(self, call_id: str) -> None:
        """Drop what is kept of a call whose result was accepted, with one of the next calls or at the end."""
        call = _file_name(call_id)
        # The agent was told where a large output is. hands.sh keeps some of those.
        self._to_forget.append(f"+{call}" if call in self._large else call)
        self._large.discard(call)

    def note_path(self, call_id: str) -> str:
        """Return the path, in the sandbox, of the file in which another tool notes that it has done a call.

        `forget` removes it. Empty where no hands were put in.
        """
        return f"{self.directory}/calls/{_file_name(call_id)}.note" if self.directory else ""

    async def _submit(self, call: str, command: str, shell: str, journal: _Journal) -> Reply:
        """Submit a call, or ask for it again, until there is an answer. `journal` is the one that may know of it."""
        reply = await self._ask(call, command, shell, journal)
        # Where the disk was full, the first refusal has made a little space: enough for a command that empties it.
        return await self._ask(call, command, shell, journal) if reply.how == "full" else reply

    async def _end_of(self, call: str, command: str, shell: str, journal: _Journal) -> Reply:
        """Return how a call that was killed has ended. What it had done to the sandbox may take a while to go."""
        problem = "it does not end"
        with anyio.move_on_after(_KILL_DEADLINE):
            while True:
                try:
                    return await self._submit(call, command, shell, journal)
                except SandboxUnavailable as error:
                    problem = str(error)
        raise self._unavailable("run", f"a command was killed because its time had passed: {problem}")

    async def _ask(self, call: str, command: str, shell: str, journal: _Journal) -> Reply:
        pause = _FIRST_PAUSE
        lost: SandboxUnavailable | None = None
        for attempt in range(_ATTEMPTS):
            if self._journal != journal:
                # A fresh journal would have the command run, and perhaps that had happened.
                return _UNKNOWN
            over_channel = self._over_channels and attempt < _CHANNEL_ATTEMPTS and len(command) <= _LINES_LIMIT
            try:
                if over_channel:
                    return await self._over_channel(call, command, shell, journal)
                reply = await self._over_exec(call, command, shell)
                if lost is not None:
                    self._do_without_channels(lost)
                return reply
            except SandboxUnavailable as error:
                lost = error if over_channel else lost
                if attempt == _ATTEMPTS - 1:
                    raise
                _log.info("sandbox %s: asking again for call %s: %s", self._sandbox.id, call, error)
                await anyio.sleep(pause)
                pause *= 2
                with contextlib.suppress(SandboxUnavailable):  # the next attempt tells
                    await self._install(shell)
        raise AssertionError("the last attempt returns or raises")

    def _do_without_channels(self, error: SandboxUnavailable) -> None:
        """Have each call be a command of its own from now on: slower, but it is what every sandbox can do."""
        if self._over_channels:
            self._over_channels = False
            _log.warning("sandbox %s: each call will be a command of its own: %s", self._sandbox.id, error)

    async def _over_channel(self, call: str, command: str, shell: str, journal: _Journal) -> Reply:
        opened, channel = self._channels.get(shell, (None, None))
        if channel is None or opened != self._journal:
            channel = await self._open_channel(shell)
            if self._journal != journal:
                return _UNKNOWN
        done = False
        try:
            reply = await channel.ask(call, command, self._next_to_forget(_FORGET_TOGETHER))
            done = True
            return reply
        finally:
            if not done:
                # An answer that nobody waits for any more would be taken for the next one.
                await self._drop_channel(shell)

    def _next_to_forget(self, least: int = 1) -> list[str]:
        """Return the ids of some calls that are to be forgotten, if there are enough of them or a large one."""
        if len(self._to_forget) < least and not any(call.startswith("+") for call in self._to_forget):
            return []
        some, self._to_forget = self._to_forget[:_FORGET_MOST], self._to_forget[_FORGET_MOST:]
        return some

    async def _forget_the_rest(self) -> None:
        """Have all forgotten that is to be, where it costs little: over a channel, which is idle by now."""
        if self._channels:
            _, channel = next(iter(self._channels.values()))
            while some := self._next_to_forget():
                await channel.forget(some)

    async def _over_exec(self, call: str, command: str, shell: str) -> Reply:
        while True:
            nonce = new_nonce(command)
            result = await self._sandbox.exec(
                [*self._argv, "once", nonce, call, shell, str(int(_ROUND)), *self._next_to_forget()],
                stdin=command.encode() + b"\n",
                timeout=_ROUND + _EXEC_SLACK,
                max_output=_ANSWER + 1024,
            )
            reply = parse_reply(result.stdout, nonce)
            if reply is None:
                raise self._unavailable("run", f"the shell there did not answer (exit code {result.exit_code})")
            if reply.how != "running":
                return reply

    async def _result(self, call: str, reply: Reply) -> CallResult:
        code = reply.code
        if reply.how == "forgotten":
            return CallResult(exit_code=None, note="this call was answered before, and its result is not kept any more")
        if reply.how == "unknown":
            return CallResult(
                exit_code=None,
                note="what the shell keeps of its commands was removed, so it is not known how this one ended; "
                "the shell was started anew",
            )
        if reply.how == "full":
            return CallResult(
                exit_code=None,
                note=f"the command was not run: there is no space left on the disk that {self.directory} is on",
            )
        ended_by_us = reply.how in ("timeout", "interrupt")
        note = None
        if reply.how == "died":
            note = f"the shell ended with this command (exit code {code}) and was started again where it was"
        elif reply.how == "lost":
            note = "the shell was killed from outside and was started again"
        head, tail, size, dropped = self._tidy(call, reply.output), b"", len(reply.output), 0
        if size >= _ANSWER:
            head = head[:_PART]
            tail, size, dropped = await self._tail(call)
        path = None
        if size > _PART:
            path = f"{self.directory}/calls/{call}.out"
            self._large.add(call)
        return CallResult(
            exit_code=None if ended_by_us else code,
            head=head,
            tail=self._tidy(call, tail),
            size=size + dropped if tail else len(head),
            path=path,
            dropped=dropped,
            timed_out=reply.how == "timeout",
            interrupted=reply.how == "interrupt",
            note=note,
        )

    def _tidy(self, call: str, output: bytes) -> bytes:
        """Let the shell's own messages begin as those of any bash do, and not with the name of our file."""
        ours = re.escape(self.directory.encode())
        program = ours + rb"/hands-[0-9a-f]{12}\.(?:inner\.)?sh"
        script = ours + b"/calls/" + call.encode() + rb"\.cmd\.[0-9a-f]{16}(?:\.f)?"
        return re.sub(b"(?:" + program + b": )?" + script + b"|" + program, b"bash", output)

    async def _tail(self, call: str) -> tuple[bytes, int, int]:
        nonce = secrets.token_hex(8)
        output = await self._script("tail", nonce, call, str(_PART), max_output=_PART + 1024)
        return parse_tail(output, nonce) or (b"", _ANSWER, 0)

    async def _kill(self, call: str, why: str) -> None:
        """Kill a call. What keeps the sandbox from starting anything, such as a fork bomb, may need some attempts."""
        problem = "it did not answer"
        with anyio.move_on_after(_KILL_DEADLINE):
            while True:
                try:
                    result = await self._run_script("kill", call, why)
                except SandboxUnavailable as error:
                    problem = str(error)
                else:
                    if result.exit_code == 0:
                        return
                    problem = _complaint(result) or f"exit code {result.exit_code}"
                await anyio.sleep(_FIRST_PAUSE)
                if await self._is_gone():
                    # All that was known of the call, and the program too: what runs of it cannot be found.
                    await self._install("main")
                    return
        raise self._unavailable("kill", f"a command could not be killed: {problem}")

    async def _is_gone(self) -> bool:
        try:
            argv = ["/bin/sh", "-c", '[ -e "$1" ]', "hands", f"{self.directory}/{_program_name()}"]
            result = await self._sandbox.exec(argv, timeout=_EXEC_SLACK, max_output=1024)
        except SandboxUnavailable:
            return False
        return result.exit_code == 1

    async def _script(self, *arguments: str, max_output: int = 1024) -> bytes:
        return (await self._run_script(*arguments, max_output=max_output)).stdout

    async def _run_script(self, *arguments: str, max_output: int = 1024) -> ExecResult:
        return await self._sandbox.exec(
            [*self._argv, *arguments], timeout=_KILL_DEADLINE + _EXEC_SLACK, max_output=max_output
        )

    def _unavailable(self, op: str, message: str) -> SandboxUnavailable:
        return SandboxUnavailable(message, provider="hands", op=op, sandbox_id=self._sandbox.id)

    @property
    def _argv(self) -> list[str]:
        return ["/bin/sh", f"{self.directory}/{_program_name()}"]

    async def _install(self, shell: str) -> None:
        """Put the program and a journal there, if they are not, and start a shell."""
        result = await self._sandbox.exec(self._install_argv(shell, "start"), timeout=_EXEC_SLACK, max_output=4096)
        lines = result.stdout.decode("utf-8", "replace").splitlines()
        if result.exit_code != 0 or len(lines) != 2 or not lines[0].startswith("/"):
            why = _complaint(result)
            hint = "no directory to write in: /tmp, /var/tmp, /dev/shm and the working directory refuse"
            if result.exit_code != 73:
                raise self._unavailable("start", f"the shell could not be set up: {why or result.exit_code}")
            raise SandboxError(
                f"the shell could not be set up: {hint}", provider="hands", op="start", sandbox_id=self._sandbox.id
            )
        self.directory, self._journal = lines[0], (lines[0], lines[1])

    async def _open_channel(self, shell: str) -> Channel:
        """Do what `_install` does and open a channel, in one go: at many providers each costs a round trip."""
        await self._drop_channel(shell)
        channel = await Channel.open(self._sandbox, self._install_argv(shell, "channel"))
        opened = False
        try:
            with anyio.move_on_after(_EXEC_SLACK):
                self._journal = await channel.greeting()
                opened = True
        finally:
            if not opened:
                await channel.aclose()
        if not opened:
            raise self._unavailable("start", "the shell there did not start in time")
        self.directory = self._journal[0]
        self._channels[shell] = (self._journal, channel)
        return channel

    def _install_argv(self, shell: str, verb: str) -> list[str]:
        tag, most = secrets.token_hex(4), str(self._max_output)
        parts = [word for name in _PARTS for word in (name, _program(name))]
        return ["/bin/sh", "-c", _INSTALL, "hands", _program_name(), tag, shell, most, verb, _program("hands"), *parts]

    async def _drop_channel(self, shell: str) -> None:
        _, channel = self._channels.pop(shell, (None, None))
        if channel is not None:
            await channel.aclose()


def _file_name(name: str) -> str:
    """Return a name that is safe in a path and in a line of the protocol: the same one for the same name."""
    if is_safe_id(name) and "." not in name:
        return name
    return "h" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _complaint(result: ExecResult) -> str:
    """Return what a script of ours said on stderr, cut to what a message can hold."""
    return result.stderr.decode("utf-8", "replace").strip()[:300]


@cache
def _program(name: str) -> str:
    return (resources.files("mabridge.hands") / f"{name}.sh").read_text(encoding="utf-8")


@cache
def _program_name() -> str:
    # A worker of another version has other programs, beside these and over the same journal.
    programs = "".join(map(_program, ("hands", *_PARTS)))
    return f"hands-{hashlib.sha256(programs.encode()).hexdigest()[:12]}.sh"
