"""What providers share whose sandboxes have ``/bin/sh`` and an `exec`: starting, killing and files, told to a shell.

Every script takes what it works on as positional arguments, so nothing that the agent chose is ever shell text.
They keep to POSIX and to what busybox has.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import re
import uuid
from collections.abc import Mapping, Sequence

import anyio

from mabridge.errors import FileTooLarge, SandboxError, SandboxUnavailable
from mabridge.sandbox import ExecResult, Sandbox

__all__ = [
    "MARKER",
    "Capture",
    "check_env",
    "kill_argv",
    "read_file",
    "run_argv",
    "with_env",
    "with_sized_stdin",
    "write_file",
]

MARKER = "MAB_EXEC"
"""The environment variable by whose value everything that one `exec` started is found again."""

_FILE_TIMEOUT = 300.0  # seconds for one file: 50 MiB through a slow link, and an end for a file system that hangs
_CLEAN_UP = 10.0
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# The shell becomes the program, so a missing directory or program ends as a shell would report it: 126 and 127.
_RUN = 'cd "$1" || exit 126; shift; exec "$@"'
_ANNOUNCE = 'echo "$$" >&2; '
_QUIET = "exec 2>/dev/null; "
_SIZED = 'n=$1; shift; head -c "$n" | "$@"'

# $1 marker, $2 the session that the command leads. Whoever carries the marker is killed, and whoever is in the session
# of one that does, or of a child of one: the first finds what went to a session of its own, the others what cleared its
# environment. The session of PID 1 is nobody's: where a provider starts commands in that one, only the marker tells.
# Not grep -F: that of busybox looks no further than the first NUL.
_KILL = r"""
look() { read -r s && s=${s##*) } && set -- $s && state=$1 parent=$2 sid=$4; }
kill_found() {
    victims=
    for f in /proc/[0-9]*; do
        { look < "$f/stat"; } 2>/dev/null || continue
        case $sids in *" $sid "*) ;; *) case $pids in *" ${f#/proc/} "*) ;; *) continue ;; esac ;; esac
        [ "$state" = Z ] || victims="$victims ${f#/proc/}"
    done
    [ -z "$victims" ] || kill -9 $victims 2>/dev/null
}
sids=" $2 " pids= pass=0
kill_found  # this much needs no process of its own, of which there may be none left
{ look < /proc/1/stat; } 2>/dev/null && first=$sid || first=1
while [ "$pass" -lt 20 ]; do
    pass=$((pass + 1)) sids=" $2 " pids=' '
    for f in $(grep -ls "$1" /proc/[0-9]*/environ); do
        f=${f%/environ}
        { look < "$f/stat"; } 2>/dev/null || continue
        pids="$pids${f#/proc/} "
        [ "$sid" = "$first" ] || sids="$sids$sid "
    done
    for f in /proc/[0-9]*; do
        { look < "$f/stat"; } 2>/dev/null || continue
        case $pids in *" $parent "*) [ "$sid" = "$first" ] || sids="$sids$sid " ;; esac
    done
    kill_found
    [ -n "$victims" ] || exit 0
done
exit 1
"""

# A script ends with 64 + errno for an error that it can name.
_NAMED = 64
_BLOCKED = r"""
blocked() {
    d=$1
    while [ -n "$d" ] && [ ! -e "$d" ]; do d=${d%/*}; done
    d=${d:-/}
    if [ -d "$d" ] && [ ! -x "$d" ]; then exit 77; fi
}
"""

# $1 path, $2 the most bytes.
_READ = (
    _BLOCKED
    + r"""
[ -e "$1" ] || { blocked "$1"; exit 66; }
[ ! -d "$1" ] || exit 85
[ -f "$1" ] && [ -r "$1" ] || exit 77
n=$(stat -L -c %s "$1" 2>/dev/null) && [ "$n" -gt "$2" ] && echo "$n" && exit 91
exec head -c "$(($2 + 1))" "$1"
"""
)

# $1 path, $2 mode, $3 bytes to come on stdin, $4 a name nobody else uses. Staged beside the file and moved over it, so
# that a connection that breaks in the middle harms nothing; written in place where the directory allows no new file,
# or the file is a mount. As for busybox: its readlink -f does not follow a link to what is not there yet, and its head
# does not say that a disk is full, which cat does.
_WRITE = (
    _BLOCKED
    + r"""
umask 022
p=$1
hops=0
while [ -h "$p" ]; do
    hops=$((hops + 1))
    [ "$hops" -le 40 ] || exit 104
    to=$(readlink "$p" && echo /) && to=${to%??}
    case $to in /*) p=$to ;; *) p=${p%/*}/$to ;; esac
done
[ ! -d "$p" ] || exit 85
d=${p%/*}/
if ! mkdir -p "$d" 2>/dev/null; then
    blocked "$d"
    [ -d "$d" ] || exit 84
    [ -w "$d" ] || exit 77
    mkdir -p "${p%/*}/"
    exit 69
fi
if [ -e "$p" ]; then { [ -f "$p" ] && [ -w "$p" ]; } || exit 77; fi
if [ -w "$d" ] && [ -x "$d" ]; then t=$d$4; elif [ -e "$p" ]; then t=$p; else exit 77; fi
umask 077
head -c "$3" | cat > "$t" && [ "$(wc -c < "$t")" -eq "$3" ] || { [ "$t" = "$p" ] || rm -f "$t"; exit 69; }
[ "$t" != "$p" ] || { chmod "$2" "$p" 2>/dev/null; exit 0; }
chmod "$2" "$t" && { mv -f "$t" "$p" 2>/dev/null || cat "$t" > "$p"; }
e=$?
[ ! -e "$t" ] || rm -f "$t"
[ "$e" -eq 0 ] || exit 69
"""
)


class Capture:
    """Keeps the first `limit` bytes that it is given, and notes whether there were more."""

    def __init__(self, limit: int) -> None:
        self._chunks: list[bytes] = []
        self._room = limit
        self.truncated = False

    @property
    def full(self) -> bool:
        """Whether there is no room, and some was dropped already."""
        return self.truncated

    def add(self, data: bytes) -> None:
        """Keep what there is room for."""
        kept = data[: self._room]
        if kept:
            self._chunks.append(kept)
            self._room -= len(kept)
        if len(kept) < len(data):
            self.truncated = True

    def take(self) -> bytes:
        """Return what was kept."""
        return b"".join(self._chunks)


def check_env(env: Mapping[str, str] | None) -> dict[str, str]:
    """Return `env` as a dict.

    Raises:
        ValueError: a name is not a shell variable's, or a value holds a NUL.
    """
    for name, value in (env or {}).items():
        if not _VARIABLE.fullmatch(name) or "\0" in value:
            raise ValueError(f"not an environment variable that can be passed on: {name!r}")
    return dict(env or {})


def run_argv(argv: Sequence[str], cwd: str, *, announce: bool = False, quiet: bool = False) -> list[str]:
    """Return the argv that runs `argv` in `cwd`.

    Args:
        argv: the program and its arguments.
        cwd: absolute path.
        announce: whether its process id is to come first, as a line on stderr.
        quiet: whether its stderr is dropped otherwise.

    Raises:
        ValueError: `argv` is empty, cannot be passed on, or its program's name would be taken for an option.
    """
    if not argv or argv[0].startswith("-") or any("\0" in arg for arg in (cwd, *argv)):
        raise ValueError(f"not a command that can be run: {list(argv)[:3]!r}")
    script = (_ANNOUNCE if announce else "") + (_QUIET if quiet else "") + _RUN
    return ["/bin/sh", "-c", script, "mab", cwd, *argv]


def with_env(argv: Sequence[str], env: Mapping[str, str] | None) -> list[str]:
    """Return the argv that runs `argv` with more variables.

    Raises:
        ValueError: `argv` cannot be run, or `env` not be passed on.
    """
    run_argv(argv, "/")  # what cannot be run is refused by its own name, not as an argument of env
    variables = check_env(env)
    if not variables:
        return list(argv)
    if "=" in argv[0]:  # env would take the program's name for a variable
        argv = ["/bin/sh", "-c", 'exec "$@"', "mab", *argv]
    return ["env", *(f"{name}={value}" for name, value in variables.items()), *argv]


def with_sized_stdin(argv: Sequence[str], size: int) -> list[str]:
    """Return the argv that gives `argv` the next `size` bytes as its stdin, where stdin cannot be closed."""
    return ["/bin/sh", "-c", _SIZED, "mab", str(size), *argv]


def kill_argv(marker: str, session: int | None = None) -> list[str]:
    """Return the argv that kills what carries `marker` or is in that session; it fails if something survives."""
    return ["/bin/sh", "-c", _KILL, "mab", f"{MARKER}={marker}", "none" if session is None else str(session)]


async def read_file(sandbox: Sandbox, path: str, *, max_bytes: int, provider: str) -> bytes:
    """`Sandbox.read_file` by `Sandbox.exec`: one round trip, with the rights of the agent's user."""
    path = _absolute(path, sandbox.workdir)
    result = await _script(sandbox, provider, "read_file", _READ, [path, str(max_bytes)], keep=max_bytes + 1)
    if result.exit_code == _NAMED + errno.EFBIG or len(result.stdout) > max_bytes or result.truncated:
        size = int(result.stdout) if result.exit_code and result.stdout.strip().isdigit() else None
        known = f"{size:,} bytes" if size is not None else "more"
        message = f"{path} holds {known}, and at most {max_bytes:,} were to be read"
        raise FileTooLarge(
            message, provider=provider, op="read_file", sandbox_id=sandbox.id, size=size, limit=max_bytes
        )
    _raise_for(result, path)
    return result.stdout


async def write_file(sandbox: Sandbox, path: str, data: bytes, *, mode: int, provider: str) -> None:
    """`Sandbox.write_file` by `Sandbox.exec`: one round trip, with the rights of the agent's user."""
    path = _absolute(path, sandbox.workdir)
    if posixpath.basename(path) in ("", ".", ".."):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    staged = f".mab-{uuid.uuid4().hex}"
    args = [path, f"{mode & 0o7777:o}", str(len(data)), staged]
    try:
        result = await _script(sandbox, provider, "write_file", _WRITE, args, stdin=data)
    except anyio.get_cancelled_exc_class():  # it was killed, so it could not clean up
        leftover = posixpath.join(posixpath.dirname(path), staged)
        with anyio.CancelScope(shield=True), anyio.move_on_after(_CLEAN_UP), contextlib.suppress(SandboxError):
            await sandbox.exec(["rm", "-f", leftover], cwd="/", timeout=_CLEAN_UP, max_output=1000)
        raise
    _raise_for(result, path)


async def _script(
    sandbox: Sandbox,
    provider: str,
    op: str,
    script: str,
    args: Sequence[str],
    *,
    stdin: bytes | None = None,
    keep: int = 4096,
) -> ExecResult:
    result = await sandbox.exec(
        ["/bin/sh", "-c", script, "mab", *args],
        stdin=stdin,
        cwd="/",
        env={"LC_ALL": "C"},
        timeout=_FILE_TIMEOUT,
        max_output=max(keep, 4096),
    )
    if result.timed_out:
        message = f"no answer within {_FILE_TIMEOUT:.0f} s for {args[0]}"
        raise SandboxUnavailable(message, provider=provider, op=op, sandbox_id=sandbox.id)
    return result


def _raise_for(result: ExecResult, path: str) -> None:
    """Raise the builtin error that a script ended with."""
    if result.exit_code == 0:
        return
    said = result.stderr[-500:].decode(errors="replace").strip()
    number = (result.exit_code or 0) - _NAMED
    if "No space left" in said or "quota exceeded" in said:
        number = errno.ENOSPC
    if number in (errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENOSPC):
        raise OSError(number, os.strerror(number), path)
    raise OSError(errno.EIO, said or f"ended with {result.exit_code}", path)


def _absolute(path: str, workdir: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise FileNotFoundError(errno.ENOENT, "no file has a name that is not Unicode", ascii(path)) from None
    if "\0" in path:
        raise FileNotFoundError(errno.ENOENT, "no file has a name with a NUL in it", ascii(path))
    return posixpath.join(workdir, path)
