"""Keeps a provider that does not answer from slowing down every session."""

from __future__ import annotations

__all__ = ["Breaker"]

_FAILURES = 3
_FIRST_REST = 15.0
_LONGEST_REST = 60.0
# While one caller tries it again, the others are kept away for so long.
_PROBE = 15.0


class Breaker:
    """Counts a provider's failures to answer; after three in a row it is left alone for a while.

    Then one caller may try it again: if that fails too, it is left alone for twice as long, up to a minute. The
    times are given in, in seconds on any clock that only goes forward.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._rest = _FIRST_REST
        self._until = float("-inf")
        self.last = ""
        """What failed last, for a person to read."""

    @property
    def tripped(self) -> bool:
        """Whether it failed so often that it is left alone, or tried by one caller at a time."""
        return self._failures >= _FAILURES

    def wait(self, now: float) -> float:
        """Return the seconds that it is still left alone; 0 lets the caller try it."""
        if now < self._until:
            return self._until - now
        if self.tripped:
            self._until = now + _PROBE
        return 0.0

    def succeeded(self) -> None:
        """It answered."""
        self._failures, self._rest, self._until = 0, _FIRST_REST, float("-inf")

    def failed(self, reason: str, now: float) -> bool:
        """It did not answer. Return whether it is left alone from now on, and was not before."""
        was_tripped = self.tripped
        self._failures += 1
        self.last = reason
        if self.tripped:
            self._until = now + self._rest
            self._rest = min(self._rest * 2, _LONGEST_REST)
        return self.tripped and not was_tripped
