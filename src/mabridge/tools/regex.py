r"""Translates the model's regular expressions for the search programs of a sandbox.

The dialect is Python's, read by Python's own parser; `render_ere` writes it for ``grep -E`` and `render_rust` for
ripgrep, so that both find the same lines. It is about lines: the question is whether a line matches, not where, so
greedy and lazy are the same. Neither program backtracks, so no pattern is catastrophic; the size of one is bounded.

What a character class means depends on no locale: ``\d`` is 0-9; ``\w`` is A-Z, a-z, 0-9, _ and the letters beyond
ASCII (in whole blocks, see `charsets.WORD`); ``\s`` is Unicode's white space. ``\b`` goes by ASCII, except beside a
letter beyond ASCII that the pattern spells out. ``$`` also matches before the carriage return of a Windows line end,
and so a carriage return is matched only where the pattern names it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from mabridge.tools.charsets import (
    ASCII_WORD,
    DIGIT,
    NEVER,
    RETURN,
    SPACE,
    WORD,
    Ranges,
    below,
    both_cases,
    complement,
    merge,
    without,
)

__all__ = ["Alt", "Assertion", "Chars", "Concat", "Node", "PatternError", "Repeat", "parse_pattern"]

_MOST_STATES = 10_000
_MOST_PATTERN = 8_000


class PatternError(ValueError):
    """A pattern is not valid, or asks for what the search programs cannot do. Says which."""


@dataclass(frozen=True)
class Chars:
    """One character out of `ranges`; `returns` if the pattern allows a carriage return too, without naming it."""

    ranges: Ranges
    returns: bool = False


@dataclass(frozen=True)
class Concat:
    """All of `items`, one after the other; the empty string if there are none."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Alt:
    """One of `items`; nothing at all if there are none."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """`item`, `low` to `high` times; ``None`` is no limit."""

    item: Node
    low: int
    high: int | None


@dataclass(frozen=True)
class Assertion:
    """``start`` or ``end`` of the line, or ``boundary`` or ``inside`` of an ASCII word."""

    kind: str


Node = Chars | Concat | Alt | Repeat | Assertion


def parse_pattern(pattern: str) -> Node:
    """Return what `pattern` means.

    Raises:
        PatternError: it is no valid pattern, or uses a look-around, a back-reference or the like, or is too large.
    """
    if len(pattern) > _MOST_PATTERN:
        raise PatternError(f"invalid regex: longer than {_MOST_PATTERN} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parsed = parser.parse(pattern)
        node = _Reader(parsed.state.flags).sequence(parsed)
    except (re.error, OverflowError) as exc:
        raise PatternError(f"invalid regex: {exc}") from exc
    except RecursionError as exc:
        raise PatternError("invalid regex: nested too deeply") from exc
    if _states(node) > _MOST_STATES:
        raise PatternError(
            "invalid regex: too large once its repetitions are written out; search for something simpler"
        )
    return node


class _Reader:
    """Turns the parser's tree into ours, under the flags in force."""

    def __init__(self, flags: int) -> None:
        self._flags = flags

    def sequence(self, parsed: Iterable[tuple[Any, Any]]) -> Node:
        items = [self._item(op, argument) for op, argument in parsed]
        return items[0] if len(items) == 1 else Concat(tuple(_mind_boundaries(items)))

    def _item(self, op: object, argument: Any) -> Node:  # noqa: ANN401 - the parser's own types
        match op:
            case sre.LITERAL:
                return self._chars([(argument, argument)])
            case sre.NOT_LITERAL:
                return self._chars([(argument, argument)], negate=True)
            case sre.ANY:
                return self._chars([], negate=True)
            case sre.IN:
                return self._set(argument)
            case sre.BRANCH:
                return Alt(tuple(self.sequence(branch) for branch in argument[1]))
            case sre.SUBPATTERN:
                _, added, removed, inner = argument
                return _Reader((self._flags | added) & ~removed).sequence(inner)
            case sre.MAX_REPEAT | sre.MIN_REPEAT:
                low, high, inner = argument
                return Repeat(self.sequence(inner), int(low), None if high == sre.MAXREPEAT else int(high))
            case sre.AT:
                return Assertion(_POSITIONS[argument])
        raise PatternError(
            f"{_UNSUPPORTED.get(op, 'this kind of pattern')} is not supported; "
            "use a simpler pattern, or a program of your own with bash"
        )

    def _set(self, items: Sequence[tuple[Any, Any]]) -> Chars:
        ranges: list[tuple[int, int]] = []
        negate = returns = False
        for op, argument in items:
            match op:
                case sre.NEGATE:
                    negate = True
                case sre.LITERAL:
                    ranges.append((argument, argument))
                case sre.RANGE:
                    ranges.append(argument)
                case sre.CATEGORY:
                    found, allows = self._category(argument)
                    ranges.extend(found)
                    returns = returns or allows
        return self._chars(ranges, negate=negate, returns=returns)

    def _category(self, category: object) -> tuple[Ranges, bool]:
        r"""Return the characters of a class such as ``\s``, and whether a carriage return is another."""
        ascii_only = bool(self._flags & re.ASCII)
        base, negative = _CATEGORIES[category]
        ranges = {
            "digit": DIGIT,
            "space": below(SPACE, 0x20) if ascii_only else SPACE,
            "word": ASCII_WORD if ascii_only else WORD,
        }[base]
        return (complement((*ranges, *RETURN)) if negative else ranges), (base == "space") is not negative

    def _chars(self, ranges: Iterable[tuple[int, int]], *, negate: bool = False, returns: bool = False) -> Chars:
        if self._flags & re.IGNORECASE:
            ranges = both_cases(ranges)
        found = merge(ranges)
        if negate:
            returns = not returns and not any(low <= 0x0D <= high for low, high in found)
            found = complement((*found, *RETURN))
        return Chars(without(found, NEVER), returns=returns)


_POSITIONS = {
    sre.AT_BEGINNING: "start",
    sre.AT_BEGINNING_STRING: "start",
    sre.AT_END: "end",
    sre.AT_END_STRING: "end",
    sre.AT_BOUNDARY: "boundary",
    sre.AT_NON_BOUNDARY: "inside",
}
_CATEGORIES = {
    sre.CATEGORY_DIGIT: ("digit", False),
    sre.CATEGORY_NOT_DIGIT: ("digit", True),
    sre.CATEGORY_SPACE: ("space", False),
    sre.CATEGORY_NOT_SPACE: ("space", True),
    sre.CATEGORY_WORD: ("word", False),
    sre.CATEGORY_NOT_WORD: ("word", True),
}
_UNSUPPORTED = {
    sre.ASSERT: "look-around such as (?=...) or (?<=...)",
    sre.ASSERT_NOT: "look-around such as (?!...) or (?<!...)",
    sre.FAILURE: "look-around such as (?!)",
    sre.GROUPREF: "a back-reference such as \\1",
    sre.GROUPREF_EXISTS: "a conditional group such as (?(1)...)",
    sre.ATOMIC_GROUP: "an atomic group such as (?>...)",
    sre.POSSESSIVE_REPEAT: "a possessive repetition such as a*+",
}


def _mind_boundaries(items: list[Node]) -> list[Node]:
    r"""Turn ``\b`` round beside a letter beyond ASCII that the pattern spells out: the programs see no word there."""
    turned = {"boundary": Assertion("inside"), "inside": Assertion("boundary")}
    for position, item in enumerate(items):
        if isinstance(item, Assertion) and item.kind in turned:
            beside = [*items[max(position - 1, 0) : position], *items[position + 1 : position + 2]]
            if sum(_is_foreign_letter(node) for node in beside) == 1:
                items[position] = turned[item.kind]
    return items


def _is_foreign_letter(node: Node) -> bool:
    if isinstance(node, Repeat) and node.low > 0:
        node = node.item
    return (
        isinstance(node, Chars) and bool(node.ranges) and node.ranges[0][0] >= 0x80 and not without(node.ranges, WORD)
    )


def _states(node: Node) -> int:
    """Return about how many states an automaton of `node` has, every repetition written out."""
    match node:
        case Chars():
            # Beyond ASCII, a range takes some sequences of bytes.
            return sum(1 if high < 0x80 else 4 for _, high in node.ranges)
        case Concat() | Alt():
            return sum(map(_states, node.items)) + 1
        case Repeat():
            return _states(node.item) * max(node.low, node.high or 1, 1)
    return 1
