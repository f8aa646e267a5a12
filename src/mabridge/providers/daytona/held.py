"""What a process that is held open runs in, and what passes through the terminal that holds it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from mabridge.providers.daytona.script import call_of, prefix, shell_text

__all__ = ["WINDOW", "ack_command", "hold_command", "terminal_line", "typed"]

WINDOW = 131_072
"""Characters that such a process may say until what it said has to be acknowledged (`ack_command`)."""

_PIECE = 30_000  # characters of one argument; each may take 4 bytes
_PLAIN = re.compile(rb"[\n\t -~]{0,1024}")

# Such a process has a terminal for its streams, which is all of Daytona's that is open both ways. It drops whoever
# reads slower than it writes: its queue holds 256 pieces, of a KiB or more. So what packs the output waits, after each
# WINDOW, for the acknowledgement of that number. What comes in is a line of text, or a number of bytes and then those.
# The dd that packs takes all that a pipe may hold, so that the mark, which is written at once, is never cut in two.
# The other dd is for bash, which reads on behind a line that comes from a terminal. It also keeps the terminal open,
# which would close with what it began with, perhaps before what was said last has got through.
# $1 the prefix of the call's files; $2 the mark that begins and ends the output; $3 WINDOW; then directory and argv.
_HELD = r"""
exec 2>/dev/null
d=$1 mark=$2 window=$3
shift 3
echo "$$" > "$d.w"
echo "$mark"
typed() {
    trap '' PIPE
    while IFS= read -r line; do
        case $line in
        t*) printf %b "${line#t}" ;;
        [0-9]*) dd bs="$line" count=1 iflag=fullblock ;;
        *) break ;;
        esac
    done
}
run() (
    read -r p line < /proc/self/stat
    echo "$p" > "$d.p"
    cd "$1" || exit 126
    shift
    exec setsid "$@"
)
packed() {
    exec 5<> "$d.k"
    said=0 count=0
    while line=$(dd bs=131072 count=1 | base64 -w 0) && [ -n "$line" ]; do
        echo "$line"
        said=$((said + ${#line}))
        [ "$said" -ge "$window" ] || continue
        said=0 count=$((count + 1))
        until [ "$line" = "$count" ]; do read -r line <&5; done
    done
}
dd bs=65536 | typed | { run "$@"; echo none > "$d.p"; printf %s "$mark"; } | packed
"""

# A login shell would give the process other variables, and another umask, than a command has; so these are noted here.
# $1 the prefix of the call's files; then, in pieces, the script that the terminal is to run.
_HOLD = r"""
d=$1
shift
set -C
true > "$d.go" || { rm -f "$d.go"; exit 1; }
mask=$(umask)
umask 077
true > "$d.w"
{ export -p; echo "umask $mask"; printf %s "$@"; } > "$d.sh" && mkfifo "$d.k"
"""
_TERMINAL = 'stty raw -echo && exec env -i /bin/sh "$1"'


def hold_command(argv: Sequence[str], cwd: str, env: Mapping[str, str] | None, *, marker: str, mark: str) -> str:
    """Return the text that has Daytona make ready what a terminal is to run (`terminal_line`).

    Args:
        argv: the program and its arguments.
        cwd: absolute path.
        env: variables added to the sandbox's own.
        marker: names it.
        mark: what nobody else knows. The terminal says it in a line; then come lines of base64. In what they hold, it
            ends the output.

    Raises:
        ValueError: `argv` cannot be run, or `env` not be passed on.
    """
    arguments = [prefix(marker), mark, str(WINDOW), *call_of(argv, cwd, env)]
    script = f"set -- {shlex.join(arguments)}\n{_HELD}"
    return shell_text(_HOLD, prefix(marker), *(script[i : i + _PIECE] for i in range(0, len(script), _PIECE)))


def terminal_line(marker: str) -> str:
    """Return the line that, typed in a terminal, makes it the streams of what `hold_command` named so."""
    return f" {shell_text(_TERMINAL, f'{prefix(marker)}.sh')}\n"


def typed(data: bytes) -> bytes:
    """Return what is sent to that terminal for the process to read `data`; of nothing, its stdin is closed."""
    if not data:
        return b"\n"
    if _PLAIN.fullmatch(data):
        return b"t" + data.replace(b"\\", rb"\\").replace(b"\n", rb"\n") + b"\n"
    return b"%d\n" % len(data) + data


def ack_command(marker: str, count: int) -> str:
    """Return the text that acknowledges the `WINDOW` of that number, the first one being 1."""
    return f"echo {count} 1<> {prefix(marker)}.k"
