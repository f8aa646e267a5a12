"""Sets of characters, as ranges of code points, and those that a pattern can name without listing them."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "ASCII_WORD",
    "DIGIT",
    "NEVER",
    "RETURN",
    "SPACE",
    "WORD",
    "Ranges",
    "below",
    "both_cases",
    "complement",
    "merge",
    "without",
]

Ranges = tuple[tuple[int, int], ...]
"""First and last code point of each range."""

_LAST = 0x10FFFF

DIGIT: Ranges = ((0x30, 0x39),)
SPACE: Ranges = (
    (0x09, 0x09),
    (0x0B, 0x0C),
    (0x1C, 0x20),
    (0x85, 0x85),
    (0xA0, 0xA0),
    (0x1680, 0x1680),
    (0x2000, 0x200A),
    (0x2028, 0x2029),
    (0x202F, 0x202F),
    (0x205F, 0x205F),
    (0x3000, 0x3000),
)
ASCII_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
# All but the blocks of signs, punctuation, private use and pictures: exact tables would make a pattern of 20 kB.
WORD: Ranges = (
    *ASCII_WORD,
    (0xAA, 0xAA),
    (0xB2, 0xB3),
    (0xB5, 0xB5),
    (0xB9, 0xBA),
    (0xBC, 0xBE),
    (0xC0, 0xD6),
    (0xD8, 0xF6),
    (0xF8, 0x1FFF),
    (0x2C00, 0x2DFF),
    (0x3005, 0x3007),
    (0x3021, 0xD7FF),
    (0xF900, 0xFDFF),
    (0xFE70, 0xFEFE),
    (0xFF10, 0xFF19),
    (0xFF21, 0xFF3A),
    (0xFF41, 0xFF5A),
    (0xFF66, 0xFFDC),
    (0x10000, 0x1CFFF),
    (0x1E000, 0x1EFFF),
    (0x20000, 0x3FFFF),
)
# A line holds neither a newline nor, for the programs' sake, a NUL; the halves of surrogate pairs are no characters.
NEVER: Ranges = ((0x00, 0x00), (0x0A, 0x0A), (0xD800, 0xDFFF))
RETURN: Ranges = ((0x0D, 0x0D),)
# Beyond these two blocks, characters with two cases are rare.
_CASED_BELOW = 0x2200


def merge(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return `ranges` sorted, with none that touch."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)


def complement(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return every character that is not in `ranges`."""
    gaps, start = [], 0
    for low, high in merge(ranges):
        if start < low:
            gaps.append((start, low - 1))
        start = high + 1
    if start <= _LAST:
        gaps.append((start, _LAST))
    return tuple(gaps)


def without(ranges: Iterable[tuple[int, int]], other: Ranges) -> Ranges:
    """Return what of `ranges` is not in `other`."""
    return complement((*complement(ranges), *other))


def below(ranges: Ranges, last: int) -> Ranges:
    """Return what of `ranges` is not beyond `last`."""
    return tuple((low, min(high, last)) for low, high in ranges if low <= last)


def both_cases(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return `ranges` with the other case of each of their characters."""
    both = list(ranges)
    for low, high in tuple(both):
        for code in range(low, min(high + 1, _CASED_BELOW)):
            character = chr(code)
            both.extend((ord(other),) * 2 for other in (character.lower(), character.upper()) if len(other) == 1)
    return both
