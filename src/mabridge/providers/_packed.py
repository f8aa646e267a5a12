"""Exact bytes through a provider whose wire carries text: what a command says is packed as base64 in the sandbox.

One command does it all, with as few processes as that takes: it runs the program in a session of its own, and packs
each of its streams on the one of the same name. Lines that begin with ``#`` are its own: ``#p`` the program's process
(and session), ``#o`` the process that packs the output of one held open, ``#c`` its exit code, ``#z`` the end of its
output. No byte of base64 is a ``#``, so such a line is found even in the middle of another.

What packs has no bound. Whoever has enough of a stream puts ``cat >/dev/null`` in its place with `drain_argv`. When the
program has ended, a nonce that it cannot know ends each stream: whoever has seen it has everything. What the program
left in the background may hold its output open, though never the provider's stream, and base64 keeps to itself what is
no full block: whoever sees ``#c``, and no nonce soon after, gets what is still on its way with `flush_argv`.

In the sandbox it takes ``/bin/sh``, ``/proc``, ``setsid``, ``base64``, ``head``, ``dd`` and ``cat``.
"""

from __future__ import annotations

import binascii
import io
import math
from collections.abc import Callable, Sequence

import anyio

from mabridge.providers import _shell

__all__ = ["REQUIRED", "Held", "Unpacker", "capture_argv", "drain_argv", "flush_argv", "hold_argv", "kill_leader_argv"]

REQUIRED = ("setsid", "base64", "head", "dd", "cat", "grep", "stat")
"""The programs that these scripts, and those of `mabridge.providers._shell`, need."""

# The program is exec'd by setsid, which becomes it: its process and its session have the number that is announced.
# The caller's PATH is for the program; what packs is found although it leads nowhere.
_COMMON = r"""
path=$PATH PATH=$PATH:/usr/bin:/bin
for setsid in /usr/bin/setsid /bin/setsid; do [ ! -x "$setsid" ] || break; done
as() { read -r p x </proc/self/stat; echo "#$1 $p" >&7; shift; exec "$@" 7>&-; }
run() {
    PATH=$path
    export MAB_EXEC="$marker"
    read -r p x </proc/self/stat; echo "#p $p" >&7
    cd "$1" || exit 126
    shift
    exec "$setsid" "$@" 7>&-
}
"""

# $1 marker, $2 and $3 the nonce in two parts (so that no list of processes shows it), $4 a file for stdin, which is
# removed, or nothing; then directory and argv.
_CAPTURE = (
    "marker=$1 nonce=$2$3 input=$4; shift 4"
    + _COMMON
    + r"""
exec 7>&2 8>&1 </dev/null 2>/dev/null
[ -z "$input" ] || { exec <"$input" || exit 1; rm -f "$input"; }
{
    { (run "$@") 2>&9 9>&-; c=$?; printf %s "$nonce"; printf %s "$nonce" >&9; echo "#c $c" >&7; } 9>&1 >&3 3>&- 8>&- |
    MAB_PACK=e$marker exec base64 >&7 3>&- 7>&- 8>&-
} 3>&1 | MAB_PACK=o$marker exec base64 >&8 7>&- 8>&-
"""
)

_DRAIN = r"""
for f in $(grep -ls "$1" /proc/[0-9]*/environ); do
    f=${f%/environ}
    exec <"$f/fd/0" && kill "${f#/proc/}" && exec cat >/dev/null 2>&1
done
"""

# The pipe has less room than this, so that base64 has read, and passed on, whatever was in it.
_FLUSH = r"""
for f in $(grep -ls "$1" /proc/[0-9]*/environ); do
    f=${f%/environ}
    exec 5<"$f/fd/0"
    head -c 300000 /dev/zero >"$f/fd/0"
    cat <&5 >/dev/null 2>&1 &
    kill "${f#/proc/}"
done
"""

_PACK_ON = r"""
while x=$(dd bs=49152 count=1 2>/dev/null | base64) && [ -n "$x" ]; do
    printf %s $x "
"
done
echo "#z"
"""

# $1 marker, $2 what packs piece by piece; then directory and argv. What packs leads a session, to be killed with it.
_HOLD = (
    "marker=$1 pack=$2; shift 2"
    + _COMMON
    + r"""
exec 7>&1 2>/dev/null
{ (run "$@"); echo "#c $?" >&7; } | as o "$setsid" /bin/sh -c "$pack"
"""
)

_LINGER = 0.3  # seconds, after a program's end, until its output is taken to have ended as well
_DRAIN_TIME = 5.0  # seconds, after that, for output that goes on and on

_KILL_LEADER = 'kill -9 "$1" 2>/dev/null; shift; exec "$@"'


def capture_argv(argv: Sequence[str], cwd: str, *, marker: str, nonce: str, stdin: str = "") -> list[str]:
    """Return the argv that runs `argv` to its end, with each of its streams packed on that of the same name.

    Args:
        argv: the program and its arguments.
        cwd: absolute path.
        marker: by which `_shell.kill_argv` finds what it started.
        nonce: ends each stream, once the program has ended.
        stdin: path of the file that is its stdin, which is removed; if none is given, that is empty.

    Raises:
        ValueError: `argv` cannot be run.
    """
    call = _shell.run_argv(argv, cwd)[4:]
    return ["/bin/sh", "-c", _CAPTURE, "mab", marker, nonce[:9], nonce[9:], stdin, *call]


def hold_argv(argv: Sequence[str], cwd: str, *, marker: str) -> list[str]:
    """Return the argv that runs `argv` with its stdin as it is, its stdout packed piece by piece, its stderr dropped.

    Raises:
        ValueError: `argv` cannot be run.
    """
    call = _shell.run_argv(argv, cwd)[4:]
    return ["/bin/sh", "-c", _HOLD, "mab", marker, _PACK_ON, *call]


def drain_argv(marker: str, stream: str) -> list[str]:
    """Return the argv that drops the rest of a stream, ``o`` or ``e``; it lasts as long as anything may write there.

    Whoever writes there never finds the pipe broken.
    """
    return ["/bin/sh", "-c", _DRAIN, "mab", f"MAB_PACK={stream}{marker}"]


def flush_argv(marker: str) -> list[str]:
    """Return the argv by which what is still on its way comes through, with nonsense after it; the rest is dropped."""
    return ["/bin/sh", "-c", _FLUSH, "mab", f"MAB_PACK=.{marker}"]


def kill_leader_argv(marker: str, leader: int) -> list[str]:
    """Return the argv that kills what `capture_argv` runs, though it has just been announced and is no leader yet."""
    return ["/bin/sh", "-c", _KILL_LEADER, "mab", str(leader), *_shell.kill_argv(marker, leader)]


class Unpacker(io.TextIOBase):
    """Takes a stream's text in pieces of any size, and gives its bytes on.

    Args:
        take: is given the bytes.
        told: is given the letter and the number of each line of the script's own; 0 where it has none.
    """

    def __init__(self, take: Callable[[bytes], None], told: Callable[[str, int], None]) -> None:
        self._take = take
        self._told = told
        self._rest = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Unpack what is whole.

        Raises:
            ValueError: this is no output of the scripts.
        """
        *lines, rest = (self._rest + text).split("\n")
        cut = ""
        for line in lines:
            packed, mark, own = (cut + line).partition("#")
            cut = packed if mark else ""
            if mark:
                letter, _, number = own.partition(" ")
                self._told(letter, int(number or 0))
            else:
                self._take(binascii.a2b_base64(packed, strict_mode=True))
        self._rest = cut + rest
        return len(text)


class Held(Unpacker):
    """Takes what a command of `hold_argv` says: the program's output, and what becomes of the program.

    Attributes:
        pids: the processes that were announced, by their letters: of those above, and of any other.
        exited: the program has ended; what it left behind may still write.
        ended: no more output is expected.
        packed: what packs has come to its end: nothing is left there to be killed.
    """

    def __init__(self) -> None:
        self._ready: list[bytes] = []
        self.pids: dict[str, int] = {}
        self.exited = self.ended = self.packed = False
        self._until = math.inf
        super().__init__(self._ready.append, self._hear)

    def take(self) -> bytes:
        """Return the next piece of output, or nothing where none is here."""
        return self._ready.pop(0) if self._ready else b""

    def patience(self) -> float:
        """Return the seconds for which more output is to be waited for."""
        return min(_LINGER, self._until - anyio.current_time()) if self.exited else math.inf

    def to_kill(self) -> list[str]:
        """Return what ``kill`` is to be given: the program with its group, if it has not ended, and what packs."""
        targets = [f"-{self.pids['o']}"] if "o" in self.pids else []
        if "p" in self.pids and not self.exited:  # it may not be the leader of its group yet
            targets += [f"-{self.pids['p']}", str(self.pids["p"])]
        return targets

    def _hear(self, letter: str, number: int) -> None:
        if letter == "c":
            self.exited = True
            self._until = anyio.current_time() + _DRAIN_TIME
        elif letter == "z":
            self.ended = self.packed = True
        else:
            self.pids[letter] = number
