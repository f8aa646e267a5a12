"""Writes a parsed pattern for ``grep -E`` and for ripgrep.

grep runs in the C locale, where it sees bytes, so that it is the same grep in every image: a character beyond ASCII is
written as the bytes of its UTF-8. Only what POSIX and GNU, busybox and musl have in common is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mabridge.tools.charsets import Ranges
from mabridge.tools.regex import Alt, Assertion, Chars, Concat, Node, Repeat

__all__ = ["render_ere", "render_rust"]

# The most that POSIX lets a repetition count to.
_MOST_COUNT = 255
_LAST_BY_LENGTH = (0x7F, 0x7FF, 0xFFFF, 0x10FFFF)
_SPECIAL = frozenset("\\.[](){}*+?|^$")


def render_ere(node: Node) -> str | None:
    """Return `node` for ``grep -E``, as ``printf %b`` takes bytes, or ``None`` if no line can match it."""
    rendered = _ERE.render(node)
    if rendered is None:
        return None
    return "".join(char if char.isascii() and char.isalnum() else f"\\0{ord(char):03o}" for char in rendered)


def render_rust(node: Node) -> str | None:
    """Return `node` for ripgrep, in ASCII, or ``None`` if no line can match it."""
    return _RUST.render(node)


@dataclass(frozen=True, kw_only=True)
class _Syntax:
    group: str
    assertions: dict[str, str]
    chars: Callable[[Ranges], str]

    def render(self, node: Node) -> str | None:
        """Return `node` in this syntax; ``None`` if it matches nothing."""
        match node:
            case Chars(ranges):
                return self.chars(ranges) if ranges else None
            case Assertion(kind):
                return self.assertions[kind]
            case Concat(items):
                parts = [self.render(item) for item in items]
                return None if None in parts else "".join(part for part in parts if part is not None)
            case Alt(items):
                return self._either([part for part in map(self.render, items) if part is not None])
            case Repeat(item, low, high):
                return self._times(item, low, high)

    def _either(self, branches: list[str]) -> str | None:
        if not branches:
            return None
        # Not every grep takes an empty branch.
        solid = [branch for branch in branches if branch]
        if not solid:
            return ""
        return f"{self.group}{'|'.join(solid)})" + ("?" if len(solid) < len(branches) else "")

    def _times(self, item: Node, low: int, high: int | None) -> str | None:
        once = self.render(item)
        if once is None:
            return None if low else ""
        if not once or high == 0:
            return ""
        if not isinstance(item, Chars):
            once = f"{self.group}{once})"
        if high is not None:
            return _counted(once, low, exact=True) + _counted(once, high - low, exact=False)
        more = once
        if isinstance(item, Chars) and item.returns:
            # Any number of them may be at a line's end before the carriage return, or pass over one within the line.
            more = self.chars(_with_return(item.ranges))
        return _counted(once, low, exact=True) + more + "*"


def _counted(once: str, count: int, *, exact: bool) -> str:
    """Return `once` repeated `count` times, or up to that."""
    written = ""
    while count:
        step = min(count, _MOST_COUNT)
        if step == 1:
            written += once + ("" if exact else "?")
        else:
            written += f"{once}{{{step}}}" if exact else f"{once}{{0,{step}}}"
        count -= step
    return written


def _with_return(ranges: Ranges) -> Ranges:
    return tuple(sorted((*ranges, (0x0D, 0x0D))))


def _ere_chars(ranges: Ranges) -> str:
    """Return one character out of `ranges` as bytes, each written as the character of that number."""
    single = _bracket([(low, min(high, 0x7F)) for low, high in ranges if low < 0x80])
    branches = [single] if single else []
    for low, high in ranges:
        branches.extend("".join(_bracket([pair]) for pair in pairs) for pairs in _utf8(max(low, 0x80), high))
    # Some bytes are no unit for a repetition, without the parentheses.
    return single if branches == [single] else f"({'|'.join(branches)})"


def _bracket(ranges: list[tuple[int, int]]) -> str:
    """Return a bracket expression. What has a meaning in one ends no range, and stands where it has none."""
    members = {code for low, high in ranges for code in range(low, high + 1)}
    if not members:
        return ""
    if len(members) == 1:
        char = chr(members.pop())
        return f"\\{char}" if char in _SPECIAL else char
    special = [char for char in "][^-" if ord(char) in members]
    body = ""
    for low, high in _runs(sorted(members - set(map(ord, special)))):
        body += chr(low) if low == high else chr(low) + chr(high) if high == low + 1 else f"{chr(low)}-{chr(high)}"
    first = "]" if "]" in special else ""
    rest = "".join(char for char in special if char != "]")
    if not first and not body and rest.startswith("^"):
        rest = "-^"
    return f"[{first}{body}{rest}]"


def _runs(codes: list[int]) -> Iterator[tuple[int, int]]:
    start = previous = None
    for code in codes:
        if start is None or previous is None:
            start = code
        elif code != previous + 1:
            yield start, previous
            start = code
        previous = code
    if start is not None and previous is not None:
        yield start, previous


def _utf8(low: int, high: int) -> Iterator[list[tuple[int, int]]]:
    """Yield the sequences of byte ranges that are the UTF-8 of `low` to `high`."""
    for last in _LAST_BY_LENGTH:
        if low <= min(high, last):
            ends = (chr(code).encode("utf-8", "surrogatepass") for code in (low, min(high, last)))
            yield from _byte_ranges(*ends)
            low = last + 1


def _byte_ranges(low: bytes, high: bytes) -> Iterator[list[tuple[int, int]]]:
    if len(low) == 1:
        yield [(low[0], high[0])]
        return
    if low[0] == high[0]:
        yield from ([(low[0], low[0]), *rest] for rest in _byte_ranges(low[1:], high[1:]))
        return
    least, most = b"\x80" * (len(low) - 1), b"\xbf" * (len(low) - 1)
    first, last = low[0], high[0]
    if low[1:] != least:
        yield from ([(first, first), *rest] for rest in _byte_ranges(low[1:], most))
        first += 1
    if high[1:] != most:
        yield from ([(last, last), *rest] for rest in _byte_ranges(least, high[1:]))
        last -= 1
    if first <= last:
        yield [(first, last), *[(0x80, 0xBF)] * len(least)]


def _rust_chars(ranges: Ranges) -> str:
    written = "".join(rf"\x{{{low:x}}}" + (rf"-\x{{{high:x}}}" if high > low else "") for low, high in ranges)
    return written if len(ranges) == 1 and ranges[0][0] == ranges[0][1] else f"[{written}]"


_ERE = _Syntax(
    group="(",
    assertions={"start": "^", "end": "(\r*$)", "boundary": "\\b", "inside": "\\B"},
    chars=_ere_chars,
)
_RUST = _Syntax(
    group="(?:",
    assertions={"start": "^", "end": "(?:\\r*$)", "boundary": "(?-u:\\b)", "inside": "(?-u:\\B)"},
    chars=_rust_chars,
)
