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

__all__ = [
    "ENV",
    "NEVER",
    "call_of",
    "exec_command",
    "kill_command",
    "prefix",
    "ready_command",
    "shell_text",
    "stdin_path",
    "unpack",
]

NEVER = "never"
"""What `kill_command` says if the command had not begun, and now will not."""

_ARGUMENT = 131_071  # bytes; Linux takes no longer one

# $1 workdir. Daytona's own images have a user that may become root.
_READY = r"""
for t in base64 cat dd env grep head mkfifo rm setsid sleep stat stty tee wc; do
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
# Most shells make a short here-document a pipe, which saves starting mkfifo: each such start is felt in every call.
# A redirection of a function or a group would leave a copy of the answer's stream open in whoever outlives this; one by
# exec does not. A reader that has ended is a zombie until the shell waits for it, which can be seen without starting
# anything; to start a shell that does nothing is the shortest pause there is.
_EXEC = r"""
exec 2>/dev/null
unset MAB_SCRIPT
d=$1 keep=$2 end=$3 marker=$4 in=$5
shift 5
set -C
true > "$d.go" || { rm -f "$d.go"; exit 0; }
set +C
exec 6<<END 7<<END

END

END
if [ -p /proc/self/fd/6 ] && [ -p /proc/self/fd/7 ]; then
    read -r x <&6
    read -r x <&7
else
    mkfifo -m 600 "$d.1" "$d.2" || exit 0
    exec 8<> "$d.1" 9<> "$d.2"
    exec 6< "$d.1" 7< "$d.2"
fi
exec 8> /proc/self/fd/6 9> /proc/self/fd/7
reader() {
    exec <&"$1" > /dev/null 6<&- 7<&- 8>&- 9>&-
    trap '' 25
    umask 077
    ulimit -f "$keep"
    LC_ALL=C exec tee "$2"
}
reader 6 "$d.1.out" &
one=$!
reader 7 "$d.2.out" &
two=$!
run() (
    exec >&8 2>&9 6<&- 7<&- 8>&- 9>&-
    read -r p said < /proc/self/stat
    echo "$p" > "$d.p"
    cd "$1" || exit 126
    shift
    MAB_EXEC=$marker exec setsid "$@"
)
case $in in
'') run "$@" < /dev/null ;;
@) run "$@" < "$d.0" ;;
*) printf %s "$in" | LC_ALL=C base64 -d 6<&- 7<&- 8>&- 9>&- | run "$@" ;;
esac
code=$?
true > "$d.p"
exec 8>&- 9>&-
ended() { ! read -r said < "/proc/$1/stat" || case ${said##*) } in Z*) ;; *) false ;; esac }
n=0
until ended "$one" && ended "$two"; do
    n=$((n + 1))
    [ "$n" -lt 12 ] || break
    (:)
done
if [ "$n" -ge 12 ]; then
    for f in 6 7; do printf %s "$end" > "/proc/self/fd/$f"; done
    whole() { ended "$2" || grep -q "$end" "$1" || [ "$(wc -c < "$1")" -ge "$((keep * 512))" ]; }
    until whole "$d.1.out" "$one" && whole "$d.2.out" "$two"; do sleep 0.005 || sleep 1; done
fi
echo "$end $code."
for f in "$d.1.out" "$d.2.out"; do
    [ ! -s "$f" ] || LC_ALL=C base64 "$f"
    echo .
done
LC_ALL=C rm -f "$d".* > /dev/null &
"""

ENV = {"MAB_SCRIPT": _EXEC}
"""Variables that the text of `exec_command` needs. A shell reads a text that is its stdin byte by byte."""

# $1 the prefix of the call's files; then the argv that kills, without the session.
_KILL = r"""
exec 2>/dev/null
d=$1 n=0 p= w=
shift
set -C
if true > "$d.go"; then rm -f "$d.0"; echo never; exit 0; fi
[ ! -e "$d.w" ] || [ -s "$d.w" ] || n=100  # to be held open, but its terminal never came to it
until [ -s "$d.p" ] || [ ! -e "$d.go" ] || [ "$n" -ge 100 ]; do
    n=$((n + 1))
    sleep 0.02 || sleep 1
done
read -r p < "$d.p"
[ -z "$p" ] || kill -9 "$p"
"$@" "${p:-none}" || exit
[ -e "$d.w" ] || exit 0
read -r w < "$d.w"
[ -z "$w" ] || kill -9 "-$w"
rm -f "$d".*
exit 0
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
    """Return the text that, given with `ENV`, has Daytona run `argv`, and answer with what `unpack` takes.

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
    call = call_of(argv, cwd, env)
    packed = "@" if stdin is None else base64.b64encode(stdin).decode()
    arguments = [prefix(marker), str((keep + len(end)) // 512 + 1), end, marker, packed, *call]
    return f'exec /bin/sh -c "$MAB_SCRIPT" mab {shlex.join(arguments)}'


def kill_command(marker: str) -> str:
    """Return the text that kills what runs under that marker, or sees to it that it never begins.

    That is what `exec_command` runs, or `hold_command`, with all that it started; what went to a session of its own is
    found only of the former.
    """
    return shell_text(_KILL, prefix(marker), *_shell.kill_argv(marker)[:-1])


def ready_command(workdir: str) -> str:
    """Return the text that makes the directory and looks for what is needed; if that fails, it says why."""
    return shell_text(_READY, workdir)


def stdin_path(marker: str) -> str:
    """Where the stdin of the command with that marker lies, if it is too large to go with it."""
    return prefix(marker) + ".0"


def unpack(said: str, end: str) -> tuple[int | None, bytes, bytes]:
    """Return exit code, stdout and stderr from an answer; no code if the script did not get so far."""
    _, begun, rest = said.partition(f"{end} ")
    parts = rest.split(".\n")
    if not begun or len(parts) != 4:
        return None, b"", b""
    out, err = (binascii.a2b_base64(part).partition(end.encode())[0] for part in parts[1:3])
    return int(parts[0]), out, err


def call_of(argv: Sequence[str], cwd: str, env: Mapping[str, str] | None) -> list[str]:
    """Return the directory and the argv that the scripts are given.

    Raises:
        ValueError: `argv` cannot be run, or `env` not be passed on.
    """
    call = _shell.run_argv(_shell.with_env(argv, env), cwd)[4:]
    if any(len(os.fsencode(argument)) > _ARGUMENT for argument in call):
        raise ValueError(f"not a command that can be run: Linux takes no argument longer than {_ARGUMENT:,} bytes")
    return call


def shell_text(script: str, *arguments: str) -> str:
    """Return the text that has a shell become the one that runs `script`."""
    return "exec " + shlex.join(["/bin/sh", "-c", script, "mab", *arguments])


def prefix(marker: str) -> str:
    """Return what the paths of the files begin with that belong to that marker."""
    return f"/tmp/.mab-{marker}"  # noqa: S108 - the sandbox's
