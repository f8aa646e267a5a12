"""The tools `glob` and `grep`.

They behave the same in every image, whichever of find, ripgrep, GNU grep and busybox it has: as the search that is
built into the Anthropic SDK's own tools. Hidden files and those that git ignores are searched; `.git`,
`node_modules`, symbolic links, binary files and lines of more than 2000 bytes are not.
"""

from __future__ import annotations

import re
import secrets
import stat
from dataclasses import dataclass

import anyio.to_thread

from mabridge.sandbox import Sandbox
from mabridge.tools.globbing import GlobPlan, plan_glob
from mabridge.tools.inputs import GlobInput, GrepInput, check_text
from mabridge.tools.limits import ToolLimits
from mabridge.tools.regex import PatternError, parse_pattern
from mabridge.tools.render import render_ere, render_rust
from mabridge.tools.result import ToolFailure, ToolResult, text_result
from mabridge.tools.script import Reply, Roots, run_script

__all__ = ["SearchTools"]

_LISTING_BYTES = 8 * 1024 * 1024
# As much as a result holds, and some that is dropped.
_MATCHES_BYTES = 192 * 1024
_LONGEST_LINE = 2000
# Arguments of one command, in bytes, that every system takes.
_ARGUMENT_BYTES = 64 * 1024
_FILE_HEADER = re.compile(rb"^\x00([^\x00]+)\x00\n", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    path: str
    mode: int
    changed: str


class SearchTools:
    """`glob` and `grep` over a sandbox.

    Args:
        sandbox: whose files they are.
        roots: the directories that may be reached.
        limits: the bounds.
    """

    def __init__(self, sandbox: Sandbox, roots: Roots, limits: ToolLimits) -> None:
        self._sandbox = sandbox
        self._roots = roots
        self._limits = limits

    async def glob(self, given: GlobInput) -> ToolResult:
        """List the paths that match a pattern, newest first."""
        plan = plan_glob(check_text("glob", "pattern", given.pattern))
        path = check_text("glob", "path", given.path or ".")
        token = secrets.token_hex(8)
        reply = await self._run(
            "glob",
            path,
            [
                plan.prefix,
                str(plan.min_depth),
                "" if plan.max_depth is None else str(plan.max_depth),
                token,
                str(_LISTING_BYTES),
                *plan.names,
            ],
            fields=1,
            max_output=_LISTING_BYTES,
        )
        root = reply.fields[0]
        # Off the event loop, for there may be very many.
        found, all_seen = await anyio.to_thread.run_sync(self._matches, plan, token, reply.rest)
        links = [entry for entry in found if stat.S_ISLNK(entry.mode)]
        if links:
            found = [entry for entry in found if not stat.S_ISLNK(entry.mode)]
            found += await self._links_inside(root, links)
        if plan.directories:
            found = [entry for entry in found if stat.S_ISDIR(entry.mode)]
        found.sort(key=lambda entry: entry.changed, reverse=True)
        return text_result(self._list(root, found, complete=all_seen and not reply.timed_out))

    async def grep(self, given: GrepInput) -> ToolResult:
        """Return the lines of files that match a regular expression."""
        pattern = check_text("grep", "pattern", given.pattern)
        path = check_text("grep", "path", given.path or ".")
        try:
            node = parse_pattern(pattern)
        except PatternError as exc:
            raise ToolFailure(f"grep: {exc}") from exc
        ere, rust = render_ere(node), render_rust(node)
        if ere is None or rust is None:
            return text_result("no matches")
        if max(len(ere), len(rust)) > _ARGUMENT_BYTES:
            raise ToolFailure("grep: invalid regex: too large; search for something simpler")
        reply = await self._run(
            "grep", path, [ere, rust, str(_MATCHES_BYTES), str(_LONGEST_LINE + 20)], fields=2, max_output=_MATCHES_BYTES
        )
        target, kind = reply.fields
        lines, complete = self._lines(target, kind, reply)
        if reply.timed_out:
            seconds = f"{self._limits.search_timeout:g}s"
            if not lines:
                raise ToolFailure(f"grep: timed out after {seconds}; narrow the path or simplify the pattern")
            lines.append(f"[the search was stopped after {seconds}: there may be more; narrow the path or the pattern]")
        elif not complete:
            lines.append(f"[output truncated at {self._limits.max_chars} characters; narrow the path or the pattern]")
        return text_result("\n".join(lines) or "no matches")

    async def _run(self, name: str, path: str, arguments: list[str], *, fields: int, max_output: int) -> Reply:
        return await run_script(
            self._sandbox,
            name,
            path,
            arguments,
            roots=self._roots,
            fields=fields,
            max_output=max_output,
            timeout=self._limits.search_timeout,
            tool="grep" if name == "grep" else "glob",
        )

    def _matches(self, plan: GlobPlan, token: str, listing: bytes) -> tuple[list[_Entry], bool]:
        """Return the entries of `listing` that match, and whether that is all there are."""
        matches = plan.matcher()
        complete = len(listing) < _LISTING_BYTES
        text = "\n" + listing.decode("utf-8", "surrogateescape")
        records = text.removesuffix("\n").split(f"\n{token} ")[1:]
        if not text.endswith("\n"):
            records = records[:-1]
        complete = complete and len(records) <= self._limits.glob_entries
        found = []
        for record in records[: self._limits.glob_entries]:
            mode, day, time, _, path = (*record.split(" ", 4), "", "", "", "")[:5]
            path = path.removeprefix(".").removeprefix("/")
            if matches(path):
                whole = "/".join(filter(None, (plan.prefix, path)))
                found.append(_Entry(path=whole, mode=_hex(mode), changed=f"{day} {time}"))
        return found, complete

    async def _links_inside(self, root: str, links: list[_Entry]) -> list[_Entry]:
        """Return the links that lead to somewhere inside `root`, with mode and time of what they lead to."""
        links = sorted(links, key=lambda entry: entry.changed, reverse=True)
        asked: list[_Entry] = []
        size = 0
        for link in links:
            size += len(link.path.encode("utf-8", "surrogateescape")) + 1
            if size > _ARGUMENT_BYTES:
                break
            # Other names cannot be passed back.
            if _is_text(root) and _is_text(link.path):
                asked.append(link)
        if not asked:
            return []
        reply = await self._run("links", root, [link.path for link in asked], fields=0, max_output=80 * len(asked))
        inside = []
        answers = reply.rest.decode("utf-8", "replace").split("\0")
        for position, about in zip(answers[::2], answers[1::2], strict=False):
            if position.isdecimal() and int(position) < len(asked):
                link = asked[int(position)]
                mode, _, changed = about.partition(" ")
                inside.append(_Entry(path=link.path, mode=_hex(mode), changed=changed))
        return inside

    def _list(self, root: str, found: list[_Entry], *, complete: bool) -> str:
        if not found and complete:
            return "no matches"
        shown: list[str] = []
        room = self._limits.max_chars
        for entry in found[: self._limits.glob_results]:
            line = _show(_join(root, entry.path))
            room -= len(line) + 1
            if room < 0:
                break
            shown.append(line)
        if len(shown) < len(found):
            shown.append(f"[the newest {len(shown)} of {len(found)} matches; use a narrower pattern for others]")
        if not complete:
            shown.append("[not the whole tree was looked at, for it is too large; give a path or a narrower pattern]")
        return "\n".join(shown)

    def _lines(self, target: str, kind: str, reply: Reply) -> tuple[list[str], bool]:
        """Return the result's lines, and whether they are all that was found."""
        complete = len(reply.rest) < _MATCHES_BYTES and not reply.truncated
        # The last line may be a part of one.
        output = reply.rest if complete and not reply.timed_out else reply.rest[: reply.rest.rfind(b"\n") + 1]
        _, *parts = _FILE_HEADER.split(output)
        files = sorted(zip(parts[::2], parts[1::2], strict=True))
        lines: list[str] = []
        room = self._limits.max_chars
        for name, matches in files:
            path = (
                target if kind == "file" else _join(target, name.decode("utf-8", "surrogateescape").removeprefix("./"))
            )
            prefix = b"" if b"\n" in name else name + b":"
            for match in matches.removesuffix(b"\n").split(b"\n"):
                number, colon, raw = match.removeprefix(prefix).partition(b":")
                if not colon or len(raw) >= _LONGEST_LINE:
                    continue
                text = raw.decode("utf-8", "replace").rstrip("\r\n")
                line = f"{path}:{number.decode('ascii', 'replace')}:{text}"
                room -= len(line) + 1
                if room < 0:
                    return lines, False
                lines.append(line)
        return lines, complete


def _join(root: str, path: str) -> str:
    return f"{root.rstrip('/')}/{path}" if path else root


def _show(path: str) -> str:
    """Return a path as text: the bytes of it that are none are replaced."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _is_text(path: str) -> bool:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _hex(field: str) -> int:
    try:
        return int(field, 16)
    except ValueError:
        return 0
