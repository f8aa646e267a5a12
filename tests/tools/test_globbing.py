"""Which paths a pattern matches: what `pathlib` says, for patterns and names of all kinds."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mabridge.tools.globbing import plan_glob
from mabridge.tools.result import ToolFailure

NAMES = ["a", "b", "ab", ".h", "a.py", "b.py", "[a]", "é", "a b", "x-y", "A", "]", "!", "\\"]
PARTS = [
    "*",
    "**",
    "a",
    "a*",
    "?",
    "??",
    "[ab]",
    "[!a]",
    "[^a]",
    "*.py",
    ".*",
    "[[]a]",
    "[]]",
    "[!]",
    "[a",
    "*b*",
    "\\",
    "é",
    "[-a]",
    ".",
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for first in NAMES:
        for second in NAMES[:7]:
            (root / first / second).mkdir(parents=True)
            (root / first / second / "a.py").touch()
    return root


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=5),
    last=st.sampled_from([part for part in PARTS if part not in ("**", ".")]),
    slash=st.booleans(),
)
def test_pattern_matches_what_pathlib_matches(tree: Path, parts: list[str], last: str, slash: bool) -> None:
    """A ``**`` at the end is left out: Python 3.11 takes it for directories alone, and 3.13 does not."""
    pattern = "/".join([*parts, last]) + ("/" if slash else "")
    expected = {str(path.relative_to(tree)) for path in tree.glob(pattern)}
    assert found(tree, pattern) == expected


def found(tree: Path, pattern: str) -> set[str]:
    """Do what the tool does: list within the plan's bounds, and match."""
    plan = plan_glob(pattern)
    matches = plan.matcher()
    start = tree / plan.prefix
    listed = set()
    for directory, directories, files in os.walk(start):
        for name in [*directories, *files]:
            path = Path(directory, name)
            below = str(path.relative_to(start))
            depth = below.count("/") + 1
            if depth < plan.min_depth or (plan.max_depth is not None and depth > plan.max_depth):
                continue
            if matches(below) and (path.is_dir() or not plan.directories):
                listed.add(str(path.relative_to(tree)))
    return listed


def test_braces_are_alternatives() -> None:
    plan = plan_glob("src/{a,b}/*.{ts,tsx}")
    assert plan.prefix == "src"
    assert sorted(map("/".join, plan.alternatives)) == ["a/*.ts", "a/*.tsx", "b/*.ts", "b/*.tsx"]
    assert plan.names == ["*.ts", "*.tsx"]
    assert plan_glob("{x}").alternatives == (("{x}",),)


def test_two_stars_at_the_end_match_everything_below() -> None:
    matches = plan_glob("**").matcher()
    assert all(map(matches, ["", "a", "a/b", ".h/c"]))


def test_matching_takes_no_exponential_time() -> None:
    matches = plan_glob("/".join(["**", "a*a*a*a*a*a*a*a*b"] * 20)).matcher()
    path = "/".join(["a" * 200] * 18)
    began = time.monotonic()
    assert not any(matches(f"{path}/{number}") for number in range(1000))
    assert time.monotonic() - began < 5


def test_path_of_very_many_parts_is_matched() -> None:
    assert plan_glob("**/b").matcher()("a/" * 5000 + "b")


@given(pattern=st.text(max_size=30))
def test_any_pattern_is_planned_or_refused_in_words(pattern: str) -> None:
    try:
        plan = plan_glob(pattern)
    except ToolFailure:
        return
    assert ".." not in plan.prefix.split("/")
    assert not plan.prefix.startswith("/")
    plan.matcher()("some/path")
