"""The bash that goes around a command, and what it answers. Pure."""

from __future__ import annotations

import base64
import binascii
import re
import shlex
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from mabridge.providers._shell import kill_argv
from mabridge.sandbox import ExecResult

__all__ = ["CALLED", "Wrapper", "decoded"]

CALLED = "MAB_CALL"  # in the environment of the wrapper, by whose value it is found as long as it runs
_PLACES = "/dev/shm /tmp /var/tmp"  # noqa: S108 - the sandbox's. The first is memory, for a disk may be full

# What both wrappers begin with: $f is where its files are, and $f.p gets the process id of the command, which leads a
# session of its own. The command takes over a shell in the foreground: one in the background would ignore SIGINT.
_BEGIN = f"""
unset {CALLED}
for d in {_PLACES}; do {{ : > "$d/.mab-$n.p"; }} 2>/dev/null && break; d=; done
[ -n "$d" ] || {{ echo "no directory to write in: {_PLACES}" >&2; exit 73; }}
f=$d/.mab-$n
"""
_END = 'rm -f "$f".* "/tmp/.mab-$n".* < /dev/null > /dev/null 2>&1 &\n'

# $n names the call, $m is a mark that only this adapter knows, $k the KiB to keep of each stream. tee writes at once,
# and reads on when its file has reached its limit. When both have ended, pipe 5 has: only they hold its other end.
# (Since 5.1 bash makes a short string a pipe, which saves a process.) What comes before the mark came before the
# command's end; so a process that holds a stream is not waited for. Then: the exit code, and both streams, those that
# are short and plain as they are.
_EXEC = (
    _BEGIN
    + r"""
keep() { exec > /dev/null 2>&1 5<&-; trap '' XFSZ; ulimit -f "$k"; umask 077; LC_ALL=C exec tee "$1"; }
have() { grep -qF "$m" "$1" || [ "$(stat -c %%s "$1")" -ge $((k * 1024)) ]; }
exec 5<<< x
{ [ -p /proc/self/fd/5 ] && read -r -u 5; } || exec 5< <(:)
exec 4> /proc/self/fd/5
exec 6> >(keep "$f.o")
exec 7> >(exec 6>&-; keep "$f.e")
exec 4>&-
( echo "$BASHPID" > "$f.p"; exec 5>&-; %(command)s ) %(stdin)s >&6 2>&7 6>&- 7>&-
c=$?
printf %%s "$m" >&6; printf %%s "$m" >&7
exec 6>&- 7>&-
read -r -t 0.1 -u 5
[ $? -le 128 ] || for j in {1..500}; do have "$f.o" && have "$f.e" && break; sleep 0.02; done
printf '\n%%s %%s\n' "$m" "$c"
export LC_ALL=C
for i in o e; do
    IFS= read -r -d '' -n 4096 x < "$f.$i"
    if [[ $x == *"$m" && $x != *[!$'\t\n '-~]* ]]; then printf '=%%s' "$x"; else base64 -w0 < "$f.$i"; fi
    echo
done
"""
    + _END
)

# The same for a process that is held open: its stdin is the wrapper's, its output comes as lines of base64.
_HOLD = (
    _BEGIN
    + r"""
relay() { while c=$(dd bs=131072 count=1 2>/dev/null | base64 -w0) && [ -n "$c" ]; do echo "$c"; done; }
exec 6> >(relay 2>/dev/null)
( echo "$BASHPID" > "$f.p"; %(command)s ) >&6 2>/dev/null 6>&-
printf %%s "$m" >&6
exec 6>&-
"""
    + _END
)

# A wrapper that has not started its command, or is done with it, is killed instead: then there is nothing to tell. One
# that has, sees the command's end and tells what it said until then. Looked at again, because the one became the other.
_KILL = f"""
wrapper() {{
    set -- $(grep -ls "{CALLED}=$n" /proc/[0-9]*/environ)
    [ $# -gt 0 ] && kill -9 $(tr -dc '0-9 ' <<< "$*")
}}
for i in {{1..50}}; do
    sid=
    for d in {_PLACES}; do [ ! -s "$d/.mab-$n.p" ] || read -r sid < "$d/.mab-$n.p"; done
    case $sid in 0* | 1 | *[!0-9]*) sid= ;; esac
    [ -z "$sid" ] || kill -9 "$sid"
    %s "${{sid:-none}}" || continue
    [ -z "$sid" ] || break
    wrapper && continue
    for d in {_PLACES}; do [ ! -s "$d/.mab-$n.p" ] || continue 2; done
    break
done 2>/dev/null
"""
_KILL_WRAPPER = "wrapper 2>/dev/null"
# A wrapper that lives has yet to tell what its files hold, and removes them itself.
_FORGET = f"""
grep -qs "{CALLED}=$n" /proc/[0-9]*/environ || for d in {_PLACES}; do rm -f "$d/.mab-$n".*; done
[ "$i" -lt 50 ]
"""


@dataclass(frozen=True)
class Wrapper:
    """One wrapper and its names: `nonce` is in its environment and its files' names, `mark` ends what was said."""

    nonce: str
    mark: str

    @classmethod
    def new(cls) -> Wrapper:
        """Make one that nobody else has."""
        return cls(uuid.uuid4().hex, uuid.uuid4().hex)

    def path(self, kind: str) -> str:
        """Return where a file may be uploaded that the wrapper needs, and removes."""
        return f"/tmp/.mab-{self.nonce}.{kind}"  # noqa: S108 - the sandbox's

    def run(self, argv: Sequence[str], cwd: str, *, stdin: bytes | str | None, max_output: int) -> str:
        """Return the bash that runs `argv` and answers with its output.

        Args:
            argv: the command.
            cwd: absolute path of its directory.
            stdin: what it reads, or the path of it in the sandbox.
            max_output: bytes to keep of each stream.
        """
        source = "< /dev/null"
        if isinstance(stdin, str):
            source = f"< {stdin}"
        elif stdin:
            text = base64.b64encode(stdin).decode()
            source = f"< <(exec 5>&- 6>&- 7>&- 2> /dev/null; base64 -d <<< {text})"
        keep = (max_output + len(self.mark)) // 1024 + 1
        return self._begin(keep) + _EXEC % {"command": _become(argv, cwd, "MAB_EXEC=$n "), "stdin": source}

    def hold(self, argv: Sequence[str], cwd: str) -> str:
        """Return the bash that runs `argv` with its own stdin, and answers with lines of base64 until the mark."""
        return self._begin() + _HOLD % {"command": _become(argv, cwd)}

    def kill(self, *, and_wrapper: bool = False) -> str:
        """Return the bash that kills the command with all that it started, and fails if something survives.

        A process that was held open is not told by its environment: what went to a session of its own is spared.
        """
        kill = shlex.join(kill_argv(self.nonce)[:-1])
        return f"{self._begin()}{_KILL % kill}{_KILL_WRAPPER if and_wrapper else ''}\n{_FORGET}"

    def most(self, max_output: int) -> int:
        """Return how many characters the answer has at most; the rest is not the wrapper's."""
        return 2 * (max_output + 4096) * 4 // 3 + 65536

    def result(self, text: str, max_output: int, *, timed_out: bool) -> ExecResult | None:
        """Return what an answer says, or None if it is none."""
        stream = rf"(=.*?{self.mark}|[A-Za-z0-9+/=]*)\n"
        framed = re.search(rf"\n{self.mark} (\d+)\n{stream}{stream}", text, re.DOTALL)
        if framed is None:
            return None
        kept, cut = [], False
        for said in framed.group(2, 3):
            whole = said[1:].encode() if said.startswith("=") else decoded(said)
            data, mark, _ = whole.rpartition(self.mark.encode())
            if not mark:  # there was more, or no room for it
                data, cut = whole, True
            kept.append(data[:max_output])
            cut = cut or len(data) > max_output
        code = None if timed_out else int(framed[1])
        return ExecResult(exit_code=code, stdout=kept[0], stderr=kept[1], timed_out=timed_out, truncated=cut)

    def _begin(self, keep: int = 0) -> str:
        return f"n={self.nonce} m={self.mark} k={keep}"


def _become(argv: Sequence[str], cwd: str, variables: str = "") -> str:
    return f"builtin cd {shlex.quote(cwd)} || exit 126; {variables}exec setsid {shlex.join(argv)}"


def decoded(text: str) -> bytes:
    """Return what base64 says."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return b""  # the sandbox is free to send nonsense in its wrapper's name
