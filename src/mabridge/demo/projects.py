"""The small projects that the demo's agents work on: each has one fault, and a test that finds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["PYTHON", "SHELL", "TASKS", "Project"]


@dataclass(frozen=True, kw_only=True)
class Project:
    """One project.

    Attributes:
        name: its directory.
        files: its files' contents, by name.
        test: the command that runs its test.
        source: the file with the fault.
        pattern: a regular expression that finds the faulty place.
        fault: the faulty text.
        fix: what it should be.
    """

    name: str
    files: Mapping[str, str]
    test: str
    source: str
    pattern: str
    fault: str
    fix: str


TASKS = ("Write roman numerals.", "Compute a median.", "Make slugs for titles.")
"""What the user asks for, in the order of the projects."""

_PY_TEST = "python3 -B -m unittest"

PYTHON = (
    Project(
        name="roman",
        files={
            "roman.py": (
                'NUMERALS = {10: "X", 9: "IX", 5: "V", 4: "IIII", 1: "I"}\n\n\n'
                "def roman(number):\n"
                '    text = ""\n'
                "    for value, numeral in NUMERALS.items():\n"
                "        while number >= value:\n"
                "            text, number = text + numeral, number - value\n"
                "    return text\n"
            ),
            "test_roman.py": (
                "import unittest\n\nfrom roman import roman\n\n\n"
                "class Roman(unittest.TestCase):\n"
                "    def test_fourteen(self):\n"
                '        self.assertEqual(roman(14), "XIV")\n'
            ),
        },
        test=_PY_TEST,
        source="roman.py",
        pattern=r"I{4}",
        fault='4: "IIII"',
        fix='4: "IV"',
    ),
    Project(
        name="median",
        files={
            "median.py": (
                "def median(numbers):\n"
                "    ordered = sorted(numbers)\n"
                "    middle = len(ordered) // 2\n"
                "    return ordered[middle]\n"
            ),
            "test_median.py": (
                "import unittest\n\nfrom median import median\n\n\n"
                "class Median(unittest.TestCase):\n"
                "    def test_even(self):\n"
                "        self.assertEqual(median([4, 1, 3, 2]), 2.5)\n"
            ),
        },
        test=_PY_TEST,
        source="median.py",
        pattern=r"return ordered",
        fault="    return ordered[middle]\n",
        fix=(
            "    if len(ordered) % 2:\n"
            "        return ordered[middle]\n"
            "    return (ordered[middle - 1] + ordered[middle]) / 2\n"
        ),
    ),
    Project(
        name="slug",
        files={
            "slug.py": 'import re\n\n\ndef slug(title):\n    return re.sub(r"[^a-z0-9]", "-", title.lower())\n',
            "test_slug.py": (
                "import unittest\n\nfrom slug import slug\n\n\n"
                "class Slug(unittest.TestCase):\n"
                "    def test_punctuation(self):\n"
                '        self.assertEqual(slug("Hands, outside!"), "hands-outside")\n'
            ),
        },
        test=_PY_TEST,
        source="slug.py",
        pattern=r"re\.sub",
        fault='re.sub(r"[^a-z0-9]", "-", title.lower())',
        fix='re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")',
    ),
)
"""For images with python3."""

_SH_TEST = "sh test.sh"


def _sh_test(call: str, wanted: str) -> str:
    return (
        f"got=$({call})\n"
        f'if [ "$got" = "{wanted}" ]; then echo ok; exit; fi\n'
        f'echo "FAILED: got $got, not {wanted}"\n'
        "exit 1\n"
    )


SHELL = (
    Project(
        name="roman",
        files={
            "roman.sh": (
                "number=$1\ntext=\n"
                "for pair in 10:X 9:IX 5:V 4:IIII 1:I; do\n"
                '    while [ "$number" -ge "${pair%%:*}" ]; do\n'
                "        text=$text${pair#*:} number=$((number - ${pair%%:*}))\n"
                "    done\ndone\n"
                'echo "$text"\n'
            ),
            "test.sh": _sh_test("sh roman.sh 14", "XIV"),
        },
        test=_SH_TEST,
        source="roman.sh",
        pattern=r"I{4}",
        fault="4:IIII",
        fix="4:IV",
    ),
    Project(
        name="median",
        files={
            "median.sh": ('set -- $(printf \'%s\\n\' "$@" | sort)\nshift $((($# - 1) / 2))\necho "$1"\n'),
            "test.sh": _sh_test("sh median.sh 10 9 100", "10"),
        },
        test=_SH_TEST,
        source="median.sh",
        pattern=r"\| sort\)",
        fault="| sort)",
        fix="| sort -n)",
    ),
    Project(
        name="slug",
        files={
            "slug.sh": "echo \"$1\" | tr 'A-Z' 'a-z' | sed 's/[^a-z0-9]/-/g'\n",
            "test.sh": _sh_test("sh slug.sh 'Hands, outside!'", "hands-outside"),
        },
        test=_SH_TEST,
        source="slug.sh",
        pattern=r"sed '",
        fault="sed 's/[^a-z0-9]/-/g'",
        fix="sed 's/[^a-z0-9][^a-z0-9]*/-/g; s/-$//'",
    ),
)
"""For any image."""
