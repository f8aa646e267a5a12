"""Glob patterns: which part of a tree to list for one, and which entries match.

As `pathlib.Path.glob`: ``*``, ``?`` and ``[...]`` within a name, hidden names too, and ``**`` for any directories. As
doublestar patterns, which the platform asks for, ``{a,b}`` is either, and ``**`` at the end is everything below.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass

from mabridge.tools.result import ToolFailure

__all__ = ["GlobPlan", "plan_glob"]

_MOST_ALTERNATIVES = 64
_MOST_PATTERN = 4_000
_MAGIC = re.compile(r"[*?\[]")
_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")


@dataclass(frozen=True, kw_only=True)
class GlobPlan:
    """What to list for a pattern, and what of it matches.

    Attributes:
        prefix: the directory to begin in, from the search's root; empty for the root itself.
        alternatives: what is matched after the prefix, parts by parts; more than one for ``{a,b}``.
        directories: whether directories alone match, for the pattern ends in a slash.
    """

    prefix: str
    alternatives: tuple[tuple[str, ...], ...]
    directories: bool

    @property
    def min_depth(self) -> int:
        """The fewest levels below `prefix` that a match has."""
        return min(sum(part != "**" for part in parts) for parts in self.alternatives)

    @property
    def max_depth(self) -> int | None:
        """The most levels; ``None`` is no limit."""
        if any("**" in parts for parts in self.alternatives):
            return None
        return max(map(len, self.alternatives))

    @property
    def names(self) -> list[str]:
        """Patterns for find's ``-name``: every match's name fits one, and as few others do as is easily said."""
        return sorted({_roughly(parts[-1]) for parts in self.alternatives})

    def matcher(self) -> Callable[[str], bool]:
        """Return what tells whether a path, from the plan's prefix, matches."""
        matchers = [_Matcher(parts) for parts in self.alternatives]
        return lambda path: any(matcher.matches(path) for matcher in matchers)


class _Matcher:
    """Tells which paths match. Takes time in proportion to path and pattern, whatever they are."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        self._last = len(parts)
        self._any = [part == "**" for part in parts]
        # fnmatch writes expressions that do not backtrack over stars.
        self._names = [re.compile(fnmatch.translate(part)) for part in parts]
        self._reached: dict[str, frozenset[int]] = {"": self._closed({0})}

    def matches(self, path: str) -> bool:
        """Whether `path` matches; the empty path is where the pattern starts."""
        return self._last in self._states(path)

    def _states(self, path: str) -> frozenset[int]:
        """Return how many of the parts `path` may have used up. It is kept, for paths share their directories."""
        known = self._reached.get(path)
        if known is not None:
            return known
        # Without recursion, for a path may have more parts than Python's stack has room.
        names = []
        while path not in self._reached:
            path, _, name = path.rpartition("/")
            names.append(name)
        states = self._reached[path]
        for name in reversed(names):
            path = f"{path}/{name}" if path else name
            states = self._reached[path] = self._closed(self._step(states, name))
        return states

    def _step(self, states: frozenset[int], name: str) -> set[int]:
        after = set()
        for state in states:
            if state < self._last:
                if self._any[state]:
                    after.add(state)
                elif self._names[state].match(name):
                    after.add(state + 1)
        return after

    def _closed(self, states: set[int]) -> frozenset[int]:
        # "**" may stand for no directory at all.
        pending = list(states)
        while pending:
            state = pending.pop()
            if state < self._last and self._any[state] and state + 1 not in states:
                states.add(state + 1)
                pending.append(state + 1)
        return frozenset(states)


def plan_glob(pattern: str) -> GlobPlan:
    """Return what to do for `pattern`.

    Raises:
        ToolFailure: the pattern is empty, absolute, or leads out of the directory it is for.
    """
    if pattern.startswith("/"):
        raise ToolFailure("glob: absolute pattern not permitted; pass a relative pattern (and optionally path)")
    if "\0" in pattern:
        raise ToolFailure("glob: embedded null byte")
    if len(pattern) > _MOST_PATTERN:
        raise ToolFailure(f"glob: the pattern is longer than {_MOST_PATTERN} characters")
    alternatives = []
    for plain in _without_braces(pattern):
        parts = [part for part in plain.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise ToolFailure("glob: '..' is not permitted in the pattern")
        if not parts:
            raise ToolFailure(f"glob: Unacceptable pattern: {pattern!r}")
        alternatives.append(_fewer_stars(parts))
    # What all have in common, up to the first part that is a pattern; a name is left over for find to look for.
    common = 0
    shortest = min(map(len, alternatives))
    while common < shortest - 1 and len({parts[common] for parts in alternatives}) == 1:
        if _MAGIC.search(alternatives[0][common]):
            break
        common += 1
    return GlobPlan(
        prefix="/".join(alternatives[0][:common]),
        alternatives=tuple(tuple(parts[common:]) for parts in alternatives),
        directories=pattern.endswith("/"),
    )


def _roughly(part: str) -> str:
    """Return a pattern that find understands as Python does; find sees bytes, and has brackets of its own."""
    plain, bracket, _ = part.partition("[")
    return re.sub(r"[^A-Za-z0-9._ -]+", "*", plain + bracket)


def _fewer_stars(parts: list[str]) -> list[str]:
    """Return `parts` without a ``**`` after another, which adds nothing."""
    return [part for position, part in enumerate(parts) if part != "**" or parts[position - 1 : position] != ["**"]]


def _without_braces(pattern: str) -> list[str]:
    """Return `pattern` once for each choice in ``{a,b}``. Braces without a comma are a part of a name."""
    done, pending = [], [pattern]
    while pending:
        one = pending.pop()
        found = _BRACES.search(one)
        if found is None:
            done.append(one)
        else:
            pending.extend(one[: found.start()] + choice + one[found.end() :] for choice in found[1].split(","))
        if len(done) + len(pending) > _MOST_ALTERNATIVES:
            raise ToolFailure(f"glob: the pattern has more than {_MOST_ALTERNATIVES} alternatives in braces")
    return list(dict.fromkeys(done))
