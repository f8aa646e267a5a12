"""What a command runs in: a script that keeps its streams apart and whole, where Daytona does neither.

Daytona's `process.exec` takes a text for a shell's stdin, and gives one text back. So the script runs the command
between pipes, whose readers keep what is wanted and drop the rest, and answers with exit code and both streams as
base64. A second request, to kill, finds the command by what the first has left in files that begin with the call's own
prefix.
"""

from __future__ import annotations

import base64
import binascii
import os
import shlex
from collections.abc import Mapping, Sequence

from mabridge.providers import _shell

__all__ = ["NEVER", "exec_command", "kill_command", "ready_command", "stdin_path", "unpack"]

NEVER = "never"
"""What `kill_command` says if the command had not begun, and now will not."""

_ARGUMENT = 131_071  # bytes; Linux takes no longer one

# $1 workdir. Daytona's own images have a user that may become root.
_READY = r"""
for t in base64 cat env grep head mkfifo rm setsid sleep stat tee wc; do
    command -v "$t" >/dev/null 2>&1 || { echo "its image has no $t, which mabridge needs"; exit 1; }
done
mkdir -p "$1" 2>/dev/null ||
    { sudo -n mkdir -p "$1" && sudo -n chown "$(id -u):$(id -g)" "$1"; } >/dev/null 2>&1
[ -d "$1" ] && [ -w "$1" ] && [ -x "$1" ] ||
    { echo "its user $(id -un) cannot make or write $1; set another workdir, or os_user"; exit 1; }
[ -w /tmp ] || { echo "its user cannot write /tmp"; exit 1; }
"""

# $1 the prefix of the call's files; $2 the most to keep of a stream, in blocks of 512 bytes; $3 what ends a stream that
# something in the background holds; $4 marker; $5 stdin: nothing, @ for the file PREFIX.0, or base64; then directory
# and argv. Whoever makes PREFIX.go first decides: this to begin, or _KILL that it never does.
# A reader is tee under a limit: it writes at once what it has read, and what its file does not take goes nowhere.
# The pipes are opened for both first, so that no opening waits for the other end. A redirection of a function or a
# group would leave a copy of the answer's stream open in whoever outlives this; one by exec does not. A reader that has
# ended is a zombie until the shell waits for it, which can be seen without starting anything.
_EXEC = r"""
exec 2>/dev/null
d=$1 keep=$2 end=$3 marker=$4 in=$5
shift 5
set -C
true > "$d.go" || { rm -f "$d.go"; exit 0; }
set +C
mkfifo -m 600 "$d.1" "$d.2" || exit 0
exec 3<> "$d.1" 4<> "$d.2"
exec 6< "$d.1" 7< "$d.2" 8> "$d.1" 9> "$d.2"
exec 3>&- 4>&-
reader() {
    exec <&"$1" > /dev/null 6<&- 7<&- 8>&- 9>&-
    trap '' 25
    umask 077
    ulimit -f "$keep"
    exec tee "$2"
}
reader 6 "$d.1.out" &
one=$!
reader 7 "$d.2.out" &
two=$!
exec 6<&- 7<&-
run() (
    exec >&8 2>&9 8>&- 9>&-
    read -r p said < /proc/self/stat
    echo "$p" > "$d.p"
    cd "$1" || exit 126
    shift
    MAB_EXEC=$marker exec setsid "$@"
)
case $in in
'') run "$@" < /dev/null ;;
@) run "$@" < "$d.0" ;;
*) printf %s "$in" | base64 -d | run "$@" ;;
esac
code=$?
true > "$d.p"
exec 8>&- 9>&-
ended() { ! read -r said < "/proc/$1/stat" || case ${said##*) } in Z*) ;; *) false ;; esac }
n=0
until ended "$one" && ended "$two"; do
    n=$((n + 1))
    [ "$n" -lt 200 ] || break
done
if [ "$n" -ge 200 ]; then
    for f in "$d.1" "$d.2"; do printf %s "$end" 1<> "$f"; done
    whole() { ended "$2" || grep -q "$end" "$1" || [ "$(wc -c < "$1")" -ge "$((keep * 512))" ]; }
    until whole "$d.1.out" "$one" && whole "$d.2.out" "$two"; do sleep 0.02 || sleep 1; done
fi
echo "$end $code."
for f in "$d.1.out" "$d.2.out"; do
    [ ! -s "$f" ] || base64 "$f"
    echo .
done
rm -f "$d".* > /dev/null &
"""

# $1 the prefix of the call's files; then the argv that kills, without the session.
_KILL = r"""
exec 2>/dev/null
d=$1 n=0 p=
shift
set -C
if true > "$d.go"; then rm -f "$d.0"; echo never; exit 0; fi
until [ -s "$d.p" ] || [ ! -e "$d.go" ] || [ "$n" -ge 100 ]; do
    n=$((n + 1))
    sleep 0.02 || sleep 1
done
read -r p < "$d.p"
[ -z "$p" ] || kill -9 "$p"
exec "$@" "${p:-none}"
"""


def exec_command(
    argv: Sequence[str],
    cwd: str,
    env: Mapping[str, str] | None,
    *,
    marker: str,
    end: str,
    keep: int,
    stdin: bytes | None,
) -> str:
    """Return the text that has Daytona run `argv`, and answer with what `unpack` takes.

    Args:
        argv: the program and its arguments.
        cwd: absolute path.
        env: variables added to the sandbox's own.
        marker: by which all that it starts is found again.
        end: what nobody else knows, and marks the ends of things.
        keep: bytes to keep of each stream, at least.
        stdin: its stdin; None if that lies at `stdin_path`.

    Raises:
        ValueError: `argv` cannot be run, or `env` not be passed on.
    """
    call = _shell.run_argv(_with_env(argv, env), cwd)[4:]
    if any(len(os.fsencode(argument)) > _ARGUMENT for argument in call):
        raise ValueError(f"not a command that can be run: Linux takes no argument longer than {_ARGUMENT:,} bytes")
    packed = "@" if stdin is None else base64.b64encode(stdin).decode()
    return _text(_EXEC, _prefix(marker), str((keep + len(end)) // 512 + 1), end, marker, packed, *call)


def kill_command(marker: str) -> str:
    """Return the text that kills what `exec_command` runs under that marker, or sees to it that it never begins."""
    return _text(_KILL, _prefix(marker), *_shell.kill_argv(marker)[:-1])


def ready_command(workdir: str) -> str:
    """Return the text that makes the directory and looks for what is needed; if that fails, it says why."""
    return _text(_READY, workdir)


def stdin_path(marker: str) -> str:
    """Where the stdin of the command with that marker lies, if it is too large to go with it."""
    return _prefix(marker) + ".0"


def unpack(said: str, end: str) -> tuple[int | None, bytes, bytes]:
    """Return exit code, stdout and stderr from an answer; no code if the script did not get so far."""
    _, begun, rest = said.partition(f"{end} ")
    parts = rest.split(".\n")
    if not begun or len(parts) != 4:
        return None, b"", b""
    out, err = (binascii.a2b_base64(part).partition(end.encode())[0] for part in parts[1:3])
    return int(parts[0]), out, err


def _text(script: str, *arguments: str) -> str:
    return "exec " + shlex.join(["/bin/sh", "-c", script, "mab", *arguments])


def _prefix(marker: str) -> str:
    return f"/tmp/.mab-{marker}"  # noqa: S108 - the sandbox's


def _with_env(argv: Sequence[str], env: Mapping[str, str] | None) -> Sequence[str]:
    variables = _shell.check_env(env)
    if not variables or not argv:
        return argv
    if "=" in argv[0]:  # env would take the program's name for a variable
        argv = ["/bin/sh", "-c", 'exec "$@"', "mab", *argv]
    _shell.run_argv(argv, "/")  # what cannot be run is refused by its own name, not as an argument of env
    return ["env", *(f"{name}={value}" for name, value in variables.items()), *argv]
