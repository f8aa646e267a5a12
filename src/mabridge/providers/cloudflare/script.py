"""The scripts that run in a container, and what they say. Pure."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence

from mabridge.providers import _shell
from mabridge.sandbox import ExecResult

__all__ = ["COMMAND_LIMIT", "INIT", "OUTPUT_LIMIT", "STATE", "UPLOAD", "Command", "cancel_argv", "is_gone", "parse"]

STATE = "/var/lib/mabridge"
"""Our directory in a container."""

UPLOAD = "/workspace/.mab-{call}.{number}"
"""Where a stdin is put that is too large for a request. Below ``/workspace`` is where the bridge writes files."""

COMMAND_LIMIT = 120_000
"""Bytes: the bridge makes one argument of a whole command, for which Linux has 128 KiB."""

OUTPUT_LIMIT = 10 * 1024 * 1024
"""Bytes of each stream: both, as base64, go through one call inside the Worker, which has 32 MiB."""

_KILL = _shell.kill_argv("")[2]

# $1 a file's content, $2 the working directory. Of several at once the first one's content stays, and all print it.
INIT = r"""
umask 022
mkdir -p "$0" "$2" && cd "$0" || exit 1
[ -e state ] || { printf '%s\n' "$1" > "state.$$" && { ln "state.$$" state 2>/dev/null; rm -f "state.$$"; }; }
cat state
"""

# $0 our directory, $1 the sandbox, $2 the call, $3 microseconds, $4 most bytes of a stream, $5 directory, $6 stdin: a
# dash, or = and base64, or the number of files that hold it; $7 what kills; $8 how many variables there are, then they,
# and the command. Bash's own clock and `read -t` make it cost few processes.
# What the command says goes into two pipes. If it ends at once, what they hold is all. Otherwise they are read into
# files that `ulimit` keeps small, and then to nowhere; a line of ours behind it tells that all was taken, even if a
# child holds the pipe. A line of output now and then shows the client that the connection lives.
_EXEC = r"""
exec 2>/dev/null
f=$0/$2 end=$(( ${EPOCHREALTIME/[.,]/} + $3 )) last=$'\n'"mab-end-$2" launch=(env "${@:9:$8}") code=- beat=0
session=none part= filed= out= err=
{ read -r mine _ < "$0/state"; } && [ "$mine" = "$1" ] || {
    case $6 in [0-9]*) rm -f "/workspace/.mab-$2".* ;; esac
    echo "mab $2 gone"
    exit
}
[ "$8" -gt 0 ] || launch=()
[ ! -e "$f.x" ] || exit
case $6 in
    -) exec 6< /dev/null ;;
    =*) exec 6< <(base64 -d <<< "${6#=}") ;;
    *) mv "/workspace/.mab-$2".* "$0/"; exec 6< <(for ((i = 0; i < $6; i++)); do cat "$0/.mab-$2.$i"; done) ;;
esac
exec 3<> <(:) 4<> <(:) 5<> <(:) 7> /proc/self/fd/4 8> /proc/self/fd/5
{
    (
        echo "p $BASHPID" >&3
        cd "$5" || exit 126
        export "MAB_EXEC=$2"
        exec "${launch[@]}" setsid "${@:9+$8}" 3>&-
    ) <&6 >&7 2>&8 6<&- 7>&- 8>&-
    code=$?
    exec 7>&- 8>&-
    echo "c $code" >&3
} > /dev/null 4>&- 5>&- &
exec 6<&- 7>&- 8>&-
file() {
    exec < "/proc/self/fd/$1" > /dev/null 4>&- 5>&-
    trap '' XFSZ
    ulimit -S -f $(( $2 / 1024 + 2 ))
    cat >> "$3" && echo "$4" >&3 && exit
    echo "$4" >&3
    exec cat
}
hear() {  # a time-out may come in the middle of a line
    IFS= read -r -t "$1" line <&3 || { part+=$line; return 1; }
    line=$part$line part=
}
while :; do
    left=$(( end - ${EPOCHREALTIME/[.,]/} )) most=250000
    if [ "$left" -le 0 ] || [ -e "$f.x" ]; then
        sh -c "$7" mab "MAB_EXEC=$2" "$session"
        break
    fi
    [ -n "$filed" ] || most=30000
    [ "$left" -lt "$most" ] || left=$most
    printf -v left %06d "$left"
    if hear "0.$left"; then
        case $line in p*) session=${line#p } ;; o) out=1 ;; e) err=1 ;; c*) code=${line#c }; break ;; esac
    elif [ -z "$filed" ]; then
        filed=1
        file 4 "$4" "$f.o" o &
        file 5 "$4" "$f.e" e &
    else
        (( ++beat % 60 )) || echo
    fi
done
if [ -z "$filed" ]; then
    tell() { told=-; ! read -r -t 0 <&"$1" || told=$(dd bs=128k count=1 <&"$1" | base64); }
    tell 4
    first=$told
    tell 5
    printf 'mab %s %s whole\n%s\n.\n%s\nend %s\n' "$2" "$code" "$first" "$told" "$2"
    # A child that still writes must find a reader.
    exec 7< /proc/self/fd/4 8< /proc/self/fd/5 4>&- 5>&-
    read -r -t 0 <&7 || { cat <&7 & } > /dev/null 8<&-
    read -r -t 0 <&8 || { cat <&8 & } > /dev/null 7<&-
else
    [ -n "$out" ] || printf %s "$last" >&4
    [ -n "$err" ] || printf %s "$last" >&5
    exec 4>&- 5>&-
    for ((i = 0; i < 100; i++)); do
        [ -z "$out" ] || [ -z "$err" ] || break
        if hear 0.05; then
            case $line in o) out=1 ;; e) err=1 ;; esac
        else
            [ -n "$out" ] || ! grep -qs "mab-end-$2" "$f.o" || out=1
            [ -n "$err" ] || ! grep -qs "mab-end-$2" "$f.e" || err=1
        fi
    done
    echo "mab $2 $code filed"
    base64 "$f.o"
    echo .
    base64 "$f.e"
    echo "end $2"
    rm -f "$f".[eo]
fi
[ -d /workspace ] || mkdir /workspace
case $6 in [0-9]*) rm -f "$0/.mab-$2".* ;; esac
"""

# $0 our directory, $1 and $2 the call in two parts, $3 what kills. The script above finds the file, now or soon, or is
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
        self._head = ["bash", "-c", _EXEC, STATE, instance, call, clock, str(max_output), cwd]
        self._rest = [_KILL, str(len(variables)), *variables, *argv]
        self.size = _size(self._head) + _size(self._rest) + 8
        """Bytes of it, without stdin."""

    def argv(self, stdin: bytes | None, files: int = 0) -> list[str]:
        """Return it with that stdin, or with the one that was put into so many files."""
        inline = "=" + base64.b64encode(stdin).decode() if stdin and not files else "-"
        return [*self._head, str(files) if files else inline, *self._rest]


def cancel_argv(call: str) -> list[str]:
    """Return what kills all that a call has started, or keeps it from starting."""
    return ["sh", "-c", _CANCEL, STATE, call[0], call[1:], _KILL]


def is_gone(said: bytes, call: str) -> bool:
    """Whether the container is not the one that the command was meant for."""
    return said.split()[:3] == [b"mab", call.encode(), b"gone"]


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


def _size(argv: Sequence[str]) -> int:
    """Bytes of what the bridge makes of an argv: it writes some characters as two."""
    return sum(len(arg.encode()) + sum(map(arg.count, "\\'\n\r\t")) + 4 for arg in argv)
