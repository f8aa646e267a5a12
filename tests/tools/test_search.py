"""`glob` and `grep`, in every place: one behaviour, whichever programs there are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mabridge.sandbox import Sandbox
from mabridge.tools import ToolLimits
from tests.tools.conftest import OtherPrograms, Place
from tests.tools.test_files import ODD_NAMES

pytestmark = pytest.mark.anyio


async def touch_in_order(place: Place, *names: str) -> None:
    """Make files, each one newer than the last."""
    for second, name in enumerate(names):
        await place.put(name, "x")
        await place.sh(f'touch -d "2026-01-01 00:00:{second:02}" "./$1"', name)


async def test_glob_lists_newest_first(place: Place) -> None:
    await touch_in_order(place, "b.py", "a.py", "sub/c.py", "d.txt")
    assert await place.said("glob", pattern="**/*.py") == "WD/sub/c.py\nWD/a.py\nWD/b.py"
    assert await place.said("glob", pattern="*.py", path="sub") == "WD/sub/c.py"
    assert await place.said("glob", pattern="*.none") == "no matches"


async def test_glob_orders_within_one_second(place: Place) -> None:
    await place.put("old", "x")
    await place.put("new", "x")
    touched = await place.sh(
        'touch -d "2026-01-01 00:00:00.250" old && touch -d "2026-01-01 00:00:00.500" new && echo yes; :'
    )
    if not touched:
        pytest.skip("its touch knows no fractions of a second")
    assert await place.said("glob", pattern="*") == "WD/new\nWD/old"


async def test_glob_takes_any_name(place: Place) -> None:
    for name in ODD_NAMES:
        await place.put(f"d/{name}", "x")
    listed = await place.said("glob", pattern="d/**/*")
    assert sorted(listed) == sorted("\n".join(f"WD/d/{name}" for name in [*ODD_NAMES, "-dir"]))


async def test_glob_keeps_the_newline_at_the_end_of_a_name(place: Place) -> None:
    await place.put("a\n", "x")
    assert await place.said("glob", pattern="*") == "WD/a\n"


async def test_glob_patterns(place: Place) -> None:
    for name in ["a/b/c.ts", "a/d.tsx", "a/.hidden/e.ts", "a/f.js", "a/{g}.ts", "[x].ts"]:
        await place.put(name, "x")

    async def found(pattern: str) -> set[str]:
        return {line.removeprefix("WD/") for line in (await place.said("glob", pattern=pattern)).split("\n")}

    assert await found("**/*.{ts,tsx}") == {"a/b/c.ts", "a/d.tsx", "a/.hidden/e.ts", "a/{g}.ts", "[x].ts"}
    assert await found("a/**") == {
        "a",
        "a/b",
        "a/b/c.ts",
        "a/d.tsx",
        "a/.hidden",
        "a/.hidden/e.ts",
        "a/f.js",
        "a/{g}.ts",
    }
    assert await found("a/*/") == {"a/b", "a/.hidden"}
    assert await found("a/[!d].*") == {"a/f.js"}
    assert await found("[[]x].ts") == {"[x].ts"}
    assert await found("a/{g}.ts") == {"a/{g}.ts"}
    assert await found("a/?.js") == {"a/f.js"}
    assert await found("./a//f.js") == {"a/f.js"}
    assert await found("{a/b,a/none}/*") == {"a/b/c.ts"}


@pytest.mark.parametrize(
    ("pattern", "error"),
    [
        ("/etc/*", "glob: absolute pattern not permitted; pass a relative pattern (and optionally path)"),
        ("../*", "glob: '..' is not permitted in the pattern"),
        ("a/{b,..}/*", "glob: '..' is not permitted in the pattern"),
        ("", "glob: Unacceptable pattern: ''"),
        (".", "glob: Unacceptable pattern: '.'"),
        ("{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}", "glob: the pattern has more than 64 alternatives in braces"),
    ],
)
async def test_glob_refuses(place: Place, pattern: str, error: str) -> None:
    assert await place.refused("glob", pattern=pattern) == error


async def test_glob_lists_links_that_stay_inside(place: Place) -> None:
    await touch_in_order(place, "real/file", "young")
    await place.sh(
        "ln -s real/file in; ln -s young in2; ln -s /etc/hostname out; ln -s nowhere dangling; ln -s /no/where lost;"
        "ln -s loop loop; ln -s /etc tree; ln -s real way"
    )
    assert await place.said("glob", pattern="[ilotd]*") == "WD/in2\nWD/in\nWD/dangling"
    assert await place.said("glob", pattern="tree/*") == "no matches"
    assert await place.said("glob", pattern="way/*") == "WD/way/file"
    assert sorted((await place.said("glob", pattern="*/")).split("\n")) == ["WD/real", "WD/way"]


async def test_glob_says_when_there_is_more(place: Place) -> None:
    place = Place(place.sandbox, ToolLimits(glob_results=2))
    await touch_in_order(place, "a", "b", "c")
    assert await place.said("glob", pattern="*") == (
        "WD/c\nWD/b\n[the newest 2 of 3 matches; use a narrower pattern for others]"
    )
    place = Place(place.sandbox, ToolLimits(glob_entries=2))
    assert "[not the whole tree was looked at" in await place.said("glob", pattern="*")


async def test_search_of_what_is_not_there_says_so(place: Place) -> None:
    assert await place.refused("glob", pattern="*", path="none") == "glob: none: no such file or directory"
    assert await place.refused("grep", pattern="x", path="none") == "grep: none: no such file or directory"


async def test_grep_shows_path_line_and_text_in_order(place: Place) -> None:
    await place.put("b.txt", "one\ntwo foo\r\n foo")
    await place.put("a/c.txt", "foo:1\n")
    await place.put("a.txt", "foo")
    assert await place.said("grep", pattern="foo") == (
        "WD/a.txt:1:foo\nWD/a/c.txt:1:foo:1\nWD/b.txt:2:two foo\nWD/b.txt:3: foo"
    )
    assert await place.said("grep", pattern="foo$", path="b.txt") == "WD/b.txt:2:two foo\nWD/b.txt:3: foo"
    assert await place.said("grep", pattern="foo", path="a") == "WD/a/c.txt:1:foo:1"
    assert await place.said("grep", pattern="bar") == "no matches"


async def test_grep_takes_any_name(place: Place) -> None:
    names = [name for name in ODD_NAMES if name != "-dir/-file"]
    for name in names:
        await place.put(f"d/{name}", "foo\n")
    found = await place.said("grep", pattern="fo+", path="d")
    assert sorted(found) == sorted("\n".join(f"WD/d/{name}:1:foo" for name in names))


async def test_grep_leaves_out_what_is_no_source(place: Place) -> None:
    for name in [".git/a", "x/node_modules/a", ".hidden/a", "ignored", "sub/.git"]:
        await place.put(name, "foo\n")
    await place.put(".gitignore", "ignored\n")
    await place.put("binary", b"\0foo\n")
    await place.put("late-binary", b"x" * 511 + b"\n\0\nfoo\n")
    await place.put("long", "foo" + "x" * 2000 + "\nfoo here\n")
    await place.put("latin", b"foo \xe9t\xe9\n")
    await place.put("utf16", "foo\n".encode("utf-16"))
    await place.sh("ln -s ignored link; ln -s .hidden dirlink; mkfifo fifo")
    found = await place.said("grep", pattern="foo")
    assert found.split("\n") == [
        "WD/.hidden/a:1:foo",
        "WD/ignored:1:foo",
        "WD/late-binary:3:foo",
        "WD/latin:1:foo \ufffdt\ufffd",
        "WD/long:2:foo here",
        "WD/sub/.git:1:foo",
    ]
    assert await place.said("grep", pattern="foo", path="binary") == "no matches"
    assert await place.said("grep", pattern="foo", path=".git") == "WD/.git/a:1:foo"
    assert await place.said("grep", pattern="foo", path="link") == "WD/ignored:1:foo"
    assert await place.refused("grep", pattern="foo", path="fifo") == "grep: fifo: not a regular file"


@pytest.mark.parametrize(
    ("pattern", "error"),
    [
        ("fo(", "grep: invalid regex: missing ), unterminated subpattern at position 2"),
        ("[a", "grep: invalid regex: unterminated character set at position 0"),
        ("*a", "grep: invalid regex: nothing to repeat at position 0"),
        ("a(?=b)", "grep: look-around such as (?=...) or (?<=...) is not supported"),
        (r"(a)\1", r"grep: a back-reference such as \1 is not supported"),
        ("(" * 2000 + ")" * 2000, "grep: invalid regex: nested too deeply"),
        ("((a{1,500}){1,500}){1,500}", "grep: invalid regex: too large"),
        ("a{1,99999999999}", "grep: invalid regex: the repetition number is too large"),
        ("x\ud800", "grep: pattern is not valid Unicode"),
    ],
)
async def test_grep_refuses(place: Place, pattern: str, error: str) -> None:
    await place.put("a", "aaa")
    assert (await place.refused("grep", pattern=pattern)).startswith(error)


async def test_grep_is_cut_where_a_result_ends(place: Place) -> None:
    await place.put("many", "".join(f"foo {number}\n" for number in range(50_000)))
    result = await place.call("grep", pattern="foo")
    assert len(result.content[0]["text"]) < 100_000
    *lines, last = place.text(result).split("\n")
    assert last == "[output truncated at 99000 characters; narrow the path or the pattern]"
    assert lines == [f"WD/many:{number + 1}:foo {number}" for number in range(len(lines))]
    assert len(lines) > 500


async def test_search_program_that_fails_is_no_search_without_matches(local_sandbox: Sandbox, tmp_path: Path) -> None:
    for name in ("readlink", "sort", "head"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    place = Place(OtherPrograms(local_sandbox, ["/bin/sh"], tmp_path), ToolLimits())
    assert "this sandbox has no `grep` program" in await place.refused("grep", pattern="x")
    (tmp_path / "grep").write_text("#!/bin/sh\necho 'grep: Out of memory' >&2; exit 2")
    (tmp_path / "grep").chmod(0o755)
    assert await place.refused("grep", pattern="x") == "grep: .: out of memory"


async def test_costly_pattern_is_stopped_in_the_sandbox(place: Place) -> None:
    """What takes a backtracking search for ever is over at once, or by the time-out."""
    place = Place(place.sandbox, ToolLimits(search_timeout=5))
    await place.put("a", "a" * 1900 + "b\n")
    result = await place.call("grep", pattern="^(a|a|aa)+$")
    assert place.text(result) in ("no matches", "grep: timed out after 5s; narrow the path or simplify the pattern")


async def test_search_that_takes_too_long_keeps_what_it_found(place: Place) -> None:
    await place.put("a", "foo\n")

    class Slow(type(place.sandbox)):  # type: ignore[misc]
        """Its search never ends after what it has found."""

        def __init__(self) -> None:
            self.__dict__.update(place.sandbox.__dict__)

        async def exec(self, argv: list[str], **options: object) -> object:
            argv = list(argv)
            argv[2] += "\nsleep 60\n"
            return await place.sandbox.exec(argv, **options)

    slow = Place(Slow(), ToolLimits(search_timeout=1.5))
    assert await slow.said("grep", pattern="foo") == (
        "WD/a:1:foo\n[the search was stopped after 1.5s: there may be more; narrow the path or the pattern]"
    )
    assert await slow.refused("grep", pattern="bar") == (
        "grep: timed out after 1.5s; narrow the path or simplify the pattern"
    )
    assert (await slow.said("glob", pattern="*")).startswith("WD/a\n[not the whole tree was looked at")
