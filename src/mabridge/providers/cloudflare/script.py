"""What is run in a container, and what it says. Pure."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import math
from collections.abc import Sequence
from importlib import resources

from mabridge.providers import _shell
from mabridge.sandbox import ExecResult

__all__ = [
    "COMMAND_LIMIT",
    "OUTPUT_LIMIT",
    "STATE",
    "UPLOAD",
    "Command",
    "attach_argv",
    "cancel_argv",
    "create_argv",
    "eof_argv",
    "hold_argv",
    "is_gone",
    "parse",
    "release_argv",
    "send_argv",
    "send_files_argv",
    "size",
]

STATE = "/var/lib/mabridge"
"""Our directory in a container."""

UPLOAD = "/workspace/.mab-{call}.{number}"
"""Where a stdin is put that is too large for a request. Below ``/workspace`` is where the bridge writes files."""

COMMAND_LIMIT = 120_000
"""Bytes: the bridge makes one argument of a whole command, for which Linux has 128 KiB."""

OUTPUT_LIMIT = 10 * 1024 * 1024
"""Bytes of each stream: both, as base64, go through one call inside the Worker, which has 32 MiB."""

_KILL = _shell.kill_argv("")[2]
_PROGRAM = f"kill_all() (\n{_KILL})\n" + resources.files(__package__).joinpath("program.sh").read_text(encoding="utf-8")
_PATH = f"{STATE}/program-{hashlib.sha256(_PROGRAM.encode()).hexdigest()[:12]}"

# $1 the path of our program, $2 the program. It is named for what it says, for there may be other versions of it.
_INSTALL = r"""
[ -e "$1" ] || { printf %s "$2" > "$1.$$" && mv -f "$1.$$" "$1"; } || exit 1
"""

# $3 a file's content, $4 the working directory. Of several at once the first one's content stays, and all print it.
_CREATE = (
    'umask 022; mkdir -p "$0" "$4" && cd "$0" || exit 1'
    + _INSTALL
    + r"""
[ -e state ] || { printf '%s\n' "$3" > "state.$$" && { ln "state.$$" state 2>/dev/null; rm -f "state.$$"; }; }
cat state
"""
)
_ATTACH = 'umask 022; cd "$0" && [ -e state ] || exit 1' + _INSTALL + "cat state"

# $0 our directory, $1 and $2 the call in two parts, $3 what kills. The program finds the file, now or soon, or is
# found by the name of the call in its arguments, whatever comes first. The pattern matches no arguments of ours.
_CANCEL = r"""
: > "$0/$1$2.x"
rm -f "/workspace/.mab-$1$2".*
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25; do
    sh -c "$3" mab "MAB_EXEC=$1$2" none
    grep -qs "[$1]$2" /proc/[0-9]*/cmdline || break
    sleep 0.1
done
rm -f "$0/$1$2".* "$0/.mab-$1$2".*
"""


class Command:
    """A command for the bridge to run: ``argv`` with everything that the bridge has no words for.

    Args:
        call: names the call, in letters and digits.
        instance: names the container that it is meant for.
        argv: the program and its arguments.
        cwd: absolute path.
        variables: ``NAME=value``.
        timeout: seconds.
        max_output: bytes of each stream.
    """

    def __init__(
        self,
        call: str,
        *,
        instance: str,
        argv: Sequence[str],
        cwd: str,
        variables: Sequence[str],
        timeout: float,
        max_output: int,
    ) -> None:
        _shell.run_argv(argv, cwd)  # for what it refuses
        clock = str(math.ceil(timeout * 1e6))
        self._head = [".", _PATH, "run", instance, call, clock, str(max_output), cwd]
        self._rest = [str(len(variables)), *variables, *argv]
        self.size = size(self._head) + size(self._rest) + 8
        """Bytes of it, without stdin."""

    def argv(self, stdin: bytes | None, files: int = 0) -> list[str]:
        """Return it with that stdin, or with the one that was put into so many files."""
        inline = "=" + base64.b64encode(stdin).decode() if stdin and not files else "-"
        return [*self._head, str(files) if files else inline, *self._rest]


def create_argv(content: str, workdir: str) -> list[str]:
    """Return what makes a container ready, and prints what the first one to do so wrote as `content`: a line."""
    return ["sh", "-c", _CREATE, STATE, _PATH, _PROGRAM, content, workdir]


def attach_argv() -> list[str]:
    """Return what prints that line, if there is one, and fails otherwise. The container is ready for this version."""
    return ["sh", "-c", _ATTACH, STATE, _PATH, _PROGRAM]


def cancel_argv(call: str) -> list[str]:
    """Return what kills all that a call has started, or keeps it from starting."""
    return ["sh", "-c", _CANCEL, STATE, call[0], call[1:], _KILL]


def hold_argv(name: str, instance: str, variables: Sequence[str], argv: Sequence[str]) -> list[str]:
    """Return what runs `argv` with a FIFO for its stdin, until it has ended.

    Its own lines begin with ``#``: ``#g`` if the container is another one, ``#h`` and its process id when it is ready,
    ``#b`` now and then.
    """
    return [".", _PATH, "hold", instance, name, str(len(variables)), *variables, *argv]


def send_argv(name: str, data: bytes) -> list[str] | None:
    """Return what writes `data` to the FIFO of a process; None if that is too much for a command."""
    if len(data) > COMMAND_LIMIT:
        return None
    with contextlib.suppress(UnicodeDecodeError):
        argv = [".", _PATH, "text", name, data.decode()]
        if b"\0" not in data and size(argv) <= COMMAND_LIMIT:
            return argv
    argv = [".", _PATH, "data", name, base64.b64encode(data).decode()]
    return argv if size(argv) <= COMMAND_LIMIT else None


def send_files_argv(name: str, paths: Sequence[str]) -> list[str]:
    """Return what writes these files to the FIFO of a process."""
    return [".", _PATH, "files", name, *paths]


def eof_argv(name: str, holder: int) -> list[str]:
    """Return what ends the stdin of a process that this one holds."""
    return [".", _PATH, "eof", name, str(holder)]


def release_argv(name: str, instance: str, pids: Sequence[str]) -> list[str]:
    """Return what kills these processes, or groups, that `hold_argv` has started."""
    return [".", _PATH, "release", instance, name, *pids]


def is_gone(said: bytes, call: str) -> bool:
    """Whether the container is not the one that the command was meant for."""
    return said.split(None, 3)[:3] == [b"mab", call.encode(), b"gone"]


def parse(said: bytes, call: str, max_output: int) -> ExecResult | None:
    """Return what a command did, if it is told to the end."""
    words = said.split()
    if words[:2] != [b"mab", call.encode()] or words[-2:] != [b"end", call.encode()] or b"." not in words:
        return None
    middle = words.index(b".")
    streams = []
    truncated = False
    try:
        code = None if words[2] == b"-" else int(words[2])
        for part in (words[4:middle], words[middle + 1 : -2]):
            data = b"" if part == [b"-"] else base64.b64decode(b"".join(part), validate=True)
            if words[3] == b"filed":
                at = data.rfind(f"\nmab-end-{call}".encode())
                data = data if at < 0 else data[:at]
                truncated = truncated or at < 0
            truncated = truncated or len(data) > max_output
            streams.append(data[:max_output])
    except (binascii.Error, ValueError):
        return None
    return ExecResult(exit_code=code, stdout=streams[0], stderr=streams[1], timed_out=code is None, truncated=truncated)


def size(argv: Sequence[str]) -> int:
    """Bytes of what the bridge makes of an argv: it writes some characters as two."""
    return sum(len(arg.encode()) + sum(map(arg.count, "\\'\n\r\t")) + 4 for arg in argv)
